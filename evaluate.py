"""How good it is: a table of experiments, and the page that reports them.

    python evaluate.py                                # all that fit the weights, for hours
    python evaluate.py --only two --n 50 --out look   # a quick look at one of them

Each experiment is a function of a Bench that returns the rows of a table. Its docstring says what
it asks, and stands above the table in results/README.md. In a row, a tensor of bool stands for the
share of what is true in it, and is reported with its 95 % interval.

This is the last chapter.
"""

import inspect
import random
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle, islice, product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from checkpoints import SHIPPED, Parser, check_out, find_device, run_command
from clip_tiny import components_needed
from data import CIFAR_CLASSES, class_captions, load
from judge import (compare, energy_distance, entropy, form, frechet, gradient_energy, load_judge,
                   psnr, same, spread, wilson)
from prior import Codes
from shapes import (COLOURS, SHAPES, SIZES, UNSEEN, is_true, item, picture_grid, render,
                    sample_scene, scenes_for, to_float, to_uint8, write_png, write_safely)
from unclip import PRIORS, UnCLIP, slerp

# ---- The bench: what every experiment works with -------------------------------------------------


@dataclass
class Bench:
    """unCLIP, its judge, and the figures so far. Pictures are uint8 (N, 3, H, W) on the CPU, and
    each has noise of its own. n caps every count."""
    unclip: UnCLIP
    weights: Path
    out: Path
    seed: int = 0
    n: int | None = None
    data_dir: str | None = None
    figures: list = field(default_factory=list)

    @cached_property
    def judge(self):
        return load_judge(self.weights, "judge", self.unclip.device)

    @property
    def priors(self):
        """The priors whose weights are there."""
        return [name for name, part in PRIORS.items() if self.unclip.parts[part]]

    def most(self, count):
        return min(count, self.n or count)

    def portions(self, title, N, f, size=64):
        """f(slice) for the slices that make up 0..N, put together."""
        slices = [slice(i, i + size) for i in range(0, N, size)]
        return torch.cat([f(i) for i in tqdm(slices, title, leave=False)])

    def floats(self, images):
        return to_float(images.to(self.unclip.device))

    def tokens(self, captions):
        return self.unclip.clip.tokenizer(captions).to(self.unclip.device)

    def z_t(self, captions):
        """Captions → z_t (N, D)."""
        with torch.no_grad():
            return self.unclip.clip.encode_text(self.tokens(captions))

    def encode(self, images):
        """Pictures → z_i (N, D)."""
        with torch.no_grad():
            return self.portions("CLIP", len(images), lambda i: self.unclip.clip.encode_image(
                self.floats(images[i])))

    def z_i(self, captions, prior="diffusion", **options):
        """A z_i of each caption, by a prior → (N, D)."""
        y, rows = self.tokens(captions), range(len(captions))
        return self.portions(f"z_i, {prior}", len(y), lambda i: self.unclip.draw_z_i(
            y[i], self.seed, rows[i], prior, **options))

    def draw(self, captions, z_i, **how):
        """A picture of each caption and z_i (N, D); None: of the caption alone."""
        y, rows = self.tokens(captions), range(len(captions))
        return self.portions("decoder", len(y), lambda i: to_uint8(self.unclip.draw_x(
            None if z_i is None else z_i[i], y[i], self.seed, rows[i], **how)).cpu())

    def latents(self, images, steps=50):
        """Pictures → z_i (N, D) and x_T (N, 3, H, W)."""
        x = self.floats(images)
        return self.encode(images), self.portions(f"inverting, {steps} steps", len(x), lambda i:
                                                  self.unclip.latent(x[i], steps)[1])

    def decode(self, z_i, x_T, steps=50, eta=0.0):
        """A picture of each latent: unguided, and without a caption."""
        rows = range(len(z_i))
        return self.portions(f"decoding, {steps} steps", len(z_i), lambda i: to_uint8(
            self.unclip.decode(z_i[i], x_T[i], steps, eta, self.unclip.noise(
                self.seed, rows[i], "variation"))).cpu())

    def enlarged(self, images):
        """Pictures through the upsampler, if there is one."""
        x, rows = self.floats(images), range(len(images))
        return self.portions("upsampler", len(x), lambda i: to_uint8(self.unclip.upsample(
            x[i], self.seed, rows[i])).cpu(), size=16)

    def renders(self, captions, size=32, first=0):
        """A render of each caption, which `first` and the caption's place choose."""
        scenes = [scenes_for(caption, 1, f"bench/{self.seed}/{first + i}")[0]
                  for i, caption in enumerate(captions)]
        return render(scenes, size, "renders")

    def figure(self, name, images, columns, caption):
        """A figure of the page, small pictures enlarged."""
        images = self.enlarged(images) if images.shape[-1] == 32 else images
        write_png(self.out / f"{name}.png", picture_grid(images, columns))
        self.figures.append((name, caption))

    def strips(self, name, frames, caption):
        """A figure with a row for each of the first six pictures, and a column for each frame."""
        shown = torch.stack([x[:6] for x in frames], dim=1)
        self.figure(name, shown.flatten(0, 1), len(frames), caption)


def conditions(bench, captions):
    """Pictures of the captions by what the decoder is given: yields (name, pictures).

    Only the first two rows and the priors' are of all captions, the others of the first quarter.
    """
    N, renders = len(captions), bench.renders(captions)
    few = captions[:(N + 3) // 4]
    yield "renders", renders
    yield "chance: renders, shuffled", renders[
        torch.randperm(N, generator=torch.Generator().manual_seed(bench.seed))]
    for name in bench.priors:
        z_i = bench.z_i(captions, name)
        yield f"{name} prior", bench.draw(captions, z_i)
        yield f"{name} prior, unguided", bench.draw(few, z_i[:len(few)], guidance=1.0)
    yield "true z_i of the renders", bench.draw(few, bench.encode(renders[:len(few)]))
    yield "z_t in place of z_i", bench.draw(few, bench.z_i(few, "text"))
    yield "caption only", bench.draw(few, None)


def noun(colour, shape):
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


# ---- Do pictures show what was asked for? --------------------------------------------------------


def judge_itself(bench):
    """Can it be trusted?

    It reads 2,000 validation renders. Position: the centre of a solid's outline."""
    split = load("shapes", "validation", limit=bench.most(2000))
    seen, truth, rows = bench.judge.read(split.images), split.labels, []
    for name, count in ("one solid", 1), ("two solids", 2):
        k = truth["count"] == count
        off = (seen["position"] - truth["position"])[k, :count]
        rows.append({"renders of": name, "pictures": int(k.sum()),
                     "relation %": (seen["relation"] == truth["relation"])[k],
                     **{f"{key} %": (seen[key] == truth[key])[k, :count]
                        for key in ("shape", "colour", "size")},
                     "position, rms pixels": 16 * off.square().mean().sqrt().item()})
    return rows


def accuracy(bench):
    """One solid, as "a red cube": why a prior? (Sec. 5.1, Fig. 8.)

    Colour and shape, as the judge sees them, by what the decoder is given. All pairs are asked for
    33 times. Unseen: the four pairs that never occurred in training, in any picture."""
    pairs = [(colour, shape) for shape in SHAPES for colour in COLOURS]
    asked, rows = pairs * bench.most(33), []
    captions = [noun(*pair) for pair in asked]
    unseen = torch.tensor([pair in UNSEEN for pair in asked])
    cube = torch.tensor([shape == "cube" for _, shape in asked])
    for name, pictures in conditions(bench, captions):
        n = len(pictures)
        right, new = compare(captions[:n], bench.judge.read(pictures)), unseen[:n]
        rows.append({"pictures from": name, "pictures": n, "colour %": right["colour"][~new],
                     "shape %": right["shape"][~new], "both %": right["all"][~new],
                     "unseen, both %": right["all"][new], "cubes, both %": right["all"][cube[:n]]})
        if name == "diffusion prior":
            bench.figure("accuracy", pictures[:len(pairs)], len(COLOURS),
                         "The first picture of each pair, by the diffusion prior.")
            wrong = (~right["all"]).nonzero()[:16, 0].tolist()
            if wrong:
                bench.figure("mistakes", pictures[wrong], 8, "Its first mistakes. They should be "
                             f"{', '.join(captions[i] for i in wrong)}.")
    return rows


def two(bench):
    """Two solids: which, where, and whose colour? (Sec. 7, Fig. 14 and 15.)

    900 captions, as "a red cube on top of a blue cube". All right: both colours and shapes in their
    places, and the relation. Set: the right ones, in whatever place. Swapped: both colours are
    right, in the wrong places."""
    rng, captions, rows = random.Random(f"two/{bench.seed}"), [], []
    while len(captions) < bench.most(900):
        relation = rng.choice(["on top of", "left of", "right of"])
        a, b = (sample_scene(rng, {"relation": "alone"}).solids[0] for _ in range(2))
        if a.colour != b.colour and (relation != "on top of" or b.shape in ("cube", "cylinder")):
            captions.append(f"{noun(a.colour, a.shape)} {relation} {noun(b.colour, b.shape)}")
    for name, pictures in conditions(bench, captions):
        right = compare(captions[:len(pictures)], bench.judge.read(pictures))
        rows.append({"pictures from": name, "pictures": len(pictures), "all right %": right["all"],
                     "colours %": right["colour"], "shapes %": right["shape"],
                     "relation %": right["relation"], "colours, set %": right["colour set"],
                     "shapes, set %": right["shape set"],
                     "colours swapped %": right["colour set"] & ~right["colour"]})
    asked = ["a red cube on top of a blue cube", "a blue cube on top of a red cube",
             "a red cube left of a blue cube", "a red cube right of a blue cube"]
    y = [caption for caption in asked for _ in range(8)]
    bench.figure("two", bench.draw(y, bench.z_i(y)), 8, f"Rows: {', '.join(asked)}.")
    return rows


def form_of_solids(bench):
    """Are drawn solids sound, or dented?

    To each picture, the scene of the asked shape and colour is fitted that looks most like it: its
    place, size, yaw, light and floor. The table has the PSNR, in dB, of the picture and this scene,
    at full size, in a box around the solid: a mean, with its 95 % interval. The first row is what
    the fit itself loses, the second what the upsampler loses beyond. 25 pictures of each shape."""
    n, rows = bench.most(25), []
    pairs = [pair for shape in SHAPES for pair in islice(cycle(
        (shape, colour) for colour in COLOURS if (colour, shape) not in UNSEEN), n)]
    captions = [noun(colour, shape) for shape, colour in pairs]
    drawn = bench.enlarged(bench.draw(captions, bench.z_i(captions)))
    renders = bench.renders(captions, drawn.shape[-1])
    pictures = {"renders": renders,
                "renders, reduced and upsampled": bench.enlarged(reduced(renders)),
                "drawn, by the diffusion prior": drawn}
    for name, some in pictures.items():
        decibels, fitted = form(some, pairs, bench.judge, seed=bench.seed)
        rows.append({"pictures": name, **{
            f"{shape}s": f"{x.mean():.1f} ± {1.96 * x.std() / n ** 0.5:.1f}"
            for shape, x in zip(SHAPES, decibels.split(n))}})
    cubes = slice(min(8, n))
    bench.figure("form", torch.cat([drawn[cubes], fitted[cubes]]), len(drawn[cubes]),
                 "Drawn cubes, and the scenes that fit them.")
    return rows


def reduced(images):
    """Pictures as area means at 32 pixels."""
    return to_uint8(F.avg_pool2d(to_float(images), images.shape[-1] // 32))


def variety(bench):
    """Does what "a cube" leaves open vary as in the data? (Sec. 5.1.)

    Of 256 pictures, or 64, those that the judge calls a cube: the entropy of their colours (1: all
    are equally frequent), how widely they stand, as a ratio to the data, and how many are large."""
    N, cube, rows = bench.most(256), "a cube", []
    data = bench.judge.read(bench.renders([cube] * 4 * N, first=N))["position"][:, 0].std(0)
    for name, pictures in conditions(bench, [cube] * N):
        seen = bench.judge.read(pictures)
        k = (seen["count"] == 1) & (seen["shape"][:, 0] == SHAPES.index(cube[2:]))
        across, down = (seen["position"][k, 0].std(0) / data).tolist()
        rows.append({"pictures from": name, "cubes %": k,
                     "entropy of colour": entropy(seen["colour"][k, 0], len(COLOURS)),
                     "spread, across": across, "spread, down": down,
                     "large %": seen["size"][k, 0] == SIZES.index("large")})
        if name == "diffusion prior":
            bench.figure("variety", pictures[:32], 8, "\"a cube\", by the diffusion prior.")
    return rows


def steps(bench):
    """How many, and how much fresh noise in each? (Sec. 2.1: 250 steps, eta 1.)

    64 cubes, as "a red cube", on another seed than the tables above: this is for choosing."""
    captions = [noun(colour, "cube") for colour in COLOURS] * bench.most(8)
    return choices(bench, captions, [{"eta": eta, "steps": n} for eta in (1.0, 0.0)
                                     for n in (8, 16, 32, 64, 128, 250)])


def guidance(bench):
    """How much? (Sec. 2.1 and 5.3.)

    One solid of each pair, eight times, on another seed than the tables above: this is for
    choosing."""
    captions = [noun(colour, shape) for shape in SHAPES for colour in COLOURS] * bench.most(8)
    return choices(bench, captions, [{"guidance": s} for s in (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)])


def choices(bench, captions, options):
    """A row for each of the decoder's options: how many pictures are right, and their seconds."""
    bench, rows = replace(bench, seed=bench.seed + 1), []
    z_i = bench.z_i(captions)
    for how in options:
        began = time.time()
        pictures = bench.draw(captions, z_i, **how)
        rows.append({**how, "seconds a picture": (time.time() - began) / len(captions),
                     "right %": compare(captions, bench.judge.read(pictures))["all"]})
    return rows


# ---- The embeddings ------------------------------------------------------------------------------


def clip(bench):
    """Is what it finds true? (App. C.)

    500 validation pairs: for each picture the closest caption of all, and for each caption the
    closest picture. True: of the scene's attributes. Many captions are true of a picture ("a cube",
    "a photo of a red cube")."""
    split, rows = load("shapes", "validation", limit=bench.most(500)), []
    texts = sorted({captions[0] for captions in split.captions})
    score = (bench.encode(split.images) @ bench.z_t(texts).T).cpu()              # (N, texts)
    true = torch.tensor([[is_true(text, split.labels, i) for text in texts]
                         for i in range(len(split))])
    for name, k in ("a picture of one solid", 1), ("a picture of two", 2), ("a caption", None):
        k = split.labels["count"] == k if k else torch.ones(len(split), dtype=bool)
        asked, answers = (score[k], true[k]) if "picture" in name else (score.T, true.T)
        rows.append({"closest to": name, "asked": len(asked),
                     "true %": answers.gather(1, asked.argmax(1, keepdim=True)),
                     "by chance %": answers.float().mean().item()})
    return rows


def codes(bench):
    """What is lost of z_i in the AR prior's codes? (Sec. 2.2.)

    Of 1,000 validation renders, as a share of their variance, by the number of buckets. Axes and
    buckets come from 5,000 training renders. The paper's rule keeps the fewest axes that lose less
    than 1 % of these."""
    train, z_i = (bench.encode(load("shapes", split, limit=bench.most(N)).images)
                  for split, N in (("train", 5000), ("validation", 1000)))
    clip, rows = bench.unclip.clip, []
    variances = (train - clip.mean).square().mean(0)
    k = components_needed(variances)
    for buckets in 4, 8, 16, 32, 64, 128, 256, "no":
        kept = clip.whiten(z_i)[:, :k]
        if buckets != "no":
            code = Codes(k, min(buckets, len(train))).to(z_i.device)
            code.fit(clip.whiten(train)[:, :k])
            kept = code.decode(code.encode(kept))
        lost = clip.unwhiten(F.pad(kept, (0, len(variances) - k))) - z_i
        rows.append({"axes": k, "variance %": (variances[:k].sum() / variances.sum()).item(),
                     "buckets": buckets,
                     "lost %": (lost.square().sum() / (z_i - z_i.mean(0)).square().sum()).item()})
    return rows


def priors(bench):
    """Do they draw from p(z_i | y)? (Sec. 2.2.)

    30 captions, 128 samples and 128 renders of each. Spread: the mean tr Cov(z_i | y), as a ratio
    to the renders'. Energy distance: from the renders, as a ratio to that of a point at their mean,
    the best a regressor could do; for z_i as they are, and whitened. Own caption: of how many z_i
    the closest z_t is their caption's. Best of two, and dots from the upper half, are the defaults
    in drawing: they trade spread for fit, on purpose."""
    captions = list(dict.fromkeys(item("validation", i)[1][0] for i in range(500)))[:bench.most(30)]
    n, whiten, rows = bench.most(128), bench.unclip.clip.whiten, []
    y, z_t = [y for y in captions for _ in range(n)], bench.z_t(captions)
    real, again = (bench.encode(bench.renders(y, first=k)).unflatten(0, (-1, n))
                   for k in (0, len(y)))                                         # (captions, n, D)
    point = real.mean(1, keepdim=True).repeat(1, 2, 1)                           # two equal ones
    ratio = lambda f, z_i: (energy_distance(f(real), f(z_i)).mean()
                            / energy_distance(f(real), f(point)).mean()).item()

    def add(name, z_i):                                                          # (captions, n, D)
        own = (z_i @ z_t.T).argmax(-1).cpu() == torch.arange(len(z_t))[:, None]
        rows.append({"z_i from": name, "spread": (spread(z_i).mean() / spread(real).mean()).item(),
                     "energy distance": ratio(lambda z: z, z_i), "whitened": ratio(whiten, z_i),
                     "own caption %": own, "z_t·z_i": (z_i * z_t[:, None]).sum(-1).mean().item()})

    add("other renders of the caption", again)
    add("the mean of the caption's renders", point)
    add("renders of another caption", again.roll(1, 0))
    ways = {"diffusion": {"one draw": {"candidates": 1}, "best of two": {}},
            "ar": {"any dot": {"top_half": False}, "dots of the upper half": {}}}
    for name in bench.priors:
        for way, options in ways[name].items():
            add(f"{name} prior, {way}", bench.z_i(y, name, **options).unflatten(0, (-1, n)))
    return rows


# ---- Pictures from pictures ----------------------------------------------------------------------
# What is drawn is measured as it is shown, in 8 bits. Nothing is guided here, and no caption plays
# a part, but in the decoder's own pictures that are upsampled.


def renders_and_others(bench, N, alone=True):
    """N validation renders, and for each another, whose first solid has neither the colour nor the
    shape: twice (pictures, labels). alone: only renders of one solid."""
    split = load("shapes", "validation", limit=10 * bench.most(200))
    pool = ((split.labels["count"] == 1) | torch.tensor(not alone)).nonzero()[:, 0]
    colour, shape = (split.labels[key][pool, 0] for key in ("colour", "shape"))
    fits = (colour[:N, None] != colour) & (shape[:N, None] != shape)             # (N, pool)
    g = torch.Generator().manual_seed(bench.seed)
    other = pool[torch.multinomial(fits.float(), 1, generator=g)[:, 0]]
    return [(split.images[i], {key: v[i] for key, v in split.labels.items()})
            for i in (pool[:N], other)]


def changes(bench, images, before):
    """Cells of a row: how far only solids moved; how much the corners, mostly floor, changed."""
    seen, saw = bench.judge.read(images), bench.judge.read(before)
    one = (seen["count"] == 1) & (saw["count"] == 1)
    way = 16 * (seen["position"] - saw["position"])[one, 0].norm(dim=-1).mean()
    corners = (images.float() - before.float())[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].abs().mean()
    return {"moved, of 32 pixels": f"{way:.2f}", "floor, of 255": f"{corners:.1f}"}


def upsampler(bench):
    """What does it add? (Sec. 2.1.)

    200 validation renders, and what the decoder draws of their z_i and captions. The small renders
    are area means of the large ones, with which PSNR and sharpness (gradient energy, as a ratio)
    compare."""
    factor = bench.unclip.part("upsampler").config.factor
    large = load("shapes", "validation", 32 * factor, limit=bench.most(200))
    small, rows = reduced(large.images), []
    drawn = bench.draw([captions[0] for captions in large.captions], bench.encode(small))
    with FlopCounterMode(display=False) as counter:
        bench.enlarged(small[:1])
    blocks, bicubic = (lambda x, mode=mode: to_uint8(F.interpolate(
        to_float(x), scale_factor=float(factor), mode=mode)) for mode in ("nearest", "bicubic"))
    pictures = {"renders": large.images, "renders, small": small, "bicubic": bicubic(small),
                "upsampled": bench.enlarged(small), "drawn": drawn,
                "drawn, upsampled": bench.enlarged(drawn)}
    for name, x in pictures.items():
        rows.append({"pictures": name, "solids right %": same(bench.judge.read(x), large.labels)})
        if name in ("bicubic", "upsampled"):
            sharp = gradient_energy(x).mean() / gradient_energy(large.images).mean()
            rows[-1] |= {"PSNR, dB": f"{psnr(x, large.images).mean():.1f}",
                         "sharpness": sharp.item()}
        if name == "upsampled":
            rows[-1]["GFLOP"] = f"{counter.get_total_flops() / 1e9:.1f}"
    bench.strips("upsampler", (blocks(small), bicubic(small), pictures["upsampled"], large.images,
                               blocks(drawn), bicubic(drawn), pictures["drawn, upsampled"]),
                 "Small, bicubic, upsampled, render; drawn: small, bicubic, upsampled.")
    return rows


def reconstruct(bench):
    """Is (z_i, x_T) a picture's latent, and does z_i matter in it? (Sec. 3.)

    200 validation renders to latents and back; as controls, with one of the two exchanged. The
    other picture's first solid has neither the colour nor the shape: a decoder that draws it from
    this one's x_T uses z_i. White noise has std 1."""
    N, rows, shown = bench.most(200), [], []
    (images, labels), (others, theirs) = renders_and_others(bench, N, alone=False)
    random_x_T = bench.unclip.noise(bench.seed, range(N), "decoder")()
    for steps in 25, 100, 50:
        z_i, x_T = bench.latents(images, steps)
        ways = {"z_i, x_T": (z_i, x_T), "z_i, random x_T": (z_i, random_x_T),
                "the other's z_i, x_T": (bench.encode(others), x_T)}
        for name, latent in list(ways.items())[:3 if steps == 50 else 1]:
            x = bench.decode(*latent, steps)
            seen, decibels = bench.judge.read(x), psnr(x, images)
            shown.append(x)
            rows.append({"decoded from": name, "steps": steps,
                         "PSNR, dB": f"{decibels.median():.1f}",
                         "its lowest tenth": f"{decibels.quantile(0.1):.1f}",
                         "judged as itself %": same(seen, labels),
                         "judged as the other %": same(seen, theirs),
                         "std of x_T": latent[1].std().item()})
    bench.strips("reconstruct", (images, *shown[-3:], others),
                 "Render, reconstruction, random x_T, the other's z_i, the other.")
    return rows


def vary(bench):
    """What stays is what z_i holds. (Sec. 3.1, Fig. 3.)

    One of each of 350 validation renders, at every eta. Kept: the solids are there, each in its
    colour and shape. The last row is how unrelated renders differ."""
    (images, labels), _ = renders_and_others(bench, bench.most(350), alone=False)
    z_i, x_T = bench.latents(images)
    one, rows = labels["count"] == 1, []
    for eta in 0.0, 0.25, 0.5, 0.75, 1.0, "another render":
        x = images.roll(1, 0) if eta == "another render" else bench.decode(z_i, x_T, eta=eta)
        kept = same(bench.judge.read(x), labels)
        rows.append({"eta": f"{eta}", "one solid, kept %": kept[one],
                     "two, both kept %": kept[~one], **changes(bench, x, images)})
    bench.strips("vary", [images, *(replace(bench, seed=bench.seed + k).decode(
        z_i[:6], x_T[:6], eta=1.0) for k in range(7))], "A render, and variations at eta 1.")
    return rows


def interpolate(bench):
    """What lies between two pictures? (Sec. 3.2, Fig. 4.)

    From A to B, 200 pairs of renders of one solid, which differ in colour and in shape, along slerp
    of z_i. x_T is slerped as well, or one noise serves all. Sharpness: gradient energy, as a ratio
    to that of the renders."""
    (images, labels), (others, theirs) = renders_and_others(bench, bench.most(200))
    (z_a, x_a), (z_b, x_b) = bench.latents(images), bench.latents(others)
    noise = bench.unclip.noise(bench.seed, [0], "decoder")().expand_as(x_a)
    sharp, rows = gradient_energy(torch.cat([images, others])).mean(), []
    for figure, way, start, end in (("interpolate", "slerped", x_a, x_b),
                                    ("interpolate-noise", "one noise", noise, noise)):
        frames = [bench.decode(slerp(z_a, z_b, k / 6), slerp(start, end, k / 6)) for k in range(7)]
        for k, x in enumerate(frames):
            seen = bench.judge.read(x)
            rows.append({"x_T": way, "t": f"{k}/6", "judged A %": same(seen, labels),
                         "judged B %": same(seen, theirs),
                         "sharpness": (gradient_energy(x).mean() / sharp).item()})
        bench.strips(figure, frames, f"From A to B, x_T: {way}.")
    return rows


def edit(bench):
    """Can a text diff change a picture? (Sec. 3.3, Fig. 5.)

    A solid's colour is to change and its shape to stay, or the other way round, by turns. z_i turns
    by a fraction θ towards norm(z_t − z_t0): z_t of the new caption, z_t0 of "a photo" or of the
    present caption. x_T stays. The chosen θ did best on 100 renders, the rows are of 200 others.
    Control: the text diff of another picture."""
    apart, N = bench.most(100), 3 * bench.most(100)
    (images, labels), _ = renders_and_others(bench, N)
    now = [(list(COLOURS)[c], SHAPES[s])
           for c, s in zip(labels["colour"][:, 0], labels["shape"][:, 0])]
    pairs, rng = set(product(COLOURS, SHAPES)) - UNSEEN, random.Random(f"edit/{bench.seed}")
    new = [rng.choice(sorted(p for p in pairs if p != pair and p[1 - i % 2] == pair[1 - i % 2]))
           for i, pair in enumerate(now)]
    present, to = ([noun(*pair) for pair in some] for some in (now, new))
    (z_i, x_T), reshaped, rows = bench.latents(images), torch.arange(apart, N) % 2 == 1, []
    z_d = {"\"a photo\"": bench.unclip.text_diff(to, ["a photo"]),
           "the present caption": bench.unclip.text_diff(to, present)}
    z_d["another picture's diff"] = z_d["the present caption"].roll(2, 0)
    shown, success, thetas = [images[apart:]], [], (0.1, 0.2, 0.3, 0.4, 0.5)
    for base, theta in [*product(list(z_d)[:2], thetas), (list(z_d)[2], thetas[-1])]:
        x = bench.decode(slerp(z_i, z_d[base], theta), x_T)
        right = compare(to, bench.judge.read(x))["all"]
        shown.append(x[apart:])
        success.append(right[:apart].sum().item())
        rows.append({"from": base, "θ": f"{theta}",
                     "colour changed, shape kept %": right[apart:][~reshaped],
                     "shape changed, colour kept %": right[apart:][reshaped],
                     **changes(bench, x[apart:], images[apart:])})
    for k in 0, 5:
        rows[max(range(k, k + 5), key=success.__getitem__)]["θ"] += " (chosen)"
    bench.strips("edit", (shown[0], *shown[6:11]), "A render, and θ 0.1 to 0.5 from the present "
                 f"caption, to become {', '.join(to[apart:apart + 6])}.")
    return rows


def pca(bench):
    """What do the first principal axes of z_i hold? (Sec. 4, Fig. 7.)

    z_i of 200 validation renders on its first k axes, decoded from one noise. With no axes it is
    the mean z_i. The paper finds the coarse meaning first, and details later."""
    (images, labels), _ = renders_and_others(bench, bench.most(200), alone=False)
    one, mean, z_i = labels["count"] == 1, bench.unclip.clip.mean, bench.encode(images)
    variances = (z_i - mean).square().mean(0)
    noise = bench.unclip.noise(bench.seed, [0], "decoder")().expand(len(images), -1, -1, -1)
    rows, shown = [], []
    for k in [0] + [2 ** j for j in range(len(variances).bit_length())]:
        shown.append(bench.decode(torch.cat([z_i[:, :k], mean[k:].expand(len(z_i), -1)], 1), noise))
        seen = bench.judge.read(shown[-1])
        rows.append({"axes": k, "variance %": (variances[:k].sum() / variances.sum()).item(),
                     **{f"one solid, {key} %": (seen[key] == labels[key])[one].all(1)
                        for key in ("colour", "shape", "size")},
                     "two, colours and shapes %": same(seen, labels)[~one],
                     "relation %": (seen["relation"] == labels["relation"])[~one]})
    bench.strips("pca", (*shown[1:], images), "1, 2, 4, … axes, and the render.")
    return rows


# ---- Real pictures -------------------------------------------------------------------------------


def cifar10(bench):
    """What becomes of real pictures? (Sec. 5.)

    What CLIP and a classifier see in real pictures, and the classifier in drawn ones; it shares no
    weight with unCLIP. CLIP picks the closest of ten captions, as "a photo of a frog". Fréchet: the
    distance, in the classifier's features, from the 50,000 training pictures; few pictures are
    farther away than many, so compare equal numbers."""
    train, test = (load("cifar10", split, limit=bench.most(50_000), data_dir=bench.data_dir)
                   for split in ("train", "validation"))
    judge = load_judge(bench.weights, "classifier", bench.unclip.device, bench.data_dir)
    features = lambda images: bench.portions("features", len(images), lambda i: judge.body(
        bench.floats(images[i])))
    reference, rows, n = features(train.images), [], bench.most(100)

    def add(name, images, classes):
        rows.append({"pictures": name, "number": len(images),
                     "class right %": judge.read(images)["class"] == classes,
                     "Fréchet distance": frechet(features(images), reference)})

    prompts = [class_captions(name)[0] for name in CIFAR_CLASSES]
    y, asked = [y for y in prompts for _ in range(n)], torch.arange(10).repeat_interleave(n)
    classes, z_i, few = test.labels["class"], bench.encode(test.images), slice(len(y))
    rows.append({"pictures": "test set, seen by CLIP", "number": len(test), "class right %":
                 (z_i @ bench.z_t(prompts).T).argmax(1).cpu() == classes})
    add("test set", test.images, classes)
    add("test set, some", test.images[few], classes[few])
    add("true z_i of these", bench.draw([prompts[k] for k in classes[few]], z_i[few]), classes[few])
    for name in bench.priors:
        images = bench.draw(y, bench.z_i(y, name))
        add(f"{name} prior", images, asked)
        bench.figure(f"cifar10-{name}", images.unflatten(0, (10, n))[:, :8].flatten(0, 1),
                     min(8, n), f"By the {name} prior, rows: {', '.join(CIFAR_CLASSES)}.")
    add("z_t in place of z_i", bench.draw(y, bench.z_t(y)), asked)
    add("caption only", bench.draw(y, None), asked)
    return rows


def overfit(bench):
    """Can a run on few pictures give them back from their z_i alone?

    Own closest: of how many results the closest of all these pictures is the one that z_i is of."""
    images = load(bench.unclip.clip.trained["data"], "train", limit=bench.most(100),
                  data_dir=bench.data_dir).images
    N = len(images)
    x_T = bench.unclip.noise(bench.seed, range(N), "decoder")()
    drawn = bench.decode(bench.encode(images), x_T)
    each = torch.stack([psnr(drawn, image) for image in images], 1)      # (results, pictures)
    bench.strips("overfit", (images, drawn), "Pictures, and what comes back.")
    return [{"pictures": N, "own closest %": each.argmax(1) == torch.arange(N),
             "PSNR, dB": f"{each.diagonal().median():.1f}",
             "to another": f"{each.roll(1, 1).diagonal().median():.1f}"}]


# ---- The page and the command --------------------------------------------------------------------

EXPERIMENTS = {"judge": judge_itself, "accuracy": accuracy, "two": two, "form": form_of_solids,
               "variety": variety, "clip": clip, "codes": codes, "priors": priors,
               "upsampler": upsampler, "reconstruct": reconstruct, "vary": vary,
               "interpolate": interpolate, "edit": edit, "pca": pca, "steps": steps,
               "guidance": guidance, "cifar10": cifar10, "overfit": overfit}
REAL = {"cifar10": {"cifar10"}, "overfit": {"coco", "folder"}}    # on these; the others on shapes
HEAD = """# Results

Written by `python evaluate.py`; an experiment that runs again replaces its own section. Shares are
in %, with their 95 % intervals (Wilson). Every picture has noise of its own.
"""


def table(rows):
    """Rows, dicts of what stands in which column, as Markdown."""
    def cell(key, value):
        if torch.is_tensor(value) and not value.numel():
            return "–"
        if torch.is_tensor(value):
            low, high = wilson(value.flatten())
            return f"{100 * value.float().mean():.1f} ({100 * low:.1f}–{100 * high:.1f})"
        if isinstance(value, float):
            return f"{100 * value:.1f}" if key.endswith("%") else f"{value:.3g}"
        return f"{value:,}" if isinstance(value, int) else str(value)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(key, row[key]) if key in row else "" for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(name, bench):
    """One experiment: its section of OUT/README.md is replaced, then printed."""
    began, device, bench.figures = time.time(), bench.unclip.device, []
    rows = EXPERIMENTS[name](bench)
    question, _, answer = inspect.getdoc(EXPERIMENTS[name]).partition("\n\n")
    command = f"python evaluate.py --only {name} --seed {bench.seed}" + \
        (f" --n {bench.n}" if bench.n else "") + \
        (f" --weights {bench.weights}" if bench.weights != SHIPPED / "shapes" else "")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else \
        f"{device.type}, {torch.get_num_threads()} threads"
    section = "\n\n".join([
        f"{name}: {question}", answer, table(rows),
        *(f"![{file}]({file}.png)\n\n*{caption}*" for file, caption in bench.figures),
        f"`{command}`: {(time.time() - began) / 60:.1f} minutes on {hardware}."]) + "\n"
    page = bench.out / "README.md"
    old = page.read_text(encoding="utf-8").split("\n## ")[1:] if page.exists() else []
    sections = {text.split(":")[0]: text for text in old} | {name: section}
    text = "\n## ".join([HEAD] + [sections[key] for key in EXPERIMENTS if key in sections])
    write_safely(page, lambda path: path.write_text(text, encoding="utf-8"))
    print(f"## {section}", flush=True)


def command(argv):
    parser = Parser(prog="evaluate.py", description="Measure what the weights can do.")
    add = parser.add_argument
    add("--weights", default=SHIPPED / "shapes", type=Path, metavar="DIR",
        help="what to measure (default: %(default)s)")
    add("--only", choices=EXPERIMENTS, help="one experiment (default: all that fit the weights)")
    add("--out", default=Path("results"), type=Path, metavar="DIR",
        help="gets README.md and its figures (default: %(default)s)")
    add("--seed", default=0, type=int, help="of all that is random (default: %(default)s)")
    add("--n", type=int, help="no more than so many of anything: a quick look, for another --out")
    add("--data-dir", help="where cifar10 (default: downloaded), coco or the folder is")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or mps (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, least in ("n", 2), ("seed", 0):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: choose {least} or more")
    check_out(args.out)
    unclip = UnCLIP.load(args.weights, find_device(args.device))
    data = unclip.clip.trained["data"]
    fit = [name for name in EXPERIMENTS if data in REAL.get(name, {"shapes"})
           and (name != "upsampler" or unclip.parts["upsampler"])]
    if args.only and args.only not in fit:
        raise ValueError(f"--only {args.only}: {args.weights} learnt from {data}; choose "
                         f"{', '.join(fit) or 'other --weights'}")
    bench = Bench(unclip, args.weights, args.out, args.seed, args.n, args.data_dir)
    for name in [args.only] if args.only else fit:
        run(name, bench)


def main(argv=None):
    """The command line; returns the exit status: 0 done, 2 a user's error, 130 stopped."""
    return run_command("evaluate.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
