"""How good it is.

What unCLIP draws of the rendered shapes is judged by a small classifier, which learnt from renders
alone what a picture shows: it never shares a weight with CLIP, or CLIP would be grading itself.

This is the last chapter.
"""
import argparse
import inspect
import math
import random
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from clip_tiny import principal
from data import (CIFAR_CLASSES, COLOURS, RELATIONS, SHAPES, SIZES, UNSEEN, Dataset, class_captions,
                  grid, is_true, item, labels_of, load, parse, render, sample_scene, scenes_for,
                  to_float, to_uint8, write_beside, write_png)
from prior import PCATokens
from unclip import FORMAT, SHIPPED, UnCLIP, read_torch, slerp, write_torch

# ---- The judge ----------------------------------------------------------------------------------


class Judge(nn.Module):
    """Reads a picture of shapes: the relation, and for both slots shape, colour, size and position.

    The slots are those of data.labels_of: the left or upper solid first, and an only solid alone.
    """

    HEADS = {"relation": len(RELATIONS), "shape": 2 * len(SHAPES), "colour": 2 * len(COLOURS),
             "size": 2 * len(SIZES), "position": 2 * 2}

    def __init__(self):
        super().__init__()

        def conv(c_in, c_out, stride=1):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False),
                                 nn.BatchNorm2d(c_out), nn.ReLU())
        self.body = nn.Sequential(                                       # (B, 3, 32, 32)
            conv(3, 24), conv(24, 48, 2),                                # (B, 48, 16, 16)
            conv(48, 96, 2), conv(96, 96),                               # (B, 96, 8, 8)
            conv(96, 96, 2), nn.Flatten(),                               # (B, 96 * 4 * 4)
            nn.Linear(96 * 4 * 4, 96), nn.ReLU())                        # no pooling: place matters
        self.head = nn.Linear(96, sum(self.HEADS.values()))

    def forward(self, x):
        """x (B, 3, 32, 32) in [-1, 1] → logits: relation (B, 3), others (B, 2, their classes)."""
        parts = self.head(self.body(x)).split(list(self.HEADS.values()), dim=1)
        return {key: part if key == "relation" else part.unflatten(1, (2, -1))
                for key, part in zip(self.HEADS, parts)}

    def loss(self, x, labels):
        """Cross-entropies, and for the positions a squared error; absent solids count nowhere."""
        out = self(x)
        present = labels["shape"] >= 0                                   # (B, 2)
        total = F.cross_entropy(out["relation"], labels["relation"])
        for key in ("shape", "colour", "size"):
            total = total + F.cross_entropy(out[key].flatten(0, 1), labels[key].flatten(),
                                            ignore_index=-1)
        error = (out["position"] - labels["position"]).square().sum(-1)
        return total + 4 * (error * present).sum() / present.sum()

    @torch.no_grad()
    def read(self, images, batch=500):
        """uint8 (N, 3, H, W), H a multiple of 32 → what it sees, as data.labels_of tells it."""
        self.eval()
        device, H = next(self.parameters()).device, images.shape[-1]
        assert H % 32 == 0, f"pictures of {H} pixels have no whole area means of 32"
        parts = []
        for some in images.split(batch):
            x = F.avg_pool2d(to_float(some.to(device)), H // 32)
            parts.append({key: v.cpu() for key, v in self(x).items()})
        out = {key: torch.cat([part[key] for part in parts]) for key in self.HEADS}
        seen = {key: v if key == "position" else v.argmax(-1) for key, v in out.items()}
        seen["count"] = 1 + (seen["relation"] > 0).long()
        absent = seen["count"] == 1
        for key, nothing in (("shape", -1), ("colour", -1), ("size", -1), ("position", 0.0)):
            seen[key][absent, 1] = nothing
        return seen


def judge_pictures(N, seed=0, device="cpu"):
    """N renders to train a judge on, as a data.Dataset: the unseen pairs occur in them too.

    A judge that has never seen a purple cylinder would call it blue, or a cube: it must not share
    the habits of the models that it judges.
    """
    scenes = []
    for i in range(N):
        rng = random.Random(f"judge/{seed}/{i}")
        scenes.append(sample_scene(rng))
        for solid in scenes[-1].solids:
            solid.colour = rng.choice(list(COLOURS))
    images = render(scenes, 32, device, "rendering for the judge")
    return Dataset(images, [[]] * N, labels_of(scenes), classes=[], flips=False)


def train_judge(dataset, device="cpu", steps=1500, batch_size=128, seed=0):
    """Train a Judge on judge_pictures (20,000 do): minutes on two cores."""
    torch.manual_seed(seed)
    judge = Judge().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    images = dataset.images.to(device)
    labels = {key: value.to(device) for key, value in dataset.labels.items()}
    bar = tqdm(range(steps), "judge")
    for step in bar:
        i = torch.randint(len(images), (batch_size,), device=device)
        x = to_float(images[i])
        # Pictures from a decoder are a little noisy and off in tone: that must not confuse it.
        x = x + 0.1 * torch.rand(batch_size, 1, 1, 1, device=device) * torch.randn_like(x)
        x = x * (1 + 0.05 * torch.randn(batch_size, 1, 1, 1, device=device))
        loss = judge.loss(x, {key: value[i] for key, value in labels.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return judge.eval()


def load_judge(folder, device="cpu"):
    """The judge of a folder of weights, or the shipped one, or else one that is trained now."""
    own, shipped = Path(folder) / "judge.pt", SHIPPED / "shapes" / "judge.pt"
    path = next((path for path in (own, shipped) if path.exists()), None)
    if path is None:
        print(f"judge: neither {own} nor {shipped}; training one, for minutes", file=sys.stderr)
        judge = train_judge(judge_pictures(20_000, 0, device), device)
        return save_judge(own, judge, {"data": "shapes", "pictures": 20_000, "seed": 0})
    return read_judge(path, "judge", Judge(), device)


def read_judge(path, part, judge, device):
    """Fill a judge (or the classifier below) with the weights in a file; returns it."""
    checkpoint = read_torch(path)
    try:
        assert checkpoint["format"] == FORMAT and checkpoint["part"] == part
        judge.load_state_dict(checkpoint["weights"])
    except (TypeError, KeyError, AssertionError, RuntimeError):
        raise ValueError(f"{path}: not a {part} that fits this code; delete it, and the next run "
                         f"trains another") from None
    return judge.to(device).eval()


def save_judge(path, judge, trained, part="judge"):
    """Write a judge like the parts of unCLIP, in half precision; returns it."""
    weights = {key: v.cpu().half() if v.is_floating_point() else v.cpu()
               for key, v in judge.state_dict().items()}
    write_torch(path, {"format": FORMAT, "part": part, "config": {}, "weights": weights,
                       "clip_id": None, "trained": trained})
    return judge


# ---- The bench: what every experiment works with ------------------------------------------------


@dataclass
class Bench:
    """unCLIP, the judge beside its weights, and where figures go; n caps every count."""
    unclip: UnCLIP
    weights: Path
    out: Path
    seed: int = 0
    n: int | None = None
    data_dir: str | None = None

    @cached_property
    def judge(self):
        return load_judge(self.weights, self.unclip.device)

    @cached_property
    def priors(self):
        """The priors whose weights are there."""
        return [name for name, prior in self.unclip.priors.items() if prior is not None]

    def most(self, count):
        """This count, or less where a quick look is asked for."""
        return min(count, self.n or count)

    def z_i(self, captions, rows, prior, **options):
        """Of each caption, the z_i that the prior draws with the noise of a row → (N, D)."""
        y = self.unclip.clip.tokenizer(captions).to(self.unclip.device)
        return self.batches(f"z_i by {prior}", len(y), lambda i: self.unclip.draw_z_i(
            y[i], prior, self.seed, rows[i], **options))

    def draw(self, captions, rows, prior=None, guidance=None, z_i=None):
        """Of each caption, the picture of a row of noise → uint8 (N, 3, H, W), on the CPU.

        Just what unclip.generate draws, with many captions in a batch; or else of given z_i (N, D).
        """
        y = self.unclip.clip.tokenizer(captions).to(self.unclip.device)

        def some(i):
            z = self.unclip.draw_z_i(y[i], prior, self.seed, rows[i]) if z_i is None else z_i[i]
            noise = self.unclip.noise(self.seed, rows[i], "decoder")
            return to_uint8(self.unclip.part("decoder").sample(z, y[i], noise, guidance)).cpu()
        return self.batches(f"pictures, z_i by {prior}" if prior else "decoding", len(y), some)

    def renders(self, captions, rows, size=32):
        """Of each caption, the render of a row's chance → uint8 (N, 3, size, size)."""
        scenes = [scenes_for(caption, 1, f"bench/{self.seed}/{row}")[0]
                  for caption, row in zip(captions, rows)]
        return render(scenes, size, self.unclip.device, "renders")

    @torch.no_grad()
    def encode(self, images):
        """uint8 (N, 3, H, W) → their z_i (N, D)."""
        return self.batches("CLIP", len(images), lambda i: self.unclip.clip.encode_image(
            to_float(images[i].to(self.unclip.device))))

    def batches(self, title, N, f, size=None):
        """f(slice) for the slices that make up 0..N, put together."""
        size = size or (64 if self.unclip.device.type == "cpu" else 512)
        slices = [slice(i, i + size) for i in range(0, N, size)]
        return torch.cat([f(i) for i in tqdm(slices, title, leave=False)])

    def figure(self, name, images, columns):
        """Write a grid of pictures as a figure."""
        path = self.out / f"{name}.png"
        write_png(path, grid(images, columns))
        print(f"figure: {path}", file=sys.stderr)


def table(rows):
    """Rows, dicts of what stands in which column, as Markdown."""
    def cell(key, value):
        if isinstance(value, float):
            return f"{100 * value:.1f}" if key.endswith("%") else f"{value + 0.0:.3f}"
        return f"{value:,}" if isinstance(value, int) else str(value)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(key, row.get(key, "")) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- Experiments: do pictures show what was asked for? -------------------------------------------


def compare(captions, seen):
    """What of each caption is right in its picture: a dict of bool (N,).

    captions name all shapes and colours; seen: the judge's reading of one picture for each.
    "colour" and "shape" ask for each solid's own, and for no solid more; "… set" for the same ones
    in any place: what is in the set and not in its place is bound to the wrong solid.
    """
    given = [parse(caption) for caption in captions]
    words = {"colour": list(COLOURS), "shape": SHAPES}
    right = {"relation": seen["relation"] == torch.tensor(
        [RELATIONS.index(scene["relation"]) for scene in given])}
    for key in words:
        asked = [[words[key].index(solid[key]) for solid in scene["solids"]] for scene in given]
        asked = torch.tensor([(slots + [-1])[:2] for slots in asked])            # (N, 2)
        right[key] = (seen[key] == asked).all(1)
        right[f"{key} set"] = (seen[key].sort(1).values == asked.sort(1).values).all(1)
    right["all"] = right["relation"] & right["colour"] & right["shape"]
    return right


def conditions(bench, captions, rows, baselines=False):
    """Pictures of the captions, by what the decoder is given: yields (name, pictures).

    All of them share their noise. baselines: also without a prior. Last comes chance: the same
    renders, shuffled among the captions.
    """
    renders = bench.renders(captions, rows)
    yield "renders", renders
    for prior in bench.priors:
        yield f"z_i by the {prior} prior", bench.draw(captions, rows, prior)
    if baselines:
        yield "z_t in place of z_i", bench.draw(captions, rows, "text")
        yield "caption only", bench.draw(captions, rows, "none")
    order = torch.randperm(len(renders), generator=torch.Generator().manual_seed(bench.seed))
    yield "chance: renders, shuffled", renders[order]


def judge_itself(bench):
    """The judge on 2,000 validation renders.

    Bars, for one solid: shape 99 %, colour 99.5 %."""
    split = load("shapes", "validation", limit=bench.most(2000))
    seen, truth = bench.judge.read(split.images), split.labels
    rows = []
    for name, count in ("one solid", 1), ("two solids", 2):
        k = truth["count"] == count
        rows.append({"renders of": name, "pictures": int(k.sum())})
        for key in "shape", "colour", "size":
            rows[-1][f"{key} %"] = mean(seen[key][k, :count] == truth[key][k, :count])
        rows[-1]["relation %"] = mean(seen["relation"][k] == truth["relation"][k])
        error = (seen["position"] - truth["position"])[k, :count]
        rows[-1]["position, rms pixels"] = 16 * error.square().mean().sqrt().item()
    return rows


def accuracy(bench):
    """Colour and shape, as the judge sees them, in pictures of one solid.

    All pairs, as "a red cube"; the four unseen pairs never occurred in training, in any picture.
    Every row has the same captions and noise. Bar: both right in 97 %, by the diffusion prior."""
    pairs = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    n = bench.most(33)
    captions = [noun(*pair) for pair in pairs for _ in range(n)]
    noise = list(range(n)) * len(pairs)
    unseen = torch.tensor([pair in UNSEEN for pair in pairs for _ in range(n)])
    rows = []

    def add(name, pictures):
        right = compare(captions, bench.judge.read(pictures))
        rows.append({"pictures from": name})
        for which, k in ("", ~unseen), ("unseen: ", unseen):
            for key, title in ("colour", "colour"), ("shape", "shape"), ("all", "both"):
                rows[-1][f"{which}{title} %"] = mean(right[key][k])
        return right["all"]

    for name, pictures in conditions(bench, captions, noise, baselines=True):
        right = add(name, pictures)
        if "diffusion" in name:
            bench.figure("accuracy", enlarged(bench, pictures[::n]), len(COLOURS))
            wrong = (~right & ~unseen).nonzero()[:16, 0].tolist()
            if wrong:
                bench.figure("mistakes", pictures[wrong], 8)
                print("which should be", *(captions[i] for i in wrong), sep="\n  ", file=sys.stderr)
            unguided = bench.draw(captions, noise, "diffusion", guidance=1)
            add("the same, decoder unguided", unguided)
    return rows


def two(bench):
    """Two solids of different colours: which, where, and whose colour?

    "Set": the right ones, in whatever place; "swapped": both colours are right and in the wrong
    place, the paper's weakness (sec. 7). Bar: colours as a set 85 %."""
    rng, N = random.Random(f"two/{bench.seed}"), bench.most(900)
    captions = []
    while len(captions) < N:
        relation = rng.choice(["on top of", "left of", "right of"])
        first, second = (sample_scene(rng, {"relation": "alone"}).solids[0] for _ in range(2))
        carries = relation != "on top of" or second.shape in ("cube", "cylinder")
        if first.colour != second.colour and carries:
            captions.append(f"{noun(first.colour, first.shape)} {relation} "
                            f"{noun(second.colour, second.shape)}")
    rows = []
    for name, pictures in conditions(bench, captions, list(range(N))):
        right = compare(captions, bench.judge.read(pictures))
        rows.append({"pictures from": name,
                     "colours, set %": mean(right["colour set"]),
                     "shapes, set %": mean(right["shape set"]),
                     "colours swapped %": mean(right["colour set"] & ~right["colour"]),
                     "all in place %": mean(right["colour"] & right["shape"]),
                     "relation %": mean(right["relation"]), "all right %": mean(right["all"])})
    shown = ["a red cube on top of a blue cube", "a blue cube on top of a red cube",
             "a red cube left of a blue cube", "a red cube right of a blue cube"]
    n = bench.most(8)
    pictures = bench.draw([caption for caption in shown for _ in range(n)], list(range(n)) * 4,
                          "diffusion")
    bench.figure("two", enlarged(bench, pictures), n)
    return rows


def variety(bench):
    """What "a cube" leaves open: does it vary as in the data?

    Of pictures that the judge calls a cube: entropy of the colours (1: all eight equally
    often), how widely they stand, as a ratio to the data, and how many are large. Bars: 0.9; 0.8 to
    1.2."""
    N, cube = bench.most(512), "a cube"
    data = bench.judge.read(bench.renders([cube] * 4 * N, range(N, 5 * N)))["position"][:, 0].std(0)
    rows = []
    for name, pictures in conditions(bench, [cube] * N, range(N)):
        if "chance" in name:
            continue                                     # all captions are the same here
        seen = bench.judge.read(pictures)
        k = (seen["count"] == 1) & (seen["shape"][:, 0] == SHAPES.index("cube"))
        places = seen["position"][k, 0]
        x, y = (places.std(0) / data).tolist() if len(places) > 1 else (math.nan, math.nan)
        rows.append({"pictures from": name, "cubes %": mean(k),
                     "entropy of colour": entropy(seen["colour"][k, 0], len(COLOURS)),
                     "spread, across": x, "spread, down": y,
                     "large %": mean(seen["size"][k, 0] == SIZES.index("large"))})
        if "diffusion" in name:
            bench.figure("variety", enlarged(bench, pictures[:32]), 8)
    return rows


def noun(colour, shape):
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


def mean(bools):
    """The share of what is true, 0..1."""
    return bools.float().mean().item()


def entropy(classes, n):
    """Entropy of the empirical distribution of integers below n, over log n."""
    p = torch.bincount(classes, minlength=n) / max(1, len(classes))
    return -(p * p.clamp(min=1e-12).log()).sum().item() / math.log(n)


# ---- Experiments: the embeddings -----------------------------------------------------------------


def clip(bench):
    """CLIP on 500 validation pairs: is what it finds true?

    For each picture the closest of all the captions, for each caption the closest picture (once for
    each different caption, and once for each pair); "true" by the scene's attributes, "exact" if
    they are a pair. Many captions are true of a picture ("a cube", "a photo of a red cube"): the
    ceiling is what one attains who knows all attributes, and of the true answers picks the one that
    is true of the fewest others. Bars: 95 % true."""
    split = load("shapes", "validation", limit=bench.most(500))
    own = [captions[0] for captions in split.captions]
    texts = sorted(set(own))
    y = bench.unclip.clip.tokenizer(texts).to(bench.unclip.device)
    z_t = bench.batches("CLIP", len(y), lambda i: bench.unclip.clip.encode_text(y[i]))
    score = (bench.encode(split.images) @ z_t.T).cpu()                           # (N, texts)
    labels = {key: v.numpy() for key, v in split.labels.items()}                 # quicker to index
    true = torch.tensor([[is_true(text, labels, i) for text in texts] for i in range(len(own))])
    pair = torch.tensor([[text == caption for text in texts] for caption in own])
    one = (split.labels["count"] == 1)
    rows = []

    def add(name, score, true, pair):                                            # (asked, answers)
        top = score.argmax(1, keepdim=True)
        rare = true / true.sum(0).clamp(min=1)
        best = rare == rare.max(1, keepdim=True).values                          # often several
        rows.append({"closest to": name, "asked": len(score),
                     "true %": mean(true.gather(1, top)), "true by chance %": mean(true),
                     "exact %": mean(pair.gather(1, top)),
                     "exact, ceiling %": ((pair & best).sum(1) / best.sum(1)).mean().item()})

    by_picture = score, true, pair
    of_pairs = torch.tensor([texts.index(caption) for caption in own])
    add("a picture", *by_picture)
    add("a picture of one solid", *(a[one] for a in by_picture))
    add("a picture of two", *(a[~one] for a in by_picture))
    add("a caption", *(a.T for a in by_picture))
    add("a pair's caption", *(a.T[of_pairs] for a in by_picture))
    return rows


def spread(x):
    """tr Cov of samples x (…, n, D) → (…,), without bias."""
    return x.var(dim=-2).sum(-1)


def energy_distance(x, y):
    """2E|X-Y| - E|X-X'| - E|Y-Y'| of samples x (…, n, D), y (…, m, D) → (…,), without bias.

    Its mean is 0 if the distributions are the same, and only then (Székely & Rizzo 2013). A point
    is a sample of two equal ones."""
    def distances(a, b):
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")

    def within(a):                                       # of different samples alone
        return distances(a, a).sum((-2, -1)) / (a.shape[-2] * (a.shape[-2] - 1))
    return 2 * distances(x, y).mean((-2, -1)) - within(x) - within(y)


def codes(bench):
    """z_i as the AR prior's codes and back: what is lost, by the number of buckets.

    Of 1,000 validation renders, as a share of their variance; axes and buckets come from 5,000
    training renders. The paper's rule keeps the fewest axes that lose less than 1 % of these."""
    train, z_i = (bench.encode(load("shapes", split, limit=bench.most(N)).images)
                  for split, N in (("train", 5000), ("validation", 1000)))
    mean_z_i, axes, variances = principal(train)
    k, D = PCATokens.components_needed(variances), len(axes)

    def row(buckets, decoded):
        lost = (decoded - z_i).square().sum() / (z_i - z_i.mean(0)).square().sum()
        return {"axes": k, "variance %": (variances[:k].sum() / variances.sum()).item(),
                "buckets": buckets, "lost %": lost.item()}
    rows = []
    for buckets in 4, 8, 16, 32, 64, 128, 256:
        tokens = PCATokens(D, k, buckets).to(z_i.device).fit(train)
        rows.append(row(buckets, tokens.decode(tokens.encode(z_i))))
    on_axes = mean_z_i + (z_i - mean_z_i) @ axes[:k].T @ axes[:k]
    return rows + [row("none", F.normalize(on_axes, dim=1))]


def priors(bench):
    """The priors against the true p(z_i | y): 50 captions, 256 samples and 256 renders of each.

    Spread: the mean tr Cov(z_i | y), as a ratio to the renders'. Energy distance: from the renders,
    as a ratio to that of a point at their own mean, the best a regressor could do. Own caption: of
    how many z_i the closest of the 50 z_t is their caption's. z_t·z_i: the mean. Best of two and
    the upper half of the dots at a temperature below 1, the defaults in drawing, trade spread for
    fit on purpose: they stand at the end. Bars: spread 0.8 to 1.2, energy distance 1/3."""
    captions = list(dict.fromkeys(item("validation", i)[1][0] for i in range(500)))[:bench.most(50)]
    n = bench.most(256)
    y, rows = [caption for caption in captions for _ in range(n)], list(range(n)) * len(captions)
    device = bench.unclip.device
    tokens = bench.unclip.clip.tokenizer(captions).to(device)
    z_t = bench.unclip.clip.encode_text(tokens)                                  # (captions, D)
    by_caption = lambda z_i: z_i.unflatten(0, (len(captions), n))
    point = lambda z: z.expand(len(captions), -1)[:, None].repeat(1, 2, 1)       # two equal ones

    real = by_caption(bench.encode(bench.renders(y, rows)))                      # (captions, n, D)
    again = by_caption(bench.encode(bench.renders(y, [n + row for row in rows])))
    regressor = energy_distance(real, point(real.mean(1))).mean()
    lines = []

    def add(name, z_i, **more):
        own = (z_i @ z_t.T).argmax(-1) == torch.arange(len(z_t), device=device)[:, None]
        lines.append({"z_i from": name, "spread": (spread(z_i).mean() / spread(real).mean()).item(),
                      "energy distance": (energy_distance(real, z_i).mean() / regressor).item(),
                      "own caption %": mean(own),
                      "z_t·z_i": (z_i * z_t[:, None]).sum(-1).mean().item(), **more})

    def sample(prior, **options):
        began = time.time()
        z_i = by_caption(bench.z_i(y, rows, prior, **options))
        z_i.sum().item()                                 # a GPU is done only when it is asked
        return z_i, {"samples/s": round(len(y) / (time.time() - began))}

    add("other renders of the caption", again)
    add("the mean of the caption's renders", point(real.mean(1)))
    add("z_t", point(z_t))
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(bench.seed))
    add("renders of any caption", by_caption(again.flatten(0, 1)[shuffled]))
    add("the mean of all renders", point(again.mean((0, 1))))
    plain = {"diffusion": {"candidates": 1}, "ar": {"top_half": False, "temperature": 1.0}}
    biased = {"diffusion": "diffusion prior, best of two", "ar": "ar prior, upper half, cooler"}
    for name in bench.priors:
        z_i, speed = sample(name, **plain[name])
        speed |= cost(bench.unclip.priors[name], real[:, 0], z_t, tokens)
        add(f"{name} prior", z_i, **speed)
        add(f"{name} prior, of another caption", z_i.roll(1, 0))
    for name in bench.priors:
        z_i, speed = sample(name)
        add(biased[name], z_i, **speed)
    return lines


def cost(prior, z_i, z_t, tokens):
    """A prior's size, and what its training cost: 6 operations for each weight and position."""
    steps, batch_size = (prior.trained.get(key, 0) for key in ("steps", "batch_size"))
    lengths = []
    hook = prior.transformer.register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    with torch.no_grad():
        prior.loss(z_i, z_t, tokens)
    hook.remove()
    weights = sum(p.numel() for p in prior.transformer.parameters())
    return {"parameters": sum(p.numel() for p in prior.parameters()),
            "training steps": f"{steps} × {batch_size}",
            "training PFLOP": 6 * weights * sum(lengths) * steps * batch_size / 1e15}


# ---- Experiments: manipulations and real images --------------------------------------------------
# What is drawn is measured as it is shown, in 8 bits. Nothing is guided, but for the decoder's own
# pictures that are upsampled; there alone the caption plays a part.

STEPS = 25                     # of inversion, and of decoding


def renders_and_others(bench, N, alone=True):
    """N validation renders, and for each another, whose first solid has neither the colour nor the
    shape: twice (uint8 (N, 3, H, W), labels). alone: only renders of one solid."""
    size = bench.unclip.part("decoder").config.image_size
    split = load("shapes", "validation", size, limit=10 * bench.most(200))
    pool = ((split.labels["count"] == 1) | torch.tensor(not alone)).nonzero()[:, 0]
    colour, shape = (split.labels[key][pool, 0] for key in ("colour", "shape"))
    fits = (colour[:N, None] != colour) & (shape[:N, None] != shape)              # (N, pool)
    g = torch.Generator().manual_seed(bench.seed)
    other = pool[torch.multinomial(fits.float(), 1, generator=g)[:, 0]]
    return [(split.images[i], {key: v[i] for key, v in split.labels.items()})
            for i in (pool[:N], other)]


def latents(bench, images, steps=None):
    """uint8 (N, 3, H, W) → their z_i (N, D) and x_T (N, 3, H, W)."""
    x, steps = to_float(images.to(bench.unclip.device)), steps or STEPS
    return bench.encode(images), bench.batches(
        f"inverting, {steps} steps", len(x), lambda i: bench.unclip.latent(x[i], steps)[1])


def decode(bench, title, z_i, x_T, steps=None, eta=0.0):
    """Latents → uint8 (N, 3, H, W), on the CPU; for eta > 0 each picture has noise of its own."""
    def some(i):
        noise = bench.unclip.noise(bench.seed, range(len(z_i))[i], "variation")
        return to_uint8(bench.unclip.decode(z_i[i], x_T[i], steps or STEPS, eta, noise)).cpu()
    return bench.batches(title, len(z_i), some)


def enlarged(bench, images):
    """Through the upsamplers, if there are any: uint8 (N, 3, h, w) → uint8 (N, 3, H, W)."""
    x = to_float(images.to(bench.unclip.device))
    return bench.batches("upsampling", len(x), lambda i: to_uint8(
        bench.unclip.upsample(x[i], bench.seed, range(len(x))[i])).cpu(), size=16)


def psnr(a, b):
    """Peak signal-to-noise ratio of uint8 pictures (N, 3, H, W) → (N,), in dB."""
    return 10 * torch.log10(255 ** 2 / (a.float() - b.float()).square().mean((1, 2, 3)))


def gradient_energy(images):
    """Sharpness: mean squared difference of neighbouring pixels, uint8 (N, 3, H, W) → (N,)."""
    x = to_float(images)
    return x.diff(dim=2).square().mean((1, 2, 3)) + x.diff(dim=3).square().mean((1, 2, 3))


def neighbours(x):
    """The correlation of neighbouring pixels of x (N, 3, H, W): 0 for white noise."""
    across, down = (x[..., 1:] * x[..., :-1]).mean(), (x[..., 1:, :] * x[..., :-1, :]).mean()
    return ((across + down) / 2 / x.square().mean()).item()


def same(seen, labels):
    """Does the judge see these solids and no others, each in its shape and colour? bool (N,)"""
    return ((seen["shape"] == labels["shape"]) & (seen["colour"] == labels["colour"])).all(1)


def changes(seen, images, before, images_before, k):
    """Of the items k, bool (N,): how far an only solid moved, how much floor and pixels changed."""
    one = k & (seen["count"] == 1) & (before["count"] == 1)
    way = 16 * (seen["position"] - before["position"])[one, 0].norm(dim=-1).mean().item()
    off = images[k].float() - images_before[k].float()
    corners = off[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].abs().mean().item()        # mostly floor
    return {"moved, of 32 pixels": f"{way:.2f}", "corners, of 255": f"{corners:.1f}",
            "pixels (rms), of 255": f"{off.square().mean((1, 2, 3)).sqrt().mean():.1f}"}


def upsampler(bench):
    """From 32 to 128 pixels: validation renders, and what the decoder draws of their z_i.

    The small renders are area means of the large ones. PSNR and sharpness (gradient energy, a
    ratio) compare with these; the last column is the distance of the result's own area means from
    the small pixels. Bars: PSNR not below bicubic's, sharpness 0.8 to 1.2, means within 2, no solid
    lost. Figure: small, bicubic, upsampled, real."""
    factor = bench.unclip.upsamplers[0].config.factor
    size = bench.unclip.part("decoder").config.image_size * factor
    large = load("shapes", "validation", size, limit=bench.most(200))
    small = to_uint8(F.avg_pool2d(to_float(large.images), factor))
    drawn = bench.draw([captions[0] for captions in large.captions], range(len(large)),
                       z_i=bench.encode(small))
    bicubic = to_uint8(F.interpolate(to_float(small), scale_factor=float(factor), mode="bicubic"))
    pictures = {"renders": large.images, "renders, small": small, "bicubic": bicubic,
                "upsampled": enlarged(bench, small), "by the decoder": drawn,
                "by the decoder, upsampled": enlarged(bench, drawn)}
    rows, sharp = [], gradient_energy(large.images).mean()
    for name, x in pictures.items():
        seen = bench.judge.read(x)
        rows.append({"pictures": name, "solids right %": mean(same(seen, large.labels))})
        if name in ("bicubic", "upsampled"):
            off = F.avg_pool2d(x.float(), factor) - small.float()
            rows[-1] |= {"PSNR": f"{psnr(x, large.images).mean():.1f} dB",
                         "sharpness": (gradient_energy(x).mean() / sharp).item(),
                         "means off, of 255": off.abs().mean().item()}
    blocks = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    shown = (blocks, bicubic, pictures["upsampled"], large.images)
    bench.figure("upsampler", torch.cat([x[:6] for x in shown]), len(blocks[:6]))
    return rows


def reconstruct(bench):
    """Validation renders to (z_i, x_T) and back; and, as controls, with one of the two exchanged.

    The other picture's solid has neither the colour nor the shape: a decoder that draws it from
    this one's x_T uses z_i. White noise, which training starts from, has std 1, and its neighbours
    do not correlate. Bars: 28 dB; judged as the other mostly. Figure: render, reconstruction,
    random x_T, another's z_i, that other."""
    N = bench.most(200)
    (images, labels), (others, theirs) = renders_and_others(bench, N, alone=False)
    rows, shown = [], []

    def add(name, z_i, x_T, steps=None):
        n, x = len(z_i), decode(bench, name, z_i, x_T, steps)
        seen, decibels = bench.judge.read(x), psnr(x, images[:n])
        mine, other = ({key: v[:n] for key, v in truth.items()} for truth in (labels, theirs))
        shown.append(x)
        rows.append({"decoded from": name, "pictures": n,
                     "PSNR, median": f"{decibels.median():.1f} dB",
                     "lowest tenth": f"{decibels.quantile(0.1):.1f} dB",
                     "judged as itself %": mean(same(seen, mine)),
                     "judged as the other %": mean(same(seen, other)),
                     "std of x_T": x_T.std().item(),
                     "its neighbours' correlation": neighbours(x_T)})

    for steps, n in (4 * STEPS, bench.most(50)), (2 * STEPS, bench.most(50)), (STEPS, N):
        z_i, x_T = latents(bench, images[:n], steps)
        add(f"z_i, x_T, {steps} steps each way", z_i, x_T, steps)
    add("z_i, random x_T", z_i, bench.unclip.noise(bench.seed, range(N), "decoder")())
    add("another's z_i, x_T", bench.encode(others), x_T)
    shown = torch.cat([x[:8] for x in (images, *shown[-3:], others)])
    bench.figure("reconstruct", enlarged(bench, shown), len(images[:8]))
    return rows


def vary(bench):
    """Variations of validation renders: what stays is what z_i holds, what goes was in x_T.

    One variation of each, at every eta. "Kept": the solids are there, each in its colour and shape.
    The last row is how unrelated renders differ. Bar, at eta 1: 90 %. Figure: in each row a render
    and seven variations at eta 1."""
    (images, labels), _ = renders_and_others(bench, bench.most(350), alone=False)
    z_i, x_T = latents(bench, images)
    before, one, rows, shown = bench.judge.read(images), labels["count"] == 1, [], []

    def add(name, x):
        seen = bench.judge.read(x)
        rows.append({"eta": name, "one solid: kept %": mean(same(seen, labels)[one]),
                     "two: both kept %": mean(same(seen, labels)[~one]),
                     **changes(seen, x, before, images, labels["count"] > 0)})

    for eta in "0", "0.25", "0.5", "0.75", "1":
        add(eta, decode(bench, f"eta {eta}", z_i, x_T, eta=float(eta)))
    add("another render", images.roll(1, 0))
    for x in to_float(images[:4].to(z_i.device)).split(1):
        shown += [x, bench.unclip.vary(x, 7, seed=bench.seed, steps=STEPS)]
    bench.figure("vary", enlarged(bench, to_uint8(torch.cat(shown)).cpu()), 8)
    return rows


def interpolate(bench):
    """From A to B, renders of one solid each, which differ in colour and in shape, along slerp.

    x_T is slerped as well, or one noise serves all (the paper's Fig. 4). p: what the judge gives
    the colour times what it gives the shape, averaged. Sharpness: gradient energy, as a ratio to
    that of the renders. Bars: 95 % at the ends, p monotone, the middle as sharp as the ends.
    Figure: in each pair of rows, x_T slerped and one noise."""
    (images, labels), (others, labels_of_others) = renders_and_others(bench, bench.most(200))
    (z_a, x_a), (z_b, x_b) = latents(bench, images), latents(bench, others)
    noise = bench.unclip.noise(bench.seed, [0], "decoder")()
    ways = {"slerped": lambda t: slerp(x_a, x_b, t), "fixed": lambda t: noise.expand_as(x_a)}
    sharp, rows, shown = gradient_energy(torch.cat([images, others])).mean(), [], []
    for way, x_T in ways.items():
        for k in range(7):
            x = decode(bench, f"x_T {way}, {k}/6", slerp(z_a, z_b, k / 6), x_T(k / 6))
            seen, row = bench.judge.read(x), {"x_T": way, "t": f"{k}/6"}
            for name, truth in ("A", labels), ("B", labels_of_others):
                row |= {f"judged {name} %": mean(same(seen, truth)),
                        f"p({name})": probability(bench.judge, x, truth)}
            rows.append(row | {"sharpness": (gradient_energy(x).mean() / sharp).item()})
            shown.append(x[:4])
    bench.figure("interpolate", enlarged(bench, torch.stack(shown, 1).flatten(0, 1)), 7)
    return rows


@torch.no_grad()
def probability(judge, images, labels):
    """What the judge gives an only solid's colour, times what it gives its shape; the mean."""
    out = judge(to_float(images.to(next(judge.parameters()).device)))
    colour, shape = (out[key][:, 0].softmax(-1).cpu().gather(1, labels[key][:, :1])
                     for key in ("colour", "shape"))
    return (colour * shape).mean().item()


def edit(bench):
    """Text diffs: a solid's colour is to change and its shape to stay, or its shape alone.

    Every other render is to change its colour. z_i turns by a fraction θ towards norm(z_t − z_t0),
    z_t of the new caption, z_t0 of "a photo" or of the present caption; x_T stays. The chosen θ did
    best on 100 other renders. Controls: a random direction along the same axes, as far from z_i as
    the diff from the present caption; and, for what moved, another render. Bars: 70 % each.
    Figure: a render and θ 0.1 to 0.5, from the present caption; colours and shapes by turns."""
    apart, N = bench.most(100), bench.most(100) + bench.most(200)
    (images, labels), (others, _) = renders_and_others(bench, N)
    reported, colour = torch.arange(N) >= apart, torch.arange(N) % 2 == 0
    first = zip(labels["colour"][:, 0].tolist(), labels["shape"][:, 0].tolist())
    now = [(list(COLOURS)[c], SHAPES[s]) for c, s in first]
    pairs = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN]
    rng, new = random.Random(f"edit/{bench.seed}"), []
    for i, pair in enumerate(now):                  # another one, which shares the shape, or colour
        kept = 1 if colour[i] else 0
        new.append(rng.choice([p for p in pairs if p[kept] == pair[kept] and p != pair]))
    present, to = ([noun(*pair) for pair in some] for some in (now, new))
    (z_i, x_T), before = latents(bench, images), bench.judge.read(images)
    shown = [images]

    def turn(base, theta, z_d):
        """Edit all; how often that succeeds on the renders set apart, and a row on the others."""
        x = decode(bench, f"{base}, θ {theta}", slerp(z_i, z_d, theta), x_T)
        seen = bench.judge.read(x)
        right = compare(to, seen)["all"]
        shown.append(x)
        return mean(right[~reported]), {
            "from": base, "θ": f"{theta}",
            "colour changed, shape kept %": mean(right[reported & colour]),
            "shape changed, colour kept %": mean(right[reported & ~colour]),
            **changes(seen, x, before, images, reported)}

    rows = []
    for base, captions in ("\"a photo\"", ["a photo"]), ("the present caption", present):
        z_d = bench.unclip.text_diff(to, captions)
        curve = [(*turn(base, theta, z_d), theta) for theta in (0.1, 0.2, 0.3, 0.4, 0.5)]
        _, best, theta = max(curve, key=lambda point: point[0])
        best["θ"] += " (chosen)"
        rows += [row for _, row, _ in curve]
    noise = torch.randn(z_i.shape, generator=torch.Generator().manual_seed(bench.seed)).to(z_i)
    aside = as_far(z_i, z_d, bench.unclip.part("decoder").whitening.broad(noise))
    rows.append(turn("a random direction", theta, aside)[1])
    rows.append({"from": "another render", **changes(
        bench.judge.read(others), others, before, images, reported)})
    strips = torch.stack([x[reported][:6] for x in [images, *shown[6:11]]], 1)
    bench.figure("edit", enlarged(bench, strips.flatten(0, 1)), 6)
    return rows


def as_far(z_i, z_d, direction):
    """Unit vectors at the same angles from z_i as z_d is, but aside in other directions (N, D)."""
    cosine = (z_i * z_d).sum(1, keepdim=True)
    aside = F.normalize(direction - (direction * z_i).sum(1, keepdim=True) * z_i, dim=1)
    return cosine * z_i + (1 - cosine ** 2).clamp(min=0).sqrt() * aside


def pca(bench):
    """z_i on its first k principal axes, decoded with one noise (the paper's Fig. 7).

    Centred PCA of the z_i of 5,000 training renders; its norm is not mended, as in training.
    Variance: the share that the axes explain. No axes: the mean z_i. The paper finds the coarse
    meaning first, and details later. Figure: k = 1, 2, 4, … in each row, and the render at its
    end."""
    (images, labels), _ = renders_and_others(bench, bench.most(200), alone=False)
    side, one = images.shape[-1], labels["count"] == 1
    train = load("shapes", "train", side, limit=bench.most(5000))
    mean_z_i, axes, variances = principal(bench.encode(train.images))
    z_i, rows, shown = bench.encode(images), [], []
    noise = bench.unclip.noise(bench.seed, [0], "decoder")().expand(len(images), -1, -1, -1)
    for k in [0] + [2 ** j for j in range(len(axes).bit_length())]:
        some = axes[:k]
        z = mean_z_i + (z_i - mean_z_i) @ some.T @ some
        shown.append(decode(bench, f"{k} axes", z, noise))
        seen, row = bench.judge.read(shown[-1]), {"axes": k}
        row["variance %"] = (variances[:k].sum() / variances.sum()).item()
        for key in "colour", "shape", "size":
            row[f"one solid: {key} %"] = mean((seen[key] == labels[key])[one].all(1))
        rows.append(row | {"two: colours and shapes %": mean(same(seen, labels)[~one]),
                           "relation %": mean((seen["relation"] == labels["relation"])[~one])})
    shown = torch.stack([x[:6] for x in shown[1:] + [images]], 1)
    bench.figure("pca", enlarged(bench, shown.flatten(0, 1)), shown.shape[1])
    return rows


# ---- Experiments: real images --------------------------------------------------------------------


class Classifier(nn.Module):
    """Tells the classes of CIFAR-10 apart, 32 pixels a side: an independent judge of samples."""

    def __init__(self, classes=10):
        super().__init__()

        def conv(c_in, c_out):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
                                 nn.BatchNorm2d(c_out), nn.ReLU())
        self.body = nn.Sequential(                                       # (B, 3, 32, 32)
            conv(3, 32), conv(32, 64), nn.MaxPool2d(2),                  # (B, 64, 16, 16)
            Residual(conv(64, 64), conv(64, 64)),
            conv(64, 128), nn.MaxPool2d(2), conv(128, 128), nn.MaxPool2d(2),     # (B, 128, 4, 4)
            Residual(conv(128, 128), conv(128, 128)),
            nn.AdaptiveMaxPool2d(1), nn.Flatten())                       # (B, 128), the features
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        """x (B, 3, 32, 32) in [-1, 1] → logits (B, classes)."""
        return self.head(self.body(x))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def train_classifier(dataset, device="cpu", steps=None, batch_size=256, seed=0):
    """Train a Classifier on CIFAR-10's training set: by default 41 epochs on a GPU, 8 on a CPU."""
    steps = steps or (8000 if torch.device(device).type == "cuda" else 1600)
    torch.manual_seed(seed)
    model = Classifier(len(dataset.classes)).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9, nesterov=True,
                                weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps, pct_start=0.2)
    images, classes = dataset.images.to(device), dataset.labels["class"].to(device)
    for _ in tqdm(range(steps), "classifier"):
        i = torch.randint(len(images), (batch_size,), device=device)
        x = jittered(to_float(images[i]))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            loss = F.cross_entropy(model(x).float(), classes[i], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def jittered(x, most=4):
    """Each picture (B, 3, H, H) mirrored or not, and moved by up to `most` pixels each way."""
    B, H, device = len(x), x.shape[-1], x.device
    mirror = (torch.rand(B, device=device) < 0.5) * 2.0 - 1                      # 1 or -1
    turn = torch.diag_embed(torch.stack([mirror, torch.ones_like(mirror)], 1))   # (B, 2, 2)
    move = torch.randint(-most, most + 1, (B, 2, 1), device=device) * 2 / H
    where = F.affine_grid(torch.cat([turn, move], 2), x.shape, align_corners=False)
    return F.grid_sample(x, where, "nearest", "border", align_corners=False)


def frechet(x, y):
    """Fréchet distance of the Gaussians that fit x (N, D) and y (M, D) (Heusel et al. 2017):
    |μ_x − μ_y|² + tr(C_x + C_y − 2 (C_x C_y)^½)."""
    x, y = x.double(), y.double()
    C_x, C_y = x.T.cov(), y.T.cov()
    values, axes = torch.linalg.eigh(C_x)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    cross = torch.linalg.eigvalsh(root @ C_y @ root).clamp(min=0).sqrt().sum()   # tr (C_x C_y)^½
    return ((x.mean(0) - y.mean(0)).square().sum() + C_x.trace() + C_y.trace() - 2 * cross).item()


def load_classifier(bench, train):
    """The classifier beside the weights, or the shipped one, or else one that is trained now."""
    own, shipped = bench.weights / "classifier.pt", SHIPPED / "cifar10" / "classifier.pt"
    path = next((path for path in (own, shipped) if path.exists()), None)
    if path:
        return read_judge(path, "classifier", Classifier(), bench.unclip.device)
    if not train:
        raise ValueError(f"neither {own} nor {shipped} is there, and no pictures to train one on")
    print(f"classifier: neither {own} nor {shipped}; training one", file=sys.stderr)
    return save_judge(own, train_classifier(train, bench.unclip.device),
                      {"data": "cifar10", "pictures": len(train), "seed": 0}, "classifier")


def cifar10(bench):
    """CIFAR-10: what CLIP and a classifier see in real pictures, and the classifier in drawn ones.

    The classifier shares no weight with unCLIP. Fréchet: the distance, in its features, from the
    50,000 training pictures; few pictures are farther away than many, so compare equal numbers.
    CLIP picks the closest of ten captions, as "a photo of a frog". Chance is 10 %. Distance of z_i:
    the energy distance from those of the test pictures of the class, as a ratio to that of their
    mean, the best a regressor could do. Bars: CLIP 80 %, classifier 90 %, samples 80 %. Figure:
    eight of each class, as they came."""
    try:
        train, test = (load("cifar10", split, limit=bench.most(50_000), data_dir=bench.data_dir)
                       for split in ("train", "validation"))
    except (ValueError, OSError) as error:
        print(f"cifar10: only samples are judged, without real pictures: {error}", file=sys.stderr)
        train = test = None
    classifier, rows, n = load_classifier(bench, train), [], bench.most(100)

    @torch.no_grad()
    def features(images):
        return bench.batches("features", len(images),
                             lambda i: classifier.body(to_float(images[i].to(bench.unclip.device))))
    reference = features(train.images) if train else None

    def add(name, images, classes, **more):
        seen = features(images)
        right = classifier.head(seen).argmax(1).cpu() == classes
        rows.append({"pictures": name, "number": len(images), "class right %": mean(right)})
        if train:
            rows[-1] |= {"Fréchet distance": frechet(seen, reference), **more}

    def distance(z_i):                                   # (10 classes, n, D), from z_of_class
        return sum(energy_distance(a, b) for a, b in zip(z_i, z_of_class)).item()

    prompts = [class_captions(name)[0] for name in CIFAR_CLASSES]
    if test:
        classes = test.labels["class"]
        y = bench.unclip.clip.tokenizer(prompts).to(bench.unclip.device)
        z_t = bench.unclip.clip.encode_text(y)
        z_i = bench.encode(test.images)
        z_of_class = [z_i[classes == k] for k in range(10)]
        regressor = distance([z.mean(0).expand(2, -1) for z in z_of_class])
        right = (z_i @ z_t.T).argmax(1).cpu() == classes
        rows.append({"pictures": "test set, seen by CLIP", "number": len(test),
                     "class right %": mean(right)})
        add("test set", test.images, classes)
        some = slice(10 * n)
        add("test set, some", test.images[some], classes[some])
        y = [prompts[k] for k in classes[some]]
        add("z_i of these", bench.draw(y, range(len(y)), z_i=z_i[some]), classes[some])
    for prior in *bench.priors, "text", "none":
        y, row = [y for y in prompts for _ in range(n)], list(range(n)) * 10
        z_i, more = None if prior == "none" else bench.z_i(y, row, prior), {}
        images = bench.draw(y, row, prior, z_i=z_i)
        if test and z_i is not None:
            more = {"distance of z_i": distance(z_i.unflatten(0, (10, n))) / regressor}
        name = {"text": "z_t in place of z_i", "none": "caption only"}.get(prior, f"{prior} prior")
        add(name, images, torch.arange(10).repeat_interleave(n), **more)
        if prior == bench.priors[0]:
            few = images.unflatten(0, (10, n))[:, :8].flatten(0, 1)
            bench.figure("cifar10", few.repeat_interleave(2, 2).repeat_interleave(2, 3), min(8, n))
    return rows


def overfit(bench):
    """Training pictures from their z_i alone: a run on few must give them back, recognisably.

    Own closest: of how many results the closest of all these pictures is the one that z_i is of.
    PSNR: medians. Figure: in each pair of rows pictures, and what comes back."""
    name, size = bench.unclip.clip.trained["data"], bench.unclip.part("decoder").config.image_size
    images = load(name, "train", size, bench.most(100), bench.data_dir).images
    z_i = bench.encode(images)
    x_T = bench.unclip.noise(bench.seed, range(len(z_i)), "decoder")()
    drawn = decode(bench, "decoding", z_i, x_T)
    each = torch.stack([psnr(drawn, image) for image in images], 1)      # (results, pictures)
    pairs = [x[k:k + 12] for k in range(0, min(len(z_i), 36), 12) for x in (images, drawn)]
    bench.figure("overfit", torch.cat(pairs).repeat_interleave(2, 2).repeat_interleave(2, 3),
                 min(len(z_i), 12))
    return [{"pictures": len(z_i), "own closest %": mean(each.argmax(1) == torch.arange(len(z_i))),
             "PSNR": f"{each.diagonal().median():.1f} dB",
             "PSNR to another": f"{each.roll(1, 1).diagonal().median():.1f} dB"}]


# ---- The command ---------------------------------------------------------------------------------

EXPERIMENTS = {"judge": judge_itself, "accuracy": accuracy, "two": two, "variety": variety,
               "clip": clip, "codes": codes, "priors": priors, "upsampler": upsampler,
               "reconstruct": reconstruct, "vary": vary, "interpolate": interpolate,
               "edit": edit, "pca": pca, "cifar10": cifar10, "overfit": overfit}
REAL = {"cifar10": {"cifar10"}, "overfit": {"coco", "folder"}}    # on these; the others on shapes


def run(name, bench):
    """One experiment: its table goes to stdout and to OUT/<name>.md, with how it was made."""
    began, device = time.time(), bench.unclip.device
    rows = EXPERIMENTS[name](bench)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else \
        f"{device.type}, {torch.get_num_threads()} threads"
    made = f"python evaluate.py --only {name} --seed {bench.seed}" + \
        (f" --n {bench.n}" if bench.n else "") + \
        (f" --weights {bench.weights}" if bench.weights != SHIPPED / "shapes" else "")
    minutes = f"{(time.time() - began) / 60:.1f} minutes on {hardware}"
    text = "\n\n".join([f"### {name}: {inspect.getdoc(EXPERIMENTS[name])}", table(rows),
                        f"`{made}`: {minutes}."]) + "\n"
    print(text, flush=True)
    write_beside(bench.out / f"{name}.md", lambda path: path.write_text(text, encoding="utf-8"))


def main(argv=None):
    """The command line; returns the exit status: 0 done, 2 a user's error."""
    parser = argparse.ArgumentParser(description="Measure what the weights can do.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--weights", default=SHIPPED / "shapes", type=Path, metavar="DIR", help="what to measure")
    add("--only", choices=EXPERIMENTS, help="one experiment")
    add("--out", default="figures", type=Path, metavar="DIR", help="gets tables and figures")
    add("--seed", default=0, type=int, help="of all that is random")
    add("--n", type=int, help="no more than so many of anything: a quick look, for another --out")
    add("--data-dir", help="where cifar10 (default: downloaded), coco or the folder is")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")

    def fault(message):                      # argparse itself would print its usage, and leave
        raise ValueError(f"{message}; see --help")
    parser.error = fault
    try:
        args = parser.parse_args(argv)
        for key, least in ("n", 2), ("seed", 0):
            value = getattr(args, key)
            if value is not None and value < least:
                raise ValueError(f"--{key} {value}: choose {least} or more")
        try:
            torch.zeros(1, device=args.device).cpu()
        except (RuntimeError, AssertionError):
            raise ValueError(f"--device {args.device}: not to be had here; try cpu") from None
        unclip = UnCLIP.load(args.weights, args.device)
        bench = Bench(unclip, args.weights, args.out, args.seed, args.n, args.data_dir)
        data = unclip.clip.trained["data"]
        fit = [name for name in EXPERIMENTS if data in REAL.get(name, {"shapes"})
               and (name != "upsampler" or unclip.upsamplers)]
        if args.only and args.only not in fit:
            raise ValueError(f"--only {args.only}: {args.weights} learnt from {data}; choose "
                             f"{', '.join(fit) or 'other --weights'}")
        for name in [args.only] if args.only else fit:
            run(name, bench)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
