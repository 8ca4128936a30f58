"""The rendered world: what shapes.py promises of pixels, scenes, captions and pictures."""
import hashlib
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import shapes
from shapes import (COLOURS, RELATIONS, SHAPES, SIZES, UNSEEN, Solid, describe, is_true,
                    item, labels_of, parse_caption, render, sample_scene, scenes_for)


@pytest.fixture(scope="module")
def scenes():
    return [item("train", i)[0] for i in range(600)]


def seen(scenes, slot, size=32):
    """How much each pixel changes with a solid's colour: light, shadow and floor do not."""
    changed = []
    for scene in scenes:
        solids = list(scene.solids)
        colour = "red" if solids[slot].colour != "red" else "cyan"
        solids[slot] = replace(solids[slot], colour=colour)
        changed.append(replace(scene, solids=solids))
    return (render(changed, size).float() - render(scenes, size)).abs().sum(1)


# ---- Pixels -------------------------------------------------------------------------------------

def test_pixels_survive_the_way_to_floats_and_back_and_are_clamped():
    every = torch.arange(256, dtype=torch.uint8)
    x = shapes.to_float(every)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.equal(shapes.to_uint8(x), every)
    assert shapes.to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path, image = tmp_path / "new" / "a.png", torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    shapes.write_png(path, image)
    with pytest.raises(TypeError):                   # after it has written half a file
        shapes.write_safely(path, lambda temporary: temporary.write_text("half") + "")
    assert list(path.parent.iterdir()) == [path] and Image.open(path).size == (7, 5)


# ---- Scenes and captions ------------------------------------------------------------------------

def test_items_are_those_of_renderer_version_5_and_of_their_seed_split_and_index_alone():
    """If this fails, raise RENDERER_VERSION: trained weights and caches know the old pictures."""
    random.seed(5)
    said = "\n".join(text for i in range(200) for text in item("train", i)[1])
    assert shapes.RENDERER_VERSION == 5
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == "d1fb63315402573f"
    means = render([item("train", i)[0] for i in range(12)]).double().mean((1, 2, 3))
    expected = torch.tensor([216.3815, 181.3424, 188.0075, 190.5241, 176.3675, 172.6527, 182.7949,
                             202.4925, 196.8577, 195.0251, 196.5397, 184.5758])
    assert (means - expected).abs().max() < 0.01    # another CPU may round a pixel otherwise
    others = [item("train", 8), item("validation", 7), item("train", 7, seed=1)]
    assert all(other[0].light != item("train", 7)[0].light for other in others)


def test_unseen_pairs_never_occur_unless_they_are_asked_for(scenes):
    pairs = {(s.colour, s.shape) for scene in scenes for s in scene.solids}
    assert not UNSEEN & pairs and len(pairs) == len(COLOURS) * len(SHAPES) - len(UNSEEN)
    for colour, shape in UNSEEN:
        for scene in scenes_for(f"a {colour} {shape} left of a cone", 20):
            assert (scene.solids[0].colour, scene.solids[0].shape) == (colour, shape)
            assert (scene.solids[1].colour, scene.solids[1].shape) not in UNSEEN


@pytest.mark.parametrize("caption", ["a large gray cube", "a cone on top of a blue cube"])
def test_scenes_for_a_caption_are_those_of_which_it_is_true(caption):
    """Against Bayes' rule: scenes drawn freely, of which only those are kept that fit."""
    rng, given, kept = random.Random(1), parse_caption(caption), Counter()
    kind = lambda scene: (scene.solids[0].shape, scene.solids[0].colour, scene.solids[0].size)
    for _ in range(5000):
        scene = sample_scene(rng, {"relation": given["relation"]})
        if all(getattr(s, key) == word for s, names in zip(scene.solids, given["solids"])
               for key, word in names.items()):
            kept[kind(scene)] += 1
    drawn = Counter(map(kind, scenes_for(caption, 1000, seed=3)))
    distance = sum(abs(kept[key] / kept.total() - drawn[key] / 1000) for key in kept | drawn) / 2
    by_chance = 0.4 * sum((n / kept.total()) ** 0.5 for n in kept.values()) * (
        kept.total() ** -0.5 + 1000 ** -0.5)
    assert distance <= 1.5 * by_chance, (distance, by_chance)


def test_labels_say_what_is_absent(scenes):
    labels = labels_of(scenes[:50])
    absent = labels["count"] == 1
    assert (labels["shape"][absent, 1] == -1).all() and (labels["position"][absent, 1] == 0).all()
    assert (labels["relation"] == 0).equal(absent) and labels["relation"].max() < len(RELATIONS)


def test_captions_are_true_and_parsed_as_no_more_than_they_say(scenes):
    labels, rng = labels_of(scenes), random.Random(0)
    for i, scene in enumerate(scenes):
        caption = describe(scene, rng)
        assert is_true(caption, labels, i), caption
        given = parse_caption(caption)
        assert given["relation"] == scene.relation and len(given["solids"]) == len(scene.solids)
        words = [word for names in given["solids"] for word in names.values()]
        assert sorted(words) == sorted(word for word in caption.split()
                                       if word in [*COLOURS, *SHAPES, *SIZES])


def test_a_caption_is_false_of_a_changed_scene_and_some_texts_are_no_captions():
    caption = "a photo of a small red cube right of a large blue cone"
    truth = labels_of(scenes_for(caption, 1))
    assert is_true(caption, truth, 0) and not is_true("a small red cube", truth, 0)
    assert not is_true("a small red cube left of a large blue cone", truth, 0)
    for key in ("shape", "colour", "size"):
        for slot in (0, 1):
            changed = truth[key].clone()
            changed[0, slot] = (changed[0, slot] + 1) % 2
            assert not is_true(caption, {**truth, key: changed}, 0)
    assert parse_caption("an orange cone") == parse_caption(" There is  an Orange cone")
    assert parse_caption("a red cube right of a cone") == parse_caption("a cone left of a red cube")
    for text in ("", "a dog", "a cube and a cone", "cube", "a red", "a red large cube"):
        assert parse_caption(text) is None
    with pytest.raises(ValueError, match="'a dog'.*like"):
        scenes_for("a dog", 1)


# ---- Pictures -----------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, height, chord", [
    ("cube", 1, 2), ("sphere", 1, 2), ("sphere", 1.6, 1.6), ("cylinder", 0.3, 2),
    ("cone", 1.05, 1), ("cone", 0, 2)])
def test_a_ray_through_a_solids_axis_crosses_the_known_chord(shape, height, chord):
    solid = shapes.in_torch(Solid(shape, "red", "small", yaw=0.0, k=0.5, stands=(0.3, 0.0, -0.2)))
    d = torch.tensor([[1e-6], [1e-6], [1.0]])
    o = torch.tensor([[0.3], [0.5 * height + 1e-5], [-0.2]]) - 3 * d
    enter, leave = shapes.crossing(solid, o, d)
    assert abs(leave - enter - 0.5 * chord) < 1e-3 and abs((enter + leave) / 2 - 3) < 1e-3
    enter, leave = shapes.crossing(solid, o + torch.tensor([[0.6], [0], [0]]), d)    # passes by
    assert not enter < leave


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size, least, most", [("small", 8, 12), ("large", 14, 18.5)])
def test_size_is_what_a_solid_spans_and_position_is_its_middle(shape, size, least, most):
    scene, = scenes_for(f"a {size} red {shape}", 1)
    mask = seen([scene], 0, 64)[0] > 50
    rows, columns = mask.any(1).nonzero() / 2, mask.any(0).nonzero() / 2    # pixels of 32
    top, bottom, left, right = rows[0], rows[-1] + 0.5, columns[0], columns[-1] + 0.5
    width, height = right - left, bottom - top
    assert least <= max(width, height) <= most and min(width, height) > 0.6 * least
    assert left > 0 and top > 0 and right < 32 and bottom < 32
    assert abs((left + right) / 32 - 1 - scene.solids[0].x) < 0.05
    assert abs((top + bottom) / 32 - 1 - scene.solids[0].y) < 0.05


@pytest.mark.parametrize("caption, axis", [
    ("a red cube left of a blue sphere", 0), ("a blue sphere right of a red cube", 0),
    ("a red cube on top of a blue cube", 1)])
def test_left_is_left_and_up_is_up_in_labels_and_in_pixels(caption, axis):
    drawn = scenes_for(caption, 4)
    position = labels_of(drawn)["position"][:, :, axis]
    assert (position[:, 0] < position[:, 1]).all()
    image, ramp = render(drawn).float(), torch.arange(32.0).view((1, -1) if axis == 0 else (-1, 1))
    red, blue = ((image[:, a] - image[:, b] > 60).float() for a, b in ((0, 2), (2, 0)))
    centre = [(mask * ramp).sum((1, 2)) / mask.sum((1, 2)) for mask in (red, blue)]
    assert (centre[0] < centre[1]).all()


def test_both_solids_of_a_pair_can_be_seen_and_a_scene_is_the_same_picture_at_any_size(scenes):
    pairs = [scene for scene in scenes if scene.relation != "alone"][:20]
    for slot in (0, 1):
        assert (seen(pairs, slot) > 30).sum((1, 2)).min() > 12    # pixels of 32 x 32
    fine, coarse = (torch.stack([shapes.trace(s, size) for s in scenes[:12]]) for size in (128, 32))
    assert (F.avg_pool2d(fine, 4) - coarse).square().mean() < 4 * 10 ** -4.4    # 44 dB below white


def test_a_picture_has_the_same_bytes_in_any_batch_and_from_any_process(scenes, monkeypatch):
    threads, together = torch.get_num_threads(), render(scenes[:5])
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 32, 32)
    assert torch.equal(torch.cat([render([scene]) for scene in scenes[:5]]), together)
    monkeypatch.setattr(shapes, "MANY", 5)
    random_state = torch.get_rng_state()
    try:
        torch.set_num_threads(2)
        assert torch.equal(render(scenes[:5]), together)           # by two processes
        assert torch.get_num_threads() == 2    # render() changes it and must put it back
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), random_state)        # nor are random numbers used up
