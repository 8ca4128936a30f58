"""Who says what is right: judges that read pictures, and the measures of evaluate.py.

Small convolutional networks read what unCLIP draws: one reads shapes, one signs, one photos. Each
learnt from such pictures alone, and shares no weight with CLIP: otherwise CLIP would grade its own
work. Each measure is a function of a few lines, with a case in tests/test_judge.py whose answer is
known.

Next chapter: evaluate.py.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from checkpoints import SHIPPED, load_part, save_part, say
from data import LETTERS, a_word, draw_sign, letters_of, load
from shapes import (COLOURS, RELATIONS, SHAPES, SIN, SIZES, Scene, Solid, labels_of, outline,
                    parse_caption, render, sample_scene, to_float)

# ---- The judge -----------------------------------------------------------------------------------


@dataclass
class JudgeConfig:
    """What the weights depend on."""
    classes: int = 0             # how many classes of photos it tells apart; 0: none
    letters: int = 0             # how many letters of a sign it reads; 0: none. Both 0: shapes


class Judge(nn.Module):
    """Reads pictures of shapes: the relation, and of both solids shape, colour, size and position,
    coded as in shapes.labels_of. With another config it has a single head: for the letters of a
    sign or, on other layers, for the class of a photo."""

    HEADS = {"relation": (len(RELATIONS),), "shape": (2, len(SHAPES)), "colour": (2, len(COLOURS)),
             "size": (2, len(SIZES)), "position": (2, 2)}

    def __init__(self, config):
        super().__init__()
        self.config, self.clip_id = config, None
        self.heads = {"class": (config.classes,)} if config.classes else \
            {"letters": (config.letters, len(LETTERS))} if config.letters else self.HEADS
        self.body, features = photo_layers() if config.classes else shape_layers()
        self.head = nn.Linear(features, sum(map(math.prod, self.heads.values())))

    def forward(self, x):
        """x (B, 3, 32, 32) in [-1, 1] → the answer (B, …) of each head: positions, or logits."""
        return self.answer(self.body(x))

    def answer(self, features):
        """The last layer alone: the body's features (B, C) → answers, as above."""
        parts = self.head(features).split([*map(math.prod, self.heads.values())], dim=1)
        return {key: part.unflatten(1, self.heads[key]) for key, part in zip(self.heads, parts)}

    def loss(self, x, labels):
        """Cross-entropies, and a squared error of positions, of the solids that are there."""
        total = 0
        for key, out in self(x).items():
            if key == "position":
                present = labels["shape"] >= 0                                   # (B, 2)
                total += 4 * (out - labels[key])[present].square().sum(-1).mean()
            else:
                total += F.cross_entropy(out.flatten(0, -2), labels[key].flatten(), ignore_index=-1)
        return total

    @torch.no_grad()
    def features(self, images):
        """uint8 (N, 3, H, W), H a multiple of 32 → what its last layer decides on (N, C)."""
        device, H = self.head.weight.device, images.shape[-1]
        assert H % 32 == 0, f"pictures of {H} pixels have no whole area means of 32"
        return torch.cat([self.body(F.avg_pool2d(to_float(some.to(device)), H // 32))
                          for some in images.split(500)])

    @torch.no_grad()
    def read(self, images):
        """uint8 (N, 3, H, W), H a multiple of 32 → what it sees, like labels_of."""
        seen = {key: v.cpu() if key == "position" else v.argmax(-1).cpu()
                for key, v in self.answer(self.features(images)).items()}
        if "relation" in seen:
            alone = seen["relation"] == RELATIONS.index("alone")
            seen["count"] = 2 - alone.long()
            for key in ("shape", "colour", "size"):
                seen[key][alone, 1] = -1
            seen["position"][alone, 1] = 0
        return seen


def conv(c_in, c_out, stride=1):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out),
                         nn.ReLU())


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def shape_layers():
    """(B, 3, 32, 32) → 96 features. There is no pooling: it matters where things are."""
    return nn.Sequential(
        conv(3, 24), conv(24, 48, 2),                                            # (B, 48, 16, 16)
        conv(48, 96, 2), conv(96, 96),                                           # (B, 96, 8, 8)
        conv(96, 96, 2), nn.Flatten(), nn.Linear(96 * 4 * 4, 96), nn.ReLU()), 96


def photo_layers():
    """(B, 3, 32, 32) → 128 features."""
    return nn.Sequential(
        conv(3, 32), conv(32, 64), nn.MaxPool2d(2),                              # (B, 64, 16, 16)
        Residual(conv(64, 64), conv(64, 64)), conv(64, 128), nn.MaxPool2d(2),    # (B, 128, 8, 8)
        conv(128, 128), nn.MaxPool2d(2), Residual(conv(128, 128), conv(128, 128)),
        nn.AdaptiveMaxPool2d(1), nn.Flatten()), 128


def train_judge(judge, images, labels, vary, steps, batch_size=128):
    """Train on uint8 images (N, 3, 32, 32). vary(x) changes a batch in ways that the judge must
    learn to overlook."""
    device = judge.head.weight.device
    images, labels = images.to(device), {key: v.to(device) for key, v in labels.items()}
    optimizer = torch.optim.AdamW(judge.train().parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    torch.manual_seed(0)
    for _ in tqdm(range(steps), "training a judge"):
        i = torch.randint(len(images), (batch_size,), device=device)
        loss = judge.loss(vary(to_float(images[i])), {key: v[i] for key, v in labels.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval().requires_grad_(False)


def noisy(x):
    """A batch with some noise, and more or less contrast, as the decoder's pictures may have."""
    rand = lambda f: f(len(x), 1, 1, 1, device=x.device)
    return (x + 0.1 * rand(torch.rand) * torch.randn_like(x)) * (1 + 0.05 * rand(torch.randn))


def moved(x, most=4):
    """A batch moved by up to `most` pixels each way; each picture is mirrored or not."""
    x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x, x.flip(3))
    dx, dy = torch.randint(2 * most + 1, (2,)).tolist()
    return F.pad(x, [most] * 4, mode="replicate")[..., dy:dy + x.shape[2], dx:dx + x.shape[3]]


def judge_scenes(N):
    """N scenes to train a judge on. The unseen pairs occur too: a judge that never saw a purple
    cylinder would share the habits of the models that it judges."""
    scenes = []
    for i in range(N):
        rng = random.Random(f"judge/0/{i}")
        scenes.append(sample_scene(rng))
        for solid in scenes[-1].solids:
            solid.colour = rng.choice(list(COLOURS))
    return scenes


def judge_signs(N):
    """N signs to train a reader on, and their letters. Half of the words are unseen ones."""
    rngs = [random.Random(f"reader/0/{i}") for i in range(N)]
    words = [a_word(rng, unseen=rng.random() < 0.5) for rng in rngs]
    drawn = zip(tqdm(words, "signs for the reader"), rngs)
    return (torch.stack([draw_sign(word, rng, 32) for word, rng in drawn]),
            {"letters": letters_of(words)})


JUDGES = {"judge": (JudgeConfig(), "shapes", noisy, 1500),       # on which data, varied how, steps
          "reader": (JudgeConfig(letters=4), "signs", noisy, 1500),
          "classifier": (JudgeConfig(classes=10), "cifar10", moved, 5000)}


def load_judge(folder, part="judge", device="cpu", data_dir=None):
    """A judge of JUDGES in a folder of weights, or the shipped one, or one that is trained now, in
    minutes, and kept in that folder. Raises ValueError or OSError, in one line."""
    config, dataset, vary, steps = JUDGES[part]
    own, shipped = Path(folder) / f"{part}.pt", SHIPPED / dataset / f"{part}.pt"
    for path in own, shipped:
        if path.exists():
            return load_part(path, device, {part: (Judge, JudgeConfig)})
    say(f"{part}: neither {own} nor {shipped} is there; training one")
    torch.manual_seed(0)
    judge = Judge(config).to(device)
    if part == "judge":
        scenes = judge_scenes(20_000)
        pictures, labels = render(scenes, title="renders for the judge"), labels_of(scenes)
    elif part == "reader":
        pictures, labels = judge_signs(20_000)
    else:
        photos = load("cifar10", "train", data_dir=data_dir)
        pictures, labels = photos.images, photos.labels
    train_judge(judge, pictures, labels, vary, steps)
    save_part(own, part, judge, {"data": dataset, "seed": 0, "steps": steps}, half=True)
    return load_part(own, device, {part: (Judge, JudgeConfig)})      # rounded, as it will be read


# ---- Are the asked solids there? -----------------------------------------------------------------


def compare(captions, seen):
    """What of each caption is right in its picture: a dict of bool (N,).

    captions name all shapes and colours; seen is the judge's reading of one picture for each.
    "colour" is true if each solid has the colour that its caption names, and no other solid is
    there. "colour set" is true if the colours are there, in whatever place. If the set is right and
    "colour" is not, the colours are bound to the wrong solids (paper, sec. 7), or whole solids have
    changed places, which "shape" tells. Likewise "shape".
    """
    given = [parse_caption(caption) for caption in captions]
    relation = torch.tensor([RELATIONS.index(scene["relation"]) for scene in given])
    right = {"relation": seen["relation"] == relation}
    for key, words in ("colour", list(COLOURS)), ("shape", SHAPES):
        asked = [[words.index(solid[key]) for solid in scene["solids"]] for scene in given]
        asked = torch.tensor([(slots + [-1])[:2] for slots in asked])            # (N, 2)
        right[key] = (seen[key] == asked).all(1)
        right[f"{key} set"] = (seen[key].sort(1).values == asked.sort(1).values).all(1)
    right["all"] = right["relation"] & right["colour"] & right["shape"]
    return right


def same(seen, labels):
    """Does the judge see these solids and no others, each in its shape and colour? bool (N,)"""
    return ((seen["shape"] == labels["shape"]) & (seen["colour"] == labels["colour"])).all(1)


# ---- Measures ------------------------------------------------------------------------------------


def wilson(right):
    """bool (N,), N > 0 → the 95 % interval of the share of what is true (Wilson 1927)."""
    N, p, z = len(right), right.float().mean().item(), 1.96
    middle, half = p + z * z / (2 * N), z * math.sqrt(p * (1 - p) / N + (z / (2 * N)) ** 2)
    return max(0, middle - half) / (1 + z * z / N), (middle + half) / (1 + z * z / N)


def larger(a, b):
    """a (N,), b (M,): is the mean of a larger, so that 0 is below the 95 % interval of the
    difference? If N = M, a[i] and b[i] are a pair, of one caption or picture; else a and b are
    independent. Of bools the mean is a share; each of the two gets one True and one False more, in
    unlike pairs, so that a few pictures prove nothing (Agresti & Caffo 2000)."""
    if a.dtype == torch.bool:
        a, b = (torch.cat([x, x.new_tensor(more)]).float()
                for x, more in ((a, [True, False]), (b, [False, True])))
    parts = [a - b] if len(a) == len(b) else [a, b]
    variance = sum((x - x.mean()).square().mean() / len(x) for x in parts)
    return bool(a.mean() - b.mean() > 1.96 * variance.sqrt())


def ratio(x, to):
    """x, to (N,) → (N,) numbers. Their mean is E x / E to, and its interval is that of this ratio
    (the delta method)."""
    r = x.mean() / to.mean()
    return r + (x - r * to) / to.mean()


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 pictures a (N, 3, H, W) to b, N or one → (N,), in dB."""
    return 10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().mean((1, 2, 3)))


def gradient_energy(images):
    """Sharpness: mean squared difference of neighbouring pixels, uint8 (N, 3, H, W) → (N,)."""
    x = to_float(images)
    return x.diff(dim=2).square().mean((1, 2, 3)) + x.diff(dim=3).square().mean((1, 2, 3))


def entropy(classes, n):
    """Integers below n (N,) → −log of how frequent each one's value is, over log n (N,). The mean
    is the entropy of the sample, 1 if all are equally frequent: it is smaller than that of what
    they are drawn from, by about (n − 1) / (2 N log n). The interval is a mean's (delta method)."""
    p = torch.bincount(classes, minlength=n) / len(classes)
    return -p[classes].log() / math.log(n)


def spread(x):
    """tr Cov of samples x (…, n, D) → (…,), without bias; nan for a single one."""
    return (x - x.mean(dim=-2, keepdim=True)).square().sum((-2, -1)) / (x.shape[-2] - 1)


def shares(x):
    """Two causes, with k levels each. x (k, k, n): a row is a level of the first, a column one of
    the second. Returns three shares of the variance: due to the first, to the second, and to both
    together (two-way analysis of variance; none is below 0)."""
    k, mean = len(x), x.mean((0, 1))
    first, second = x.mean(1) - mean, x.mean(0) - mean                           # (k, n) each
    both = (x - mean - first[:, None] - second).square().sum() / (k - 1) ** 2
    one = lambda effect: (effect.square().sum() / (k - 1) - both / k).clamp(min=0)
    parts = torch.stack([one(first), one(second), both])
    return (parts / parts.sum()).tolist()


def energy_distance(x, y):
    """2E|X-Y| - E|X-X'| - E|Y-Y'| of samples x (…, n, D), y (…, m, D) → (…,), without bias if x
    and y are independent.

    Its mean is 0 if the distributions are the same, and only then (Székely & Rizzo 2013). To
    compare with a single point, give it twice: one sample has no pairs.
    """
    total = lambda a, b: torch.cdist(
        a, b, compute_mode="donot_use_mm_for_euclid_dist").sum((-2, -1))
    n, m = x.shape[-2], y.shape[-2]
    # n (n − 1): a sample and itself are no pair.
    return 2 * total(x, y) / (n * m) - total(x, x) / (n * (n - 1)) - total(y, y) / (m * (m - 1))


def frechet(x, y):
    """Fréchet distance of the Gaussians that fit x (N, D) and y (M, D) (Heusel et al. 2017):
    |μ_x − μ_y|² + tr(C_x + C_y − 2 (C_x C_y)^½)."""
    x, y = x.cpu().double(), y.cpu().double()
    C_x, C_y = x.T.cov(), y.T.cov()
    values, axes = torch.linalg.eigh(C_x)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    cross = torch.linalg.eigvalsh(root @ C_y @ root).clamp(min=0).sqrt().sum()   # tr (C_x C_y)^½
    return ((x.mean(0) - y.mean(0)).square().sum() + C_x.trace() + C_y.trace() - 2 * cross).item()


# ---- Form: is it a sound solid? ------------------------------------------------------------------
# A judge also recognises a dented cube. So form is measured by analysis by synthesis: of all scenes
# of the asked shape and colour, which one looks most like the picture, and how much does it differ?

# A scene of one solid is nine numbers: x and y, the centre of its outline; k; yaw; azimuth and
# elevation of the light; and r, g, b, the floor's tint. The search begins within AROUND of a first
# guess, and stays between LOW and HIGH: the solid is to be in the picture, and the light so low
# that it does not look down into a cone, for which the tracer has no formula.
AROUND = torch.tensor([0.08, 0.08, 0.08, math.pi / 4, 1.3, 0.15, 0.05, 0.05, 0.05])
LOW = torch.tensor([-1, -1, 0.12, -9, -9, 0.6, 0, 0, 0])
HIGH = torch.tensor([1, 1, 0.7, 9, 9, 1.0, 1, 1, 1])


def scene_of(numbers, shape, colour):
    """Nine numbers → the Scene."""
    x, y, k, yaw, azimuth, elevation, *floor = numbers.tolist()
    solid = Solid(shape, colour, "", yaw % (math.pi / 2), k, x, y)
    _, up, down = outline(solid, k)
    solid.stands = x, 0, -(y + (up - down) / 2) / SIN
    light = (math.sin(azimuth) * math.cos(elevation), math.sin(elevation),
             -math.cos(azimuth) * math.cos(elevation))
    return Scene("alone", [solid], tuple(floor), light)


def first_guess(images, judge):
    """Pictures → their nine numbers (N, 9): place and size as the judge reads them, the floor's
    tint from the lower corners, and the rest from the middle of its range."""
    seen, guess = judge.read(images), torch.tensor([0, 0, 0, math.pi / 4, 0, 0.82, 0, 0, 0])
    guess = guess.repeat(len(images), 1)
    guess[:, :2] = seen["position"][:, 0]
    guess[:, 2] = torch.tensor([0.27, 0.42])[seen["size"][:, 0]]
    guess[:, 6:] = images[:, :, -2:, [0, 1, -2, -1]].flatten(2).float().median(2).values / 255
    return guess


def fit_scenes(images, asked, judge, candidates=24, plan=((32, 16), (64, 6)), seed=0):
    """uint8 (N, 3, S, S), and N pairs (shape, colour) → for each the Scene most like the picture.

    Differential evolution (Storn & Price 1997): each candidate is moved towards the best one of its
    picture, and by the difference of two others. It stays there if its render is now more like the
    picture. Moves become small by themselves, as the candidates gather. plan: pixels and
    generations. The last ones have more pixels, because a small render is no exact area mean.
    """
    N, S, g = len(images), images.shape[-1], torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(N, candidates, *shape, generator=g)
    pick = lambda x, i: x.gather(1, i[:, :, None].expand(-1, -1, 9))

    def misfit(x, size):
        target = F.avg_pool2d(to_float(images), S // size)[:, None]
        drawn = render([scene_of(numbers, *pair) for some, pair in zip(x, asked)
                        for numbers in some], size)
        return (to_float(drawn).unflatten(0, (N, -1)) - target).square().mean((2, 3, 4))

    x = (first_guess(images, judge)[:, None] + AROUND * (2 * rand(9) - 1)).clamp(LOW, HIGH)
    for size, generations in plan:                                       # x (N, candidates, 9)
        size = min(size, S)
        error = misfit(x, size)                                                  # (N, candidates)
        for _ in tqdm(range(generations), f"fitting scenes, {size} pixels", leave=False):
            best = pick(x, error.argmin(1, keepdim=True))
            a, b = pick(x, rand().argsort(1)), pick(x, rand().argsort(1))
            step = (0.6 * (best - x) + 0.6 * (a - b)) * (rand(9) < 0.9)
            tried = (x + step).clamp(LOW, HIGH)
            its_error = misfit(tried, size)
            x = torch.where((its_error < error)[:, :, None], tried, x)
            error = error.minimum(its_error)
    best = pick(x, error.argmin(1, keepdim=True))[:, 0]
    return [scene_of(numbers, *pair) for numbers, pair in zip(best, asked)]


def form(images, asked, judge, **search):
    """uint8 (N, 3, S, S), S 32 or a multiple of 64, and N pairs (shape, colour) → PSNR (N,), in dB,
    of each picture and the scene that fits it, in a box around the solid; and these renders.

    The fit itself is not exact: form of renders says how much it loses.
    """
    S, decibels = images.shape[-1], []
    scenes = fit_scenes(images, asked, judge, **search)
    drawn = render(scenes, S)
    pixel = lambda v: round((min(max(v, -1), 1) + 1) / 2 * S)
    for scene, both in zip(scenes, torch.stack([images, drawn], 1)):
        solid = scene.solids[0]
        side, up, down = outline(solid, solid.k)
        half, edge = (up + down) / 2, 1 / 16                                     # a pixel of 32
        box = both[:, :, pixel(solid.y - half - edge):pixel(solid.y + half + edge),
                   pixel(solid.x - side - edge):pixel(solid.x + side + edge)]
        decibels.append(psnr(box[:1], box[1:]))
    return torch.cat(decibels), drawn
