"""Pictures with captions.

unCLIP learns from pairs (picture x, caption y). The default pairs are drawn here, by a small ray
tracer: one or two solids on a floor, in light and shadow. Nothing is downloaded, the truth about
each picture is known, and four pairs of colour and shape are held back, so that composing can be
told from remembering.
A caption names some of what is to be seen: shapes, colours, sizes, the relation. Where a solid
stands, how it is turned, the light and the floor's tint are never named: they are the
"non-essential details" (paper, sec. 3.1) that a picture's variations are free to change.

A data set is one uint8 tensor (N, 3, H, W) and a list of captions for each image: a batch is an
index.

Next chapter: train.py.
"""
import codecs
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import sys
import tarfile
import urllib.request
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

# ---- Pixels -------------------------------------------------------------------------------------


def to_float(images):
    """uint8 0..255 → float32 in [-1, 1]: what every network sees."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1], clamped and rounded → uint8 0..255: what is stored and shown."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_beside(path, write):
    """Call write(temporary path), then rename: whatever happens, `path` is whole or untouched."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_png(path, image):
    """Write a uint8 (3, H, W) tensor as a PNG."""
    assert image.dtype == torch.uint8 and image.ndim == 3, (image.dtype, image.shape)
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    write_beside(path, lambda beside: picture.save(beside, format="png"))


def grid(images, columns, gap=2):
    """uint8 (N, 3, H, W) → one uint8 (3, H', W'), row by row, with light gaps of `gap` pixels."""
    N, C, H, W = images.shape
    rows = math.ceil(N / columns)
    sheet = images.new_full((C, rows * (H + gap) - gap, columns * (W + gap) - gap), 245)
    for i, image in enumerate(images):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        sheet[:, top:top + H, left:left + W] = image
    return sheet


# ---- Data sets ----------------------------------------------------------------------------------


@dataclass
class Dataset:
    """Pictures and what is known about them.

    images    uint8 (N, 3, H, W)
    captions  N lists of one or more captions
    labels    ground truth, a dict of tensors whose first axis is N ({} where none is known)
    classes   the names behind labels["class"] ([] where there are none)
    flips     does a mirrored picture keep its captions? Not where they say "left of"
    """
    images: torch.Tensor
    captions: list
    labels: dict
    classes: list
    flips: bool

    def __len__(self):
        return len(self.images)


DATASETS = ("shapes", "cifar10", "coco", "folder")
SPLITS = ("train", "validation")


def load(name, split, size=32, limit=None, data_dir=None, seed=0, cache=True):
    """The data set `name` ("shapes", "cifar10", "coco" or "folder") → Dataset.

    split     "train" or "validation"
    size      height and width of the images, in pixels
    limit     how many images; None: all of them
    data_dir  where the files lie; the rendered shapes need none
    seed      of whatever is drawn at random: the shapes, or which images a limit keeps
    cache     keep what took long to make in $UNCLIP_CACHE, or else in ~/.cache/unclip
    Raises ValueError or OSError, one line that says what to do.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if size < 8:
        raise ValueError(f"images of {size} pixels are too small: choose a size of 8 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves no images: choose 1 or more")
    make = {"shapes": shapes, "cifar10": cifar10, "coco": coco, "folder": folder}[name]
    return make(split=split, size=size, limit=limit, data_dir=data_dir, seed=seed, cache=cache)


def cache_folder():
    return Path(os.environ.get("UNCLIP_CACHE") or Path.home() / ".cache" / "unclip")


# ---- Shapes: what there is to see, and how it is said -------------------------------------------

SHAPES = ["cube", "sphere", "cylinder", "cone"]
COLOURS = {"red": (214, 44, 42), "green": (52, 164, 74), "blue": (44, 92, 220),
           "yellow": (250, 210, 40), "purple": (146, 66, 190), "orange": (250, 130, 24),
           "cyan": (48, 196, 212), "gray": (112, 114, 118)}
SIZES = ["small", "large"]
RELATIONS = ["alone", "left of", "on top of"]    # "right of" is another wording of "left of"
UNSEEN = {("purple", "cylinder"), ("orange", "sphere"), ("cyan", "cone"), ("gray", "sphere")}

RENDERER_VERSION = 2    # raise it whenever a picture or a caption changes: it names the cache


@dataclass
class Solid:
    shape: str
    colour: str
    size: str
    yaw: float             # radians, about the vertical
    k: float = 0           # its radius or half its edge; 1 is half a picture
    x: float = 0           # centre of its outline in the picture, -1 left ... 1 right
    y: float = 0           # and -1 top ... 1 bottom
    stands: tuple = ()     # where its base stands in the world: right, up, away from us


@dataclass
class Scene:
    relation: str
    solids: list           # one, or two: the left or upper one first
    floor: tuple           # its tint, r, g, b in 0..1
    light: tuple           # unit vector towards the light: right, up, away from us


def sample_scene(rng, given=None):
    """Draw a scene with a random.Random. `given`, as from parse(), fixes some of it.

    What is free follows the law of the training set: colour and shape of a solid are uniform over
    the pairs that may be seen (given both, any pair may), its size is independent of them.
    """
    given = given or {}
    relation = given.get("relation") or rng.choices(RELATIONS, (0.55, 0.225, 0.225))[0]
    fixed = given.get("solids") or [{}] * (1 if relation == "alone" else 2)
    solids = []
    for slot, names in enumerate(fixed):
        while True:        # rejection: the pairs that remain stay equally likely
            carries = relation == "on top of" and slot == 1
            shape = names.get("shape") or rng.choice(["cube", "cylinder"] if carries else SHAPES)
            colour = names.get("colour") or rng.choice(list(COLOURS))
            if (colour, shape) not in UNSEEN or {"shape", "colour"} <= names.keys():
                break
        size = names.get("size") or rng.choice(SIZES)
        solids.append(Solid(shape, colour, size, yaw=rng.uniform(0, math.pi / 2)))
    arrange(solids, relation, rng)
    hue, depth, value = rng.random(), rng.uniform(0.05, 0.2), rng.uniform(0.86, 0.96)
    floor = tuple(value * (1 - depth * (0.5 + 0.5 * math.cos(2 * math.pi * (hue - c / 3))))
                  for c in range(3))
    azimuth, height = math.radians(rng.uniform(-75, 75)), math.radians(rng.uniform(38, 56))
    light = (math.sin(azimuth) * math.cos(height), math.sin(height),
             -math.cos(azimuth) * math.cos(height))
    return Scene(relation, solids, floor, light)


def describe(scene, rng):
    """One caption that is true of the scene.

    *Which* attributes it names is drawn without looking at their values, so it tells no more than
    it says: p(scene | caption) is the law of scenes with the named attributes held fixed.
    """
    alone = scene.relation == "alone"
    nouns = []
    for solid in scene.solids:
        words = [solid.shape]
        if rng.random() < (0.75 if alone else 0.9):
            words.insert(0, solid.colour)
        if rng.random() < 0.4:
            words.insert(0, solid.size)
        nouns.append(("an " if words[0] == "orange" else "a ") + " ".join(words))
    relation = scene.relation
    if relation == "left of" and rng.random() < 0.5:
        relation, nouns = "right of", nouns[::-1]
    return rng.choice(["", "", "", "a photo of ", "a picture of ", "there is "]) + \
        (nouns[0] if alone else f"{nouns[0]} {relation} {nouns[1]}")


NOUN = rf"an? (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
CAPTION = re.compile(rf"(?:a photo of |a picture of |there is )?{NOUN}"
                     rf"(?: (left of|right of|on top of) {NOUN})?")


def parse(caption):
    """What a caption fixes: {"relation": ..., "solids": [{"shape": ...}, ...]}, or else None.

    Each solid has what is named of "shape", "colour", "size"; the left or upper one comes first.
    """
    match = CAPTION.fullmatch(" ".join(caption.lower().split()))
    if not match:
        return None
    words, relation = match.groups(), match[4] or "alone"
    solids = [{key: word for key, word in zip(("size", "colour", "shape"), noun) if word}
              for noun in (words[:3], words[4:])]
    if relation == "right of":
        relation, solids = "left of", solids[::-1]
    return {"relation": relation, "solids": solids[:1] if relation == "alone" else solids}


def labels_of(scenes):
    """The truth about N scenes, as tensors; slot 0 is the left or upper solid, or the only one.

    count (N,); relation (N,), index into RELATIONS; shape, colour, size (N, 2), indices, or -1 if
    absent; position (N, 2, 2), centre of the outline, x right, y down, in [-1, 1], and yaw (N, 2),
    radians, 0 if absent; floor (N, 3), its tint in 0..1.
    """
    def slots(value, absent):
        return torch.tensor([[value(s) for s in scene.solids] + [absent] * (2 - len(scene.solids))
                             for scene in scenes])
    colours = list(COLOURS)
    return {"count": torch.tensor([len(scene.solids) for scene in scenes]),
            "relation": torch.tensor([RELATIONS.index(scene.relation) for scene in scenes]),
            "shape": slots(lambda s: SHAPES.index(s.shape), -1),
            "colour": slots(lambda s: colours.index(s.colour), -1),
            "size": slots(lambda s: SIZES.index(s.size), -1),
            "position": slots(lambda s: [s.x, s.y], [0.0, 0.0]),
            "yaw": slots(lambda s: s.yaw, 0.0),
            "floor": torch.tensor([scene.floor for scene in scenes])}


def is_true(caption, labels, i):
    """Is the caption true of item i? `labels` as from labels_of(), or as a judge read them."""
    given = parse(caption)
    assert given, f"not a caption of shapes: {caption!r}"
    vocabulary = {"shape": SHAPES, "colour": list(COLOURS), "size": SIZES}
    return RELATIONS[labels["relation"][i]] == given["relation"] and all(
        labels[key][i, slot] == vocabulary[key].index(word)
        for slot, names in enumerate(given["solids"]) for key, word in names.items())


def scenes_for(caption, n, seed=0):
    """n scenes from p(scene | caption), in the law of the training set."""
    given = parse(caption)
    if given is None:
        raise ValueError(f"no scene for {caption!r}: write it like "
                         "'a small red cube' or 'a red cube on top of a blue cylinder'")
    return [sample_scene(random.Random(f"{RENDERER_VERSION}/{seed}/{caption}/{i}"), given)
            for i in range(n)]


# ---- Shapes: where the solids stand -------------------------------------------------------------

# The camera looks down by PITCH. Its rays are parallel: a solid spans as much wherever it stands.
PITCH = math.radians(30)
COS, SIN = math.cos(PITCH), math.sin(PITCH)
HEIGHT = {"cube": 2, "sphere": 2, "cylinder": 1.7, "cone": 2.1}    # for k = 1


def outline(solid, k):
    """How far its outline reaches, for this k: (to each side, up, down) from where it stands."""
    if solid.shape == "sphere":
        return k, k * COS + k, k - k * COS
    half = k * (math.cos(solid.yaw) + math.sin(solid.yaw)) if solid.shape == "cube" else k
    top = HEIGHT[solid.shape] * k * COS
    return half, top if solid.shape == "cone" else top + half * SIN, half * SIN


# What a small and a large solid span, in pixels of 32: the longer side of the outline. In a stack
# the lower one is a little larger, to be seen. EDGE leaves half a pixel free around everything.
SPANS = {"alone": [((9, 11), (14.5, 18))], "left of": [((9, 10.5), (14.2, 15))] * 2,
         "on top of": [((9, 10), (14.2, 15)), ((10.5, 11.5), (15.2, 16.5))]}
EDGE, GAP = 1 - 0.5 / 16, 1 / 16


def arrange(solids, relation, rng):
    """Choose how large the solids are and where they stand: all in the frame, none hidden."""
    for s, spans in zip(solids, SPANS[relation]):
        side, up, down = outline(s, 1)
        s.k = rng.uniform(*spans[SIZES.index(s.size)]) / 16 / max(2 * side, up + down)
    reach = [outline(s, s.k) for s in solids]
    place = stacked if relation == "on top of" else side_by_side
    for s, (_, up, down), (right, height, y) in zip(solids, reach, place(solids, reach, rng)):
        s.stands = right, height, -(y + height * COS) / SIN
        s.x, s.y = right, y + (down - up) / 2


def side_by_side(solids, reach, rng):
    """One solid, or two with a gap between: where they stand is (x, height, y in the picture)."""
    slack = 2 * EDGE - sum(2 * side for side, _, _ in reach) - GAP * (len(reach) - 1)
    cuts = sorted(rng.uniform(0, slack) for _ in reach)
    lower = rng.uniform(max(up + down for _, up, down in reach) - EDGE, EDGE)
    start = -EDGE
    for cut, (side, up, down) in zip(cuts, reach):    # the lower ends are at similar heights
        end = rng.uniform(max(up + down - EDGE, lower - 0.2), min(EDGE, lower + 0.2))
        yield start + cut + side, 0, end - down
        start += 2 * side + GAP


def stacked(solids, reach, rng):
    """The first on top of the second, not quite in its middle."""
    (side, up, _), (lower_side, _, down) = reach
    height, slip = HEIGHT[solids[1].shape] * solids[1].k, 0.15 * min(s.k for s in solids)
    free = EDGE - max(side, lower_side) - slip
    x, y = rng.uniform(-free, free), rng.uniform(height * COS + up + slip - EDGE, EDGE - down)
    yield (x + rng.uniform(-slip, slip), height,
           y - height * COS + rng.uniform(-slip, slip) * SIN)
    yield x, 0, y


# ---- Shapes: the ray tracer ---------------------------------------------------------------------

SAMPLES = 3    # rays along each side of a pixel
AMBIENT, DIFFUSE, SHINE = 0.5, 0.62, 0.35


def render(scenes, size=32, device="cpu", title=None):
    """N scenes → uint8 (N, 3, size, size) on the CPU: area means of a finer picture.

    Given a title, a progress bar goes to stderr.
    """
    rays = 2 ** 17 if torch.device(device).type == "cpu" else 2 ** 23    # the CPU's cache is small
    step = max(1, rays // (size * SAMPLES) ** 2)
    images = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8)
    for i in tqdm(range(0, len(scenes), step), title, unit_scale=step, disable=title is None):
        images[i:i + step] = to_uint8(trace(scenes[i:i + step], size, device))
    return images


def numbers(scenes, device):
    """Scenes as tensors: a dict of the solids' (N, 2, 1), light and floor (3, N, 1, 1)."""
    def row(s):
        h = HEIGHT[s.shape]
        # Round solids are x² + z² + A y² + B y + C <= 0, if they stand on y = 0 and k = 1.
        A, B, C = {"sphere": (1, -2, 0), "cylinder": (0, 0, -1), "cone": (-1 / h ** 2, 2 / h, -1),
                   "cube": (0, 0, -1)}[s.shape]
        return (*s.stands, s.k, math.cos(s.yaw), math.sin(s.yaw), h, A, B, C, s.shape == "cube",
                *(c / 255 for c in COLOURS[s.colour]))
    nobody = Solid("sphere", "red", "small", 0, k=0.01, stands=(0, -9, 0))    # buried: never seen
    table = torch.tensor([[row(s) for s in (scene.solids + [nobody])[:2]] for scene in scenes])
    keys = ("x", "y", "z", "k", "cos", "sin", "h", "A", "B", "C", "cube", "r", "g", "b")
    solids = dict(zip(keys, table.to(device).unsqueeze(-2).unbind(-1)))
    light, floor = (torch.tensor([getattr(scene, key) for scene in scenes], device=device)
                    .T[:, :, None, None] for key in ("light", "floor"))
    return solids, light, floor


def turned(s, v):
    """A direction of the world in the frame of each solid, in units of its k."""
    x, y, z = v
    cos, sin, k = s["cos"], s["sin"], s["k"]
    return (cos * x + sin * z) / k, y / k, (cos * z - sin * x) / k


def crossing(s, o, d):
    """The t at which rays o + t d enter and leave each solid; enter < leave is false if they miss.

    Each solid is the part with 0 <= y <= h of a square or a round tube. A ray's part within a slab
    or a quadric is an interval, middle ± half, and all that remains is to intersect intervals.
    """
    ox, oy, oz = turned(s, (o[0] - s["x"], o[1] - s["y"], o[2] - s["z"]))
    dx, dy, dz = turned(s, d)
    middle, half = (s["h"] / 2 - oy) / dy, (s["h"] / 2 / dy).abs()
    enter, leave = middle - half, middle + half
    x, half_x, z, half_z = -ox / dx, (1 / dx).abs(), -oz / dz, (1 / dz).abs()
    a = dx * dx + dz * dz + s["A"] * dy * dy    # > 0: neither eye nor light looks down into a cone
    b = ox * dx + oz * dz + (s["A"] * oy + s["B"] / 2) * dy
    c = ox * ox + oz * oz + (s["A"] * oy + s["B"]) * oy + s["C"]
    middle, half = -b / a, (b * b - a * c).clamp(min=0).sqrt() / a    # 0 where the ray misses
    cube = s["cube"] > 0
    enter = torch.maximum(enter, torch.where(
        cube, torch.maximum(x - half_x, z - half_z), middle - half))
    leave = torch.minimum(leave, torch.where(
        cube, torch.minimum(x + half_x, z + half_z), middle + half))
    return enter, leave


def normals(s, p):
    """Unit vectors out of each solid at points p of its surface (any vectors elsewhere)."""
    x, y, z = turned(s, (p[0] - s["x"], p[1] - s["y"], p[2] - s["z"]))
    ny = s["A"] * y + s["B"] / 2
    cube, wide = s["cube"] > 0, x.abs() > z.abs()
    nx = torch.where(cube, x.sign() * wide, x)
    nz = torch.where(cube, z.sign() * ~wide, z)
    top = y > s["h"] - 1e-3
    nx, ny, nz = nx * ~top, torch.where(top, 1.0, ny * ~cube), nz * ~top
    length = (nx * nx + ny * ny + nz * nz).sqrt() + 1e-9
    return (s["cos"] * nx - s["sin"] * nz) / length, ny / length, \
        (s["cos"] * nz + s["sin"] * nx) / length


def soft_light(light, size):
    """A direction for each ray: those of one pixel cover a small disc, so shadows are soft."""
    n = torch.arange(SAMPLES ** 2, device=light.device)
    radius, angle = 0.08 * ((n + 0.5) / len(n)).sqrt(), n * 2.39996    # a sunflower's spiral
    spread = torch.stack([radius * angle.cos(), 0 * radius, radius * angle.sin()])
    return light + spread.view(3, SAMPLES, SAMPLES).repeat(1, size, size).reshape(3, 1, 1, -1)


def trace(scenes, size, device):
    """The light that N scenes send to the camera → float (N, 3, size, size) in [-1, 1]."""
    s, light, tint = numbers(scenes, device)
    side = size * SAMPLES
    line = (torch.arange(side, device=device) + 0.5) / side * 2 - 1
    down, right = (v.reshape(1, 1, -1) for v in torch.meshgrid(line, line, indexing="ij"))

    # What does each ray meet first: a solid, or the floor y = 0?
    o, d = (right, -down * COS, -down * SIN), (0, -SIN, COS)
    enter, leave = crossing(s, o, d)                                           # (N, 2, side²)
    enter = torch.where(enter < leave, enter, math.inf)
    second = enter[:, 1:] < enter[:, :1]                                       # (N, 1, side²)

    def first(v):
        return torch.where(second, v[:, 1:], v[:, :1])

    solid = first(enter) < math.inf
    n = normals(s, [a + b * enter for a, b in zip(o, d)])
    n = [torch.where(solid, first(a), up) for a, up in zip(n, (0.0, 1.0, 0.0))]
    t = torch.where(solid, first(enter), -down * COS / SIN)
    p = [a + b * t for a, b in zip(o, d)]

    # Does it see the light? Start a little above the surface, or it would shade itself.
    beam = soft_light(light, size)
    enter, leave = crossing(s, [a + 0.002 * b for a, b in zip(p, n)], beam)
    lit = ~((enter < leave) & (leave > 0)).any(1, keepdim=True)
    facing = sum(a * b for a, b in zip(n, beam)).clamp(min=0) * lit

    # The floor brightens into the distance, and darkens where a solid is close.
    near = ((p[0] - s["x"]) ** 2 + (p[2] - s["z"]) ** 2) / (1.4 * s["k"]) ** 2
    near = (torch.exp(-near) * (s["y"] == 0)).sum(1, keepdim=True)
    far = ((0.2 - down) / 1.2).clamp(0, 1) ** 2
    glow = (AMBIENT + DIFFUSE * facing) / (AMBIENT + DIFFUSE * light[1]) * (1 - 0.22 * near)
    # Solids: light from all around, more from above; Lambert's law; and a highlight.
    halfway = [a - b for a, b in zip(light, d)]
    length = sum(a * a for a in halfway).sqrt()
    shine = sum(a * b for a, b in zip(n, halfway)).clamp(min=0) / length
    shine = SHINE * shine ** 40 * (facing > 0)
    shade = AMBIENT * (0.9 + 0.2 * n[1]) + DIFFUSE * facing
    channels = []
    for base, colour in zip(tint, (s[c] for c in "rgb")):
        floor = (base + (0.98 - base) * 0.7 * far) * glow
        channels.append(torch.where(solid, first(colour) * shade + shine, floor))
    fine = torch.cat(channels, 1).clamp(0, 1).unflatten(2, (size, SAMPLES, size, SAMPLES))
    return fine.mean((3, 5)) * 2 - 1


# ---- Shapes: the data set -----------------------------------------------------------------------


def item(split, i, seed=0):
    """Item i of a split: (Scene, captions). It depends on these and RENDERER_VERSION alone."""
    rng = random.Random(f"{RENDERER_VERSION}/{seed}/{split}/{i}")
    scene = sample_scene(rng)
    return scene, [describe(scene, rng) for _ in range(4)]


def shapes(split, size=32, limit=None, data_dir=None, seed=0, cache=True, device="cpu"):
    """Rendered shapes: 20,000 to train and 2,000 to validate, or `limit`, which may be more."""
    N = limit or {"train": 20_000, "validation": 2_000}[split]

    def make():
        scenes, captions = zip(*(item(split, i, seed) for i in range(N)))
        images = render(scenes, size, device, f"rendering {split} shapes, {size} pixels")
        return {"images": images, "captions": list(captions), "labels": labels_of(scenes)}
    name = f"shapes-v{RENDERER_VERSION}-{split}-{N}-{size}px-seed{seed}.pt"
    made = cached(cache_folder() / name, make) if cache else make()
    return Dataset(**made, classes=[], flips=False)


# ---- Real images --------------------------------------------------------------------------------

def read_image(path, size):
    """Any picture that Pillow opens → uint8 (3, size, size): upright, its middle square, resized.

    Transparency is laid on white; of an animation the first frame counts.
    Raises ValueError or OSError, one line, if there is no picture in it.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: give the path of one picture")
    try:
        with strict_pillow():
            pixels, _, _ = decode(path, size)
    except Exception as error:    # Pillow's decoders raise a dozen kinds
        why = error if path.stat().st_size else "it is empty"
        raise ValueError(f"{path} can't be read ({why}): give a PNG or JPEG that opens") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@contextmanager
def strict_pillow():
    """Pillow only warns of a file that is small on disk and huge in memory: refuse it instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # odd EXIF, odd palettes: of no account here
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def decode(path, size):
    """→ the picture, uint8 array (size, size, 3); and, of the file, its mode and shorter side."""
    with Image.open(path) as image:
        mode, shorter = image.mode, min(image.size)
        image.draft(None, (2 * size, 2 * size))    # a JPEG can shrink while it is decoded: faster
        return np.array(square(ImageOps.exif_transpose(image), size)), mode, shorter


def square(image, size):
    """The middle of a Pillow image of any size and mode → RGB, size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if image.mode[0] in "IF":    # 16 bits or more, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float64)
        low, high = (0, 65535) if image.mode.startswith("I;16") else (grey.min(), grey.max())
        image = Image.fromarray((255 * (grey - low) / max(high - low, 1e-9)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Shrunk pixels are area means, as they are in the rendered shapes.
    how = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return image.convert("RGB").resize((size, size), how)


def cached(path, make):
    """What make() returned when it was called for this path before, or else does now."""
    try:
        return torch.load(path, weights_only=True, mmap=True)    # read when it is needed
    except Exception:    # there is no such file, or it is damaged, or not ours
        made = make()
        write_beside(path, lambda beside: torch.save(made, beside))
        return made


def read_images(root, names, size, limit, seed, cache, title, left_out):
    """The pictures root/name → uint8 (M, 3, size, size), and which M of the names these are.

    `limit` of the files that are there are drawn. One line on stderr counts them, and what was left
    out (`left_out` and more). They are cached under the names, lengths and dates of all files, so
    that a changed picture is noticed; a changed decode() is not: raise the number in the cache's
    name.
    """
    there = [i for i, name in enumerate(names) if os.path.isfile(root / name)]
    left_out = {**left_out, "missing": len(names) - len(there)}
    drawn = [there[k] for k in subset(len(there), limit, seed)]
    names = [names[i] for i in drawn]
    files = [os.stat(root / name) for name in names]
    states = [(file.st_size, file.st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((str(root.resolve()), names, states)).encode()).hexdigest()[:20]

    def make():
        return decode_all(root, names, size, title)
    read = cached(cache_folder() / f"images-v1-{size}px-{key}.pt", make) if cache else make()
    notes = [f"{n:,} {mode} made RGB" for mode, n in read["converted"].items()]
    notes += [f"{n:,} {why} left out" for why, n in {**left_out, **read["left_out"]}.items() if n]
    line = f"{title}: {len(read['kept']):,} images" + f" ({', '.join(notes)})" * bool(notes)
    if not read["kept"]:
        raise ValueError(f"{line}: put readable pictures, which have captions, into {root}")
    print(line, file=sys.stderr)
    return read["images"], [drawn[k] for k in read["kept"]]


def decode_all(root, names, size, title):
    """The work of read_images, in parallel; what is wrong with single pictures is counted."""
    inside = root.resolve()

    def read(name):
        path = root / name
        if not path.resolve().is_relative_to(inside):
            raise ValueError(f"{name!r} leads out of {root}: move that picture into the folder")
        try:
            pixels, mode, shorter = decode(path, size)
        except Exception:    # as in read_image
            return None, "broken"
        return (pixels, mode) if shorter >= 8 else (None, "under 8 pixels")

    images, kept = torch.empty(len(names), 3, size, size, dtype=torch.uint8), []
    left_out, converted = Counter(), Counter()
    with strict_pillow(), ThreadPool() as pool:    # Pillow works outside Python's lock: threads do
        for i, (pixels, what) in enumerate(tqdm(pool.imap(read, names), title, len(names))):
            if pixels is None:
                left_out[what] += 1
                continue
            images[len(kept)] = torch.from_numpy(pixels).permute(2, 0, 1)
            kept.append(i)
            if what != "RGB":
                converted["grey" if what in ("1", "L", "LA", "I;16") else what] += 1
    images = images if len(kept) == len(names) else images[:len(kept)].clone()
    return {"images": images, "kept": kept,
            "left_out": dict(left_out), "converted": dict(converted)}


def subset(N, limit, seed):
    """Which of N items to take, in their order: all, or `limit` of them drawn with the seed."""
    drawn = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:limit]
    return drawn.sort().values.tolist()


def given_folder(name, data_dir):
    if data_dir is None:
        raise ValueError(f"--data {name} needs --data-dir: the folder where the pictures lie")
    if not Path(data_dir).is_dir():
        raise ValueError(f"--data-dir {data_dir}: there is no such folder")
    return Path(data_dir)


def parse_json(content, file, line=1):
    """JSON in bytes that begin in this line of the file; an error names the line where it is."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        raise ValueError(f"{file}, line {line}: not UTF-8; save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"{file}, line {line}: broken JSON; mend that line") from None


def clean(caption):
    """One line, single blanks, and nothing that UTF-8 could not write."""
    return " ".join(caption.encode("utf-8", "replace").decode().split())


TEMPLATES = ["a photo of {}", "a picture of {}", "an image of {}", "{}"]


def class_captions(name):
    """"frog" → ["a photo of a frog", ..., "a frog"]."""
    thing = ("an " if name[:1].lower() in "aeiou" else "a ") + name
    return [template.format(thing) for template in TEMPLATES]


# ---- Real images: CIFAR-10 ----------------------------------------------------------------------

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "validation": ["test_batch"]}


def cifar10(split, size=32, limit=None, data_dir=None, seed=0, cache=True):
    """CIFAR-10: 50,000 images of ten classes to train; its test set, 10,000, to validate.

    data_dir  the official archive, the folder it lies in, or cifar-10-batches-py unpacked from it;
              None: the archive is downloaded into the cache, once
    """
    source = Path(data_dir or cache_folder() / "cifar-10-python.tar.gz")
    if not data_dir and not source.exists():
        download(CIFAR_URL, CIFAR_MD5, source)
    pixels, classes = map(torch.cat, zip(*read_cifar(source, CIFAR_BATCHES[split])))
    chosen = subset(len(pixels), limit, seed)
    images, classes = pixels[chosen].view(-1, 3, 32, 32), classes[chosen]
    if size != 32:
        pictures = [square(Image.fromarray(array), size)
                    for array in images.permute(0, 2, 3, 1).contiguous().numpy()]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    captions = [class_captions(name) for name in CIFAR_CLASSES]
    return Dataset(images, [captions[k] for k in classes.tolist()], {"class": classes},
                   CIFAR_CLASSES, flips=True)


def read_cifar(source, names):
    """These batches of an archive or a folder, each uint8 (10000, 3072) and int64 (10000,)."""
    for inner in ("cifar-10-python.tar.gz", "cifar-10-batches-py"):
        source = source / inner if (source / inner).exists() else source
    try:
        if source.is_dir():
            found = {name: unpickle((source / name).read_bytes()) for name in names}
        else:    # read where it is: what is never unpacked can't land outside a folder
            with tarfile.open(source, "r:gz") as tar:
                found = {Path(member.name).name: unpickle(tar.extractfile(member).read())
                         for member in tar if member.isfile() and Path(member.name).name in names}
        return [found[name] for name in names]
    except Exception as error:    # a damaged or a hostile file may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"no CIFAR-10 in {source} ({why}): let --data-dir be its archive "
                         "cifar-10-python.tar.gz, or the folder of that") from None


class ArrayUnpickler(pickle.Unpickler):
    """A pickle names functions to be called, any at all. This knows only those that make arrays."""
    make = np.empty(0).__reduce__()[0]
    known = {("numpy.core.multiarray", "_reconstruct"): make,     # its name in the official archive
             ("numpy._core.multiarray", "_reconstruct"): make,    # and since numpy 2
             ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
             ("_codecs", "encode"): codecs.encode,                # bytes, as Python 3 writes them,
             ("__builtin__", "bytes"): bytes}                     # and b"", which it calls for

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}, which no image needs")
        return self.known[module, name]


def unpickle(content):
    batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    data, labels = torch.from_numpy(batch[b"data"]), torch.tensor(batch[b"labels"])
    if data.dtype != torch.uint8 or data.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"{len(labels)} labels for {data.dtype} data of shape {list(data.shape)}")
    if labels.dtype != torch.int64 or not set(labels.tolist()) <= set(range(10)):
        raise ValueError("labels that are no classes, 0 to 9")
    return data, labels


def download(url, md5, path):
    """Fetch a file and check it. Whatever goes wrong, nothing is left behind."""
    def fetch(beside):
        digest = hashlib.md5()
        with urllib.request.urlopen(url, timeout=60) as answer, open(beside, "wb") as file:
            length = int(answer.headers["Content-Length"] or 0)
            with tqdm(desc=path.name, total=length, unit="B", unit_scale=True) as bar:
                while piece := answer.read(2 ** 18):
                    digest.update(piece)
                    file.write(piece)
                    bar.update(len(piece))
            if bar.n < length:
                raise OSError(f"it broke off after {bar.n:,} of {length:,} bytes")
        if digest.hexdigest() != md5:
            raise OSError(f"what came has MD5 {digest.hexdigest()} instead of {md5}")
    try:
        write_beside(path, fetch)
    except Exception as error:    # of the network, of the disk, or one of the two above
        raise OSError(f"no {path.name} from {url} ({error}): try again, or fetch it in another way "
                      "and name the file by --data-dir") from None


# ---- Real images: COCO --------------------------------------------------------------------------


def coco(split, size=32, limit=None, data_dir=None, seed=0, cache=True):
    """COCO 2017, photographs with five captions each: 118,287 to train, 5,000 to validate.

    data_dir  holds annotations/captions_{train,val}2017.json, train2017/ and val2017/
    All of it, at 64 pixels, is 118,287 * 3 * 64 * 64 bytes = 1.45 GB, in memory and in the cache.
    """
    root = given_folder("coco", data_dir)
    part = {"train": "train2017", "validation": "val2017"}[split]
    file = root / "annotations" / f"captions_{part}.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: let --data-dir be a folder with "
                         f"annotations/captions_{part}.json and {part}/")
    content, captions = parse_json(file.read_bytes(), file), {}
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        for note in content["annotations"]:
            if text := clean(note["caption"]):
                captions.setdefault(note["image_id"], []).append(text)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not like COCO's ({type(error).__name__}: {error}): "
                         "take the one in annotations_trainval2017.zip") from None
    keys = [key for key in names if key in captions]
    left_out = {"without captions": len(names) - len(keys),
                "captioned but not listed": len(captions.keys() - names.keys())}
    images, kept = read_images(root / part, [names[key] for key in keys], size, limit, seed, cache,
                               f"coco {split}", left_out)
    # Mirrored pictures keep their captions: few say left or right (2 of 500 that we counted).
    return Dataset(images, [captions[keys[i]] for i in kept], {}, [], flips=True)


# ---- Real images: a folder of one's own ---------------------------------------------------------


def folder(split, size=32, limit=None, data_dir=None, seed=0, cache=True):
    """Pictures of one's own: a folder with metadata.jsonl, or with one sub-folder for each class.

    data_dir  each line of its metadata.jsonl is {"file_name": "a.jpg", "text": "a caption"}, or
              "text": [several]. If it holds train/ and one of validation/, val/, test/, then
              these are two such folders. Otherwise one picture in twenty is kept for validation.
    """
    root = given_folder("folder", data_dir)
    tops = {"train": root, "validation": root}
    held = [root / name for name in ("validation", "val", "test") if (root / name).is_dir()]
    if held and (root / "train").is_dir() and not (root / "metadata.jsonl").exists():
        tops = {"train": root / "train", "validation": held[0]}
    top, classes = tops[split], []
    if (top / "metadata.jsonl").is_file():
        captions, how = read_metadata(top / "metadata.jsonl"), "metadata.jsonl"
    else:    # the same classes in both splits, though a picture of one may be missing in the other
        classes = sorted({path.name for half in tops.values() for path in half.iterdir()
                          if path.is_dir() and path.name[0] != "."
                          and any(map(is_picture, path.iterdir()))})
        captions = {f"{name}/{path.name}": class_captions(as_words(name))
                    for name in classes for path in (top / name).glob("*") if is_picture(path)}
        how = f"{len(classes)} sub-folders as classes"
    pictures = {path.relative_to(top).as_posix() for path in top.rglob("*") if is_picture(path)}
    left_out = {"without captions": len(pictures - captions.keys())}
    names = sorted(captions)
    if tops["train"] == tops["validation"]:
        # By a hash of the name, not by the seed: another seed would validate on what was trained.
        names.sort(key=lambda name: hashlib.md5(name.encode(errors="replace")).digest())
        share = math.ceil(len(names) / 20)
        names = names[:share] if split == "validation" else names[share:]
    if not names:
        raise ValueError(f"no pictures for {split} in {top} ({how}): name two or more in "
                         "metadata.jsonl, or put them into one sub-folder for each class")
    images, kept = read_images(top, names, size, limit, seed, cache, f"folder {split}, {how}",
                               left_out)
    captions, names = [captions[names[i]] for i in kept], [names[i] for i in kept]
    labels = {"class": torch.tensor([classes.index(name.split("/")[0]) for name in names])} \
        if classes else {}
    sided = any(re.search(r"\b(left|right)\b", text, re.I) for texts in captions for text in texts)
    return Dataset(images, captions, labels, list(map(as_words, classes)), flips=not sided)


def as_words(name):
    return clean(name.replace("_", " "))


def is_picture(path):
    return path.suffix.lower() in Image.registered_extensions() and path.name[0] != "."


def read_metadata(file):
    """metadata.jsonl → {file name: [caption, ...]}, without the names that have no caption."""
    captions = {}
    for line, content in enumerate(file.read_bytes().splitlines(), 1):
        if not content.strip():
            continue
        row = parse_json(content, file, line)
        try:
            name, texts = row["file_name"], row["text"]
            texts = [texts] if isinstance(texts, str) else texts
            if not (isinstance(name, str) and isinstance(texts, list)):
                raise TypeError
            captions.setdefault(name, []).extend(filter(None, map(clean, texts)))
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{file}, line {line}: write it as "
                             '{"file_name": "a.jpg", "text": "a caption"}') from None
    return {name: texts for name, texts in captions.items() if texts}
