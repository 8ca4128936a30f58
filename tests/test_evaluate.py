"""Every experiment runs once on tiny weights, and the page holds what it returned."""
import shutil
from functools import partial

import pytest
import torch
from PIL import ImageColor

import evaluate
from checkpoints import read_torch
from conftest import ROOT, tiny_parts
from data import CIFAR_CLASSES, Dataset, class_captions
from diffusion import Diffusion
from evaluate import EXPERIMENTS, LINE_COLOURS, NEEDS, line_charts, main, table
from judge import JUDGES, Judge, compare, form, wilson
from unclip import UnCLIP

CLAIMS = "accuracy two binding diversity reconstruct vary edit spelling".split()
OTHERS = {"spelling": "signs", "cifar10": "cifar10", "overfit": "folder"}


@pytest.fixture(scope="module")
def weights(tiny_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "weights"
    shutil.copytree(tiny_weights, folder)
    model = read_torch(folder / "decoder.pt")
    torch.save({**model, "part": "text_decoder"}, folder / "text_decoder.pt")
    shutil.copy(ROOT / "weights/shapes/judge.pt", folder)
    return folder


@pytest.fixture
def evaluated(weights, tiny_unclip, monkeypatch, tmp_path):
    """A function of a name and n that runs an experiment → the page. Each part is read once, what
    is drawn is drawn in two steps and enlarged without a network, and form is fitted in a round."""
    timesteps = Diffusion.timesteps
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Diffusion, "timesteps", lambda self, steps: timesteps(self, 2))
    monkeypatch.setattr(UnCLIP, "load", lambda *_: tiny_unclip)
    monkeypatch.setattr(evaluate, "form", partial(form, candidates=3, plan=((32, 1),)))

    def call(name, n):
        with monkeypatch.context() as patch:
            if name in ("accuracy", "steps"):
                patch.setattr(evaluate, "COLOURS", ["red", "purple"])               # fewer pictures
            if name != "upsampler":
                patch.setattr(UnCLIP, "upsample", lambda self, x, *_: x.repeat_interleave(
                    2, 2).repeat_interleave(2, 3))
            if name in OTHERS:                           # the others are on shapes
                patch.setitem(tiny_unclip.clip.trained, "data", OTHERS[name])
                patch.setattr(evaluate, "load", photos)
                patch.setattr(evaluate, "load_judge", lambda _, part, *__: Judge(
                    JUDGES[part][0]).eval().requires_grad_(False))
            argv = ["--only", name, "--n", n, "--weights", weights, "--out", tmp_path / "results"]
            assert main([str(a) for a in argv]) == 0
        return (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    return call


def photos(name, split, size=32, limit=None, data_dir=None):
    """What data.load returns, with random pixels."""
    classes = torch.arange(limit) % 10
    return Dataset(torch.randint(256, (limit, 3, 32, 32)).byte(),
                   [class_captions(CIFAR_CLASSES[k]) for k in classes], {"class": classes},
                   CIFAR_CLASSES, flips=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_its_section_and_its_figures(name, evaluated, tmp_path, capsys):
    page = evaluated(name, 3)
    assert f"## {name}: " in page and f"--only {name} --seed 0 --n 3" in page
    assert "minutes on" in page and page[page.index("## "):] in capsys.readouterr().out
    rows = [line for line in page[page.index("## "):].splitlines() if line.startswith("| ")]
    assert len(rows) > 2                                         # head, rule, and rows
    claims = [line[2:] for line in page.splitlines() if line.startswith("> ")]
    assert all(f"| {claim} | {name} |" in page[:page.index("## ")] for claim in claims)
    assert bool(claims) == (name in CLAIMS)
    assert "| nan" not in page and "| inf" not in page
    figures = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert sorted(figures) == sorted(file.name for file in (tmp_path / "results").glob("*.png"))


def test_experiments_work_as_well_where_clip_and_decoder_have_64_pixels(evaluated, monkeypatch):
    unclip = UnCLIP(**tiny_parts(side=64))
    monkeypatch.setattr(UnCLIP, "load", lambda *_: unclip)
    monkeypatch.setattr(evaluate.Bench, "text_only", None)               # there is none of 64
    for name in "clip", "form", "reconstruct":
        assert f"## {name}: " in evaluated(name, 3)


def test_without_a_diffusion_prior_what_needs_it_is_refused_and_the_rest_runs(
        evaluated, tiny_unclip, monkeypatch, capsys):
    monkeypatch.setitem(tiny_unclip.parts, "prior", None)
    for name in (name for name, parts in NEEDS.items() if "prior" in parts):
        assert main(["--only", name]) == 2
        assert "--stage prior" in capsys.readouterr().err
    page = evaluated("accuracy", 3)
    assert "| ar prior |" in page and "| diffusion prior |" not in page


def test_an_experiment_that_runs_again_replaces_its_own_section_alone(evaluated):
    evaluated("clip", 4), evaluated("judge", 4)
    page = evaluated("clip", 6)
    assert page.count("## clip: ") == page.count("## judge: ") == 1 and "--n 6" in page
    assert page.index("## judge") < page.index("## clip")


def test_each_row_of_a_table_is_drawn_from_the_z_i_and_captions_that_it_names(
        tiny_unclip, weights, monkeypatch):
    monkeypatch.setattr(evaluate.Bench, "draw", lambda self, captions, z_i, **how: (
        captions, z_i, how))
    bench, y = evaluate.Bench(tiny_unclip, weights, None), ["a red cube", "a blue cone"] * 4
    rows = dict(evaluate.conditions(bench, y))
    renders = rows["renders"]
    assert compare(y, bench.judge.read(renders))["all"].all()
    assert torch.equal(rows["true z_i of the renders"][1], bench.encode(renders[:2]))
    assert torch.equal(rows["z_t in place of z_i"][1], bench.z_t(y[:2]))
    assert torch.equal(rows["z_t, along the main axes"][1], bench.z_i(y[:2], "text"))
    assert rows["caption only"][1] is rows["caption only, text-only decoder"][1] is None
    for name in "diffusion", "ar":
        assert torch.equal(rows[f"{name} prior"][1], bench.z_i(y, name)), name
        assert rows[f"{name} prior"][2] == {}
        assert rows[f"{name} prior, decoder unguided"][2] == {"guidance": 1.0}


def test_a_claim_holds_fails_or_is_left_open_and_a_reason_is_told_if_it_does_not_hold():
    bench, yes, no = evaluate.Bench(None, None, None), torch.ones(50) > 0, torch.zeros(50) > 0
    for a, b, holds in ((yes, no, "yes"), (no, yes, "no: odd"), (yes, yes, "not shown: odd")):
        bench.claim("3", "more", a, b, "odd")
        assert bench.claims[-1].endswith(f"| {holds}")


def test_a_chart_has_each_line_in_its_colour_rising_where_its_values_rise():
    rising, falling = [(1, 0.0), (2, 1.0)], [(1, 1.0), (2, 0.0)]
    chart = line_charts({"y": {"a": rising, "b": falling}, "z": {"a": rising}}, "x", side=200)
    assert chart.shape == (3, 200, 400) and chart.dtype == torch.uint8
    for line, colour in zip((rising, falling), LINE_COLOURS):
        here = (chart == torch.tensor(ImageColor.getrgb(colour)).view(3, 1, 1)).all(0)
        y, x = here[80:, :200].nonzero().T                                    # below the names
        slope = ((x - x.float().mean()) * (y - y.float().mean())).sum()
        assert (slope < 0) == (line == rising)                                # y grows downwards


def test_a_table_has_means_with_their_intervals_and_blanks_where_a_row_has_none():
    right, low_high = torch.tensor([True, True, False, True]), wilson(torch.arange(4) > 0)
    rows = [{"a": "x", "b %": right}, {"a": 1234, "c": 0.5, "d": torch.tensor([1.0, 2, 3])},
            {"b %": right[:0], "d": torch.tensor([])}]
    lines = table(rows).splitlines()
    assert lines[0] == "| a | b % | c | d |"
    assert lines[2] == "| x | 75.0 ({:.1f}–{:.1f}) |  |  |".format(*(100 * v for v in low_high))
    assert lines[3] == "| 1,234 |  | 0.5 | 2 ± 1.1 |"                # 1.96 · 1 / √3
    assert lines[4] == "|  | – |  | – |"


def test_the_other_render_has_another_colour_and_shape_and_changes_are_in_pixels(
        tiny_unclip, monkeypatch, tmp_path):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path))
    bench = evaluate.Bench(tiny_unclip, None, None)
    (_, a), (_, b) = evaluate.renders_and_others(bench, 5)
    assert all((a[key][:, 0] != b[key][:, 0]).all() for key in ("colour", "shape"))
    x, count = torch.zeros(2, 3, 32, 32), torch.tensor([1, 2])           # of one solid, and of two
    before, after = ({"count": count, "position": torch.full((2, 2, 2), p)} for p in (0.0, 0.5))
    cells = evaluate.changes(x + 5, before, x, after)
    assert cells["floor, of 255"].tolist() == [5, 5]
    assert cells["moved, of 32 pixels"].tolist() == pytest.approx([8 * 2 ** 0.5])
