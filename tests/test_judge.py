"""judge.py: does each measure give the answer that is known, and does a judge learn to read?"""
import math
import random

import pytest
import torch
import torch.nn.functional as F

import judge as judges
from checkpoints import SHIPPED
from data import LETTERS, a_word
from judge import (Judge, JudgeConfig, compare, energy_distance, entropy, first_guess, form,
                   frechet, gradient_energy, judge_scenes, judge_signs, larger, load_judge, moved,
                   psnr, ratio, same, scene_of, shares, spread, train_judge, wilson)
from shapes import UNSEEN, item, labels_of, render, scenes_for, to_float, to_uint8


def flat(value, n=2, side=32):
    return torch.full((n, 3, side, side), value, dtype=torch.uint8)


class Oracle:
    """A judge that has been told what is in the pictures."""

    def __init__(self, scenes):
        self.labels = labels_of(scenes)

    def read(self, images):
        return self.labels


# ---- Measures ------------------------------------------------------------------------------------

def test_wilsons_interval_is_the_textbooks():
    """5 of 10: 0.2366 to 0.7634; none of 10: 0 to 0.2775 (Brown, Cai & DasGupta 2001)."""
    assert wilson(torch.arange(10) < 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(torch.zeros(10, dtype=bool)) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(torch.arange(50) < 45) == pytest.approx((0.7864, 0.9565), abs=1e-4)


def test_a_ratio_is_the_quotient_of_the_means_and_its_interval_holds_the_truth():
    """If x is twice `to`, picture by picture, then nothing is unsure about it."""
    torch.manual_seed(0)
    to = torch.rand(30) + 1
    assert torch.allclose(ratio(2 * to, to), torch.tensor(2.0))
    hits = 0
    for _ in range(500):
        values = ratio(6 + torch.randn(50), 2 + 0.5 * torch.randn(50))           # 3 is the truth
        hits += abs(values.mean() - 3) < 1.96 * values.std() / math.sqrt(50)
    assert hits / 500 == pytest.approx(0.95, abs=0.03)


def test_psnr_sharpness_and_entropy_of_what_is_known():
    assert psnr(flat(100), flat(105)).tolist() == pytest.approx([20 * math.log10(51)] * 2)
    assert psnr(flat(7), flat(7)).tolist() == [math.inf] * 2
    board = ((torch.arange(32) + torch.arange(32)[:, None]) % 2 * 255).byte().expand(2, 3, -1, -1)
    large = board.repeat_interleave(2, 2).repeat_interleave(2, 3)      # 31 of 63 steps are edges
    assert gradient_energy(flat(50)).tolist() == [0, 0]
    assert gradient_energy(board).tolist() == pytest.approx([8, 8])    # 2² each way
    assert gradient_energy(large).tolist() == pytest.approx([8 * 31 / 63] * 2)
    assert entropy(torch.arange(8).repeat(5), 8).mean() == pytest.approx(1)
    assert entropy(torch.full((9,), 3), 8).mean() == pytest.approx(0)
    assert entropy(torch.tensor([0, 1] * 4), 8).mean() == pytest.approx(1 / 3)
    assert entropy(torch.tensor([], dtype=torch.long), 8).numel() == 0


def test_one_share_is_larger_only_if_the_difference_is_more_than_chance():
    share = lambda right, of: torch.arange(of) < right
    assert larger(share(90, 100), share(70, 100)) and not larger(share(70, 100), share(90, 100))
    assert not larger(share(9, 10), share(7, 10)) and not larger(share(50, 100), share(50, 100))
    torch.manual_seed(0)                   # of equal shares it says so in one of forty
    apart = lambda: (torch.rand(80) < 0.4, torch.rand(81) < 0.4)
    pairs = lambda: (torch.rand(2, 80) < 0.1) | (torch.rand(80) < 0.3)      # most is shared
    for draw in apart, pairs:
        assert 0.01 < sum(larger(*draw()) for _ in range(2000)) / 2000 < 0.04
    some, more = torch.arange(100) < 70, torch.arange(100) < 80      # ten of a hundred are mended
    assert larger(more, some) and not larger(more[:-1], some)        # or are they of others?


def test_one_entropy_is_larger_only_if_the_difference_is_more_than_chance():
    torch.manual_seed(0)
    even, uneven = torch.ones(8), torch.tensor([5.0, 3, 2, 2, 1, 1, 1, 1])
    draw = lambda weights: entropy(torch.multinomial(weights, 256, replacement=True), 8)
    assert sum(larger(draw(even), draw(uneven)) for _ in range(200)) > 190
    said = [larger(draw(weights), draw(weights)) for weights in (even, uneven) for _ in range(1000)]
    assert sum(said) / 2000 < 0.04


def test_shares_of_two_causes_are_those_of_the_variances_they_were_made_with():
    """x_ij = a_i + b_j + c_ij with variances 4, 1 and 0, then 0, 0 and 1, then 4, 1 and 5."""
    torch.manual_seed(0)
    a, b, c = torch.randn(60, 1, 50), torch.randn(1, 60, 50), torch.randn(60, 60, 50)
    first, second = (v.var(dim).sum().item() for v, dim in ((2 * a, 0), (b, 1)))
    both = first + second
    assert shares(2 * a + b) == pytest.approx([first / both, second / both, 0], abs=1e-5)
    assert shares(c) == pytest.approx([0, 0, 1], abs=0.01)
    assert shares(2 * a + b + math.sqrt(5) * c) == pytest.approx([0.4, 0.1, 0.5], abs=0.02)


def test_energy_distance_of_gaussians_is_the_closed_form():
    """In one dimension E|N(0, s²)| = s·√(2/π), so N(0, 1) and N(m, 1) have a closed form."""
    torch.manual_seed(0)
    x, y, m = torch.randn(2000, 1), torch.randn(2000, 1) + 1, 1.0
    folded = 2 / math.sqrt(math.pi) * math.exp(-m ** 2 / 4) + m * math.erf(m / 2)     # E|N(m, 2)|
    assert energy_distance(x, y).item() == pytest.approx(2 * folded - 4 / math.sqrt(math.pi),
                                                         abs=0.04)
    point = 2 * math.sqrt(2 / math.pi) - 2 / math.sqrt(math.pi)        # 2 E|X| - E|X-X'|
    assert energy_distance(x, torch.zeros(2, 1)).item() == pytest.approx(point, abs=0.03)


def test_energy_distance_and_spread_are_unbiased_for_small_samples():
    """Many samples of one law: 0 and the true trace on average, however small they are."""
    torch.manual_seed(0)
    x, y = torch.randn(4000, 3, 2), torch.randn(4000, 5, 2)
    distances = energy_distance(x, y)
    assert abs(distances.mean()) < 4 * distances.std() / math.sqrt(4000)
    assert spread(2 * x).mean().item() == pytest.approx(8, rel=0.05)
    assert spread(torch.ones(7, 2, 3)).tolist() == [0] * 7


def test_frechet_distance_is_the_closed_form():
    """0 of the same; of a copy a·x + b it is |(a − 1)μ + b|² + (a − 1)² tr C."""
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


# ---- Are the asked solids there? -----------------------------------------------------------------

@pytest.mark.parametrize("asked, drawn, wrong", [
    ("a red cube on top of a blue cylinder", "a red cube left of a blue cylinder", "relation"),
    ("a red cube on top of a blue cylinder", "a blue cube on top of a red cylinder", "colour"),
    ("a red cube on top of a blue cylinder", "a green cube on top of a blue cylinder",
     "colour, colour set"),
    ("a red cone left of a blue cube", "a red cube left of a blue cone", "shape"),
    ("a red cone left of a blue cube", "a red cone right of a blue cube", "colour, shape"),
    ("a red cube", "a red cube left of a red cube",
     "relation, colour, colour set, shape, shape set")])
def test_compare_tells_of_a_picture_exactly_what_is_wrong_in_it(asked, drawn, wrong):
    seen = labels_of(scenes_for(drawn, 1))
    right = compare([asked], seen)
    assert {key for key, value in right.items() if not value} == {*wrong.split(", "), "all"}
    assert same(seen, labels_of(scenes_for(asked, 1))).item() == (wrong == "relation")


# ---- The judge -----------------------------------------------------------------------------------

def test_a_judge_is_shown_the_unseen_pairs_too_and_a_reader_the_unseen_words():
    pairs = {(s.colour, s.shape) for scene in judge_scenes(400) for s in scene.solids}
    assert UNSEEN <= pairs
    images, labels = judge_signs(100)
    assert images.shape == (100, 3, 32, 32) and labels["letters"].shape == (100, 4)
    words = {"".join(LETTERS[k] for k in letters) for letters in labels["letters"]}
    rng = random.Random(0)
    unseen = {a_word(rng, unseen=True) for _ in range(5_000)}                # next to all there are
    assert 30 < len(words & unseen) < 70


def test_larger_pictures_are_read_as_their_area_means():
    judge, pictures = Judge(JudgeConfig()).eval(), torch.randint(256, (3, 3, 64, 64)).byte()
    halves = to_uint8(F.avg_pool2d(to_float(pictures), 2))
    for key, value in judge.read(pictures).items():
        assert torch.allclose(value.float(), judge.read(halves)[key].float(), atol=0.05), key


def test_training_teaches_a_classifier_what_the_labels_say(monkeypatch):
    """Dark and light pictures, which it has not seen; here its layers are mere area means."""
    means = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())       # (B, 48)
    monkeypatch.setattr(judges, "photo_layers", lambda: (means, 48))
    classes = torch.arange(200) % 2
    pictures = (torch.randint(60, (200, 3, 32, 32)) + 100 * classes.view(-1, 1, 1, 1)).byte()
    for truth, right in (classes, 1), (1 - classes, 0):
        judge = train_judge(Judge(JudgeConfig(2)), pictures[:100], {"class": truth[:100]}, moved,
                            60, 20)
        assert ((judge.read(pictures[100:])["class"] == classes[100:]).float().mean() - right
                ).abs() < 0.1


def test_the_classifier_is_shown_pictures_moved_and_mirrored():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 8, 8)
    wide = F.pad(x, (2, 2, 2, 2), mode="replicate")
    views = {(m.flip(3) if k else m)[0].numpy().tobytes(): (dy, dx, k) for k in (0, 1)
             for dy in range(5) for dx in range(5) for m in [wide[..., dy:dy + 8, dx:dx + 8]]}
    found = {views[moved(x, 2)[0].numpy().tobytes()] for _ in range(200)}
    assert len(views) == 50 and len(found) > 45


@pytest.mark.parametrize("part", ["judge", "reader"])
def test_a_judge_is_trained_once_and_kept(part, tmp_path, monkeypatch, capsys):
    calls, train = [], train_judge
    monkeypatch.setattr(judges, "SHIPPED", tmp_path / "nothing shipped")
    monkeypatch.setattr(judges, "judge_scenes", lambda N, scenes=judge_scenes(20): scenes)
    monkeypatch.setattr(judges, "judge_signs", lambda N, signs=judge_signs(20): signs)
    monkeypatch.setattr(judges, "train_judge", lambda judge, images, labels, vary, steps: (
        calls.append(steps), train(judge, images, labels, vary, 2, 8))[1])
    pictures = torch.randint(256, (5, 3, 32, 32)).byte()
    first, second = (load_judge(tmp_path, part).read(pictures) for _ in range(2))
    assert calls == [1500] and "training one" in capsys.readouterr().err
    for key, value in first.items():                              # it was kept in half precision
        assert torch.allclose(value.float(), second[key].float(), atol=0.05), key


def test_the_shipped_judge_reads_validation_renders():
    scenes = [item("validation", i)[0] for i in range(100)]
    seen, truth = load_judge(SHIPPED / "shapes").read(render(scenes)), labels_of(scenes)
    one = truth["count"] == 1
    assert seen.keys() <= truth.keys() and (seen["shape"][seen["count"] == 1, 1] == -1).all()
    assert (seen["relation"] == truth["relation"]).float().mean() > 0.97
    assert same(seen, truth)[one].float().mean() > 0.97


# ---- Form ----------------------------------------------------------------------------------------

def test_a_scene_made_of_its_own_nine_numbers_looks_the_same():
    """The scene made of a scene's own numbers is drawn as that scene."""
    for caption in ("a cube", "a sphere", "a cylinder", "a cone"):
        scene, = scenes_for(caption, 1)
        solid, (right, up, away) = scene.solids[0], scene.light
        numbers = torch.tensor([solid.x, solid.y, solid.k, solid.yaw, math.atan2(right, -away),
                                math.asin(up), *scene.floor])
        again = render([scene_of(numbers, solid.shape, solid.colour), scene])
        assert (again[0].int() - again[1].int()).abs().max() <= 2


def bitten(picture, solid, side=7):
    """A picture whose solid lacks a square, through which its floor is seen."""
    picture, S = picture.clone(), picture.shape[-1]
    top, left = (round((v + 1) / 2 * S) - side // 2 for v in (solid.y, solid.x))
    picture[:, top:top + side, left:left + side] = picture[:, -1:, :1]
    return picture


def test_form_is_the_psnr_in_a_box_around_the_solid_that_fits(monkeypatch):
    """Where the true scene is found it is infinite. Only what is near the solid matters."""
    scene, = scenes_for("a small red cube", 1)
    monkeypatch.setattr(judges, "fit_scenes", lambda images, *_: [scene] * len(images))
    x, = render([scene], 64)
    solid, far = scene.solids[0], x.clone()
    far[:, :, 0 if solid.x > 0 else -1] = 0                          # the edge it does not touch
    decibels, drawn = form(torch.stack([x, far, bitten(x, solid)]), [("cube", "red")] * 3, None)
    assert torch.equal(drawn, torch.stack([x] * 3))
    assert decibels[:2].tolist() == [math.inf] * 2 and 5 < decibels[2] < 30


def test_a_sound_solid_has_more_form_than_a_dented_or_another_one():
    """Renders of the asked solid in any scene fit; a cube that lacks a piece does not, nor a sphere
    that should be a cube."""
    scenes = [scenes_for(f"a large {solid}", 1, 3)[0]
              for solid in ("red cube", "red cube", "red sphere")]
    scenes[1], = scenes_for("a large red cube", 1, 4)
    cube, another, sphere = render(scenes)
    pictures = torch.stack([cube, another, bitten(cube, scenes[0].solids[0], 5), sphere])
    oracle = Oracle([scenes[0], scenes[1], scenes[0], scenes[2]])
    decibels, drawn = form(pictures, [("cube", "red")] * 4, oracle, candidates=10, plan=((32, 14),))
    assert drawn.shape == pictures.shape
    assert decibels[:2].min() > 18 and decibels[:2].min() > decibels[2:].max() + 3


def test_form_begins_at_the_judges_reading_and_the_floor_that_is_seen():
    scenes = [scenes_for("a small green cone", 1, i)[0] for i in range(4)]
    guess, solids = first_guess(render(scenes), Oracle(scenes)), [s.solids[0] for s in scenes]
    assert torch.allclose(guess[:, :2], torch.tensor([[s.x, s.y] for s in solids]))
    assert torch.allclose(guess[:, 2], torch.tensor([s.k for s in solids]), atol=0.12)
    assert torch.allclose(guess[:, 6:], torch.tensor([s.floor for s in scenes]), atol=0.1)
