"""The rendered world: solids on a floor, the captions that describe them, and a small ray tracer.

unCLIP learns from pairs of a picture x and a caption y. Here both are made, so nothing is
downloaded and the truth about each picture is known. A caption names some of what is to be seen:
shapes, colours, sizes, a relation. It never names where a solid stands, how it is turned, the
light, or the floor's tint. These are the "non-essential details" (paper, Fig. 3) that a
picture's variations are free to change. Four pairs of colour and shape never occur in the data:
a model that draws them has composed them, it has not remembered them.

Next chapter: data.py.
"""
import math
import os
import random
import re
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

# ---- Pixels -------------------------------------------------------------------------------------


def to_float(images):
    """uint8 0..255 → float32 in [-1, 1]: what every network sees."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1], clamped and rounded → uint8 0..255: what is stored and shown."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_safely(path, write):
    """Call write(temporary path), then rename: `path` is never left half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:    # or a power cut could leave the name, but no bytes
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path, image):
    """Write a uint8 (3, H, W) tensor as a PNG."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    write_safely(path, lambda temporary: picture.save(temporary, format="png"))


def picture_grid(images, columns, gap=2):
    """uint8 (N, 3, H, W) → one uint8 (3, H', W'), row by row, with light gaps of `gap` pixels."""
    N, C, H, W = images.shape
    rows = math.ceil(N / columns)
    sheet = images.new_full((C, rows * (H + gap) - gap, columns * (W + gap) - gap), 245)
    for i, image in enumerate(images):
        top, left = i // columns * (H + gap), i % columns * (W + gap)
        sheet[:, top:top + H, left:left + W] = image
    return sheet


# ---- Scenes -------------------------------------------------------------------------------------

SHAPES = ["cube", "sphere", "cylinder", "cone"]
COLOURS = {"red": (214, 44, 42), "green": (52, 164, 74), "blue": (44, 92, 220),
           "yellow": (250, 210, 40), "purple": (146, 66, 190), "orange": (250, 130, 24),
           "cyan": (48, 196, 212), "gray": (112, 114, 118)}
SIZES = ["small", "large"]
RELATIONS = ["alone", "left of", "on top of"]    # "right of" is another wording of "left of"
UNSEEN = {("purple", "cylinder"), ("orange", "sphere"), ("cyan", "cone"), ("gray", "sphere")}

# Raise it whenever a picture or a caption changes: it names the cache, and seeds each item.
RENDERER_VERSION = 5


@dataclass
class Solid:
    shape: str
    colour: str
    size: str
    yaw: float             # radians, about the vertical
    k: float = 0           # its radius, or half its edge; the picture is 2 wide
    x: float = 0           # centre of its outline in the picture: -1 left ... 1 right
    y: float = 0           # and -1 top ... 1 bottom
    stands: tuple = ()     # where its base stands in the world: right, up, away from us


@dataclass
class Scene:
    relation: str
    solids: list           # one, or two: the left or upper one first
    floor: tuple           # its tint: r, g, b in 0..1
    light: tuple           # unit vector towards the light: right, up, away from us


def sample_scene(rng, given=None):
    """Draw a scene with a random.Random. `given`, as from parse_caption(), fixes some of it.

    The rest follows the training set's distribution: colour and shape of a solid are uniform over
    the pairs that are not UNSEEN (what carries another solid is a cube or a cylinder), and its size
    does not depend on them. If both are given, they may be an UNSEEN pair.
    """
    given = given or {}
    relation = given.get("relation") or rng.choice(RELATIONS)
    fixed = given.get("solids") or [{}] * (1 if relation == "alone" else 2)
    solids = []
    for slot, names in enumerate(fixed):
        carries = relation == "on top of" and slot == 1
        while True:        # draw again if the pair is unseen: the others stay equally likely
            shape = names.get("shape") or rng.choice(["cube", "cylinder"] if carries else SHAPES)
            colour = names.get("colour") or rng.choice(list(COLOURS))
            if (colour, shape) not in UNSEEN or {"shape", "colour"} <= names.keys():
                break
        size = names.get("size") or rng.choice(SIZES)
        solids.append(Solid(shape, colour, size, yaw=rng.uniform(0, math.pi / 2)))
    arrange(solids, relation, rng)
    hue, saturation, value = rng.random(), rng.uniform(0.05, 0.2), rng.uniform(0.86, 0.96)
    floor = tuple(value * (1 - saturation * (0.5 + 0.5 * math.cos(2 * math.pi * (hue - c / 3))))
                  for c in range(3))
    azimuth, elevation = math.radians(rng.uniform(-75, 75)), math.radians(rng.uniform(38, 56))
    light = (math.sin(azimuth) * math.cos(elevation), math.sin(elevation),
             -math.cos(azimuth) * math.cos(elevation))
    return Scene(relation, solids, floor, light)


def item(split, i, seed=0):
    """Item i of a split: (Scene, four captions), a function of these and RENDERER_VERSION alone."""
    rng = random.Random(f"{RENDERER_VERSION}/{seed}/{split}/{i}")
    scene = sample_scene(rng)
    return scene, [describe(scene, rng) for _ in range(4)]


def scenes_for(caption, n, seed=0):
    """n scenes of which the caption is true; the rest follows the training set's distribution."""
    given = parse_caption(caption)
    if given is None:
        raise ValueError(f"no scene for {caption!r}: write it like "
                         "'a small red cube' or 'a red cube on top of a blue cylinder'")
    return [sample_scene(random.Random(f"{RENDERER_VERSION}/{seed}/{caption}/{i}"), given)
            for i in range(n)]


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


# ---- Captions -----------------------------------------------------------------------------------


def describe(scene, rng):
    """One caption that is true of the scene.

    *Which* attributes it names is drawn without a look at their values. So a caption tells no more
    than its words say, and scenes_for() can draw from p(scene | caption) exactly.
    """
    relation, nouns = scene.relation, []
    for solid in scene.solids:
        words = [solid.shape]
        if rng.random() < (0.75 if relation == "alone" else 0.9):
            words.insert(0, solid.colour)
        if rng.random() < 0.4:
            words.insert(0, solid.size)
        nouns.append(("an " if words[0] == "orange" else "a ") + " ".join(words))
    # One wording is more usual. If both were equally frequent, neither the word nor the order of
    # the nouns would tell anything alone, and CLIP does not learn what both tell together.
    if relation == "left of" and rng.random() < 0.25:
        relation, nouns = "right of", nouns[::-1]
    return rng.choice(["", "", "", "a photo of ", "a picture of ", "there is "]) + \
        (nouns[0] if relation == "alone" else f"{nouns[0]} {relation} {nouns[1]}")


NOUN = rf"an? (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
CAPTION = re.compile(rf"(?:a photo of |a picture of |there is )?{NOUN}"
                     rf"(?: (left of|right of|on top of) {NOUN})?")


def parse_caption(caption):
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


def is_true(caption, labels, i):
    """Is the caption true of item i? `labels` are those of labels_of()."""
    given = parse_caption(caption)
    assert given, f"not a caption of shapes: {caption!r}"
    vocabulary = {"shape": SHAPES, "colour": list(COLOURS), "size": SIZES}
    return RELATIONS[labels["relation"][i]] == given["relation"] and all(
        labels[key][i, slot] == vocabulary[key].index(word)
        for slot, names in enumerate(given["solids"]) for key, word in names.items())


# ---- The camera, and where the solids stand -----------------------------------------------------
#
#   The camera from the side:               A solid in the picture:
#
#    up                                   -1 +-------------------------+
#     |  \      \      \   parallel rays     |       +------+  ^       |
#     |   \      \      \  fall by PITCH     |      /      /|  |       |
#     |    \   +--\-+    \                   |     +------+ |  | up    |
#     |     \  |   \|     \                  |     |    o | +  +       |
#     +------\-+----+------\--- away         |     |      |/   | down  |
#      floor                                 |     +------+    v       |
#                                          1 +-----|side|--------------+
#                                           -1                         1
#
# Rays are parallel, so a solid is equally large wherever it stands. A point of the world (right,
# up, away) is seen at x = right, y = -(up COS + away SIN): what is further away is higher up. From
# the middle of its base, the hidden o, the outline reaches `side` to both sides, `up` and `down`.

PITCH = math.radians(30)
COS, SIN = math.cos(PITCH), math.sin(PITCH)
HEIGHT = {"cube": 2, "sphere": 2, "cylinder": 1.7, "cone": 2.1}    # for k = 1

# What a small and a large solid span, in pixels of 32: the longer side of the outline. The ranges
# do not overlap, so that size can be read from the picture. In a stack the lower solid is a little
# larger than an upper one of the same size, and so less hidden by it.
SPANS = {"alone": [((9, 11), (14.5, 18))], "left of": [((9, 10.5), (14.2, 15))] * 2,
         "on top of": [((9, 10), (14.2, 15)), ((10.5, 11.5), (15.2, 16.5))]}
EDGE, GAP = 1 - 0.5 / 16, 1 / 16    # half a pixel stays free at the edge, a pixel between solids


def outline(solid, k):
    """How far the outline reaches from the middle of the base, for this k: (side, up, down)."""
    if solid.shape == "sphere":
        return k, k * COS + k, k - k * COS
    half = k * (math.cos(solid.yaw) + math.sin(solid.yaw)) if solid.shape == "cube" else k
    top = HEIGHT[solid.shape] * k * COS
    return half, top if solid.shape == "cone" else top + half * SIN, half * SIN


def arrange(solids, relation, rng):
    """Choose k, stands, x and y of one or two solids: all in the frame, none hidden."""
    for s, spans in zip(solids, SPANS[relation]):
        side, up, down = outline(s, 1)
        s.k = rng.uniform(*spans[SIZES.index(s.size)]) / 16 / max(2 * side, up + down)
    reach = [outline(s, s.k) for s in solids]
    place = stacked if relation == "on top of" else side_by_side
    for s, (_, up, down), (right, height, y) in zip(solids, reach, place(solids, reach, rng)):
        s.stands = right, height, -(y + height * COS) / SIN
        s.x, s.y = right, y + (down - up) / 2


def side_by_side(solids, reach, rng):
    """One solid or two on the floor. Yields for each (right, height, y of its base's middle).

        -EDGE                                                          EDGE
          |-- cut 0 --|== 2 side ==|--- GAP + (cut 1 - cut 0) ---|== 2 side ==|-- rest --|
    """
    slack = 2 * EDGE - sum(2 * side for side, _, _ in reach) - GAP * (len(reach) - 1)
    cuts = sorted(rng.uniform(0, slack) for _ in reach)
    lower = rng.uniform(max(up + down for _, up, down in reach) - EDGE, EDGE)
    start = -EDGE
    for cut, (side, up, down) in zip(cuts, reach):    # the lower ends are at similar heights
        end = rng.uniform(max(up + down - EDGE, lower - 0.2), min(EDGE, lower + 0.2))
        yield start + cut + side, 0, end - down
        start += 2 * side + GAP


def stacked(solids, reach, rng):
    """The first solid on top of the second, off its middle by at most `slip` each way."""
    (side, up, _), (lower_side, _, down) = reach
    height, slip = HEIGHT[solids[1].shape] * solids[1].k, 0.15 * min(s.k for s in solids)
    free = EDGE - max(side, lower_side) - slip
    x, y = rng.uniform(-free, free), rng.uniform(height * COS + up + slip - EDGE, EDGE - down)
    yield (x + rng.uniform(-slip, slip), height,
           y - height * COS + rng.uniform(-slip, slip) * SIN)
    yield x, 0, y


# ---- The ray tracer -----------------------------------------------------------------------------

SAMPLES = 4    # rays across a pixel, and down: a pixel has 16
MANY = 500     # from so many pictures on, it pays to start several processes
PORTION = 20   # pictures that a process hands over at once
AMBIENT, DIFFUSE, SHINE = 0.5, 0.62, 0.35


def render(scenes, size=32, title=None):
    """N scenes → uint8 (N, 3, size, size). Given a title, a progress bar goes to stderr."""
    # A picture is hundreds of small operations. Threads wait for each other at each of them, so
    # two threads draw no faster than one. Processes do not wait for each other. The loader takes a
    # number, which nothing uses, from this generator; without it, the number would be torch's.
    threads = torch.get_num_threads()
    loader = DataLoader(scenes, batch_size=PORTION, collate_fn=partial(traced, size=size),
                        generator=torch.Generator(),
                        num_workers=threads if len(scenes) >= MANY and threads > 1 else 0)
    torch.set_num_threads(1)
    try:
        return torch.cat([torch.from_numpy(some) for some in tqdm(
            loader, title, disable=title is None, unit_scale=PORTION)])
    finally:
        torch.set_num_threads(threads)


def traced(scenes, size):
    """Scenes → a uint8 array (N, 3, size, size). A tensor would go from process to process in
    shared memory, of which a container may have little."""
    return torch.stack([to_uint8(trace(scene, size)) for scene in scenes]).numpy()


def in_torch(solid):
    """What the tracer must know of a solid, as tensors of one element. x, y, z: right, up, away."""
    h = HEIGHT[solid.shape]
    A, B, C = {"sphere": (1, -2, 0), "cylinder": (0, 0, -1), "cone": (-1 / h ** 2, 2 / h, -1),
               "cube": (0, 0, 0)}[solid.shape]    # of a round solid, see crossing()
    numbers = (*solid.stands, solid.k, math.cos(solid.yaw), math.sin(solid.yaw), h, A, B, C)
    keys = ("x", "y", "z", "k", "cos", "sin", "h", "A", "B", "C")
    return SimpleNamespace(cube=solid.shape == "cube", on_floor=solid.stands[1] == 0,
                           colour=torch.tensor(COLOURS[solid.colour]).view(3, 1) / 255,
                           **dict(zip(keys, torch.tensor(numbers).unbind())))


def direction_in(s, v):
    """A direction (x, y, z) of the world, seen from the solid: turned by its yaw, in units of k."""
    x, y, z = v
    return (s.cos * x + s.sin * z) / s.k, y / s.k, (s.cos * z - s.sin * x) / s.k


def point_in(s, p):
    """A point (x, y, z) of the world, seen from the solid, whose base lies on y = 0."""
    return direction_in(s, (p[0] - s.x, p[1] - s.y, p[2] - s.z))


def slab(o, d, low, high):
    """The t at which the coordinate o + t d enters and leaves the interval from low to high."""
    middle, half = ((low + high) / 2 - o) / d, ((high - low) / 2 / d).abs()
    return middle - half, middle + half


def crossing(s, o, d):
    """The t at which rays o + t d enter and leave the solid; enter < leave is false if they miss.

    A solid is the overlap of a few bodies: of three layers for a cube, or else of the layer
    0 <= y <= h and the round body x² + z² + A y² + B y + C <= 0. On a ray, each is an interval.
    """
    ox, oy, oz = point_in(s, o)
    dx, dy, dz = direction_in(s, d)
    parts = [slab(oy, dy, 0, s.h)]
    if s.cube:
        parts += [slab(ox, dx, -1, 1), slab(oz, dz, -1, 1)]
    else:    # a t² + 2 b t + c <= 0, with a > 0: every ray is less steep than a cone's side
        a = dx * dx + dz * dz + s.A * dy * dy
        b = ox * dx + oz * dz + (s.A * oy + s.B / 2) * dy
        c = ox * ox + oz * oz + (s.A * oy + s.B) * oy + s.C
        root = (b * b - a * c).clamp(min=0).sqrt() / a    # 0 where the ray misses
        parts += [(-b / a - root, -b / a + root)]
    enter, leave = map(torch.stack, zip(*parts))                # (2 or 3, R) each
    return enter.amax(0), leave.amin(0)


def normal_at(s, p):
    """Unit vectors out of the solid, (3, M), at M points of its surface."""
    x, y, z = point_in(s, p)
    top = y > s.h - 1e-3
    if s.cube:
        wide = x.abs() > z.abs()
        x, y, z = x.sign() * wide, 0 * y, z.sign() * ~wide
    else:
        y = s.A * y + s.B / 2
    x, y, z = x * ~top, torch.where(top, 1.0, y), z * ~top
    n = torch.stack([s.cos * x - s.sin * z, y, s.cos * z + s.sin * x])
    return n / ((x * x + y * y + z * z).sqrt() + 1e-9)


@lru_cache
def camera(size):
    """The R = (size SAMPLES)² rays of a picture: right (R,), down (R,) and light's spread (3, R).

    No two rays of a pixel are in one column or row (N rooks, Shirley 1991): an upright edge that
    moves across the pixel meets them one by one, and so the pixel darkens in 16 steps, not in 4.
    Each of them sees the light from another direction of a small disc, so that shadows have soft
    edges.
    """
    side = size * SAMPLES
    down, right = (v.reshape(-1) for v in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    right, down = (right + (down % SAMPLES + 0.5) / SAMPLES,
                   down + (SAMPLES - right % SAMPLES - 0.5) / SAMPLES)
    right, down = right / side * 2 - 1, down / side * 2 - 1
    n = torch.arange(SAMPLES ** 2)
    radius, angle = 0.08 * ((n + 0.5) / len(n)).sqrt(), n * 2.39996    # a sunflower's spiral
    spread = torch.stack([radius * angle.cos(), 0 * radius, radius * angle.sin()])
    return right, down, spread.view(3, SAMPLES, SAMPLES).repeat(1, size, size).reshape(3, -1)


def trace(scene, size):
    """The light that a scene sends to the camera → float (3, size, size) in [-1, 1]."""
    solids = [in_torch(solid) for solid in scene.solids]
    light = torch.tensor(scene.light).view(3, 1)
    right, down, spread = camera(size)
    o = torch.stack([right, -down * COS, -down * SIN])                         # (3, R)
    d = torch.tensor([0, -SIN, COS]).view(3, 1)

    # What does each ray meet first: a solid (0 or 1), or the floor y = 0 (-1)?
    t, met = torch.full_like(right, math.inf), torch.full_like(right, -1)      # (R,)
    for i, s in enumerate(solids):
        enter, leave = crossing(s, o, d)
        first = (enter < leave) & (enter < t)
        t, met[first] = torch.where(first, enter, t), i
    p = o + d * torch.where(met < 0, -down * COS / SIN, t)                     # (3, R)
    n, colour = torch.zeros_like(p), torch.zeros_like(p)
    n[1] = 1                                                                   # the floor's
    for i, s in enumerate(solids):
        here = (met == i).nonzero()[:, 0]
        n[:, here], colour[:, here] = normal_at(s, p[:, here]), s.colour

    # Does the point see the light? Start a little above the surface, or it would shade itself.
    beam, lit = light + spread, torch.ones_like(met, dtype=torch.bool)
    for s in solids:
        enter, leave = crossing(s, p + 0.002 * n, beam)
        lit &= ~((enter < leave) & (leave > 0))
    facing = (n * beam).sum(0).clamp(min=0) * lit                              # (R,)

    # Solids: light from all around, more from above; Lambert's law; and a highlight.
    halfway = light - d
    shine = (n * halfway).sum(0).clamp(min=0) / halfway.square().sum(0).sqrt()
    solid = colour * (AMBIENT * (0.9 + 0.2 * n[1]) + DIFFUSE * facing) \
        + SHINE * shine ** 40 * (facing > 0)
    glow = (AMBIENT + DIFFUSE * facing) / (AMBIENT + DIFFUSE * light[1])      # 1: floor in light
    pixels = torch.where(met < 0, floor_seen(scene, solids, p, down, glow), solid).clamp(0, 1)
    return pixels.unflatten(1, (size, SAMPLES, size, SAMPLES)).mean((2, 4)) * 2 - 1


def floor_seen(scene, solids, p, down, glow):
    """The floor's colour (3, R): brighter into the distance, darker where a solid is close."""
    tint, near = torch.tensor(scene.floor).view(3, 1), 0
    for s in solids:
        if s.on_floor:
            near = near + torch.exp(-((p[0] - s.x) ** 2 + (p[2] - s.z) ** 2) / (1.4 * s.k) ** 2)
    far = ((0.2 - down) / 1.2).clamp(0, 1) ** 2
    return (tint + (0.98 - tint) * 0.7 * far) * (glow * (1 - 0.22 * near))
