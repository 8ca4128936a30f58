"""Weights on disk: what is saved comes back, what is damaged or of another CLIP is refused. And
what all commands share.
"""
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

import checkpoints
from checkpoints import (ALL_PARTS, PARTS, SHIPPED, check_clip, load_part, load_parts, read_torch,
                         run_command, save_part, say, write_torch)
from clip_tiny import CLIP, CLIPConfig
from conftest import Surprise, raising, same_bits


# ---- Files ---------------------------------------------------------------------------------------

def test_a_file_has_its_name_once_it_is_on_the_disk_and_a_failed_write_leaves_the_old_one(
        tmp_path, monkeypatch):
    path, order = tmp_path / "new folder" / "x.pt", []
    with monkeypatch.context() as patch:
        for call in ("fsync", "replace"):
            real = getattr(os, call)
            patch.setattr(os, call, lambda *a, c=call, real=real: order.append(c) or real(*a))
        write_torch(path, {"a": 1})
    assert order == ["fsync", "replace"]
    with pytest.raises(Exception):
        write_torch(path, {"a": lambda: None})                             # can't be pickled
    for call in order:
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(os, call, raising(OSError(28, "disk full")))
            write_torch(path, {"a": 2})
    assert read_torch(path) == {"a": 1} and list(path.parent.iterdir()) == [path]
    with pytest.raises(OSError, match="new folder: .*train.py"):
        read_torch(path.parent)


# ---- Parts ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("part", PARTS)
def test_a_part_comes_back_bit_by_bit_or_in_half_precision_nearly_so(tiny_weights, tmp_path, part):
    model, path = load_part(tiny_weights / f"{part}.pt"), tmp_path / f"{part}.pt"
    for half in (False, True):
        save_part(path, part, model, model.trained, half)
        again, weights = load_part(path), read_torch(path)["weights"]
        assert type(again) is PARTS[part][0] and again.config == model.config
        assert (again.clip_id, again.trained) == (model.clip_id, model.trained)
        assert not again.training and not any(p.requires_grad for p in again.parameters())
        assert not any(isinstance(m, PARTS["clip"][0]) for m in [*again.modules()][1:])
        assert part != "clip" or again.tokenizer.state() == model.tokenizer.state()
        assert {v.dtype for v in weights.values()} == {torch.float16 if half else torch.float32}
        for name, value in again.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.allclose(value, model.state_dict()[name], rtol=1e-3, atol=1e-6), name
        assert half or same_bits(again.state_dict(), model.state_dict())


def first(change):
    """Change the first of the weights."""
    def spoil(c):
        name, tensor = next(iter(c["weights"].items()))
        c["weights"][name] = change(tensor)
    return spoil


SPOILT = {
    "decoder": [
        dict.clear, lambda c: c["weights"].popitem(),
        lambda c: c["weights"].update(extra=torch.zeros(1)), first(lambda w: torch.zeros(3, 3)),
        first(lambda w: w * math.nan), first(lambda w: w + math.inf), first(lambda w: w + 0j),
        first(lambda w: "heavy"), lambda c: c.pop("weights"), lambda c: c.update(weights=[1]),
        lambda c: c.pop("config"), lambda c: c.update(config=[1]),
        lambda c: c["config"].update(dim="large"), lambda c: c["config"].update(width=10 ** 9),
        lambda c: c["config"].update(width=32), lambda c: c["config"].update(channels=3),
        lambda c: c.pop("clip_id"), lambda c: c.update(clip_id=7), lambda c: c["trained"].clear(),
        lambda c: c.update(trained=torch.zeros(2)), lambda c: c.update(format=999),
        lambda c: c.pop("format"), lambda c: c.update(format=torch.zeros(2)),
        lambda c: c.update(part=["decoder"]), lambda c: c.update(part="prior")],
    "clip": [
        lambda c: c["tokenizer"]["merges"].pop(), lambda c: c["tokenizer"].update(merges="abc"),
        lambda c: c["tokenizer"]["merges"].append([9, 9]), lambda c: c["tokenizer"].pop("words"),
        lambda c: c["tokenizer"].update(context=8), lambda c: c["tokenizer"].update(words=3)]}


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_part_is_refused_in_one_line_and_no_code_in_it_runs(
        tiny_weights, tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    path, whole = tmp_path / f"{part}.pt", (tiny_weights / f"{part}.pt").read_bytes()
    trees = [[1, 2], {"part": Surprise()}, torch.nn.Linear(1, 1)]
    middle = len(whole) // 2                             # of a weight: a single bit of it is wrong
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
    for spoil in SPOILT.get(part, []):
        path.write_bytes(whole)
        spoil(tree := read_torch(path))
        trees.append(tree)
    png = b"\x89PNG\r\n\x1a\n" + bytes(100)
    for content in (b"", b"hello", png, whole[:5000], flipped, *trees):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(ValueError, match=f"^.*{part}.pt: .*$"):
            load_part(path)
    assert os.listdir() == [path.name]


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


@pytest.mark.parametrize("data, lacks", [("shapes", set()),
                                         ("cifar10", {"upsampler", "text_decoder"})])
def test_the_weights_in_the_repository_are_whole_and_belong_to_one_clip(data, lacks):
    clip = load_part(SHIPPED / data / "clip.pt")
    for part in ALL_PARTS.keys() - lacks:
        model = load_part(SHIPPED / data / f"{part}.pt")
        check_clip(model, clip, part)
        assert model.trained["data"] == data and model.trained["steps"] > 1000


def test_what_a_folder_lacks_is_taken_from_the_shipped_parts_of_its_clip_and_said_so(
        shipped, tmp_path, capsys):
    copy_of(shipped, tmp_path / "run", "prior", trained={"data": "shapes", "seed": 5})
    parts = load_parts(tmp_path / "run")
    assert parts["prior"].trained["seed"] == 5 and parts.keys() == PARTS.keys()
    out, err = capsys.readouterr()
    assert out == "" and sorted(line.split(":")[0] for line in err.splitlines()) == [
        "ar_prior", "clip", "decoder", "upsampler"]
    (tmp_path / "run" / "prior.pt").unlink()
    write_torch(tmp_path / "run" / "text_decoder.pt",
                {**read_torch(shipped / "decoder.pt"), "part": "text_decoder"})
    assert load_parts(tmp_path / "run").keys() == PARTS.keys()            # evaluate.py compares it
    capsys.readouterr()
    copy_of(shipped, tmp_path / "run", "clip", clip_id="new")
    assert load_parts(tmp_path / "run").keys() == {"clip", "upsampler"}   # which needs no CLIP
    assert "decoder" not in capsys.readouterr().err
    config = {**read_torch(shipped / "clip.pt")["config"], "image_size": 64}
    weights = CLIP(CLIPConfig(**config)).state_dict()
    copy_of(shipped, tmp_path / "run", "clip", clip_id="new", config=config, weights=weights)
    assert load_parts(tmp_path / "run").keys() == {"clip"}     # that upsampler enlarges 32 pixels
    (tmp_path / "run" / "clip.pt").unlink()
    copy_of(shipped, tmp_path / "run", "prior", clip_id="new")           # not the shipped CLIP's
    with pytest.raises(OSError, match="clip.pt is missing; copy"):
        load_parts(tmp_path / "run")


@pytest.mark.parametrize("part, changes, message", [
    *((part, dict(clip_id="other"), f"{part}.pt: belongs to another CLIP.*other.*tiny")
      for part in ("prior", "ar_prior", "decoder")),
    ("prior", dict(clip_id=None), "prior.pt: belongs to another CLIP"),
    *((part, dict(image_size=64), f"{part}.pt: does not fit .*64, not 32")
      for part in ("decoder", "upsampler")),
    ("decoder", dict(dim=8), "decoder.pt: does not fit .*dim 8")])
def test_a_part_of_another_clip_or_of_another_size_than_its_clips_is_refused(
        shipped, part, changes, message):
    if "clip_id" not in changes:
        config = {**read_torch(shipped / f"{part}.pt")["config"], **changes}
        kind, config_kind = ALL_PARTS[part]
        weights = kind(config_kind(**config)).state_dict()
        changes = dict(config=config, weights=weights)
    copy_of(shipped, shipped, part, **changes)
    with pytest.raises(ValueError, match=message):
        load_parts(shipped)


def test_a_device_that_is_not_there_is_refused_in_one_line(shipped):
    for load, path in (load_part, shipped / "clip.pt"), (load_parts, shipped):
        with pytest.raises(ValueError, match="^--device nowhere: not to be had here.*cpu$"):
            load(path, "nowhere")


# ---- Commands ------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, status, line", [
    (ValueError("--n 0:\nchoose more"), 2, "x.py: --n 0: choose more\n"),
    (OSError("no\x1b[2Jsuch \udcff file"), 2, "x.py: no\\x1b[2Jsuch \\udcff file\n"),
    (MemoryError(), 2, "x.py: out of memory; ask for less at once, see --help\n"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2,
     "x.py: out of memory; ask for less at once, see --help\n"),
    (KeyboardInterrupt(), 130, "")])
def test_a_command_ends_in_a_status_and_a_printable_line_unless_its_code_is_at_fault(
        capsys, error, status, line):
    assert run_command("x.py", raising(error)) == status and capsys.readouterr() == ("", line)
    assert run_command("x.py", lambda argv: argv, status) == status      # its own is kept
    with pytest.raises(RuntimeError, match="shapes"):
        run_command("x.py", raising(RuntimeError("shapes do not fit")))


def test_a_command_ends_in_its_status_when_nobody_reads_what_it_says(monkeypatch):
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=raising(BrokenPipeError(32, "gone"))))
    assert run_command("x.py", raising(ValueError("--n 0: choose more"))) == 2


@pytest.mark.parametrize("stream, encoding, command, content", [
    ("stderr", "ascii", lambda argv: say("θ = 0.5, Würfel"), b"\\u03b8 = 0.5, W\\xfcrfel\n"),
    ("stdout", "cp1252", lambda argv: print("θ ü"), b"\\u03b8 \xfc\n"),
    ("stdout", "utf-8", lambda argv: print(os.fsdecode(b"caf\xe9/0.png")), b"caf\xe9/0.png\n")])
def test_no_character_is_too_much_for_a_console_and_a_path_stays_as_it_is(
        monkeypatch, tmp_path, stream, encoding, command, content):
    with open(tmp_path / "console", "w", encoding=encoding) as console, monkeypatch.context() as m:
        m.setattr(f"sys.{stream}", console)
        assert run_command("x.py", command) == 0
    assert (tmp_path / "console").read_bytes() == content
