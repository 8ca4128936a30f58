"""How good it is: a table of experiments, and the page that reports them.

    python evaluate.py                                # all that fit the weights, for hours
    python evaluate.py --only two --n 50 --out look   # a quick look at one of them

Each experiment is a function of a Bench that returns the rows of a table. Its docstring says what
it asks, and stands above the table in results/README.md. A tensor in a row is one measurement for
each picture (of priors: for each caption). The table has its mean (of bools: the share of what is
true), with a 95 % interval.

Next chapter: checkpoints.py, the last.
"""

import inspect
import os
import random
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations, product
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")          # see train.py

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from checkpoints import (SHIPPED, Parser, about, check_clip, check_out, find_device, load_part,
                         run_command)
from clip_tiny import components_needed
from data import CIFAR_CLASSES, a_word, class_captions, draw_sign, letters_of, load
from judge import (compare, energy_distance, entropy, first_guess, form, frechet, gradient_energy,
                   larger, load_judge, psnr, ratio, same, shares, spread, wilson)
from prior import Codes
from shapes import (COLOURS, SHAPES, UNSEEN, is_true, item, picture_grid, render,
                    sample_scene, scenes_for, to_float, to_uint8, write_png, write_safely)
from unclip import PRIORS, UnCLIP, slerp

# ---- The bench: what every experiment works with -------------------------------------------------


@dataclass
class Bench:
    """unCLIP, its judge, and the figures so far. Pictures are uint8 (N, 3, H, W) on the CPU, and
    each has noise of its own. n caps every count, of captions or of rounds over them."""
    unclip: UnCLIP
    weights: Path
    out: Path
    seed: int = 0
    n: int | None = None
    data_dir: str | None = None
    figures: list = field(default_factory=list)
    claims: list = field(default_factory=list)

    @cached_property
    def judge(self):
        return load_judge(self.weights, "judge", self.unclip.device)

    @cached_property
    def text_only(self):
        """The bench with the text-only decoder, or None if its weights are not there."""
        path, clip = self.weights / "text_decoder.pt", self.unclip.clip
        if not path.exists():
            return None
        decoder = load_part(path, self.unclip.device)
        check_clip(decoder, clip, path)
        return replace(self, unclip=UnCLIP(clip, decoder))

    @property
    def priors(self):
        """The priors whose weights are there."""
        return [name for name, part in PRIORS.items() if self.unclip.parts[part]]

    @property
    def side(self):
        """Pixels a side of the pictures that CLIP sees and the decoder draws."""
        return self.unclip.clip.config.image_size

    def most(self, count):
        return min(count, self.n or count)

    def portions(self, title, f, *columns, size=64):
        """f(*columns), `size` rows at a time, put together. Where a column is None, f gets None."""
        N = max(len(x) for x in columns if x is not None)
        some = lambda i: [x if x is None else x[i:i + size] for x in columns]
        return torch.cat([f(*some(i)) for i in tqdm(range(0, N, size), title, leave=False)])

    def floats(self, images):
        return to_float(images.to(self.unclip.device))

    def tokens(self, captions):
        return self.unclip.clip.tokenizer(captions).to(self.unclip.device)

    def z_t(self, captions):
        """Captions → z_t (N, D)."""
        return self.unclip.clip.encode_text(self.tokens(captions))

    def encode(self, images):
        """Pictures → z_i (N, D)."""
        return self.portions("CLIP", self.unclip.clip.encode_image, self.floats(images))

    def z_i(self, captions, prior="diffusion", **options):
        """A z_i of each caption, by a prior → (N, D)."""
        f = lambda y, rows: self.unclip.draw_z_i(y, self.seed, rows, prior, **options)
        return self.portions(f"z_i, {prior}", f, self.tokens(captions), range(len(captions)))

    def draw(self, captions, z_i, **how):
        """A picture of each caption and z_i (N, D). One of them may be None: it is hidden."""
        f = lambda z_i, y, rows: self.unclip.draw_x(z_i, y, self.seed, rows, **how)
        y, rows = captions and self.tokens(captions), range(len(captions or z_i))
        return to_uint8(self.portions("decoder", f, z_i, y, rows)).cpu()

    def latents(self, images):
        """Pictures → z_i (N, D) and x_T (N, 3, H, W)."""
        invert = lambda x: self.unclip.latent(x)[1]
        return self.encode(images), self.portions("inverting", invert, self.floats(images))

    def decode(self, z_i, x_T, eta=0.0):
        """A picture of each latent: unguided, and without a caption."""
        noise = lambda rows: self.unclip.noise(self.seed, rows, "variation")
        f = lambda z_i, x_T, rows: self.unclip.decode(z_i, x_T, eta=eta, noise=noise(rows))
        return to_uint8(self.portions("decoding", f, z_i, x_T, range(len(z_i)))).cpu()

    def x_T(self, N):
        """Noise to start N pictures from, the same at each call."""
        return self.unclip.noise(self.seed, range(N), "decoder")()

    def validation(self, limit, side=None):
        """Renders like those that training validates on, but others."""
        return load("shapes", "validation", side or self.side, limit, seed=1 + self.seed)

    def enlarged(self, images):
        """Pictures through the upsampler, if there is one."""
        f, x = lambda x, rows: self.unclip.upsample(x, self.seed, rows), self.floats(images)
        return to_uint8(self.portions("upsampler", f, x, range(len(x)), size=16)).cpu()

    def renders(self, captions, side=None, first=0):
        """A render of each caption. Scenes are numbered from `first`: others are other scenes."""
        scenes = [scenes_for(caption, 1, f"bench/{self.seed}/{i}")[0]
                  for i, caption in enumerate(captions, first)]
        return render(scenes, side or self.side, "renders")

    def figure(self, name, images, columns, caption):
        """A figure of the page, small pictures enlarged."""
        images = self.enlarged(images) if images.shape[-1] == self.side else images
        write_png(self.out / f"{name}.png", picture_grid(images, columns))
        self.figures.append((name, caption))

    def claim(self, section, says, a, b, reason=""):
        """Note a claim of the paper. It holds if the mean (of bools: the share of True) of a (N,)
        is larger than that of b (M,), by more than chance explains (judge.larger: if N = M, a[i]
        and b[i] are a pair). reason: why it may fail here; it is told if it does."""
        here = [f"{with_interval(x)} of {len(x)}" for x in (a, b)]
        holds = "yes" if larger(a, b) else "no" if larger(b, a) else "not shown"
        holds += f": {reason}" if reason and holds != "yes" else ""
        self.claims.append(f"> {section} | {says} | {', '.join(here)} | {holds}")  # for run()

    def strips(self, name, frames, caption):
        """A figure with a row for each of the first six pictures, and a column for each frame."""
        shown = torch.stack([x[:6] for x in frames], dim=1)
        self.figure(name, shown.flatten(0, 1), len(frames), caption)


WORDS_FOR_TWO = ["on top of", "left of", "right of"]


def noun(colour, shape):
    return f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"


# ---- Do pictures show what was asked for? --------------------------------------------------------


def conditions(bench, captions):
    """Yields (what the decoder is given, the pictures that it draws of the captions).

    Renders, also shuffled, and what the guided decoder draws of the priors' z_i are of all
    captions; the others are of the first quarter.
    """
    N, renders = len(captions), bench.renders(captions)
    few = captions[:(N + 3) // 4]
    yield "renders", renders
    yield "chance: renders, shuffled", renders[
        torch.randperm(N, generator=torch.Generator().manual_seed(bench.seed))]
    for name in bench.priors:
        z_i = bench.z_i(captions, name)
        yield f"{name} prior", bench.draw(captions, z_i)
        yield f"{name} prior, decoder unguided", bench.draw(few, z_i[:len(few)], guidance=1.0)
    yield "true z_i of the renders", bench.draw(few, bench.encode(renders[:len(few)]))
    yield "z_t in place of z_i", bench.draw(few, bench.z_t(few))
    yield "z_t, along the main axes", bench.draw(few, bench.z_i(few, "text"))
    yield "caption only", bench.draw(few, None)
    if bench.text_only:
        yield "caption only, text-only decoder", bench.text_only.draw(few, None)


def judge_itself(bench):
    """Can it be trusted?

    It reads validation renders, not what is drawn, and always names one solid or two: in an empty
    picture a gray cube. Of two, what it says of both must be right. Position: the centre of a
    solid's outline."""
    dataset = bench.validation(bench.most(2000), side=32)
    seen, truth, rows = bench.judge.read(dataset.images), dataset.labels, []
    for name, count in ("one solid", 1), ("two solids", 2):
        k = truth["count"] == count
        off = (seen["position"] - truth["position"])[k, :count]
        rows.append({"renders of": name, "pictures": int(k.sum()),
                     "relation %": (seen["relation"] == truth["relation"])[k],
                     **{f"{key} %": (seen[key] == truth[key])[k].all(1)
                        for key in ("shape", "colour", "size")},
                     "position, rms pixels": 16 * off.square().sum(-1).mean().sqrt().item()})
    return rows


def accuracy(bench):
    """One solid, as "a red cube": why a prior? (Sec. 5.1, Fig. 8.)

    How often are colour and shape what was asked for, as the judge sees them? A second solid makes
    both wrong. All 32 pairs are asked for equally often. Unseen: the four pairs that no training
    picture holds. Main axes: the first, which hold 99 % of z_i's variance (CLIP.fit_axes). Along
    the others z_t is unlike any z_i, and whitening enlarges them. So z_t whole fails here more than
    in the paper."""
    pairs = list(product(SHAPES, COLOURS)) * bench.most(32)
    captions, rows, all_right = [noun(colour, shape) for shape, colour in pairs], [], {}
    unseen = torch.tensor([(colour, shape) in UNSEEN for shape, colour in pairs])
    cube = torch.tensor([shape == "cube" for shape, _ in pairs])
    for name, x in conditions(bench, captions):
        right, new = compare(captions[:len(x)], bench.judge.read(x)), unseen[:len(x)]
        all_right[name] = right["all"]
        rows.append({"pictures from": name, "pictures": len(x), "seen, both %": right["all"][~new],
                     "unseen, both %": right["all"][new],
                     "cubes, both %": right["all"][cube[:len(x)]],
                     "seen, colour %": right["colour"][~new],
                     "seen, shape %": right["shape"][~new]})
        if name == "diffusion prior":
            wrong = (~right["all"]).nonzero()[:16, 0].tolist()
            bench.figure("accuracy", x[:32], 8, "The first picture of each pair, by the "
                         "diffusion prior.")
            if wrong:
                bench.figure("mistakes", x[wrong], 8, "This prior's first mistakes. They should be "
                             f"{', '.join(captions[i] for i in wrong)}.")
    z_t = all_right["z_t in place of z_i"]
    for name in bench.priors:
        bench.claim("5.1", f"z_i by the {name} prior draw better than z_t, whole, in its place",
                    all_right[f"{name} prior"], z_t)
    bench.claim("5.1", "z_t in place of z_i draws better than the caption alone", z_t,
                all_right["caption only"], "z_t is unlike any z_i, but for its main axes (there: "
                f"{with_interval(all_right['z_t, along the main axes'])})")
    return rows


def two(bench):
    """Two solids: which, where, and whose colour? (Sec. 7, Fig. 14 and 15.)

    Captions as "a red cube on top of a blue cube", in two colours. All right: both colours and
    shapes in their places, and the relation. Set: the right ones, in whatever place. Swapped: both
    colours are right, in the wrong places, with their solids or without."""
    rng, captions, rows, all_right = random.Random(f"two/{bench.seed}"), [], [], {}
    while len(captions) < bench.most(900):
        relation = rng.choice(WORDS_FOR_TWO)
        a, b = (sample_scene(rng, {"relation": "alone"}).solids[0] for _ in range(2))
        if a.colour != b.colour and (relation != "on top of" or b.shape in ("cube", "cylinder")):
            captions.append(f"{noun(a.colour, a.shape)} {relation} {noun(b.colour, b.shape)}")
    for name, x in conditions(bench, captions):
        right = compare(captions[:len(x)], bench.judge.read(x))
        all_right[name] = right["all"]
        rows.append({"pictures from": name, "pictures": len(x), "all right %": right["all"],
                     "colours %": right["colour"], "shapes %": right["shape"],
                     "relation %": right["relation"], "colours, set %": right["colour set"],
                     "shapes, set %": right["shape set"],
                     "colours swapped %": right["colour set"] & ~right["colour"]})
    asked = ["a red cube on top of a blue cube", "a blue cube on top of a red cube",
             "a red cube left of a blue cube", "a red cube right of a blue cube"]
    y = [caption for caption in asked for _ in range(bench.most(8))]
    z_t = all_right["z_t, along the main axes"]
    for name in bench.priors:
        bench.claim("5.1", f"two solids: z_i by the {name} prior draw better than z_t along the "
                    "main axes (the paper: whole)", all_right[f"{name} prior"][:len(z_t)], z_t)
    if len(bench.priors) == 2:
        bench.claim("5.2", "the diffusion prior (the better of two z_i) draws better than the "
                    "autoregressive prior (guided by 2)",
                    *(all_right[f"{name} prior"] for name in bench.priors),
                    f"even true z_i give {with_interval(all_right['true z_i of the renders'])}")
    bench.figure("two", bench.draw(y, bench.z_i(y)), bench.most(8), f"Rows: {', '.join(asked)}.")
    return rows


def binding(bench):
    """Whose colour is it? (Sec. 7, Fig. 14 and 15.)

    Captions as "a red cube on top of a blue cube". CLIP: how often is z_i closer to z_t of its
    caption than to z_t of the caption with the colours exchanged? Drawn, from z_i and caption: of
    the pictures that hold both colours, how many have them in their places? Chance is 50 %. This
    world's captions are worded so that CLIP learns who is where (NOTES.md, CLIP). The paper's CLIP
    had no such help, so this is no test of it."""
    asked = [(a, relation, b) for a, b in permutations(COLOURS, 2) for relation in WORDS_FOR_TWO]
    asked, rows = asked[:bench.most(len(asked))], []
    captions = [f"{noun(a, 'cube')} {relation} {noun(b, 'cube')}" for a, relation, b in asked]
    exchanged = [f"{noun(b, 'cube')} {relation} {noun(a, 'cube')}" for a, relation, b in asked]
    sources = {"renders": bench.encode(bench.renders(captions)),
               **{f"{name} prior": bench.z_i(captions, name) for name in bench.priors}}
    sources |= {"none: text-only decoder": None} if bench.text_only else {}
    bound, told, shown = {}, {}, []
    for name, z_i in sources.items():
        model = bench.text_only if z_i is None else bench
        shown.append(model.draw(captions, z_i))
        right = compare(captions, bench.judge.read(shown[-1]))
        bound[name] = right["colour"][right["colour set"]]
        if z_i is not None:
            near, far = ((z_i * bench.z_t(y)).sum(1).cpu() for y in (captions, exchanged))
            told[name] = near > far
        for words in WORDS_FOR_TWO:
            k = torch.tensor([relation == words for _, relation, _ in asked])
            rows.append({"z_i of": name, "relation": words, "captions": int(k.sum()),
                         **({} if z_i is None else
                            {"CLIP: closer to its caption %": told[name][k]}),
                         "drawn: both colours %": right["colour set"][k],
                         "of these, in their places %": right["colour"][k & right["colour set"]]})
    if bench.text_only:
        bench.claim("7", "colours are bound to solids better without z_i, as in GLIDE",
                    bound["none: text-only decoder"], bound["diffusion prior"],
                    f"this CLIP tells the two captions apart: {with_interval(told['renders'])}")
    bench.strips("binding", shown, f"Columns, drawn from z_i of: {', '.join(sources)}. Rows: "
                 f"{', '.join(captions[:6])}.")
    return rows


def form_of_solids(bench):
    """Are drawn solids sound, or dented?

    To each picture, the scene of the asked shape and colour is fitted that looks most like it: its
    place, size, yaw, light and floor. The table has the PSNR, in dB, of the picture and this scene,
    at full size, in a box around the solid. A wrong colour counts as well. The first row is what
    the fit itself loses, and the last column says how far cubes are below it."""
    n = bench.most(25)
    pairs = [pair for shape in SHAPES for pair in (n * [
        (shape, colour) for colour in COLOURS if (colour, shape) not in UNSEEN])[:n]]
    captions = [noun(colour, shape) for shape, colour in pairs]
    drawn = bench.enlarged(bench.draw(captions, bench.z_i(captions)))
    pictures = {"renders": bench.renders(captions, drawn.shape[-1]),
                "small renders, upsampled": bench.enlarged(bench.renders(captions)),
                "drawn, by the diffusion prior": drawn}
    fits = {name: form(x, pairs, bench.judge, seed=bench.seed) for name, x in pictures.items()}
    own, fitted = fits["renders"][0], fits["drawn, by the diffusion prior"][1]
    rows = [{"pictures": name, "of each shape": n,
             **{f"{shape}s": some for shape, some in zip(SHAPES, decibels.split(n))},
             "cubes, below renders": (own - decibels)[:n]} for name, (decibels, _) in fits.items()]
    shown = torch.cat([drawn[:min(8, n)], fitted[:min(8, n)]])
    bench.figure("form", shown, min(8, n), "Drawn cubes, and the scenes that fit them.")
    return rows


def diversity(bench):
    """What does guidance cost? (Sec. 5.3, Fig. 9 to 11.)

    "a cube" leaves open its colour, its place and the floor. unCLIP draws z_i, which holds most of
    that, before guidance acts; all its rows have the same z_i. The text-only decoder was trained on
    captions alone. It has no z_i, so guidance acts on all that it draws. Entropy: of the colours of
    what the judge calls a cube; 1: all are equally frequent. Std: of places and of the floor's
    tint, as a ratio to renders; a tint above 1 is a fault, not variety. Fréchet: the distance, in
    the judge's features, from four times as many other renders; the first row is what so many
    pictures can reach. The paper speaks of change: compare each decoder's rows from 1 to 6."""
    N, judge, rows, lines, shown = bench.most(256), bench.judge, [], {}, []
    captions = ["a cube"] * N
    data = bench.renders(4 * captions, first=N)
    reference, known = judge.features(data), first_guess(data, judge)

    def measure(x):
        seen, guess = judge.read(x), first_guess(x, judge)
        k = (seen["count"] == 1) & (seen["shape"][:, 0] == SHAPES.index("cube"))
        wide = lambda some: (spread(guess[k][:, some]) / spread(known[:, some])).sqrt().item()
        return {"cubes %": k, "entropy of colour": entropy(seen["colour"][k, 0], len(COLOURS)),
                "std of places": wide([0, 1]), "std of floors": wide([6, 7, 8]),
                "Fréchet distance": frechet(judge.features(x), reference)}

    rows.append({"pictures from": "renders", "pictures": N, **measure(bench.renders(captions))})
    decoders = {"diffusion prior": (bench, bench.z_i(captions))}
    decoders |= {"text-only decoder": (bench.text_only, None)} if bench.text_only else {}
    for name, (model, z_i) in decoders.items():
        for s in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0):
            x = model.draw(captions, z_i, guidance=s)
            rows.append({"pictures from": name, "guidance": s, "pictures": N, **measure(x)})
            for key in ("cubes %", "entropy of colour", "Fréchet distance"):
                line = lines.setdefault(key.replace(" %", ", share"), {}).setdefault(name, [])
                mean = torch.as_tensor(rows[-1][key]).float().mean()
                line.append((s, mean.nan_to_num().item()))               # nan: no cube is there
            if s in (1.0, 3.0, 6.0):
                shown.append(x[:8])
    if bench.text_only:
        ours, its = (row["entropy of colour"] for row in (rows[6], rows[-1]))    # guided by 6
        bench.claim("5.3", "guided by 6, unCLIP's cubes have more entropy of colour than a "
                    "text-only decoder's", ours, its)
    bench.figure("diversity", torch.cat(shown), min(8, N), "\"a cube\" at guidance 1, 3 and 6, "
                 f"by {', '.join(decoders)}.")
    bench.figure("guidance", line_charts(lines, "guidance")[None], 1, "Over the guidance scale.")
    return rows


def twice(bench):
    """What comes from z_i, and what from the noise? (Sec. 2 and 3.1.)

    "a cube": each of k z_i, by the diffusion prior, is drawn with each of k streams of noise in the
    decoder, guided and with the caption, as always. Of the variance of the k² pictures (colour,
    size and place as the judge reads them, the floor in the lower corners): the share of z_i, of
    the noise, and of both together, where one changes what the other does. With 16 of each, a share
    near 1 has a standard error of 0.01 to 0.06, a small one of a seventh to a half of its value;
    below 1 % it may be none."""
    k = bench.most(16)
    y, judge = ["a cube"] * k, bench.judge
    x = torch.cat([bench.draw(y, z_i.expand(k, -1)) for z_i in bench.z_i(y)])
    seen, guess = judge.read(x), first_guess(x, judge)
    values = {"colour": F.one_hot(seen["colour"][:, 0], len(COLOURS)).float(),
              "size": seen["size"][:, :1].float(), "place, across": guess[:, :1],
              "place, down": guess[:, 1:2], "floor": guess[:, 6:], "all pixels": x.flatten(1) / 255}
    rows = []
    for name, value in values.items():
        by = shares(value.unflatten(0, (k, k)))
        rows.append({"variance of": name, "pictures": k * k, "by z_i %": by[0], "by noise %": by[1],
                     "by both together %": by[2]})
    bench.figure("twice", x.unflatten(0, (k, k))[:4, :4].flatten(0, 1), min(k, 4),
                 "A row has one z_i, a column has one noise.")
    return rows


def steps(bench):
    """How many, and how much fresh noise in each? (App. C: 250 steps.)

    Cubes, as "a red cube", on another seed than the tables above: this is for choosing."""
    captions, rows = [noun(colour, "cube") for colour in COLOURS] * bench.most(8), []
    bench = replace(bench, seed=bench.seed + 1)
    z_i = bench.z_i(captions)
    for eta, n in product((1.0, 0.0), (4, 8, 16, 32, 64, 128, 250)):
        began = time.time()
        x = bench.draw(captions, z_i, eta=eta, steps=n)
        seconds = (time.time() - began) / len(x)
        rows.append({"eta": eta, "steps": n, "pictures": len(x), "seconds a picture": seconds,
                     "right %": compare(captions, bench.judge.read(x))["all"]})
    return rows


# ---- The embeddings ------------------------------------------------------------------------------


def clip(bench):
    """Is what it finds true? (App. C.)

    Each validation picture gives one caption, its first. CLIP picks the closest caption for each
    picture, and the closest picture for each caption. True: the caption is true of the scene. Many
    captions are true of a picture ("a cube", "a photo of a red cube")."""
    dataset, rows = bench.validation(bench.most(500)), []
    texts = sorted({captions[0] for captions in dataset.captions})
    score = (bench.encode(dataset.images) @ bench.z_t(texts).T).cpu()              # (N, texts)
    true = torch.tensor([[is_true(text, dataset.labels, i) for text in texts]
                         for i in range(len(dataset))])
    one = dataset.labels["count"] == 1
    for name, asked, answers in (("a picture of one solid", score[one], true[one]),
                                 ("a picture of two", score[~one], true[~one]),
                                 ("a caption", score.T, true.T)):
        rows.append({"closest to": name, "asked": len(asked),
                     "true %": answers.gather(1, asked.argmax(1, keepdim=True)),
                     "by chance %": answers.float().mean().item()})
    return rows


def codes(bench):
    """What is lost of z_i in the AR prior's codes? (Sec. 2.2.)

    What is lost is a share of the variance of validation renders' z_i. Axes and buckets come from
    training renders. The paper's rule keeps the fewest axes that lose less than 1 % of the variance
    of z_i. But where solids stand is in the axes of small variance. So the prior's axes are those
    that the rule keeps of whitened z_i."""
    train = bench.encode(load("shapes", "train", bench.side, bench.most(5000)).images)
    z_i = bench.encode(bench.validation(bench.most(1000)).images)
    clip, rows = bench.unclip.clip, []
    spaces = {"raw": lambda z: z, "whitened": clip.whiten}
    for space, f in spaces.items():
        k = components_needed(f(train).var(0))
        for buckets in 4, 16, 64, 256, "no":
            kept = clip.whiten(z_i)[:, :k]
            if buckets != "no":
                code = Codes(k, min(buckets, len(train))).to(z_i.device)
                code.fit(clip.whiten(train)[:, :k])
                kept = code.decode(code.encode(kept))
            decoded = clip.unwhiten(F.pad(kept, (0, z_i.shape[1] - k)))
            lost = {f"lost, {key} %": ((g(decoded) - g(z_i)).square().mean(0).sum()
                                       / g(z_i).var(0).sum()).item() for key, g in spaces.items()}
            rows.append({"99 % of z_i": space, "axes": k, "buckets": buckets, **lost})
    return rows


def priors(bench):
    """Do they draw from p(z_i | y)? (Sec. 2.2.)

    As many samples as renders of each caption. Spread: tr Cov(z_i | y), as a ratio to the renders'.
    Energy distance to the renders, of z_i as they are, and whitened: 1 is that of a point at the
    renders' mean, which is what a regressor learns. Own caption: the share of z_i whose closest
    z_t, of these captions', is that of their own. The last row of each prior is the default in
    drawing: it trades spread for fit, on purpose. Intervals are over captions; near an energy
    distance of 0 they are too narrow."""
    captions = list(dict.fromkeys(item("validation", i)[1][0] for i in range(500)))[:bench.most(30)]
    n, rows = bench.most(128), []
    y, z_t = [y for y in captions for _ in range(n)], bench.z_t(captions)
    real, again = (bench.encode(bench.renders(y, first=k)).unflatten(0, (-1, n))
                   for k in (0, len(y)))                                         # (captions, n, D)
    point = real.mean(1, keepdim=True).repeat(1, 2, 1)                           # two equal ones
    spaces = {"raw": lambda z: z, "whitened": bench.unclip.clip.whiten}
    worst = {key: energy_distance(f(real), f(point)) for key, f in spaces.items()}

    def add(name, z_i):                                                          # (captions, n, D)
        own = (z_i @ z_t.T).argmax(-1).cpu() == torch.arange(len(z_t))[:, None]
        rows.append({"z_i from": name, "captions": len(z_i), "z_i of each": z_i.shape[1],
                     "spread": ratio(spread(z_i), spread(real)),
                     **{f"energy distance, {key}": ratio(energy_distance(f(real), f(z_i)),
                                                         worst[key]) for key, f in spaces.items()},
                     "own caption, %": 100 * own.float().mean(1),
                     "z_t·z_i": (z_i * z_t[:, None]).sum(-1).mean().item()})

    add("other renders of the caption", again)
    add("the mean of the caption's renders", point)
    add("renders of another caption", again.roll(1, 0))
    ways = {"diffusion": {"one draw": {"candidates": 1}, "best of two": {}},
            "ar": {"any dot": {"top_half": False, "guidance": 1.0},
                   "dots of the upper half": {"guidance": 1.0}, "these, guided by 2": {}}}
    for name in bench.priors:
        for way, options in ways[name].items():
            add(f"{name} prior, {way}", bench.z_i(y, name, **options).unflatten(0, (-1, n)))
    return rows


# ---- Pictures from pictures ----------------------------------------------------------------------
# Pictures are measured as they are shown, in 8 bits. The decoder is unguided here and is shown no
# caption, with one exception: the pictures that `upsampler` draws.


def upsampler(bench):
    """What does it add? (Sec. 2.1.)

    To small validation renders, and to what the decoder draws of their z_i and captions. PSNR and
    sharpness (gradient energy, as a ratio) compare with renders of the same scenes at full size,
    and are told for area means of these, too: they are cleaner than small renders."""
    factor = bench.unclip.part("upsampler").config.factor
    dataset, full = (bench.validation(bench.most(200), side)
                   for side in (bench.side, bench.side * factor))
    small, large, rows = dataset.images, full.images, []
    means = to_uint8(F.avg_pool2d(to_float(large), factor))
    drawn = bench.draw([captions[0] for captions in dataset.captions], bench.encode(small))
    with FlopCounterMode(display=False) as counter:
        bench.enlarged(small[[0] * 4])                   # the upsampler works on four at a time
    plain = lambda x, mode="bicubic": to_uint8(F.interpolate(
        to_float(x), scale_factor=float(factor), mode=mode))
    pictures = {"renders": large, "renders, small": small, "bicubic": plain(small),
                "upsampled": bench.enlarged(small), "area means, upsampled": bench.enlarged(means),
                "drawn": drawn, "drawn, upsampled": bench.enlarged(drawn)}
    for name, x in pictures.items():
        row = {"pictures": name, "of": len(x),
               "solids right %": same(bench.judge.read(x), dataset.labels)}
        if name in ("bicubic", "upsampled", "area means, upsampled"):
            row |= {"PSNR, dB": psnr(x, large),
                    "sharpness": ratio(gradient_energy(x), gradient_energy(large))}
        if name == "upsampled":
            row["GFLOP a picture"] = counter.get_total_flops() / 4e9
        rows.append(row)
    bench.strips("upsampler", (
        plain(small, "nearest"), pictures["bicubic"], pictures["upsampled"], large,
        plain(drawn, "nearest"), plain(drawn), pictures["drawn, upsampled"]),
        "Small, bicubic, upsampled, render; drawn: small, bicubic, upsampled.")
    return rows


def renders_and_others(bench, N, alone=True):
    """N validation renders, and for each another, whose first solid has another colour and another
    shape → [(pictures, labels), (pictures, labels)]. alone: only renders of one solid."""
    dataset = bench.validation(10 * max(10, N))
    pool = ((dataset.labels["count"] == 1) | (not alone)).nonzero()[:, 0]
    colour, shape = (dataset.labels[key][pool, 0] for key in ("colour", "shape"))
    fits = (colour[:N, None] != colour) & (shape[:N, None] != shape)             # (N, pool)
    g = torch.Generator().manual_seed(bench.seed)
    other = pool[torch.multinomial(fits.float(), 1, generator=g)[:, 0]]
    return [(dataset.images[i], {key: v[i] for key, v in dataset.labels.items()})
            for i in (pool[:N], other)]


def decoded(bench, latents, measure):
    """latents: a list of (cells, z_i, x_T), one for each row, with an eta if it is not 0. Returns
    rows (cells | measure(pictures, the judge's reading of them)), and the pictures of each row."""
    rows, shown = [], []
    for cells, *latent in latents:
        x = bench.decode(*latent)
        rows.append({**cells, "pictures": len(x), **measure(x, bench.judge.read(x))})
        shown.append(x)
    return rows, shown


def changes(x, seen, before, saw):
    """Cells of a row: how far a lone solid moved; how much the corners, mostly floor, changed."""
    one = (seen["count"] == 1) & (saw["count"] == 1)
    way = 16 * (seen["position"] - saw["position"])[one, 0].norm(dim=-1)
    corners = (x.float() - before.float())[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].abs()
    return {"moved, of 32 pixels": way, "floor, of 255": corners.mean((1, 2))}


def reconstruct(bench):
    """Is (z_i, x_T) a picture's latent, and does z_i matter in it? (Sec. 3.)

    Validation renders become latents and are decoded again. As controls, z_i or x_T is exchanged.
    The other z_i is of a picture whose first solid has another colour and shape: a decoder that
    draws this solid from the first picture's x_T uses z_i. White noise has std 1."""
    (images, labels), (others, theirs) = renders_and_others(bench, bench.most(200), alone=False)
    (z_i, x_T), noise = bench.latents(images), bench.x_T(len(images))

    def measure(x, seen):
        decibels = psnr(x, images)
        return {"PSNR, dB, median": decibels.median().item(),
                "a tenth is below": decibels.quantile(0.1).item(),
                "judged as itself %": same(seen, labels),
                "judged as the other %": same(seen, theirs)}
    rows, shown = decoded(bench, [
        ({"decoded from": name, "std of x_T": start.std().item()}, z, start)
        for name, z, start in (("z_i, x_T", z_i, x_T), ("z_i, random x_T", z_i, noise),
                               ("the other's z_i, x_T", bench.encode(others), x_T))], measure)
    bench.strips("reconstruct", (images, *shown, others),
                 "Render, reconstruction, random x_T, the other's z_i, the other.")
    bench.claim("3", "colour and shape come from z_i: with z_i of a picture B and x_T of a picture "
                "A, B's are drawn more often than A's",
                rows[2]["judged as the other %"], rows[2]["judged as itself %"])
    return rows


def vary(bench):
    """What stays is what z_i holds. (Sec. 3.1, Fig. 3.)

    One variation of each validation render, at every eta, with the same noise. Kept: the solids are
    there, each in its colour and shape. Moved: how far a lone solid's centre is away, as the judge
    reads it. Floor: the mean change of the four corners. The last row is how unrelated renders
    differ."""
    dataset = bench.validation(bench.most(350))
    images, labels, one = dataset.images, dataset.labels, dataset.labels["count"] == 1
    (z_i, x_T), saw = bench.latents(images), bench.judge.read(images)

    def measure(x, seen):
        kept = same(seen, labels)
        return {"one solid, kept %": kept[one], "two, both kept %": kept[~one],
                **changes(x, seen, images, saw)}
    rows, shown = decoded(bench, [({"eta": eta}, z_i, x_T, eta)
                                  for eta in (0.0, 0.25, 0.5, 0.75, 1.0)], measure)
    x = images.roll(1, 0)
    rows.append({"eta": "another render", "pictures": len(x), **measure(x, bench.judge.read(x))})
    more = [replace(bench, seed=bench.seed + k).decode(z_i[:6], x_T[:6], eta=1.0)
            for k in range(1, 7)]
    bench.strips("vary", (images, shown[-1], *more), "A render, and variations at eta 1.")
    bench.claim("3.1", "variations at eta 1 show the solids of their picture more often than "
                "another render does", *(torch.cat([row[key] for key in row if "kept" in key])
                                         for row in rows[-2:]))
    return rows


def interpolate(bench):
    """What lies between two pictures? (Sec. 3.2, Fig. 4.)

    A and B are renders of one solid each, which differ in colour and in shape. z_i goes from A to B
    by slerp. x_T does so too, or one random x_T serves all seven. Sharpness: gradient energy, as a
    ratio to that of the renders."""
    (images, labels), (others, theirs) = renders_and_others(bench, bench.most(200))
    (z_a, x_a), (z_b, x_b) = bench.latents(images), bench.latents(others)
    noise = bench.x_T(len(images))
    sharp = (gradient_energy(images) + gradient_energy(others)) / 2
    measure = lambda x, seen: {"judged A %": same(seen, labels), "judged B %": same(seen, theirs),
                               "sharpness": ratio(gradient_energy(x), sharp)}
    rows, shown = decoded(bench, [
        ({"x_T": way, "t": f"{k}/6"}, slerp(z_a, z_b, k / 6), slerp(start, end, k / 6))
        for way, start, end in (("slerped", x_a, x_b), ("one noise", noise, noise))
        for k in range(7)], measure)
    bench.strips("interpolate", shown[:7], "From A to B, x_T slerped.")
    bench.strips("interpolate-noise", shown[7:], "From A to B, x_T one noise.")
    return rows


def edit(bench):
    """Can a text diff change a picture? (Sec. 3.3, Fig. 5.)

    A solid's colour is to change and its shape to stay, or the other way round, by turns. z_i turns
    by a fraction θ towards norm(z_t − z_t0) on its main axes: z_t of the new caption, z_t0 of "a
    photo" or of the present caption. x_T stays. Control: the text diff of another picture, which in
    31 of 200 asks for the same colour or shape (seed 0). Moved and floor: as in vary."""
    (images, labels), _ = renders_and_others(bench, bench.most(200))
    now = [(list(COLOURS)[c], SHAPES[s])
           for c, s in zip(labels["colour"][:, 0], labels["shape"][:, 0])]
    pairs, rng = set(product(COLOURS, SHAPES)) - UNSEEN, random.Random(f"edit/{bench.seed}")
    new = []
    for i, pair in enumerate(now):
        kept = 1 - i % 2                                     # the shape (1) or the colour (0)
        new.append(rng.choice(sorted(p for p in pairs if p != pair and p[kept] == pair[kept])))
    present, to = ([noun(*pair) for pair in some] for some in (now, new))
    near, photo = (bench.unclip.text_diff(to, base) for base in (present, ["a photo"]))
    ways = [(base, z_d, theta) for base, z_d in (("the present caption", near), ("a photo", photo))
            for theta in (0.1, 0.2, 0.3, 0.4, 0.5)] + [("another's diff", near.roll(2, 0), 0.5)]
    (z_i, x_T), saw = bench.latents(images), bench.judge.read(images)
    reshaped = torch.arange(len(to)) % 2 == 1                # where the shape is to change

    def measure(x, seen):
        right = compare(to, seen)["all"]
        return {"colour changed, shape kept %": right[~reshaped],
                "shape changed, colour kept %": right[reshaped], **changes(x, seen, images, saw)}
    rows, shown = decoded(bench, [({"from": base, "θ": theta}, slerp(z_i, z_d, theta), x_T)
                                  for base, z_d, theta in ways], measure)
    bench.strips("edit", (images, *shown[:5]), "A render, and θ 0.1 to 0.5 from the present "
                 f"caption, to become {', '.join(to[:6])}.")
    bench.claim("3.3", "a text diff (θ 0.5) changes what it names more often than the text diff of "
                "another picture does",
                *(torch.cat([row[key] for key in row if "changed" in key])
                  for row in (rows[4], rows[-1])))
    return rows


def pca(bench):
    """What do the first principal axes of z_i hold? (Sec. 4, Fig. 7.)

    z_i of validation renders on its first k axes, and the mean on the others, each decoded from the
    same noise for every k. The paper finds the coarse meaning first, and details later."""
    dataset, mean = bench.validation(bench.most(200)), bench.unclip.clip.mean
    images, labels, one = dataset.images, dataset.labels, dataset.labels["count"] == 1
    z_i = bench.encode(images)
    noise, variances = bench.x_T(len(images)), (z_i - mean).square().mean(0)

    def measure(x, seen):
        return {**{f"one solid, {key} %": (seen[key] == labels[key])[one].all(1)
                   for key in ("colour", "shape", "size")},
                "two, colours and shapes %": same(seen, labels)[~one],
                "relation %": (seen["relation"] == labels["relation"])[~one]}
    rows, shown = decoded(bench, [
        ({"axes": k, "variance %": (variances[:k].sum() / variances.sum()).item()},
         torch.cat([z_i[:, :k], mean[k:].expand(len(z_i), -1)], 1), noise)
        for k in (2 ** j for j in range(len(variances).bit_length()))], measure)
    bench.strips("pca", (*shown, images), "1, 2, 4, … axes, and the render.")
    return rows


# ---- Other pictures ------------------------------------------------------------------------------


def cifar10(bench):
    """What becomes of real pictures? (Sec. 5.)

    Shares of pictures in which the class is recognised: by CLIP, as the closest of ten captions
    such as "a photo of a frog"; else by a classifier, which shares no weight with unCLIP. Fréchet:
    the distance, in the classifier's features, from the training pictures. Few pictures are farther
    away than many, so compare equal numbers."""
    train, test = (load("cifar10", split, limit=bench.most(50_000), data_dir=bench.data_dir)
                   for split in ("train", "validation"))
    classifier = load_judge(bench.weights, "classifier", bench.unclip.device, bench.data_dir)
    reference, rows, n = classifier.features(train.images), [], bench.most(100)

    def add(name, images, classes):
        rows.append({"pictures": name, "number": len(images),
                     "class right %": classifier.read(images)["class"] == classes,
                     "Fréchet distance": frechet(classifier.features(images), reference)})

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
    if "diffusion" in bench.priors:
        add("diffusion prior, guided by 2", bench.draw(y, bench.z_i(y, guidance=2.0)), asked)
    add("z_t, along the main axes", bench.draw(y, bench.z_i(y, "text")), asked)
    add("caption only", bench.draw(y, None), asked)
    return rows


def spelling(bench):
    """Does it spell? (Sec. 7, Fig. 16.)

    Signs with a word of four letters, two syllables. Unseen: one word in ten, of which training has
    no sign. A reader, which learnt from signs with words of both kinds, reads each letter in its
    place. From true z_i alone: with the caption hidden. That is what the decoder draws, not all
    that z_i holds: an MLP reads 92 % of the letters there (NOTES.md, Signs)."""
    reader, n = load_judge(bench.weights, "reader", bench.unclip.device), bench.most(300)
    rows, shown, whole = [], [], {}
    for kind, unseen in ("seen", False), ("unseen", True):
        rngs = [random.Random(f"spelling/{bench.seed}/{kind}/{i}") for i in range(n)]
        words = [a_word(rng, unseen) for rng in rngs]
        x = torch.stack([draw_sign(word, rng, bench.side) for word, rng in zip(words, rngs)])
        captions, z_i = [f'a sign that says "{word}"' for word in words], bench.encode(x)
        pictures = {"renders": x, "chance: renders, shuffled": x.roll(1, 0),
                    "true z_i alone": bench.draw(None, z_i),
                    "true z_i and caption": bench.draw(captions, z_i),
                    **{f"{name} prior": bench.draw(captions, bench.z_i(captions, name))
                       for name in bench.priors}, "caption only": bench.draw(captions, None)}
        for name, drawn in pictures.items():
            right = reader.read(drawn)["letters"] == letters_of(words)              # (n, 4)
            whole[name] = whole.get(name, []) + [right.all(1)]
            rows.append({"words": kind, "pictures from": name, "pictures": n,
                         "words %": right.all(1), "letters, %": 100 * right.float().mean(1)})
        shown += [drawn[:8] for name, drawn in pictures.items() if "chance" not in name]
    bench.figure("spelling", torch.cat(shown), min(8, n), "Seen words, then unseen ones. Rows: "
                 f"{', '.join(name for name in pictures if 'chance' not in name)}.")
    bench.claim("7", "words: those of renders are read right more often than drawn ones",
                *(torch.cat(whole[name]) for name in ("renders", "diffusion prior")))
    return rows


def overfit(bench):
    """Can a run on few pictures give them back from their z_i alone?

    Own closest: the share of results whose closest picture is their own."""
    trained = bench.unclip.clip.trained
    few = min(bench.most(100), trained.get("limit") or 100)
    images = load(trained["data"], "train", bench.side, few, bench.data_dir).images
    N = len(images)
    drawn = bench.decode(bench.encode(images), bench.x_T(N))
    each = torch.stack([psnr(drawn, image) for image in images], 1)      # (results, pictures)
    bench.strips("overfit", (images, drawn), "Pictures, and what comes back.")
    return [{"pictures": N, "own closest %": each.argmax(1) == torch.arange(N),
             "PSNR, dB, median": each.diagonal().median().item(),
             "to another": each.roll(1, 1).diagonal().median().item()}]


# ---- Charts --------------------------------------------------------------------------------------

LINE_COLOURS = "#c0392b", "#2471a3", "#1e8449", "#7d3c98"


def line_charts(charts, across, side=272):
    """{what y is: {name of a line: [(x, y), …]}} → one chart each, side by side, as uint8
    (3, side, side · charts). Axes are labelled at both ends, and x is named by `across`."""
    sheet = Image.new("RGB", (side * len(charts), side), "white")
    draw, left, right, top, bottom = ImageDraw.Draw(sheet), 40, 12, 24 + 14 * 3, 24
    for k, (title, lines) in enumerate(charts.items()):
        xs, ys = zip(*(point for line in lines.values() for point in line))
        x_0, x_1, y_1 = min(xs), max(xs), max(1e-9, *ys)                        # y from 0 upwards
        place = lambda x, y: (k * side + left + (x - x_0) / (x_1 - x_0) * (side - left - right),
                              side - bottom - y / y_1 * (side - top - bottom))
        draw.text((k * side + left, 6), title.replace("é", "e"), "black")    # the font lacks it
        draw.line([place(x_0, y_1), place(x_0, 0), place(x_1, 0)], "black")
        for y in 0, y_1:
            draw.text((k * side + left - 4, place(x_0, y)[1]), f"{y:.3g}", "black", anchor="rm")
        for x, text in (x_0, f"{x_0:g}"), ((x_0 + x_1) / 2, across), (x_1, f"{x_1:g}"):
            draw.text((place(x, 0)[0], side - bottom + 6), text, "black", anchor="mt")
        for j, ((name, line), colour) in enumerate(zip(lines.items(), LINE_COLOURS)):
            draw.line([place(*point) for point in line], colour, width=2)
            draw.text((k * side + left + 8, 22 + 14 * j), name, colour)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


# ---- The page and the command --------------------------------------------------------------------

EXPERIMENTS = {"judge": judge_itself, "accuracy": accuracy, "two": two, "binding": binding,
               "form": form_of_solids, "diversity": diversity, "twice": twice, "clip": clip,
               "codes": codes, "priors": priors, "upsampler": upsampler, "reconstruct": reconstruct,
               "vary": vary, "interpolate": interpolate, "edit": edit, "pca": pca, "steps": steps,
               "spelling": spelling, "cifar10": cifar10, "overfit": overfit}
OTHERS = {"spelling": {"signs"}, "cifar10": {"cifar10"}, "overfit": {"coco", "folder"}}
# Parts without which an experiment has nothing to show; of the others it takes what is there.
NEEDS = dict.fromkeys(EXPERIMENTS, ["decoder"]) | {"upsampler": ["decoder", "upsampler"]} | \
    dict.fromkeys(["judge", "clip", "codes", "priors"], []) | dict.fromkeys(
        ["two", "binding", "form", "diversity", "twice", "steps", "spelling"], ["decoder", "prior"])
HEAD = """# Results

Written by `python evaluate.py`; an experiment that runs again replaces its own section. Shares are
in %. A share of pictures is followed by its 95 % interval (Wilson), a mean over pictures by ± half
of its interval. Within a row each picture has noise of its own. The k-th pictures of all rows begin
with the same noise, unless a table says otherwise. From captions, the diffusion prior gives the
better of two z_i, unguided; the AR prior is guided by 2, and the decoder by 1.5. From reconstruct
to pca, the decoder is unguided and sees no caption.

What the paper says, as a comparison of two numbers, and whether it holds here, where the truth is
known. "yes": the first is larger by more than chance explains (95 %). "no": it is smaller by more
than that. "not shown": the difference may be chance.

| section | the paper | here | holds | experiment |
| --- | --- | --- | --- | --- |"""


def with_interval(x):
    """The mean of a tensor with its 95 % interval, as text; of bools the share of what is true."""
    if not x.numel():
        return "–"
    if x.dtype != torch.bool:
        half = f" ± {1.96 * x.std() / len(x) ** 0.5:.2g}" if len(x) > 1 else ""
        return f"{x.mean():.3g}{half}"
    low, high = wilson(x.flatten())
    return f"{100 * x.float().mean():.1f} ({100 * low:.1f}–{100 * high:.1f})"


def table(rows):
    """Rows, dicts of what stands in which column, as Markdown."""
    def cell(key, value):
        if torch.is_tensor(value):
            return with_interval(value)
        if isinstance(value, float):
            text = f"{100 * value:.1f}" if key.endswith("%") else f"{value:.3g}"
            return text.replace("nan", "–")                              # where nothing was seen
        return f"{value:,}" if isinstance(value, int) else str(value)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(key, row[key]) if key in row else "" for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(name, bench):
    """One experiment: its section of OUT/README.md is replaced, then printed."""
    began, device, bench.figures, bench.claims = time.time(), bench.unclip.device, [], []
    rows = EXPERIMENTS[name](bench)
    question, _, answer = inspect.getdoc(EXPERIMENTS[name]).partition("\n\n")
    typed = f"python evaluate.py --only {name} --seed {bench.seed}" + \
        (f" --n {bench.n}" if bench.n else "") + \
        (" --data-dir …" if bench.data_dir else "") + \
        (f" --weights {bench.weights}" if bench.weights != SHIPPED / "shapes" else "")
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{device.type}, {torch.get_num_threads()} threads"
    section = "\n\n".join([
        f"{name}: {question}", answer, table(rows), *bench.claims,
        *(f"![{file}]({file}.png)\n\n*{caption}*" for file, caption in bench.figures),
        f"`{typed}`: {(time.time() - began) / 60:.1f} minutes on {hardware}."]) + "\n"
    page = bench.out / "README.md"
    old = page.read_text(encoding="utf-8").split("\n## ")[1:] if page.exists() else []
    sections = {text.split(":")[0]: text for text in old} | {name: section}
    sections = {key: sections[key] for key in EXPERIMENTS if key in sections}
    claims = [f"| {line[2:]} | {key} |" for key, text in sections.items()
              for line in text.splitlines() if line.startswith("> ")]
    text = "\n## ".join(["\n".join([HEAD, *claims, ""]), *sections.values()])
    write_safely(page, lambda path: path.write_text(text, "utf-8", "backslashreplace"))
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
    add("--n", type=int, help="at most so many captions, or rounds of them, for a quick look; "
        "give another --out as well")
    add("--data-dir", help="where cifar10 (default: downloaded), coco or the folder is")
    args = parser.parse_args(argv)
    for name, least in ("n", 3), ("seed", 0):
        if getattr(args, name) is not None and not least <= getattr(args, name) < 2 ** 64:
            raise ValueError(f"--{name} {getattr(args, name)}: choose {least} or more, below 2^64")
    check_out(args.out)
    page = args.out / "README.md"
    with about(f"--out {page}:"):
        if page.exists() and not page.read_text("utf-8").startswith(HEAD[:HEAD.index(";")]):
            raise ValueError("not written by evaluate.py, and would be lost; choose another --out")
    device = find_device(args.device)
    with about("--weights"):
        unclip = UnCLIP.load(args.weights, device)
    data = unclip.clip.trained["data"]
    fit = [name for name in EXPERIMENTS if data in OTHERS.get(name, {"shapes"})
           and all(unclip.parts[part] for part in NEEDS[name])]
    with about(f"--weights {args.weights}:"):
        for part in NEEDS.get(args.only, []):
            unclip.part(part)                            # says what to train if it is not there
    if args.only and args.only not in fit:
        raise ValueError(f"--only {args.only}: {args.weights} learnt from {data}; choose "
                         f"{', '.join(fit) or 'other --weights'}")
    if not fit:
        raise ValueError(f"--weights {args.weights}: no experiment fits what is there; train more")
    bench = Bench(unclip, args.weights, args.out, args.seed, args.n, args.data_dir)
    with about("--weights"):
        bench.text_only                      # if it does not fit, an hour later would be too late
    for name in [args.only] if args.only else fit:
        run(name, bench)


def main(argv=None):
    """The command line; returns the exit status: 0 done, 2 a user's error, 130 stopped."""
    return run_command("evaluate.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
