"""Weights on disk: what is saved comes back, what is damaged is refused, and what all commands
share."""
import math
import os
import shutil

import pytest
import torch
import torch.nn as nn

import checkpoints
from checkpoints import (PARTS, Parser, check_out, find_device, load_part, load_parts, read_torch,
                         run_command, save_part, say, write_torch)
from conftest import same_bits

ALL_PARTS = pytest.mark.parametrize("part", PARTS)


# ---- Files ---------------------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "new folder" / "x.pt"
    write_torch(path, {"a": 1})
    with pytest.raises(Exception):
        write_torch(path, {"a": lambda: None})                             # can't be pickled
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
            write_torch(path, {"a": 2})
    assert read_torch(path) == {"a": 1} and list(path.parent.iterdir()) == [path]


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    order = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *a, c=call, real=real: order.append(c) or real(*a))
    write_torch(tmp_path / "x.pt", {"a": 1})
    assert order == ["fsync", "replace"]


# ---- Parts ---------------------------------------------------------------------------------------

@ALL_PARTS
def test_a_part_is_the_same_bits_after_saving_and_loading(tiny_weights, tmp_path, part):
    model = load_part(tiny_weights / f"{part}.pt")
    save_part(tmp_path / f"{part}.pt", part, model, model.trained)
    again = load_part(tmp_path / f"{part}.pt")
    assert type(again) is PARTS[part][0] and again.config == model.config
    assert same_bits(again.state_dict(), model.state_dict())
    assert (again.clip_id, again.trained) == (model.clip_id, model.trained)
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@ALL_PARTS
def test_half_precision_is_half_the_bytes_and_nearly_the_same(tiny_weights, tmp_path, part):
    model = load_part(tiny_weights / f"{part}.pt")
    save_part(tmp_path / f"{part}.pt", part, model, model.trained, half=True)
    again = load_part(tmp_path / f"{part}.pt")
    for name, value in again.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-3, atol=1e-6), name
    weights = read_torch(tmp_path / f"{part}.pt")["weights"].values()
    assert {value.dtype for value in weights} == {torch.float16}
    assert again.clip_id == model.clip_id                                  # it is still that CLIP's


def test_clip_carries_its_tokenizer(tiny_weights, tmp_path):
    clip = load_part(tiny_weights / "clip.pt")
    save_part(tmp_path / "clip.pt", "clip", clip, clip.trained)
    assert load_part(tmp_path / "clip.pt").tokenizer.state() == clip.tokenizer.state()


def weight(change):
    """Change the first weight of a checkpoint."""
    def spoil(checkpoint):
        name = next(iter(checkpoint["weights"]))
        checkpoint["weights"][name] = change(checkpoint["weights"][name])
    return spoil


def config(**values):
    return lambda checkpoint: checkpoint["config"].update(values)


DAMAGE = {
    "a weight is missing": lambda c: c["weights"].popitem(),
    "a weight is too many": lambda c: c["weights"].update(extra=torch.zeros(1)),
    "a weight has another shape": weight(lambda w: torch.zeros(3, 3)),
    "a weight is not a number": weight(lambda w: torch.full_like(w, math.nan)),
    "a weight is infinite": weight(lambda w: torch.full_like(w, math.inf)),
    "a weight is complex": weight(lambda w: w + 0j),
    "a weight is a word": weight(lambda w: "heavy"),
    "there are no weights": lambda c: c.pop("weights"),
    "the weights are a list": lambda c: c.update(weights=[1]),
    "the config is a list": lambda c: c.update(config=[1]),
    "there is no config": lambda c: c.pop("config"),
    "a size is a word": config(dim="large"), "a size is negative": config(width=-32),
    "a size is enormous": config(width=10**9),
    "a size is missing": lambda c: c["config"].pop("dim"),
    "a size is not the weights'": config(width=32), "channels are a number": config(channels=3),
    "no CLIP is named": lambda c: c.pop("clip_id"), "its CLIP is a number": lambda c: c.update(
        clip_id=7),
    "no data set is named": lambda c: c["trained"].pop("data"),
    "the training is a number": lambda c: c.update(trained=7),
    "the training is a tensor": lambda c: c.update(trained=torch.zeros(2)),
    "the format is another": lambda c: c.update(format=999),
    "the format is missing": lambda c: c.pop("format"),
    "the format is a tensor": lambda c: c.update(format=torch.zeros(2)),
    "the part is a list": lambda c: c.update(part=["decoder"]),
    "the part is another": lambda c: c.update(part="prior"),
    "the part is unknown": lambda c: c.update(part="gan")}


def assert_refused(path):
    with pytest.raises(ValueError) as error:
        load_part(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value), error


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_is_refused_in_one_line_that_names_it_if(tiny_weights, tmp_path, spoil):
    checkpoint = read_torch(tiny_weights / "decoder.pt")
    write_torch(tmp_path / "decoder.pt", checkpoint)
    load_part(tmp_path / "decoder.pt")                                     # control
    spoil(checkpoint)
    write_torch(tmp_path / "decoder.pt", checkpoint)
    assert_refused(tmp_path / "decoder.pt")


@pytest.mark.parametrize("spoil", [
    lambda t: t["merges"].pop(), lambda t: t["merges"].append([9, 9]), lambda t: t.pop("words"),
    lambda t: t.update(context=8), lambda t: t.update(words=3), lambda t: t.update(merges="abc")])
def test_a_tokenizer_that_is_not_the_weights_is_refused(tiny_weights, tmp_path, spoil):
    checkpoint = read_torch(tiny_weights / "clip.pt")
    spoil(checkpoint["tokenizer"])
    write_torch(tmp_path / "clip.pt", checkpoint)
    assert_refused(tmp_path / "clip.pt")


class Surprise:
    """A pickle that runs code when it is opened."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the code was run')",)


@pytest.mark.parametrize("content", [None, b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100),
                                     {"part": Surprise()}, [1, 2], nn.Linear(1, 1)],
                         ids=["cut", "empty", "text", "picture", "code", "list", "module"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_that_names_it(tiny_weights, tmp_path,
                                                                         content):
    path, good = tmp_path / "decoder.pt", (tiny_weights / "decoder.pt").read_bytes()
    content = good[:len(good) // 2] if content is None else content
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert_refused(path)


# ---- Folders of weights --------------------------------------------------------------------------

@pytest.fixture
def shipped(tiny_weights, tmp_path, monkeypatch):
    """Shipped weights of every part, and an empty run folder beside them."""
    shutil.copytree(tiny_weights, tmp_path / "weights" / "shapes")
    monkeypatch.setattr(checkpoints, "SHIPPED", tmp_path / "weights")
    (tmp_path / "run").mkdir()
    return tmp_path / "weights" / "shapes"


def copy_of(source, target, part, **changes):
    write_torch(target / f"{part}.pt", {**read_torch(source / f"{part}.pt"), **changes})


def test_what_a_folder_lacks_is_taken_from_the_shipped_weights_and_said_so(shipped, tmp_path,
                                                                         capsys):
    copy_of(shipped, tmp_path / "run", "prior", trained={"data": "shapes", "seed": 5})
    parts = load_parts(tmp_path / "run")
    assert parts["prior"].trained["seed"] == 5 and parts.keys() == PARTS.keys()
    out, err = capsys.readouterr()
    assert out == "" and sorted(line.split(":")[0] for line in err.splitlines()) == [
        "ar_prior", "clip", "decoder", "upsampler"]


def test_shipped_parts_of_another_clip_are_not_taken(shipped, tmp_path, capsys):
    copy_of(shipped, tmp_path / "run", "clip", clip_id="new")
    assert load_parts(tmp_path / "run").keys() == {"clip", "upsampler"}   # which needs no CLIP
    assert "decoder" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["prior", "ar_prior", "decoder"])
def test_a_part_of_another_clip_is_refused_with_both_names(shipped, part):
    copy_of(shipped, shipped, part, clip_id="other")
    with pytest.raises(ValueError, match=f"{part}.pt: belongs to another CLIP.*other.*tiny"):
        load_parts(shipped)


def test_a_decoder_of_another_size_than_its_clip_s_pictures_is_refused(shipped):
    checkpoint = read_torch(shipped / "decoder.pt")
    copy_of(shipped, shipped, "decoder", config={**checkpoint["config"], "image_size": 64})
    with pytest.raises(ValueError, match="64.*32"):
        load_parts(shipped)


def test_a_folder_without_weights_or_clip_says_how_to_make_them(shipped, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path / "run"):
        with pytest.raises(FileNotFoundError, match=f"{folder.name}.*train.py"):
            load_parts(folder)
    shutil.copy(shipped / "prior.pt", tmp_path / "run")
    (shipped / "clip.pt").unlink()
    with pytest.raises(FileNotFoundError, match="--stage clip"):
        load_parts(tmp_path / "run")


# ---- Commands ------------------------------------------------------------------------------------

def raising(error):
    def command(argv):
        raise error
    return command


@pytest.mark.parametrize("error, status, line", [
    (ValueError("--n 0:\nchoose more"), 2, "x.py: --n 0: choose more\n"),
    (OSError("no\x1b[2Jsuch \udcff file"), 2, "x.py: no\\x1b[2Jsuch \\udcff file\n"),
    (MemoryError(), 2, "x.py: out of memory; ask for less at once, see --help\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2,
     "x.py: out of memory; ask for less at once, see --help\n"),
    (KeyboardInterrupt(), 130, "")])
def test_a_command_ends_in_a_status_and_at_most_one_printable_line(capsys, error, status, line):
    assert run_command("x.py", raising(error)) == status
    assert capsys.readouterr() == ("", line)


def test_a_fault_of_the_code_is_not_hidden_and_a_command_s_own_status_is_kept():
    with pytest.raises(RuntimeError, match="shapes"):
        run_command("x.py", raising(RuntimeError("shapes do not fit")))
    assert run_command("x.py", lambda argv: argv, 130) == 130
    assert run_command("x.py", lambda argv: None) == 0


@pytest.mark.parametrize("stream, encoding, command, content", [
    ("stderr", "ascii", lambda argv: say("θ = 0.5, ein Würfel"), b"\\u03b8 = 0.5, ein W\\xfcrfel\n"),
    ("stdout", "cp1252", lambda argv: print("θ ü"), b"\\u03b8 \xfc\n"),
    ("stdout", "utf-8", lambda argv: print(os.fsdecode(b"caf\xe9/0.png")), b"caf\xe9/0.png\n")])
def test_no_character_is_too_much_for_a_console_and_a_path_stays_as_it_is(
        monkeypatch, tmp_path, stream, encoding, command, content):
    with open(tmp_path / "console", "w", encoding=encoding) as console, monkeypatch.context() as m:
        m.setattr(f"sys.{stream}", console)
        assert run_command("x.py", command) == 0
    assert (tmp_path / "console").read_bytes() == content


def test_flags_are_not_guessed_and_faults_are_raised():
    parser = Parser(prog="x.py")
    parser.add_argument("--steps", type=int)
    assert parser.parse_args(["--steps", "3"]).steps == 3
    for argv in (["--step", "3"], ["--steps", "three"]):
        with pytest.raises(ValueError, match="--step.*; see --help"):
            parser.parse_args(argv)


def test_a_device_that_is_not_there_and_a_folder_that_can_t_be_written_are_named(tmp_path):
    assert find_device("cpu") == torch.device("cpu")
    for name in ("abacus", "meta", ""):
        with pytest.raises(ValueError, match=f"--device {name}: .*--device cpu"):
            find_device(name)
    (tmp_path / "file").touch()
    check_out(tmp_path / "new" / "folder")
    with pytest.raises(OSError, match="--out .*file/below: "):
        check_out(tmp_path / "file" / "below")
    assert os.listdir(tmp_path) == ["file"]                                # it makes nothing
