"""evaluate.py: are its measures what they say, on data whose answer is known, and does it run?"""
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import evaluate
from data import COLOURS, SHAPES, labels_of, scenes_for
from decoder import Decoder
from evaluate import (Bench, Judge, compare, cost, energy_distance, entropy, load_judge, save_judge,
                      spread, table)
from prior import DiffusionPrior, DiffusionPriorConfig
from unclip import UnCLIP, load_part, save_part

PAIRS = [f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"
         for shape in SHAPES for colour in COLOURS]
TWO = ["a red cube on top of a blue cube", "a green cone left of a gray cube",
       "a green cone right of a gray cube"]


@pytest.fixture
def weights(tiny_weights, tmp_path, monkeypatch):
    """Tiny weights, those of the decoder tinier still, and a judge that has learnt nothing."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "weights"
    shutil.copytree(tiny_weights, folder)
    given = load_part(folder / "decoder.pt")
    decoder = Decoder(replace(given.config, channels=(8, 8), attention=(False, False), steps=1))
    decoder.clip_id = given.clip_id
    torch.nn.init.normal_(decoder.unet.out.weight, std=0.1)       # 0 at first: nothing would matter
    save_part(folder / "decoder.pt", "decoder", decoder, given.trained)
    save_judge(folder / "judge.pt", Judge(), {"data": "shapes"})
    return folder


@pytest.fixture
def bench(weights, tmp_path):
    return Bench(UnCLIP.load(weights), weights, tmp_path / "out", n=2)


class Reader:
    """A judge that is always right: it recognises pictures by heart."""

    def __init__(self, bench, monkeypatch):
        self.known = {}

        def render(scenes, *_):
            pictures = torch.randint(256, (len(scenes), 3, 4, 4), dtype=torch.uint8)
            self.known |= {self.name(p): scene for p, scene in zip(pictures, scenes)}
            return pictures
        monkeypatch.setattr(evaluate, "render", render)
        bench.judge = self
        # a picture is a render: of the caption asked for, or without a prior of another one
        bench.draw = lambda captions, rows, prior, guidance=None: bench.renders(
            captions if prior == "diffusion" else captions[1:] + captions[:1], rows)

    @staticmethod
    def name(picture):
        return picture.numpy().tobytes()

    def read(self, pictures):
        return labels_of([self.known[self.name(p)] for p in pictures])


# ---- Measures -----------------------------------------------------------------------------------

def test_energy_distance_of_gaussians():
    """In one dimension E|N(0, s²)| = s·√(2/π), so X, Y ~ N(0, 1) and N(m, 1) have a closed form."""
    torch.manual_seed(0)
    n, m = 2000, 1.0
    x, y = torch.randn(n, 1), torch.randn(n, 1) + m
    folded = 2 / math.sqrt(math.pi) * math.exp(-m ** 2 / 4) + m * math.erf(m / 2)     # E|N(m, 2)|
    assert energy_distance(x, y).item() == pytest.approx(
        2 * folded - 4 / math.sqrt(math.pi), abs=0.04)
    point = torch.zeros(2, 1)                       # 2 E|X| - E|X-X'|
    expected = 2 * math.sqrt(2 / math.pi) - 2 / math.sqrt(math.pi)
    assert energy_distance(x, point).item() == pytest.approx(expected, abs=0.03)
    assert abs(energy_distance(x, x.flip(0) + 0).item()) < 0.01


def test_energy_distance_and_spread_are_unbiased():
    """Small samples of one law, many times: 0 and the true trace on average, whatever n."""
    torch.manual_seed(0)
    x, y = torch.randn(4000, 3, 2), torch.randn(4000, 5, 2)
    distances = energy_distance(x, y)
    assert distances.shape == (4000,)
    assert abs(distances.mean()) < 4 * distances.std() / math.sqrt(4000)
    assert spread(2 * x).mean().item() == pytest.approx(8, rel=0.05)
    assert spread(torch.ones(7, 2, 3)).tolist() == [0] * 7


def test_energy_distance_tells_spread_from_mean():
    """A sample of the right law beats the right mean, which beats the wrong one."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 500, 8)
    right, mean, wrong = (energy_distance(x, z).item() for z in (
        y, torch.zeros(2, 8), torch.ones(2, 8)))
    assert abs(right) < 0.1 * mean < mean < wrong


def test_entropy():
    assert entropy(torch.arange(8).repeat(5), 8) == pytest.approx(1)
    assert entropy(torch.full((9,), 3), 8) == pytest.approx(0)
    assert entropy(torch.tensor([0, 1] * 4), 8) == pytest.approx(1 / 3)
    assert entropy(torch.tensor([], dtype=torch.long), 8) == 0


def test_table():
    rows = [{"a": "x", "b %": 0.5}, {"a": "y", "c": 1234, "d": -0.0}]
    assert table(rows).splitlines() == ["| a | b % | c | d |", "| --- | --- | --- | --- |",
                                        "| x | 50.0 |  |  |", "| y |  | 1,234 | 0.000 |"]


# ---- Counting -----------------------------------------------------------------------------------

@pytest.mark.parametrize("captions", [PAIRS, TWO])
def test_truth_is_all_right_and_shuffled_is_chance(captions):
    captions = captions * 30
    scenes = [scenes_for(caption, 1, i)[0] for i, caption in enumerate(captions)]
    right = compare(captions, labels_of(scenes))
    assert all(value.all() for value in right.values())
    if captions[0] in PAIRS:
        random.Random(0).shuffle(scenes)
        right = compare(captions, labels_of(scenes))
        for key, chance in ("colour", 1 / 8), ("shape", 1 / 4), ("all", 1 / 32):
            assert right[key].float().mean().item() == pytest.approx(chance, abs=0.05)
        assert right["relation"].all()


def test_what_is_wrong_is_told():
    def of(asked, drawn):
        right = compare([asked], labels_of(scenes_for(drawn, 1)))
        return {key for key, value in right.items() if not value.item()}
    asked = "a red cube on top of a blue cylinder"
    assert of(asked, "a red cube left of a blue cylinder") == {"relation", "all"}
    assert of(asked, "a blue cube on top of a red cylinder") == {"colour", "all"}
    aside = "a red cone left of a blue cube"
    assert of(aside, "a red cube left of a blue cone") == {"shape", "all"}
    assert of(aside, "a red cone right of a blue cube") == {"colour", "shape", "all"}
    assert of(asked, "a green cube on top of a blue cylinder") == {"colour", "colour set", "all"}
    assert of("a red cube", "a red cube left of a red cube") == {
        "relation", "colour", "colour set", "shape", "shape set", "all"}


def test_accuracy_of_a_perfect_and_of_a_wrong_generator(bench, monkeypatch):
    Reader(bench, monkeypatch)
    bench.n = 3
    rows = {row.pop("pictures from"): row for row in evaluate.accuracy(bench)}
    assert set(rows["renders"].values()) == {1.0}
    assert set(rows["z_i by the diffusion prior"].values()) == {1.0}
    assert rows["caption only"]["both %"] == pytest.approx(2 / 3, abs=0.05)   # 1 in 3 is another's
    assert rows["chance: renders, shuffled"]["both %"] < 0.15
    assert (bench.out / "accuracy.png").exists() and not (bench.out / "mistakes.png").exists()


def test_two_and_variety_of_a_perfect_generator(bench, monkeypatch):
    Reader(bench, monkeypatch)
    bench.n = 300
    rows = {row.pop("pictures from"): row for row in evaluate.two(bench)}
    assert rows["z_i by the diffusion prior"] == rows["renders"]
    assert rows["renders"].pop("colours swapped %") == 0 and set(rows["renders"].values()) == {1.0}
    assert rows["chance: renders, shuffled"]["colours, set %"] < 0.1
    for row in evaluate.variety(bench):
        assert row["cubes %"] == 1 and row["entropy of colour"] > 0.97
        assert 0.85 < row["spread, across"] < 1.15 and 0.85 < row["spread, down"] < 1.15
        assert 0.4 < row["large %"] < 0.6


# ---- Models in the bench ------------------------------------------------------------------------

def test_the_bench_draws_what_generate_draws(bench):
    captions = ["a red cube", "a large green cone on top of a blue cylinder"]
    for prior in ("diffusion", "ar", "text", "none"):
        drawn = bench.draw([c for c in captions for _ in range(3)], [0, 1, 2] * 2, prior)
        one_by_one = bench.unclip.generate(captions, 3, prior=prior, upsample=False)
        difference = drawn.int() - evaluate.to_uint8(one_by_one).int()
        assert difference.abs().max() <= 1                         # other batches round otherwise


def test_priors_know_their_own_kind(bench, monkeypatch):
    """Samples of the renders' own law are as good as renders; another caption's are not."""
    bench.n, places = 24, {}

    def law(captions):
        where = torch.stack([places.setdefault(c, torch.randn(8)) for c in captions])
        return torch.nn.functional.normalize(where + 0.3 * torch.randn(len(captions), 8), dim=1)
    torch.manual_seed(0)
    monkeypatch.setattr(Bench, "renders", lambda self, captions, rows: captions)
    monkeypatch.setattr(Bench, "encode", lambda self, captions: law(captions))
    monkeypatch.setattr(Bench, "z_i", lambda self, captions, *_, **options: law(captions))
    monkeypatch.setattr(bench.unclip.clip, "encode_text", lambda y: torch.randn(len(y), 8))
    monkeypatch.setattr(evaluate, "cost", lambda *_: {})
    rows = {row["z_i from"]: row for row in evaluate.priors(bench)}
    good, bad = rows["diffusion prior"], rows["diffusion prior, of another caption"]
    assert good["spread"] == pytest.approx(1, abs=0.1) and abs(good["energy distance"]) < 0.15
    assert rows["the mean of the caption's renders"]["energy distance"] == pytest.approx(1)
    assert rows["the mean of the caption's renders"]["spread"] == pytest.approx(0, abs=1e-6)
    assert bad["energy distance"] > 1.5 and rows["the mean of all renders"]["energy distance"] > 1.5


# ---- The command --------------------------------------------------------------------------------

FIGURES = {"judge": [], "accuracy": ["accuracy.png", "mistakes.png"], "two": ["two.png"],
           "variety": ["variety.png"], "clip": [], "codes": [], "priors": []}


@pytest.mark.parametrize("name", FIGURES)
def test_an_experiment_from_the_command_line(weights, tmp_path, capsys, name):
    out = tmp_path / "figures"
    argv = ["--weights", str(weights), "--out", str(out), "--n", "2", "--only", name]
    assert evaluate.main(argv) == 0
    text = capsys.readouterr().out
    written = (out / f"{name}.md").read_text(encoding="utf-8")
    assert written in text and "| --- |" in text and f"--only {name} --seed 0 --n 2" in text
    assert {path.name for path in out.iterdir()} == {f"{name}.md", *FIGURES[name]}


def test_without_only_all_experiments_run(weights, monkeypatch):
    run = []
    monkeypatch.setattr(evaluate, "run", lambda name, bench: run.append(name))
    assert evaluate.main(["--weights", str(weights)]) == 0
    assert run == [name for name in evaluate.EXPERIMENTS if name not in evaluate.REAL]


@pytest.mark.parametrize("argv, word", [
    (["--weights", "nowhere"], "nowhere"), (["--n", "0"], "--n 0"), (["--seed", "-1"], "--seed -1"),
    (["--device", "hamster"], "hamster"), (["--only", "everything"], "priors"),
    (["--only", "cifar10"], "learnt from shapes"), (["--hamster"], "--hamster")])
def test_faults(weights, argv, word, capsys):
    assert evaluate.main(["--weights", str(weights), *argv]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("evaluate.py: ") and word in line


def test_a_judge_is_kept_and_a_broken_one_refused(weights, tmp_path, monkeypatch, capsys):
    pictures = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(evaluate, "SHIPPED", tmp_path / "nothing shipped")
    again = load_judge(weights).read(pictures)
    (weights / "judge.pt").unlink()
    calls = []
    monkeypatch.setattr(evaluate, "judge_pictures", lambda *_: calls.append("pictures"))
    monkeypatch.setattr(evaluate, "train_judge", lambda *_: calls.append("train") or Judge())
    first = load_judge(weights).read(pictures)
    assert calls == ["pictures", "train"] and "training one" in capsys.readouterr().err
    second = load_judge(weights).read(pictures)                   # from its file, in half precision
    assert len(calls) == 2 and torch.allclose(first["position"], second["position"], atol=1e-2)
    assert again.keys() == second.keys()
    shutil.copy(weights / "decoder.pt", weights / "judge.pt")
    with pytest.raises(ValueError, match="judge.pt: not a judge"):
        load_judge(Path(weights))


def test_cost_of_training():
    """W weights at L positions take 2·W·L operations forward, and twice that backward."""
    prior = DiffusionPrior(DiffusionPriorConfig(dim=16, vocab=300, context=8, width=32, depth=1))
    prior.trained = {"steps": 10, "batch_size": 1000}
    z = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    line = cost(prior, z, z, torch.full((4, 6), 5))
    weights = 12 * 32 ** 2 + 13 * 32 + 2 * 32          # matrices; biases and norms; the last norm
    assert line["training PFLOP"] * 1e15 == pytest.approx(6 * weights * (6 + 4) * 10_000)
    assert line["training steps"] == "10 × 1000" and line["parameters"] > weights
