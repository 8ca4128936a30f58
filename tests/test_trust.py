"""Nothing lost, nothing silent: killed runs, damaged files, wrong commands, memory that stays flat.

Here each is tried a few times, by `pytest -m slow` many times, in half an hour.
"""
import copy
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data
import evaluate
import sample
import train
from checkpoints import PARTS, load_part, run_command
from conftest import (at_step, batch, bytes_in, interrupt, log, picture, read, same_bits,
                      type_train, write_cifar, write_coco, write_metadata)
from unclip import UnCLIP

pytestmark = pytest.mark.usefixtures("tiny_training")
STAGES = list(train.STAGES)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# ---- Killed and resumed --------------------------------------------------------------------------

def assert_same_run(a, b, part):
    """Weights, average, moments, random numbers and log of two runs are the same bits."""
    states = [read(folder / f"{part}.state.pt") for folder in (a, b)]
    for name in ("step", "model", "ema", "optimizer", "generator", "sums"):
        assert same_bits(*(state[name] for state in states)), name
    assert same_bits(*(read(folder / f"{part}.pt")["weights"] for folder in (a, b)))
    logs = [log(folder / f"{part}.csv") for folder in (a, b)]
    assert logs[0] != [] and len({*map(len, logs)}) == 1
    for rows in zip(*logs):
        assert len({(*{**row, "minutes": 0}.items(),) for row in rows}) == 1, rows


@pytest.fixture
def two_folders(trained, tmp_path, monkeypatch):
    """Two folders with one CLIP. No pictures are drawn in them: that takes long."""
    monkeypatch.setattr(train, "picture_to_watch", lambda *_: None)
    folders = tmp_path / "whole", tmp_path / "parts"
    for folder in folders:
        folder.mkdir()
        shutil.copy(trained / "clip.pt", folder)
    return folders


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(two_folders, monkeypatch, capsys, stage):
    (whole, parts), part = two_folders, stage.replace("-", "_")
    argv = ["--stage", stage, "--batch-size", 4, "--restart"]
    assert type_train(*argv, "--out", whole, steps=4) == 0
    number = signal.SIGTERM if stage == "prior" else signal.SIGINT

    def stop(state):
        rates = {group["lr"] for group in state.optimizer.param_groups}
        assert rates == {train.learning_rate(2, train.Recipe(4, 4, 1e-3))}
        [os.kill(os.getpid(), number) for _ in range(2)]
    with monkeypatch.context() as patch:             # step 3 lies between two rows of the log
        at_step(patch, 3, stop)
        assert type_train(*argv, "--out", parts, steps=4) == 130
    assert "stopped at step 3" in capsys.readouterr().err
    assert load_part(parts / f"{part}.pt").trained["steps"] == 3         # for use meanwhile
    assert type_train(*argv[:-1], "--out", parts, steps=4) == 0
    assert "from step 3 to 4" in capsys.readouterr().err
    assert_same_run(whole, parts, part)


def run_for_ever(*argv, **options):
    """train.py, which saves at every step, on a slow disk, and never ends by itself."""
    rate = train.learning_rate
    train.learning_rate = lambda k, r: time.sleep(0 if k + 1 < r.steps else 999) or rate(k, r)
    train.SAVE_SECONDS, os.fsync = -1, lambda _: time.sleep(0.02)
    type_train(*argv, **options)


@pytest.mark.filterwarnings("ignore:.*fork")         # which Python 3.12 does not like
@pytest.mark.parametrize("stage, kills", [
    ("prior", 2), *(slow(stage, 20) for stage in STAGES)])
def test_a_process_killed_at_random_moments_loses_nothing_that_was_saved(two_folders, stage, kills):
    (whole, parts), part = two_folders, stage.replace("-", "_")
    (parts / "clip.pt").unlink() if stage == "clip" else None
    state, chance = parts / f"{part}.state.pt", random.Random(stage)
    options = dict(steps=10 * kills)
    in_a_save = done = 0
    while done < kills and not (done and read(state)["step"] >= options["steps"] - 1):
        before = state.stat().st_mtime_ns if done else 0
        process = multiprocessing.get_context("fork").Process(
            target=run_for_ever, args=("--stage", stage, "--out", parts), kwargs=options)
        process.start()
        while process.is_alive() and not (state.exists() and state.stat().st_mtime_ns > before):
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        load_part(parts / f"{part}.pt")                                  # is whole at any time
        in_a_save, done = in_a_save + any(parts.glob("*.tmp")), done + 1
    print(f"{stage}: {done} kills, {in_a_save} of them in a save, up to step {read(state)['step']}")
    for folder in two_folders:
        assert type_train("--stage", stage, "--out", folder, *["--restart"] * (folder == whole),
                          **options) == 0
    assert_same_run(whole, parts, part)
    assert not list(parts.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_memory_of_training_is_flat(two_folders, monkeypatch, stage):
    bytes_at, update = {}, train.State.update_ema

    def watch(state):
        update(state)
        if state.step % 100 == 0:
            pages = open("/proc/self/statm").read().split()[1]
            bytes_at[state.step] = int(pages) * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(train.State, "update_ema", watch)
    monkeypatch.setattr(train, "SAVE_SECONDS", 1)                        # saves are in it, too
    assert type_train("--stage", stage, "--out", two_folders[0], "--restart", steps=2000) == 0
    early, late = bytes_at[200], max(bytes_at[step] for step in range(1000, 2001, 100))
    print(f"{stage}: {early / 1e6:.1f} MB at step 200, at most {late / 1e6:.1f} MB later")
    assert abs(late / early - 1) < 0.02


# ---- Damaged files -------------------------------------------------------------------------------

class Surprise:
    """A pickle that runs code when it is opened."""

    def __reduce__(self):
        return os.system, ("touch was_here",)


def damaged(content, chance):
    """Bytes of which some are left out, and others put in."""
    for _ in range(chance.choice([1, 1, 2, 8])):
        i, n = chance.randrange(len(content) or 1), chance.choice([1, 4, 100, len(content) // 2])
        content = content[:i] + chance.randbytes(n * chance.randrange(2)) + \
            content[i + n * chance.randrange(2):]
    return content


def grafted(tree, chance, odd):
    """A copy of a tree of dicts and lists, in which one thing is odd, or is missing."""
    tree = node = copy.deepcopy(tree)
    while True:
        key = chance.choice([*node] if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.8:
            node = node[key]
        elif chance.random() < 0.2:
            del node[key]
            return tree
        else:
            node[key] = chance.choice(odd)
            return tree


ODD = [None, True, -1, 0, 7, 10 ** 12, 1.5, math.nan, "", "x", "../x", [], {}, [1], {"a": 1}]
TENSORS = [torch.zeros(2), torch.full((2,), math.nan), torch.zeros(2) + 0j, torch.tensor(7)]


def to_bytes(write, value):
    write(value, file := io.BytesIO())
    return file.getvalue()


# Each of these writes what is whole → the file to be damaged, the tree in it, a function that
# writes such a tree (both None for a picture), and a command that reads the file.

def data_set(name, folder):
    """A command that loads a data set as train.py does."""
    return lambda: run_command("x", lambda _: data.load(name, "train", 32, None, folder,
                                                        cache=False) and None)


def given_picture(kind, folder):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path := folder / f"damaged.{kind}", exif=exif)
    argv = ["--reconstruct", path.name, "--steps", "2", "--no-upsample", "--weights", "tiny"]
    return path, None, None, partial(sample.main, argv)


def weights(part, folder):
    path = shutil.copytree("tiny", folder / part) / f"{part}.pt"
    argv = ["a red cube", "--n", "1", "--steps", "1", "--no-upsample", "--weights", part,
            "--prior", "ar" if part == "ar_prior" else "diffusion"]
    return path, read(path), torch.save, partial(sample.main, argv)


def training_state(folder):
    """A run of three steps that ended after two of them."""
    go_on = lambda: type_train("--stage", "clip", "--out", "run", steps=3)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert go_on() == 130
    path = folder / "run" / "clip.state.pt"
    return path, read(path), torch.save, go_on


def captions(folder):
    path = write_metadata(folder, 4) / "metadata.jsonl"
    write = lambda rows, file: file.write("\n".join(map(json.dumps, rows)).encode())
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    return path, rows, write, data_set("folder", folder)


def coco(folder):
    path = write_coco(folder, 3) / "annotations" / "captions_train2017.json"
    write = lambda table, file: file.write(json.dumps(table).encode())
    return path, json.loads(path.read_text()), write, data_set("coco", folder)


def cifar(folder):
    path, dump = write_cifar(folder, 4) / "data_batch_3", partial(pickle.dump, protocol=2)
    return path, batch(2, 4), dump, data_set("cifar10", folder)


# By kind: who writes it, the words of each refusal, and what must be refused: the bytes of a file,
# how many bytes of the whole one, or a function that spoils its tree.

def first(change, key="weights"):
    """Change the first of the tensors under a key."""
    def spoil(tree):
        name, tensor = next(iter(tree[key].items()))
        tree[key][name] = change(tensor)
    return spoil


NO_TREE = [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100), 5000,
           *(to_bytes(torch.save, value) for value in ([1, 2], {"part": Surprise()},
                                                       torch.nn.Linear(1, 1)))]
NOT_JSON = [b"", b"{broken", b"[" * 100_000, b'{"text": "\xe9"}', b"[]"]
DAMAGED = {
    "decoder": (partial(weights, "decoder"), ["decoder.pt"], [
        *NO_TREE, dict.clear, lambda c: c["weights"].popitem(),
        lambda c: c["weights"].update(extra=torch.zeros(1)), first(lambda w: torch.zeros(3, 3)),
        first(lambda w: w * math.nan), first(lambda w: w + math.inf), first(lambda w: w + 0j),
        first(lambda w: "heavy"), lambda c: c.pop("weights"),
        lambda c: c.update(weights=[1]), lambda c: c.pop("config"), lambda c: c.update(config=[1]),
        lambda c: c["config"].update(dim="large"), lambda c: c["config"].update(width=10 ** 9),
        lambda c: c["config"].update(width=32), lambda c: c["config"].update(channels=3),
        lambda c: c.pop("clip_id"), lambda c: c.update(clip_id=7), lambda c: c["trained"].clear(),
        lambda c: c.update(trained=torch.zeros(2)), lambda c: c.update(format=999),
        lambda c: c.pop("format"), lambda c: c.update(format=torch.zeros(2)),
        lambda c: c.update(part=["decoder"]), lambda c: c.update(part="prior")]),
    "clip": (partial(weights, "clip"), ["clip.pt"], [
        lambda c: c["tokenizer"]["merges"].pop(), lambda c: c["tokenizer"].update(merges="abc"),
        lambda c: c["tokenizer"]["merges"].append([9, 9]), lambda c: c["tokenizer"].pop("words"),
        lambda c: c["tokenizer"].update(context=8), lambda c: c["tokenizer"].update(words=3)]),
    **{part: (partial(weights, part), [f"{part}.pt"], [5000])
       for part in ("prior", "ar_prior", "upsampler")},
    "state": (training_state, ["run/clip.state.pt", "--restart"], [
        b"hello", dict.clear, lambda s: s.pop("optimizer"), lambda s: s["optimizer"].pop(1),
        lambda s: s["optimizer"][0].pop("exp_avg"), lambda s: s.update(step=torch.zeros(2)),
        lambda s: s.update(step=-5), lambda s: s.update(step=True), lambda s: s.update(step=4),
        lambda s: s.update(seconds=None), lambda s: s.update(rows=[{"step": torch.ones(2)}]),
        first(lambda w: w * math.nan, "model"), first(lambda w: w + math.inf, "ema"),
        lambda s: s["optimizer"][0]["exp_avg_sq"].fill_(math.nan), lambda s: s.update(clip_id=3),
        lambda s: s.update(generator=torch.zeros(3)), lambda s: s.update(identity=None),
        lambda s: s["identity"].update(lr=torch.zeros(2)), lambda s: s.update(sums=torch.zeros(5)),
        lambda s: s["tokenizer"]["merges"].pop(), lambda s: s["sums"].fill_(math.nan)]),
    "captions": (captions, ["metadata.jsonl, line 1"], [
        *NOT_JSON[1:], b'{"file_name": "a.jpg"}', b'{"file_name": 5, "text": "a"}']),
    "COCO": (coco, ["captions_train2017.json"], [
        *NOT_JSON, b'{"images": [{"id": 1}]}', b'{"images": [{"id": 1, "file_name": 3}]}',
        b'{"images": [], "annotations": [{"image_id": []}]}']),
    "CIFAR-10": (cifar, ["--data-dir"], [
        b"", b"no pickle", 5000, *map(pickle.dumps, (
            [1, 2], {}, Surprise(), batch(0, 0), {**batch(0, 4), b"labels": [1] * 3},
            {**batch(0, 4), b"labels": [10] * 4}, {**batch(0, 4), b"data": np.zeros((4, 3072))})),
        *(b"cbuiltins\n" + name + b"\n." for name in (b"eval", b"getattr", b"__import__"))]),
    **{kind: (partial(given_picture, kind), [f"--reconstruct damaged.{kind}", "can't be read"], [
        b"", b"no picture", 300, b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(40)])
       for kind in ("png", "jpeg")}}


@pytest.mark.parametrize("kind, tries", [*((kind, 4) for kind in DAMAGED),
                                         *(slow(kind, 910) for kind in DAMAGED)])
def test_a_damaged_file_is_refused_in_one_line_or_else_read_and_nothing_is_written(
        tiny_weights, loaded, tmp_path, monkeypatch, capsys, kind, tries):
    """What is listed above must be refused; of random damage, some can be read."""
    def everything():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
                if not {"samples", "run"} & {*path.parts}}

    def spoilt(spoil):
        if spoil is None:                                                # at random
            if tree is None or chance.random() < 0.5:
                return damaged(whole, chance)
            return to_bytes(write, grafted(tree, chance, ODD + TENSORS * (write is torch.save)))
        if callable(spoil):
            spoil(changed := copy.deepcopy(tree))
            return to_bytes(write, changed)
        return spoil if isinstance(spoil, bytes) else whole[:spoil]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "picture_to_watch", lambda *_: None)
    shutil.copytree(tiny_weights, "tiny")
    make, words, spoils = DAMAGED[kind]
    path, tree, write, command = make(tmp_path)
    if kind in PARTS:                                # what is whole is read once
        others = {f"{part}.pt": load_part(f"tiny/{part}.pt") for part in PARTS if part != kind}
        monkeypatch.setattr(checkpoints, "load_part", lambda path, *device: (
            others[path.name] if path.name in others else load_part(path, *device)))
    whole, run = path.read_bytes(), bytes_in(path.parent) if kind == "state" else {}
    assert command() == 0                                                # as long as it is whole
    before, refused, chance = everything(), 0, random.Random(kind)
    for number, spoil in enumerate([*spoils, *[None] * tries]):
        for file, content in run.items():                                # as it was stopped
            file.write_bytes(content)
        path.write_bytes(content := spoilt(spoil))
        capsys.readouterr()
        status = command()
        err = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
        assert status in (0, 2), (number, content[:500])
        assert status == 0 or err[-1].split(":")[0] in ("x", "sample.py", "train.py"), err
        if spoil is not None:
            assert status == 2 and len(err) == 1 and all(w in err[0] for w in words), (number, err)
            assert not run or bytes_in(path.parent) == {**run, path: content}
        refused += spoil is None and status == 2
    after = everything()
    assert after.keys() == before.keys() and {p for p in after if after[p] != before[p]} <= {path}
    print(f"{kind}: of {tries} damaged files {refused} were refused, the others read")
    assert refused >= tries // 4 - 1                                     # the damage was real


# ---- Wrong commands ------------------------------------------------------------------------------
# Each line ends with what is wrong: a flag and its value, which the answer must name, or a word.
# The words that follow the line must be in the answer, too: they say what to type.

TRAIN = [
    ("--steps 0", "1 to"), ("--steps 1.5", "--help"), ("--batch-size 1", "2 to"),
    ("--stage decoder --batch-size -8", "1 to"), ("--limit 0", "1 to"), ("--lr 0", "1e-12 to 1"),
    ("--lr nan", "1e-12 to 1"), ("--lr 10000000000", "1e-12 to 1"), ("--seed -1", "0 to"),
    ("--device abacus", "--device cpu"), ("--device meta", "--device cpu"),
    ("--stage judge", "decoder"), ("--data faces", "folder"), ("--step 3", "--help"),
    ("red", "--help"), ("--stage prior --text-only", "--stage decoder"),
    ("--stage decoder --init nowhere", "no such folder"), ("--init tiny", "--stage"),
    ("--stage decoder --init broken_decoder", "decoder.pt", "train.py"),
    ("--out text.png", "another folder"), ("--out text.png/below", "another folder"),
    ("--out logs", "clip.csv", "another folder"), ("--data coco", "--data-dir"),
    ("--data folder --data-dir wrong", "no such folder"), ("--data folder --data-dir bare", "put"),
    ("--data coco --data-dir bare", "annotations/"), ("--data cifar10 --data-dir wrong", ".tar.gz"),
    ("--stage prior --out bare", "clip.pt", "--stage clip"),
    ("--out broken_clip --stage=prior", "broken_clip/clip.pt", "train.py"),
    ("--stage decoder --size base --out bare", "clip.pt", "--stage clip", "--size base"),
    ("--stage prior --out tiny --size base", "clip.pt", "--stage clip")]
SAMPLE = [
    ("", 'try: python sample.py "a red cube"'), ("' \n\t'", "empty", "red cube"),
    ("'" + "word " * 100 + "'", "shorten"), ("x --n 0", "from 1 to 10000"), ("x --n two", "--help"),
    ("x y --n 5001", "from 1 to 5000"), ("--interpolate a.png b.png --n 1", "from 2"),
    ("x --steps 1001", "from 1 to 1000"), ("--reconstruct a.png --steps 1", "from 2 to 1000"),
    ("x --guidance nan", "100"), ("x --eta -0.1", "from 0 to 1"), ("x --seed -1", "0 or more"),
    ("x --device cuda:99", "cpu"), ("x --prior gan", "diffusion"), ("x --colour red", "--help"),
    ("--vary a.png cube", "--vary", "choose one"), ("--to cube --show", "python sample"),
    ("--vary a.png --reconstruct a.png --show", "--vary", "--help"),
    ("--interpolate a.png --show", "--interpolate", "--help"),
    ("--edit a.png --show", "--edit", "--to"), ('--edit a.png --to ""', "empty", "red cube"),
    ('--edit a.png --from "A  cube" --to "a cube"', "choose another"),
    ("--vary nowhere.png", "give the path"), ("--vary bare", "not a file"),
    ("--reconstruct empty.png", "give a PNG"),
    ("--interpolate a.png nowhere.png", "--interpolate", "give the path"),
    ("x --weights nowhere", "train.py"), ("x --weights bare", "train.py"),
    ("x --weights broken_prior", "broken_prior/prior.pt", "train.py"),
    ("x --weights no_clip", "clip.pt", "--stage clip"), ("x --weights no_prior", "--stage prior"),
    ("x --prior ar --weights no_ar_prior", "--stage ar-prior"),
    ("--vary a.png --weights no_decoder", "--stage decoder"), ("x --out link", "another folder")]
EVALUATE = [
    ("--only nothing", "judge"), ("--only cifar10", "choose"), ("--n 1", "2 or more"),
    ("--n x", "--help"), ("--seed -1", "0 or more"), ("--device abacus", "cpu"),
    ("--weights broken_clip", "clip.pt", "train.py"), ("--out text.png", "another folder")]
PROGRAMS = {"train": train, "sample": sample, "evaluate": evaluate}
BAD = [(program, *row) for program, rows in zip(PROGRAMS, (TRAIN, SAMPLE, EVALUATE))
       for row in rows]


@pytest.fixture(scope="module")
def litter(tiny_weights, tmp_path_factory):
    """A folder with files of many kinds to stumble over."""
    top = tmp_path_factory.mktemp("litter")
    picture(top / "a.png"), picture(top / "b.png")
    (top / "text.png").write_text("no picture"), (top / "empty.png").touch()
    (top / "link").symlink_to("nowhere"), (top / "tiny").symlink_to(tiny_weights)
    (top / "bare").mkdir(), (top / "logs" / "clip.csv").mkdir(parents=True)
    for part in ("clip", "prior", "ar_prior", "decoder"):
        for folder in (top / f"no_{part}", top / f"broken_{part}"):
            folder.mkdir()
            for file in tiny_weights.iterdir():
                (folder / file.name).symlink_to(file)
            (folder / f"{part}.pt").unlink()
        (folder / f"{part}.pt").write_bytes(b"PK" + bytes(5000))
    return top


@pytest.mark.parametrize("program, line, words", [(program, line, words)
                                                  for program, line, *words in BAD])
def test_a_wrong_command_ends_in_one_line_with_flag_value_and_remedy_before_any_work(
        litter, loaded, monkeypatch, capsys, program, line, words):
    monkeypatch.chdir(litter)
    monkeypatch.setattr(data, "render", None)
    monkeypatch.setattr(evaluate, "render", None)
    monkeypatch.setattr(UnCLIP, "draw_x", None)
    argv, before = shlex.split(line), sorted(litter.rglob("*"))
    weights = ["--weights", "tiny"] * (program != "train" and "--weights" not in argv)
    assert PROGRAMS[program].main([*weights, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"{program}.py: "), err
    named = argv[-2:] if len(argv) > 1 and argv[-2].startswith("--") and argv[-1] else []
    assert all(word in err for word in [*named, *words]), (named, words, err)
    assert sorted(litter.rglob("*")) == before


@pytest.mark.parametrize("program, flags", [
    ("train", "stage data data-dir limit size steps batch-size lr seed device out init text-only "
              "restart profile"),
    ("sample", "n seed guidance steps eta no-upsample prior weights device show out reconstruct "
               "vary interpolate edit to from fixed-noise"),
    ("evaluate", "only n seed weights data-dir device out")])
def test_help_tells_every_flag_and_what_is_taken_without_it(capsys, program, flags):
    with pytest.raises(SystemExit) as done:
        PROGRAMS[program].main(["--help"])
    out, err = capsys.readouterr()
    assert done.value.code == 0 and err == "" and "default: " in out
    assert {*re.findall(r"^  --([\w-]+)", out, re.M)} == {*flags.split()}
