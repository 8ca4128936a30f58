"""Nothing lost, nothing silent: killed runs, wrong commands, and memory that stays flat.

Runs are killed a few times here, and many times by `pytest -m slow`, which takes minutes.
"""
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import time

import pytest

import data
import evaluate
import sample
import train
from checkpoints import load_part, read_torch
from conftest import ROOT, at_step, log, picture, same_bits, type_train
from unclip import UnCLIP

pytestmark = pytest.mark.usefixtures("tiny_training")
STAGES = list(train.STAGES)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# ---- Killed and resumed --------------------------------------------------------------------------

def assert_same_run(a, b, part):
    """Weights, average, moments, random numbers and log of two runs are the same bits."""
    states = [read_torch(folder / f"{part}.state.pt") for folder in (a, b)]
    for name in ("step", "model", "ema", "optimizer", "generator", "sums"):
        assert same_bits(*(state[name] for state in states)), name
    assert same_bits(*(read_torch(folder / f"{part}.pt")["weights"] for folder in (a, b)))
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
    in_a_save = done = saved = 0
    while done < kills and not (done and read_torch(state)["step"] >= options["steps"] - 1):
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
        last, saved = saved, read_torch(state)["step"]
        assert saved > last
        in_a_save, done = in_a_save + any(parts.glob("*.tmp")), done + 1
    step = read_torch(state)["step"]
    print(f"{stage}: {done} kills, {in_a_save} of them in a save, up to step {step}")
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


# ---- Wrong commands ------------------------------------------------------------------------------
# Each line ends with what is wrong: a flag and its value, which the answer must name, or a word.
# The words that follow the line must be in the answer, too: they say what to type.

TRAIN = [
    ("--steps 0", "1 to"), ("--steps 1.5", "--help"), ("--batch-size 1", "2 to"),
    ("--stage decoder --batch-size -8", "1 to"), ("--limit 0", "1 to"), ("--lr nan", "1e-12 to 1"),
    ("--seed -1", "0 to"), ("--device abacus", "--device cpu"), ("--device meta", "--device cpu"),
    ("--data faces", "folder"), ("red", "--help"), ("--stage prior --text-only", "--stage decoder"),
    ("--data-dir bare --data shapes", "leave it out"),
    ("--stage decoder --init nowhere", "no such folder"), ("--out ''", "empty"),
    ("--init tiny", "--stage"),
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
    ('--edit a.png --from "A  zebra" --to "a zebra"', "choose another"),
    ('--edit a.png --to "a cube" --from ""', "--from", "empty"),
    ("--vary nowhere.png", "give the path"), ("--vary bare", "not a file"),
    ("--reconstruct empty.png", "give a PNG"), ("--vary text.png", "give a PNG"),
    ("--interpolate a.png nowhere.png", "--interpolate", "give the path"),
    ("x --weights nowhere", "train.py"), ("x --weights bare", "train.py"),
    ("x --weights broken_prior", "broken_prior/prior.pt", "train.py"),
    ("x --weights no_clip", "clip.pt", "train.py"), ("x --weights no_prior", "--stage prior"),
    ("x --prior ar --weights no_ar_prior", "--stage ar-prior"),
    ("--vary a.png --weights no_decoder", "--stage decoder"), ("x --out link", "another folder"),
    (f"x --out {'o' * 300}", "too long", "another folder")]
EVALUATE = [
    ("--only nothing", "judge"), ("--only cifar10", "choose"), ("--n 2", "3 or more"),
    (f"--seed {2 ** 64}", "below"),
    ("--n x", "--help"), ("--seed -1", "0 or more"), ("--device abacus", "cpu"),
    ("--weights broken_clip", "clip.pt", "train.py"), ("--out text.png", "another folder"),
    ("--weights broken_text_decoder", "text_decoder.pt", "train.py"),
    ("--only vary --weights no_decoder", "--stage decoder"),
    ("--only vary --out notes", "another --out"), ("--only vary --out latin", "utf-8")]
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
    (top / "notes").mkdir(), (top / "notes" / "README.md").write_text("# Results of mine")
    (top / "latin").mkdir(), (top / "latin" / "README.md").write_bytes(b"# Results \xfc")
    (top / "bare").mkdir(), (top / "logs" / "clip.csv").mkdir(parents=True)
    for part in ("clip", "prior", "ar_prior", "decoder", "text_decoder"):
        for folder in (top / f"no_{part}", top / f"broken_{part}"):
            folder.mkdir()
            for file in tiny_weights.iterdir():
                (folder / file.name).symlink_to(file)
            (folder / f"{part}.pt").unlink(missing_ok=True)
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


def test_train_and_sample_know_the_flags_of_every_command_of_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    typed = re.findall(r"python (train|sample)\.py([^`#\n]*)", readme)
    for program, line in typed:
        args = PROGRAMS[program].parse(shlex.split(line))
        sample.understand(args) if program == "sample" else train.check(args)
    assert {program for program, _ in typed} == {"train", "sample"} and len(typed) > 15
    exec(compile(re.search(r"```python\n(.*?)```", readme, re.S)[1].split("\nx = ")[0], "", "exec"))


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
