"""evaluate.py on manipulations and real images: measures in closed form, controls, and runs."""
import math

import pytest
import torch

import evaluate
from data import SHAPES, Dataset, load, to_float
from evaluate import (Bench, Classifier, as_far, changes, frechet, gradient_energy, jittered,
                      load_classifier, neighbours, psnr, renders_and_others, same, save_judge)
from test_evaluate import weights  # noqa: F401, a fixture
from unclip import UnCLIP, load_part, save_part


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bench(weights, tmp_path, cache, monkeypatch):  # noqa: F811
    monkeypatch.setenv("UNCLIP_CACHE", str(cache))
    monkeypatch.setattr(evaluate, "STEPS", 2)
    return Bench(UnCLIP.load(weights), weights, tmp_path / "out", n=2)


def flat(value, n=2, side=32):
    return torch.full((n, 3, side, side), value, dtype=torch.uint8)


# ---- Measures -----------------------------------------------------------------------------------

def test_psnr():
    assert psnr(flat(100), flat(105)).tolist() == pytest.approx([20 * math.log10(51)] * 2)
    assert psnr(flat(7), flat(7)).tolist() == [math.inf] * 2


def test_gradient_energy():
    """0 of a plain picture, 2² both ways of a chessboard; a part of it if each pixel is four."""
    board = ((torch.arange(32) + torch.arange(32)[:, None]) % 2 * 255).byte().expand(2, 3, -1, -1)
    assert gradient_energy(flat(50)).tolist() == [0, 0]
    assert gradient_energy(board).tolist() == pytest.approx([8, 8])
    large = board.repeat_interleave(2, 2).repeat_interleave(2, 3)      # 31 of 63 steps are edges
    assert gradient_energy(large).tolist() == pytest.approx([8 * 31 / 63] * 2)


def test_neighbours():
    torch.manual_seed(0)
    noise = torch.randn(50, 3, 32, 32)
    assert neighbours(noise) == pytest.approx(0, abs=0.01)
    means = torch.nn.functional.avg_pool2d(noise, 3, 1)           # neighbours share 2 of 3 columns
    assert neighbours(means) == pytest.approx(2 / 3, abs=0.02)


def test_frechet():
    """0 of the same; of an affine copy a·x + b it is |(a − 1)μ + b|² + (a − 1)² tr C."""
    torch.manual_seed(0)
    x = torch.randn(400, 6) @ torch.randn(6, 6) + torch.randn(6)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)
    shift = ((3 - 1) * x.mean(0) + 5).square().sum() + 4 * x.var(0).sum()
    assert frechet(3 * x + 5, x) == pytest.approx(shift.item(), rel=1e-4)
    y = torch.randn(300, 6) @ torch.randn(6, 6)                   # covariances that do not commute
    roots = torch.linalg.eigvals(x.double().T.cov() @ y.double().T.cov()).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * roots
    assert frechet(x, y) == pytest.approx(expected.item(), rel=1e-4)
    assert frechet(x, y) == pytest.approx(frechet(y, x), rel=1e-6)


def test_as_far_in_a_random_direction():
    torch.manual_seed(1)
    z_i, z_d = torch.nn.functional.normalize(torch.randn(2, 50, 16), dim=-1)
    random = as_far(z_i, z_d, torch.randn(50, 16))
    assert torch.allclose(random.norm(dim=1), torch.ones(50), atol=1e-5)
    assert torch.allclose((random * z_i).sum(1), (z_d * z_i).sum(1), atol=1e-5)
    assert (random * z_d).sum(1).abs().mean() < 0.35


def test_renders_and_others_differ(bench):
    for alone in (True, False):
        (images, labels), (others, theirs) = renders_and_others(bench, 6, alone)
        assert images.shape == others.shape == (6, 3, 32, 32)
        assert (labels["colour"][:, 0] != theirs["colour"][:, 0]).all()
        assert (labels["shape"][:, 0] != theirs["shape"][:, 0]).all()
        assert (labels["count"] == 1).all() == (theirs["count"] == 1).all() == alone
        assert same(labels, labels).all() and not same(labels, theirs).any()


def test_changes(bench):
    labels = load("shapes", "validation", limit=20).labels
    moved = {**labels, "position": labels["position"] + torch.tensor([3 / 16, 4 / 16])}
    every, one = labels["count"] > 0, labels["count"] == 1
    assert changes(moved, flat(60, 20), labels, flat(50, 20), every) == {
        "moved, of 32 pixels": "5.00", "corners, of 255": "10.0", "pixels (rms), of 255": "10.0"}
    assert changes(moved, flat(60, 20), labels, flat(50, 20), ~one)["moved, of 32 pixels"] == "nan"


# ---- Experiments --------------------------------------------------------------------------------

FIGURE = {"upsampler": (2, 4, 128), "reconstruct": (2, 5, 128), "vary": (8, 2, 32),
          "interpolate": (7, 4, 32), "edit": (6, 2, 32), "pca": (6, 2, 32)}


@pytest.mark.parametrize("name", FIGURE)
def test_an_experiment_runs(bench, name, monkeypatch):
    shown = {}
    monkeypatch.setattr(Bench, "figure", lambda self, *args: shown.update({args[0]: args[1:]}))
    columns, rows, side = FIGURE[name]
    bench.unclip.upsamplers *= side == 128                    # elsewhere it would only take time
    evaluate.run(name, bench)
    (images, wide), = shown.values()
    assert (wide, *images.shape) == (columns, columns * rows, 3, side, side)
    assert list(shown) == [name] and (bench.out / f"{name}.md").exists()


def test_an_upsampler_that_repeats_pixels_keeps_their_means(bench, monkeypatch):
    monkeypatch.setattr(evaluate, "enlarged", lambda bench, x: x.repeat_interleave(4, 2)
                        .repeat_interleave(4, 3))
    rows = {row["pictures"]: row for row in evaluate.upsampler(bench)}
    assert rows["upsampled"]["means off, of 255"] == 0 < rows["bicubic"]["means off, of 255"] < 2
    assert rows["bicubic"]["sharpness"] < 0.8
    assert rows["renders"]["solids right %"] == rows["upsampled"]["solids right %"]


def test_reconstruction_inverts_and_its_controls_do_not(bench):
    rows = {row["decoded from"]: row for row in evaluate.reconstruct(bench)}
    decibels = {name: float(row["PSNR, median"].split()[0]) for name, row in rows.items()}
    assert decibels["z_i, random x_T"] < decibels["z_i, x_T, 4 steps each way"] - 10
    assert rows["z_i, random x_T"]["its neighbours' correlation"] == pytest.approx(0, abs=0.05)


def test_theta_is_chosen_on_other_renders_than_those_reported(bench, monkeypatch):
    """Suppose θ = 0.2 succeeds on the first renders alone, and every other θ on the rest alone."""
    calls = []

    def compare(captions, seen):
        calls.append(captions)
        apart = torch.arange(4) < 2
        return {"all": apart if len(calls) % 5 == 2 else ~apart}
    monkeypatch.setattr(evaluate, "compare", compare)
    monkeypatch.setattr(evaluate, "decode", lambda *args: flat(0, 4))
    rows = evaluate.edit(bench)[:-2]
    for row in rows:
        chosen = row["θ"] == "0.2 (chosen)"
        assert chosen == ("chosen" in row["θ"])
        percents = row["colour changed, shape kept %"], row["shape changed, colour kept %"]
        assert percents == (not chosen, not chosen)
    now = renders_and_others(bench, 4)[0][1]["shape"][:, 0]
    new = torch.tensor([SHAPES.index(caption.split()[-1]) for caption in calls[0]])
    assert (now == new).tolist() == [True, False] * 2          # the colour or the shape changes


# ---- CIFAR-10 -----------------------------------------------------------------------------------

def small_classifier(classes=10):
    """In place of the Classifier, which takes long on a CPU."""
    model = torch.nn.Module()
    model.body = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())
    model.head = torch.nn.Linear(48, classes)
    model.forward = lambda x: model.head(model.body(x))
    return model


@pytest.fixture
def cifar(weights, tmp_path, monkeypatch):  # noqa: F811
    """Weights as if of CIFAR-10, and 40 pictures; the later the class, the brighter."""
    for path in weights.glob("*.pt"):
        if path.stem != "judge":
            part = load_part(path)
            save_part(path, path.stem, part, {"data": "cifar10"})
    (weights / "upsampler.pt").unlink()
    monkeypatch.setattr(evaluate, "SHIPPED", tmp_path / "nothing shipped")
    monkeypatch.setattr(evaluate, "Classifier", small_classifier)
    classes = torch.arange(40) % 10
    images = torch.randint(20, (40, 3, 32, 32)) + 25 * classes.view(-1, 1, 1, 1)

    def first(*_, limit=40, **options):
        some = images[:limit].byte()
        return Dataset(some, [[]] * len(some), {"class": classes[:limit]}, evaluate.CIFAR_CLASSES,
                       flips=True)
    monkeypatch.setattr(evaluate, "load", first)
    return weights, first()


def test_cifar10_is_all_that_runs_on_its_weights(cifar, tmp_path, capsys, monkeypatch):
    folder, dataset = cifar
    save_judge(folder / "classifier.pt", small_classifier(), {"data": "cifar10"}, "classifier")
    argv = ["--weights", str(folder), "--n", "2", "--out", str(tmp_path / "out")]
    assert evaluate.main(argv) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"cifar10.md", "cifar10.png"}
    lines = capsys.readouterr().out.splitlines()
    for name, number in ("test set", 2), ("z_i of these", 2), ("diffusion prior", 20), \
            ("caption only", 20):
        assert any(line.startswith(f"| {name} | {number} |") for line in lines), name
    line, = (line for line in lines if line.startswith("| test set | 2 |"))
    assert abs(float(line.split("|")[4])) < 1e-3             # these are the training pictures, too

    def missing(*_, **options):
        raise OSError("no archive")
    monkeypatch.setattr(evaluate, "load", missing)
    assert evaluate.main(argv) == 0                            # the samples are judged all the same
    out, err = capsys.readouterr()
    assert "Fréchet distance" not in out and "no archive" in err


@pytest.mark.parametrize("learnt", [False, True])
def test_overfit_tells_what_was_learnt_by_heart_from_what_was_not(cifar, learnt, tmp_path, capsys,
                                                                   monkeypatch):
    folder, dataset = cifar
    for part in "clip", "decoder":
        path = folder / f"{part}.pt"
        save_part(path, part, load_part(path), {"data": "coco"})
    if learnt:
        monkeypatch.setattr(UnCLIP, "decode", lambda *_: to_float(dataset.images) * 0.9)
    argv = ["--weights", str(folder), "--out", str(tmp_path), "--data-dir", "somewhere"]
    assert evaluate.main(argv) == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| 40"))
    closest, own, other = (float(a.split()[0]) for a in line.split("|")[2:5])
    assert (closest == 100 and own > other + 10) if learnt else (closest < 20 and own < other + 3)
    assert (tmp_path / "overfit.png").exists()


def test_only_what_applies(cifar, capsys):
    assert evaluate.main(["--weights", str(cifar[0]), "--only", "edit"]) == 2
    assert "learnt from cifar10; choose cifar10" in capsys.readouterr().err


def test_a_classifier_learns_and_is_kept(cifar, monkeypatch):
    folder, dataset = cifar
    train = evaluate.train_classifier
    monkeypatch.setattr(evaluate, "train_classifier",
                        lambda *args: train(*args, steps=100, batch_size=40))
    bench = Bench(UnCLIP.load(folder), folder, folder)
    for known in (dataset, None):                              # trained; then read from its file
        classifier = load_classifier(bench, known)
        right = classifier(to_float(dataset.images)).argmax(1) == dataset.labels["class"]
        assert not classifier.training and right.float().mean() > 0.3        # chance is 0.1
    save_judge(folder / "classifier.pt", small_classifier(3), {}, "classifier")
    with pytest.raises(ValueError, match="not a classifier that fits"):
        load_classifier(bench, None)


def test_classifier():
    classifier = Classifier().eval()
    x = torch.randn(2, 3, 32, 32)
    assert classifier.body(x).shape == (2, 128) and classifier(x).shape == (2, 10)


def test_jittered_pictures_are_mirrored_and_moved():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 8).expand(200, -1, -1, -1)
    wide = torch.nn.functional.pad(x[0], (2, 2, 2, 2), mode="replicate")
    views = [view[:, dy:dy + 8, dx:dx + 8].flatten() for view in (wide, wide.flip(2))
             for dy in range(5) for dx in range(5)]
    same_as = (jittered(x, 2).flatten(1)[:, None] == torch.stack(views)).all(2)       # (200, 50)
    assert (same_as.sum(1) == 1).all() and same_as.any(0).sum() > 45
