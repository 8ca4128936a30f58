"""Nothing lost, nothing silent: killed runs, damaged files, wrong commands, memory that stays flat.

Here each is tried a few times, by `pytest -m slow` many times, in half an hour.
"""
import copy
import csv
import io
import json
import math
import multiprocessing
import os
import pickle
import random
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
from conftest import same_bits, type_train
from unclip import UnCLIP

pytestmark = pytest.mark.usefixtures("tiny_training")
STAGES = list(train.STAGES)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def read(path):
    return torch.load(path, weights_only=True)


# ---- Killed and resumed --------------------------------------------------------------------------

def assert_same_run(a, b, part):
    """Weights, average, moments, random numbers and log of two runs are the same bits."""
    states = [read(folder / f"{part}.state.pt") for folder in (a, b)]
    for name in ("step", "model", "ema", "optimizer", "generator", "sums"):
        assert same_bits(*(state[name] for state in states)), name
    assert same_bits(*(read(folder / f"{part}.pt")["weights"] for folder in (a, b)))
    logs = [list(csv.DictReader(open(folder / f"{part}.csv", newline=""))) for folder in (a, b)]
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
    (whole, parts), part, update = two_folders, stage.replace("-", "_"), train.State.update_ema
    argv = ["--stage", stage, "--restart"]
    assert type_train(*argv, "--out", whole, steps=5) == 0

    def stop_at_3(state):                            # which lies between two rows of the log
        update(state)
        for _ in range(2 if state.step == 3 else 0):
            os.kill(os.getpid(), signal.SIGTERM if stage == "prior" else signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train.State, "update_ema", stop_at_3)
        assert type_train(*argv, "--out", parts, steps=5) == 130
    assert "stopped at step 3" in capsys.readouterr().err
    assert load_part(parts / f"{part}.pt").trained["steps"] == 3         # for use meanwhile
    assert type_train(*argv[:2], "--out", parts, steps=5) == 0
    assert "from step 3 to 5" in capsys.readouterr().err
    assert_same_run(whole, parts, part)


def run_for_ever(*argv, **options):
    """train.py, which saves at every step, on a slow disk, and never ends by itself."""
    rate = train.learning_rate
    train.learning_rate = lambda k, r: time.sleep(0 if k + 1 < r.steps else 999) or rate(k, r)
    train.SAVE_SECONDS, os.fsync = -1, lambda _: time.sleep(0.02)
    type_train(*argv, **options)


@pytest.mark.filterwarnings("ignore:.*fork")         # which Python 3.12 does not like
@pytest.mark.parametrize("stage, kills", [("clip", 2), ("prior", 2),
                                          *(slow(stage, 20) for stage in STAGES)])
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

class Hangs(BaseException):
    """Not an Exception, which the readers of damaged files catch."""


def damaged(content, chance):
    """Bytes of which some are changed, cut off, left out, doubled or put in."""
    for _ in range(chance.choice([1, 1, 2, 8])):
        i = chance.randrange(max(1, len(content)))
        n = chance.choice([1, 4, 100, len(content) // 2])
        content = content[:i] + chance.choice([
            b"", content[i + n:], chance.randbytes(n) + content[i + n:],
            chance.randbytes(n) + content[i:], content[i:i + n] + content[i:]])
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


def tree_or_bytes(path, tree, write, odd):
    """Write the tree, and return a function of chance → a file of odd content or odd bytes."""
    path.write_bytes(whole := to_bytes(write, tree))
    return lambda chance: to_bytes(write, grafted(tree, chance, odd)) if chance.random() < 0.5 \
        else damaged(whole, chance)


# Each of these writes a file → its path, a function that damages it, and a command that reads it.


def data_set(name, folder):
    """A command that loads a data set as train.py does."""
    return lambda: run_command("x", lambda _: data.load(name, "train", 32, None, folder,
                                                        cache=False) and None)


def given_pictures(kind, folder):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path := folder / f"damaged.{kind}", exif=exif)
    argv = ["--reconstruct", path.name, "--steps", "2", "--no-upsample", "--weights", "tiny"]
    return path, partial(damaged, path.read_bytes()), partial(sample.main, argv)


def weights(part, folder):
    path = shutil.copytree("tiny", folder / part) / f"{part}.pt"
    argv = ["a red cube", "--n", "1", "--steps", "1", "--no-upsample", "--weights", part,
            "--prior", "ar" if part == "ar_prior" else "diffusion"]
    return path, tree_or_bytes(path, read(path), torch.save, ODD + TENSORS), \
        partial(sample.main, argv)


def training_state(folder):
    """A run of three steps that ended after two of them."""
    with pytest.MonkeyPatch.context() as patch:
        update = train.State.update_ema
        patch.setattr(train.State, "update_ema", lambda state: (
            update(state), state.step == 2 and os.kill(os.getpid(), signal.SIGINT)))
        assert type_train("--stage", "upsampler", "--out", "run", steps=3) == 130
    path = folder / "run" / "upsampler.state.pt"
    return path, tree_or_bytes(path, read(path), torch.save, ODD + TENSORS), \
        lambda: type_train("--stage", "upsampler", "--out", "run", steps=3)


def captions(folder):
    rows = [{"file_name": f"{i}.png", "text": [f"thing {i}", None, "a thing"]} for i in range(4)]
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / f"{i}.png")
    write = lambda rows, file: file.write("\n".join(map(json.dumps, rows)).encode())
    path = folder / "metadata.jsonl"
    return path, tree_or_bytes(path, rows, write, ODD), data_set("folder", folder)


def coco(folder):
    (folder / "train2017").mkdir(), (folder / "annotations").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / "train2017" / f"{i}.png")
    table = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
             "annotations": [{"image_id": i, "caption": f"thing {i}"} for i in range(3)]}
    write = lambda table, file: file.write(json.dumps(table).encode())
    path = folder / "annotations" / "captions_train2017.json"
    return path, tree_or_bytes(path, table, write, ODD), data_set("coco", folder)


def cifar(folder):
    batch = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 3, 6, 9], b"batch_label": b"x"}
    dump = partial(pickle.dump, protocol=2)
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(to_bytes(dump, batch))
    path = folder / "data_batch_3"
    return path, tree_or_bytes(path, batch, dump, [*ODD, b"x"]), data_set("cifar10", folder)


DAMAGED = {**{part: partial(weights, part) for part in PARTS}, "state": training_state,
           "captions": captions, "COCO": coco, "CIFAR-10": cifar,
           "png": partial(given_pictures, "png"), "jpeg": partial(given_pictures, "jpeg")}


@pytest.mark.parametrize("kind, tries", [*((kind, 19) for kind in DAMAGED),
                                         *(slow(kind, 910) for kind in DAMAGED)])
def test_damaged_files_are_read_or_refused_in_one_line_and_nothing_else_is_written(
        tiny_weights, tmp_path, monkeypatch, capsys, kind, tries):
    def hangs(*_):
        raise Hangs

    def everything():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")
                if not {"samples", "run"} & {*path.parts}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "picture_to_watch", lambda *_: None)
    shutil.copytree(tiny_weights, "tiny")
    path, spoil, command = DAMAGED[kind](tmp_path)
    if kind in ("png", "jpeg"):                      # what is whole is read once
        monkeypatch.setattr(UnCLIP, "load", lambda *_, whole=UnCLIP.load("tiny"): whole)
    elif kind in PARTS:
        others = {f"{part}.pt": load_part(f"tiny/{part}.pt") for part in PARTS if part != kind}
        monkeypatch.setattr(checkpoints, "load_part", lambda path, *device: (
            others[path.name] if path.name in others else load_part(path, *device)))
    run = {file: file.read_bytes() for file in (tmp_path / "run").glob("*")}
    assert command() == 0                                                # as long as it is whole
    before, statuses, chance = everything(), [], random.Random(kind)
    signal.signal(signal.SIGPROF, hangs)
    for number in range(tries):
        for file, content in run.items():                                # as it was stopped
            file.write_bytes(content)
        path.write_bytes(content := spoil(chance))
        capsys.readouterr()
        try:
            signal.setitimer(signal.ITIMER_PROF, 10)                     # seconds of computing
            statuses.append(status := command())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        err = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line]
        assert status in (0, 2), (number, content[:500])
        assert status == 0 or err[-1].split(":")[0] in ("x", "sample.py", "train.py"), err
    after = everything()
    assert after.keys() == before.keys() and {p for p in after if after[p] != before[p]} <= {path}
    print(f"{kind}: of {tries} damaged files {statuses.count(2)} were refused, the others read")
    assert statuses.count(2) >= tries / 4                                # the damage was real


# ---- Wrong commands ------------------------------------------------------------------------------
# Each line ends with what is wrong: a flag and its value, which the answer must name, or a word.
# The words that follow the line must be in the answer, too: they say what to type.

TRAIN = [
    ("--steps 0", "1 to"), ("--steps -1", "1 to"), ("--steps 1.5", "--help"),
    ("--steps x", "--help"), ("--batch-size 0", "2 to"), ("--batch-size 1", "2 to"),
    ("--stage clip --batch-size 1", "2 to"),
    ("--stage decoder --batch-size -8", "1 to"), ("--limit 0", "1 to"), ("--limit -3", "1 to"),
    ("--lr 0", "1e-12 to 1"), ("--lr nan", "1e-12 to 1"), ("--lr inf", "1e-12 to 1"),
    ("--lr 10000000000", "1e-12 to 1"), ("--lr -0.1", "1e-12 to 1"), ("--seed -1", "0 to"),
    (f"--seed {2 ** 64}", "0 to"), ("--device abacus", "--device cpu"),
    ("--device meta", "--device cpu"), ("--stage judge", "decoder"),
    ("--stage ar_prior", "ar-prior"),
    ("--size huge", "base"), ("--data faces", "folder"), ("--colour red", "--help"),
    ("--step 3", "--help"), ("red", "--help"), ("--stage decoder --init nowhere", "no such folder"),
    ("--init tiny", "--stage"), ("--stage clip --init bare", "clip.pt", "train.py"),
    ("--stage decoder --init broken_decoder", "decoder.pt", "train.py"),
    ("--out text.png", "another folder"), ("--out text.png/below", "another folder"),
    ("--out logs", "clip.csv", "another folder"), ("--data coco", "--data-dir"),
    ("--data folder", "--data-dir"), ("--data coco --data-dir wrong", "no such folder"),
    ("--data folder --data-dir wrong", "no such folder"), ("--data folder --data-dir bare", "put"),
    ("--data coco --data-dir bare", "annotations/"), ("--data cifar10 --data-dir wrong", ".tar.gz"),
    ("--stage prior --out bare", "clip.pt", "--stage clip"),
    ("--stage decoder --size base --out bare", "clip.pt", "--stage clip", "--size base"),
    ("--stage prior --out tiny --size base", "clip.pt", "--stage clip")]
SAMPLE = [
    ("", 'try: python sample.py "a red cube"'), ('""', "empty", "red cube"),
    ("' \n\t'", "empty", "red cube"), ('"a red cube" ""', "empty", "red cube"),
    ("'" + "word " * 100 + "'", "shorten"), ("x --n 0", "from 1 to 10000"), ("x --n -1", "from 1"),
    ("x --n two", "--help"), ("x --n 1.5", "--help"), ("x --n 100000000", "from 1 to 10000"),
    ("x y --n 5001", "from 1 to 5000"), ("--vary a.png --n 10001", "from 1 to 10000"),
    ("x --steps 0", "from 1 to 1000"), ("x --steps 1001", "from 1 to 1000"),
    ("--reconstruct a.png --steps 1", "from 2 to 1000"), ("--vary a.png --steps 1", "from 2"),
    ("--edit a.png --to x --steps 1", "from 2"), ("x --guidance nan", "100"),
    ("x --guidance inf", "100"), ("x --guidance 1000", "100"), ("x --eta nan", "from 0 to 1"),
    ("x --eta -0.1", "from 0 to 1"), ("--vary a.png --eta 1.1", "from 0 to 1"),
    ("x --seed -1", "0 or more"), ("x --seed x", "--help"), ("x --device abacus", "cpu"),
    ("x --device meta", "cpu"), ("x --device cuda:99", "cpu"), ("x --prior gan", "diffusion"),
    ("x --colour red", "--help"), ("x --out", "--help"),
    ("--vary a.png cube", "--vary", "choose one"),
    ("--vary a.png --reconstruct a.png --show", "--vary", "--help"),
    ("--interpolate a.png --show", "--interpolate", "--help"),
    ("--interpolate a.png b.png --n 1", "from 2"), ("--edit a.png --show", "--edit", "--to"),
    ('--edit a.png --to ""', "empty", "red cube"), ('--edit a.png --to x --from ""', "empty"),
    ('--edit a.png --from "A  cube" --to "a cube"', "choose another"),
    ("--to cube --show", "python sample"),
    ("--vary nowhere.png", "give the path"), ("--vary text.png", "give a PNG"),
    ("--reconstruct empty.png", "give a PNG"), ("--vary .", "give the path"),
    ("--to x --edit nowhere.png", "give the path"), ("x --weights nowhere", "train.py"),
    ("--interpolate a.png nowhere.png", "--interpolate", "give the path"),
    ("x --weights bare", "train.py"), ("x --weights text.png", "train.py"),
    ("x --weights broken_prior", "broken_prior/prior.pt", "train.py"),
    ("x --weights no_clip", "clip.pt", "--stage clip"), ("x --weights no_prior", "--stage prior"),
    ("x --prior ar --weights no_ar_prior", "--stage ar-prior"),
    ("x --weights no_decoder", "--stage decoder"), ("--vary a.png --weights no_decoder", "decoder"),
    ("x --out text.png", "another folder"), ("x --out text.png/below", "another folder"),
    ("x --out link", "another folder")]
EVALUATE = [
    ("--only nothing", "judge"), ("--only cifar10", "choose"), ("--n 1", "2 or more"),
    ("--n x", "--help"), ("--seed -1", "0 or more"), ("--weights nowhere", "train.py"),
    ("--weights bare", "train.py"), ("--weights broken_clip", "clip.pt", "train.py"),
    ("--device abacus", "cpu"), ("--out text.png", "another folder"), ("--colour red", "--help"),
    ("--guidance 3", "--help")]
PROGRAMS = {"train": train, "sample": sample, "evaluate": evaluate}
BAD = [(program, *row) for program, rows in zip(PROGRAMS, (TRAIN, SAMPLE, EVALUATE))
       for row in rows]


@pytest.fixture
def littered(tiny_weights, tmp_path, monkeypatch):
    """A folder with files of many kinds to stumble over. No work is done in it."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save("a.png"), Image.new("RGB", (32, 32)).save("b.png")
    (tmp_path / "text.png").write_text("no picture"), (tmp_path / "empty.png").touch()
    (tmp_path / "link").symlink_to("nowhere"), (tmp_path / "tiny").symlink_to(tiny_weights)
    (tmp_path / "bare").mkdir(), (tmp_path / "logs" / "clip.csv").mkdir(parents=True)
    for part in ("clip", "prior", "ar_prior", "decoder"):
        for folder in (f"no_{part}", f"broken_{part}"):
            (tmp_path / folder).mkdir()
            for file in tiny_weights.iterdir():
                (tmp_path / folder / file.name).symlink_to(file)
            (tmp_path / folder / f"{part}.pt").unlink()
        (tmp_path / folder / f"{part}.pt").write_bytes(b"PK" + bytes(5000))
    for module in (train, evaluate):
        monkeypatch.setattr(module, "render", None, raising=False)
    monkeypatch.setattr(data, "render", None)
    monkeypatch.setattr(UnCLIP, "draw_x", None)
    return tmp_path


@pytest.mark.parametrize("program, line, words", [(program, line, words)
                                                  for program, line, *words in BAD])
def test_a_wrong_command_ends_in_one_line_with_flag_value_and_remedy(littered, capsys, program,
                                                                     line, words):
    argv, before = shlex.split(line), sorted(littered.rglob("*"))
    weights = ["--weights", "tiny"] * (program != "train" and "--weights" not in argv)
    assert PROGRAMS[program].main([*weights, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"{program}.py: "), err
    named = argv[-2:] if len(argv) > 1 and argv[-2].startswith("--") and argv[-1] else []
    assert all(word in err for word in [*named, *words]), (named, words, err)
    assert sorted(littered.rglob("*")) == before
