"""Rendered shapes: every claim that data.py makes about pictures, captions and labels."""
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from data import (COLOURS, RELATIONS, SHAPES, SIZES, UNSEEN, describe, is_true, item, labels_of,
                  load, parse, render, sample_scene, scenes_for)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def scenes():
    return [item("train", i)[0] for i in range(3000)]


def outline(scene):
    """(left, top, width, height) in pixels of 32 of an only solid, measured on its picture.

    A solid is what changes if it alone is drawn in another colour: light, shadow and floor stay.
    """
    only, = scene.solids
    other = replace(scene, solids=[replace(only, colour="cyan" if only.colour == "red" else "red")])
    seen = render([scene, other], 64).float().diff(dim=0)[0].abs().sum(0) > 50
    rows, columns = seen.any(1).nonzero()[:, 0] / 2, seen.any(0).nonzero()[:, 0] / 2
    left, top = columns[0].item(), rows[0].item()
    return left, top, columns[-1].item() + 0.5 - left, rows[-1].item() + 0.5 - top


# ---- Pixels -------------------------------------------------------------------------------------


def test_pixels_survive_a_round_trip_and_are_clamped():
    every = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(every)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.equal(data.to_uint8(x), every)
    assert data.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_png_is_written_whole_or_not_at_all(tmp_path):
    image = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    data.write_png(tmp_path / "new" / "a.png", image)
    back = data.Image.open(tmp_path / "new" / "a.png")
    assert torch.equal(torch.from_numpy(np.array(back)).permute(2, 0, 1), image)

    def fail(beside):
        beside.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError):
        data.write_beside(tmp_path / "new" / "a.png", fail)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert data.Image.open(tmp_path / "new" / "a.png").size == (7, 5)


def test_grid_goes_row_by_row():
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 4, 6)
    sheet = data.grid(images, columns=2, gap=2)
    assert sheet.shape == (3, 4 + 2 + 4, 6 + 2 + 6)
    assert (sheet[:, :4, :6] == 0).all() and (sheet[:, :4, 8:] == 1).all()
    assert (sheet[:, 6:, :6] == 2).all() and (sheet[:, 4:6] > 200).all()


# ---- The law of the scenes ----------------------------------------------------------------------


def test_item_depends_on_seed_split_and_index_alone():
    few, more = (load("shapes", "train", limit=n, cache=False) for n in (3, 40))
    assert torch.equal(few.images, more.images[:3]) and few.captions == more.captions[:3]
    others = [load("shapes", "validation", limit=3, cache=False),
              load("shapes", "train", limit=3, seed=1, cache=False)]
    for other in others:
        assert not (other.images == few.images).flatten(1).all(1).any()
    assert not few.flips and len(few) == 3 and few.images.dtype == torch.uint8


def test_unseen_pairs_never_occur_unless_asked_for(scenes):
    pairs = Counter((s.colour, s.shape) for scene in scenes for s in scene.solids)
    validation = {(s.colour, s.shape) for i in range(1000) for s in item("validation", i)[0].solids}
    assert not UNSEEN & (pairs.keys() | validation)
    assert len(pairs) == len(COLOURS) * len(SHAPES) - len(UNSEEN)
    for colour, shape in UNSEEN:
        for scene in scenes_for(f"a {colour} {shape} left of a cone", 20):
            assert (scene.solids[0].colour, scene.solids[0].shape) == (colour, shape)
            assert (scene.solids[1].colour, scene.solids[1].shape) not in UNSEEN


def test_law_of_relations_shapes_and_stacks(scenes):
    share = Counter(scene.relation for scene in scenes)
    assert abs(share["alone"] / 3000 - 0.55) < 0.04 and abs(share["left of"] / 3000 - 0.225) < 0.04
    for scene in scenes:
        assert len(scene.solids) == 1 + (scene.relation != "alone")
        if scene.relation == "on top of":
            assert scene.solids[1].shape in ("cube", "cylinder")


@pytest.mark.parametrize("caption", ["a cube", "a red cube", "a small cone", "a large gray cube",
                                     "a cube on top of a blue cube"])
def test_scenes_for_follow_the_conditional_law(caption):
    """Against Bayes' rule itself: scenes of the training law, kept if the caption is true."""
    rng, law, drawn = random.Random(1), Counter(), Counter()

    def essence(scene):
        return tuple((s.shape, s.colour, s.size) for s in scene.solids)
    names = parse(caption)["solids"]
    for _ in range(12000):
        scene = sample_scene(rng, {"relation": parse(caption)["relation"]})
        if all(getattr(s, key) == word for s, named in zip(scene.solids, names)
               for key, word in named.items()):
            law[essence(scene)[0]] += 1
    drawn.update(essence(scene)[0] for scene in scenes_for(caption, 2000, seed=3))
    distance = sum(abs(law[key] / law.total() - drawn[key] / 2000) for key in law | drawn) / 2
    expected = 0.4 * sum((n / law.total()) ** 0.5 for n in law.values()) * (
        law.total() ** -0.5 + 2000 ** -0.5)    # what chance alone makes of it
    assert distance <= 1.5 * expected, (distance, expected)


# ---- Captions -----------------------------------------------------------------------------------


def test_captions_are_true_and_no_more_is_read_from_them_than_they_say(scenes):
    labels, rng = labels_of(scenes), random.Random(0)
    for i, scene in enumerate(scenes):
        caption = describe(scene, rng)
        assert is_true(caption, labels, i), caption
        given = parse(caption)
        assert given["relation"] == scene.relation and len(given["solids"]) == len(scene.solids)
        for names in given["solids"]:
            for word in names.values():
                assert f" {word}" in f" {caption}"
        named = sum(len(names) for names in given["solids"])
        vocabulary = [*COLOURS, *SHAPES, *SIZES]
        assert named == sum(word in vocabulary for word in caption.split())


def test_a_caption_is_false_of_a_changed_scene():
    caption = "a photo of a small red cube right of a large blue cone"
    truth = labels_of(scenes_for(caption, 1))
    assert is_true(caption, truth, 0)
    assert not is_true("a small red cube left of a large blue cone", truth, 0)
    assert not is_true("a small red cube", truth, 0)
    for key in ("shape", "colour", "size"):
        for slot in (0, 1):
            changed = {k: v.clone() for k, v in truth.items()}
            changed[key][0, slot] = (changed[key][0, slot] + 1) % 2
            assert not is_true(caption, changed, 0)
    assert not is_true(caption, {**truth, "relation": torch.tensor([2])}, 0)


def test_articles_wordings_and_what_is_no_caption(scenes):
    assert parse("an orange cone") == parse(" There is  an Orange cone")
    assert parse("a red cube right of a cone") == parse("a cone left of a red cube")
    for caption in ("", "a dog", "a cube and a cone", "cube", "a red", "a red large cube"):
        assert parse(caption) is None
    said = " ".join(text for i in range(500) for text in item("train", i)[1])
    assert "a orange" not in said and "an orange" in said and "right of" in said
    with pytest.raises(ValueError, match="'a dog'.*like"):
        scenes_for("a dog", 1)


# ---- Pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size, least, most", [("small", 8, 12), ("large", 14, 18.5)])
def test_size_is_what_a_solid_spans_in_the_picture(shape, size, least, most):
    for scene in scenes_for(f"a {size} red {shape}", 4):
        x, y = scene.solids[0].x, scene.solids[0].y
        left, top, width, height = outline(scene)
        assert least <= max(width, height) <= most and min(width, height) > 0.6 * least
        # The label says where it is, and nothing is cut off.
        assert abs((left + width / 2) / 16 - 1 - x) < 0.05
        assert abs((top + height / 2) / 16 - 1 - y) < 0.05
        assert left > 0 and top > 0 and left + width < 32 and top + height < 32


def test_left_is_left_and_up_is_up_in_labels_and_pixels():
    for caption, axis in (("a red cube left of a blue sphere", 2),
                          ("a blue sphere right of a red cube", 2),
                          ("a red cube on top of a blue cube", 1)):
        scenes = scenes_for(caption, 20)
        position = labels_of(scenes)["position"]
        assert (position[:, 0, 2 - axis] < position[:, 1, 2 - axis]).all()
        image = render(scenes).float()
        ramp = torch.arange(32.0).view((-1, 1) if axis == 1 else (1, -1))
        for a, b, side in ((0, 2, 0), (2, 0, 1)):    # red pixels, then blue ones
            mask = (image[:, a] - image[:, b] > 60).float()
            centre = (mask * ramp).sum((1, 2)) / mask.sum((1, 2)) / 16 - 1
            other = position[:, 1 - side, 2 - axis]
            assert ((centre < other) if side == 0 else (centre > other)).all()


def test_both_solids_of_a_pair_can_be_seen(scenes):
    pairs = [scene for scene in scenes if scene.relation != "alone"][:80]
    before = render(pairs).float()
    for slot in (0, 1):
        others = [replace(scene, solids=[replace(s, colour="gray" if s.colour != "gray" else "red")
                                         if i == slot else s for i, s in enumerate(scene.solids)])
                  for scene in pairs]
        changed = (render(others).float() - before).abs().sum(1) > 30
        assert changed.sum((1, 2)).min() > 12    # pixels of 32 x 32


def test_the_same_scene_is_the_same_picture_at_any_size(scenes):
    fine, coarse = render(scenes[:12], 128).float(), render(scenes[:12], 32).float()
    assert (F.avg_pool2d(fine, 4) - coarse).abs().mean() < 1.2
    assert (F.avg_pool2d(fine, 4) - coarse).abs().mean((1, 2, 3)).max() < 2.5
    alone = torch.cat([render([scene]) for scene in scenes[:12]]).float()
    assert (alone - coarse).abs().max() <= 1    # nor does the batch matter


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_picture(scenes):
    assert (render(scenes[:20], device="cuda").float() - render(scenes[:20]).float()
            ).abs().mean() < 0.1


# ---- The data set -------------------------------------------------------------------------------


def test_rendered_sets_are_cached_and_a_damaged_file_is_drawn_anew(capfd):
    first = load("shapes", "train", limit=5)
    assert "rendering" in capfd.readouterr().err
    path, = data.cache_folder().iterdir()
    again = load("shapes", "train", limit=5)
    assert "rendering" not in capfd.readouterr().err
    half = path.read_bytes()[:path.stat().st_size // 2]
    path.unlink()    # a file that is open must not be cut in place
    path.write_bytes(half)
    for other in (again, load("shapes", "train", limit=5)):
        assert torch.equal(other.images, first.images) and other.captions == first.captions
        for key, value in first.labels.items():
            assert torch.equal(other.labels[key], value)
    assert "rendering" in capfd.readouterr().err
    assert list(data.cache_folder().iterdir()) == [path]


def test_labels_have_their_shapes(scenes):
    labels = labels_of(scenes[:50])
    shapes = {"count": (50,), "relation": (50,), "shape": (50, 2), "colour": (50, 2),
              "size": (50, 2), "position": (50, 2, 2), "yaw": (50, 2), "floor": (50, 3)}
    assert {key: tuple(value.shape) for key, value in labels.items()} == shapes
    absent = labels["count"] == 1
    assert (labels["shape"][absent, 1] == -1).all() and (labels["position"][absent, 1] == 0).all()
    assert (labels["relation"] == 0).equal(absent) and labels["relation"].max() < len(RELATIONS)
    assert labels["position"].dtype == labels["floor"].dtype == torch.float32


@pytest.mark.parametrize("wrong, words", [
    (dict(name="dogs"), "'dogs'.*shapes"), (dict(split="test"), "'test'.*validation"),
    (dict(size=4), "4 pixels"), (dict(limit=0), "limit of 0")])
def test_user_errors_name_thing_value_and_remedy(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        load(**{**dict(name="shapes", split="train"), **wrong})
    assert "\n" not in str(error.value) and "choose" in str(error.value)
