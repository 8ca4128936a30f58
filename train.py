"""How unCLIP is learnt: one loop, and a table of stages.

    python train.py                              # every stage, on rendered shapes
    python train.py --stage prior                # one stage, on the CLIP that is there
    python train.py --data cifar10 --size base   # real pictures, for one GPU

CLIP is trained first, and then frozen. Priors and decoder learn on its embeddings, which are
computed once. A stage trains one part: "ar-prior" ar_prior, and "decoder" with --text-only
text_decoder. For each part, a run leaves in runs/<data>

    <part>.pt          its weights: an average over the last steps of training ("EMA")
    <part>.state.pt    all that a stopped run needs; the same command (not --restart) goes on
    <part>.csv         its losses
    <part>.png         pictures to watch: none of CLIP, of a prior only with a decoder of its CLIP

Next chapter: sample.py.
"""

import copy
import csv
import hashlib
import math
import os
import secrets
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

# Before torch is loaded: a thread that waits for others spins for about 0.1 ms, then sleeps.
# By default it spins for so long that two processes on the same cores starve each other.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from checkpoints import (ALL_PARTS, SHIPPED, Parser, about, check_clip, check_out, find_device,
                         load_part, misfit, read_torch, run_command, save_part, say, sound_weights,
                         write_torch)
from clip_tiny import Tokenizer, components_needed
from diffusion import Noise
from shapes import picture_grid, to_float, to_uint8, write_png
from unclip import UnCLIP


@dataclass
class Recipe:
    """How a stage is trained, unless flags say otherwise."""
    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0


RECIPES = {
    "small": {"clip": Recipe(3200, 128, 1e-3, 0.05), "prior": Recipe(2500, 64, 1e-3, 0.02),
              "ar-prior": Recipe(1900, 64, 1e-3, 0.02), "decoder": Recipe(7000, 16, 1e-3),
              "upsampler": Recipe(2600, 8, 1e-3)},
    "base": {"clip": Recipe(12000, 512, 1e-3, 0.1), "prior": Recipe(20000, 512, 5e-4, 0.02),
             "ar-prior": Recipe(20000, 512, 5e-4, 0.02), "decoder": Recipe(60000, 256, 4e-4),
             "upsampler": Recipe(30000, 16, 4e-4)}}

# What --size changes in the models, besides image_size (Run) and what the data decide (build).
SIZES = {
    "small": {"clip": {}, "prior": {}, "ar-prior": {}, "decoder": {}, "upsampler": {}},
    "base": {"clip": dict(patch=4, width=256, depth=6, dim=128), "prior": dict(width=256),
             "ar-prior": dict(width=256),
             "decoder": dict(channels=(64, 128, 192), blocks=(2, 2, 2), width=256, text_depth=6),
             "upsampler": dict(channels=(64, 128, 192), blocks=(1, 2, 2), width=256)}}

# GLIDE in miniature, from captions alone: evaluate.py compares it with unCLIP (sec. 5.3).
# Its sketch sees no z_i, so it needs no hidden layer.
TEXT_ONLY = dict(drop_z_i=1.0, drop_text=0.1, sketch_depth=0)

# The loss of each stage, on a batch b as Pairs.batch makes it, with random numbers by g.
STAGES = {
    "clip": lambda model, b, g: model.loss(b.x, b.tokens),
    "prior": lambda model, b, g: model.loss(b.z_i, b.z_t, b.tokens, g),
    "ar-prior": lambda model, b, g: model.loss(b.z_i, b.z_t, b.dot, b.tokens, g),
    "decoder": lambda model, b, g: model.loss(b.x, b.z_i, b.tokens, g),
    "upsampler": lambda model, b, g: model.loss(b.x, b.low, g)}

SAVE_SECONDS, LOG_ROWS, PROFILE_SECONDS = 180, 100, 20       # the last for each stage
LARGE_PICTURES = 4000                # for the upsampler, to which each gives many crops
VALIDATION_PICTURES, VALIDATION_DRAWS = 1000, 1024
AXES_PICTURES = 10_000               # on which CLIP's principal axes are fitted
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") \
    else math.inf                    # bytes of this machine


# ---- The loop ------------------------------------------------------------------------------------

def train(run):
    """Train one stage to its end, or until a signal stops it; True if it ended by itself."""
    with suppress(ValueError, OSError):                  # a part that is missing is made again
        if run.saved and run.saved["step"] == run.recipe.steps and load_part(run.files["pt"]):
            run.say(f"finished already: {run.files['pt']}; --restart begins anew")
            return True
    pairs, validation = load_pairs(run)
    model, r = build(run, pairs), run.recipe
    check_memory(run, model, pairs)
    state = State(run, model)                            # fresh, or as the last run left it
    if run.clip and run.clip_path.parent != run.folder:      # said once all checks have passed
        run.say(f"no clip.pt in {run.folder}, using {run.clip_path}")
    run.say(f"from step {state.step} to {r.steps}, {r.batch_size} pictures a step, on {run.device}")
    if not state.step and not run.args.restart and run.files["pt"].exists():
        run.say(f"{run.files['pt']} will be replaced: no state is there from which "
                f"this run could go on")
    saved_at, began = time.monotonic(), time.monotonic() - state.seconds
    often = 1 if sys.stderr.isatty() else 30             # seconds; in a file, twice a minute
    with open_log(run), signals_heeded() as stopped, tqdm(
            desc=run.stage, total=r.steps, initial=state.step, mininterval=often,
            maxinterval=30) as bar:
        with writing(run.folder):
            write_log(run.files["csv"], state.rows)
        if run.args.restart:                             # or it would pass for this run's state
            run.files["state.pt"].unlink(missing_ok=True)
            if run.args.stage == "all":                  # the upsampler's, too: it names no CLIP
                (run.folder / "upsampler.state.pt").unlink(missing_ok=True)
        while state.step < r.steps and not stopped:
            take_step(run, state, pairs)
            state.seconds = time.monotonic() - began
            with suppress(OSError):                      # as in say()
                bar.update()
            if state.step % math.ceil(r.steps / LOG_ROWS) == 0 or state.step == r.steps:
                report(run, state, validation, bar)
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save(run, state, pairs)
                saved_at = time.monotonic()
        done = state.step == r.steps
        if state.step:                                   # a state of step 0 has nothing to tell
            save(run, state, pairs)
    how = "; without --restart, this command goes on" if run.args.restart and not done else ""
    run.say(f"{'finished' if done else 'stopped'} at step {state.step} of {r.steps}, after "
            f"{state.seconds / 60:.1f} minutes of training: {run.files['pt']}{how}")
    return done and not stopped


def take_step(run, state, pairs):
    """One step of training. Nothing in it waits for the device.

    differs from the paper: gradients are clipped to norm 1; it reports no clipping."""
    batch = pairs.draw(run.recipe.batch_size, state.generator)
    with autocast(run.device):
        loss = STAGES[run.stage](state.model, batch, state.generator)
    state.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, run.recipe)
    state.optimizer.step()
    state.step += 1
    state.update_ema()
    state.sums += torch.stack([loss.detach(), norm])     # to read them now would stall a GPU


def check_memory(run, model, pairs):
    """Refuse a batch that is too large for the memory. What 8 and 16 pictures keep for the gradient
    is compared: an eighth of the difference is for one."""
    g, n = torch.Generator(run.device), run.recipe.batch_size
    have = torch.cuda.mem_get_info(run.device)[1] if run.device.type == "cuda" else MEMORY

    def kept(pictures):
        sizes = {}

        def keep(a):
            sizes[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
            return a
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a), autocast(run.device):
            loss = STAGES[run.stage](model, pairs.draw(pictures, g), g)      # holds what is kept
        return sum(sizes.values())
    need = (kept(16) - kept(8)) / 8 * n                  # weights are kept once, for any batch
    if need > have:
        raise ValueError(f"--batch-size {n}: needs {need / 1e9:,.1f} GB of memory, and there are "
                         f"{have / 1e9:,.1f}; choose {max(1, int(n * have / need))} or less")


def learning_rate(step, recipe):
    """The rate at a step: a linear warm-up, 2 % of the steps, then half a cosine to zero.

    differs from the paper: it reports no schedule."""
    warm_up = max(1, recipe.steps // 50)
    if step < warm_up:
        return recipe.lr * (step + 1) / warm_up
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))


def autocast(device):
    """bf16 on CUDA, where it is fast; float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def report(run, state, validation, bar):
    """A row of the log. Every tenth row, and the last, tells the averaged weights' error on
    validation data too, and comes with a new picture to watch."""
    check_finite(run, state)
    loss = state.sums[0].item() / (state.step - (state.rows[-1]["step"] if state.rows else 0))
    state.sums.zero_()
    row = {"step": state.step, "minutes": round(state.seconds / 60, 2),
           "lr": float(f"{learning_rate(state.step - 1, run.recipe):.3g}"), "loss": round(loss, 5)}
    if len(state.rows) % 10 == 9 or state.step == run.recipe.steps:
        row |= {name: round(value, 5) for name, value in validate(run, state.ema, validation)}
        with suppress(OSError):
            bar.write(f"{run.stage}: step {state.step}, {row['minutes']} min, loss {row['loss']}, "
                      f"validation {row['validation']}", file=sys.stderr)
        if (picture := picture_to_watch(run, state.ema, validation)) is not None:
            with writing(run.folder):
                write_png(run.files["png"], picture)
    state.rows.append(row)
    bar.set_postfix(loss=row["loss"], refresh=False)
    with writing(run.folder):
        write_log(run.files["csv"], state.rows)


@torch.no_grad()
def validate(run, ema, pairs):
    """Yields columns of the log, (name, value): the loss, with the same draws and noise each time.
    For a decoder, also 1,000 times the mean squared errors of x_0, at five t, and of the sketch,
    for each group of pictures."""
    g, n = torch.Generator(run.device).manual_seed(0), run.recipe.batch_size
    with autocast(run.device):
        losses = [STAGES[run.stage](ema, pairs.draw(n, g), g)
                  for _ in range(math.ceil(VALIDATION_DRAWS / n))]
        yield "validation", torch.stack(losses).mean().item()
        for name, i in pairs.groups.items() if run.stage == "decoder" else ():
            b = pairs.batch(i, pairs.text_of[i, 0], torch.zeros_like(i))
            for t in (100, 300, 500, 700, 900):
                g, ts = torch.Generator(run.device).manual_seed(t), torch.full_like(i, t)
                eps = torch.randn(b.x.shape, device=run.device, generator=g)
                x_t = ema.diffusion.q_sample(b.x, ts, eps)
                v = ema(x_t, ts, b.z_i, b.tokens).float()
                x_0, _ = ema.diffusion.x_0_and_eps(v, x_t, ts)
                yield f"{name}_{t}", 1000 * F.mse_loss(x_0, b.x).item()
            if not run.args.text_only:                   # its sketch is drawn without z_i
                yield f"{name}_sketch", 1000 * ema.sketch_error(b.x, b.z_i).item()


def picture_to_watch(run, model, pairs):
    """True pictures, and what the part makes of them: uint8 (3, H, W), or None."""
    true, rows, quickly = pairs.images[:8], range(len(pairs.images[:8])), dict(steps=16, eta=0.0)
    noise = Noise(0, rows, true.shape[1:], "watch", run.device)
    if run.stage == "upsampler":                     # small pictures: enlarged, and upsampled
        low = to_float(pairs.small[:8])
        drawn = [model.enlarge(low), model.sample(low, noise)]
    elif run.stage == "decoder":                     # drawn from z_i alone, or captions alone
        tokens = pairs.tokens[pairs.text_of[:8, 0]] if run.args.text_only else None
        drawn = [model.sample(run.clip.whiten(pairs.z_i[0, :8]), tokens, noise, **quickly)]
    elif run.clip and run.decoder:                   # drawn from their captions
        unclip = UnCLIP(run.clip, run.decoder, **{run.part: model})
        tokens = pairs.tokens[pairs.text_of[:8, 0]]
        z_i = unclip.draw_z_i(tokens, 0, rows, "ar" if run.part == "ar_prior" else "diffusion")
        drawn = [unclip.draw_x(z_i, tokens, 0, rows, **quickly)]
    else:
        return None
    return picture_grid(torch.cat([true, *map(to_uint8, drawn)]), columns=len(true))


# ---- Data and models -----------------------------------------------------------------------------

def load_pairs(run):
    """Training and validation data, on the device."""
    limit, learns_clip, enlarges = run.args.limit, run.stage == "clip", run.stage == "upsampler"
    if enlarges:
        limit = min(limit or LARGE_PICTURES, LARGE_PICTURES)

    def load(size):                                  # the few first: is a file missing?
        few = data.load(run.args.data, "validation", size, VALIDATION_PICTURES, run.args.data_dir)
        return data.load(run.args.data, "train", size, limit, run.args.data_dir), few
    sets = load(run.image_size * 4 if enlarges else run.image_size)
    tokenizer = run.clip and run.clip.tokenizer
    if learns_clip:
        most = dict(vocab=1024, context=64) if run.args.data == "shapes" else \
            dict(vocab=4096, context=77)             # other captions may have more words
        tokenizer = Tokenizer.learn([y for ys in sets[0].captions for y in ys], **most)
        if run.initial:                                # --init's weights know its tokens alone
            run.initial.tokenizer.words |= tokenizer.words
            tokenizer = run.initial.tokenizer
    smalls = load(run.image_size) if enlarges else [None, None]
    return [Pairs(d, tokenizer, run.clip, run.device, learns_clip and d is sets[0], small)
            for d, small in zip(sets, smalls)]


class Pairs:
    """Pictures with captions, on the device as a whole: a batch is an index.

    Captions repeat: the 240,000 of 60,000 renders are 52,370 different ones. So tokens and z_t are
    kept once for each, and text_of has the indices of a picture's captions. CLIP is frozen, so z_i
    and z_t are computed here, once. If pictures may be mirrored, z_i has two views.
    small: for the upsampler, the same pictures in the size in which the decoder learns them. Area
    means of the large ones would be cleaner than what the decoder draws. Raises ValueError if there
    are more of one size, since a picture could be read in that size only.
    """

    def __init__(self, dataset, tokenizer, clip, device, shift=False, small=None):
        self.tokenizer, self.clip = tokenizer, clip
        self.shift = shift and dataset.flips     # photographs and the like: more can't be made
        self.images, self.flips = dataset.images.to(device), dataset.flips         # (N, 3, H, W)
        if small and len(small) != len(dataset):
            raise ValueError("some pictures could be read in one of two sizes only: try it again")
        self.small = small and small.images.to(device)                     # (N, 3, H/4, W/4)
        self.texts = sorted({y for ys in dataset.captions for y in ys})
        place, most = {y: k for k, y in enumerate(self.texts)}, max(map(len, dataset.captions))
        self.how_many = torch.tensor([len(ys) for ys in dataset.captions], device=device)   # (N,)
        self.text_of = torch.tensor([[place[y] for y in ys] + [0] * (most - len(ys))
                                     for ys in dataset.captions], device=device)   # (N, most)
        self.tokens = tokenizer and tokenizer(self.texts, truncate=True).to(device)    # (texts, L)
        if clip:
            self.z_i, self.z_t = self.embeddings()                 # (views, N, D), (texts, D)
        # For `validate`: the first 64 pictures of one solid, and of two; of any if that is unknown.
        solids = dataset.labels.get("count", torch.zeros(len(dataset)))
        self.groups = {name: (solids == k).nonzero()[:64, 0].to(device)
                       for k, name in enumerate(("all", "one", "two")) if (solids == k).any()}

    @torch.no_grad()
    def embeddings(self):
        """z_i and z_t of all, from the cache or computed now. The cache file's name is a hash of
        all that they depend on: CLIP's weights, the pictures and the tokens."""
        views, D = [self.images, self.images.flip(3)][:1 + self.flips], self.clip.config.dim
        digest = hashlib.sha256()
        for tensor in [self.images, self.tokens, *self.clip.state_dict().values()]:
            digest.update(tensor.cpu().contiguous().numpy())
        name = f"embeddings-v3-{digest.hexdigest()[:20]}.pt"
        kept = data.read_cache(name, {"z_i": torch.empty(len(views), len(self.images), D),
                                      "z_t": torch.empty(len(self.texts), D)})
        if kept is None:
            z_t = [self.clip.encode_text(y) for y in self.tokens.split(500)]
            kept = {"z_i": torch.stack([embed_images(self.clip, view) for view in views]).cpu(),
                    "z_t": torch.cat(z_t).cpu()}
            data.write_cache(name, kept)
        return (kept[key].to(self.images.device) for key in ("z_i", "z_t"))

    def draw(self, n, generator):
        """n random pictures, each with one of its captions, mirrored or not → a batch (below)."""
        device = self.images.device
        i = torch.randint(len(self.images), (n,), device=device, generator=generator)
        u = torch.rand(2, n, device=device, generator=generator)
        text = self.text_of[i, (u[0] * self.how_many[i]).long()]
        b = self.batch(i, text, ((u[1] < 0.5) & self.flips).long())
        if self.shift:
            b.x = shifted(b.x, generator)
        return b

    def batch(self, i, text, mirrored):
        """Pictures i with the captions `text`, mirrored where that is 1, all (n,) → an object with
        x (n, 3, H, W), tokens (n, L), z_i (n, D) whitened, z_t (n, D), and dot (n,) = z_i·z_t.
        For the upsampler low (n, 3, H/4, W/4), the same pictures small."""
        def pictures(images):
            x = to_float(images[i])
            return torch.where(mirrored[:, None, None, None] > 0, x.flip(3), x) if self.flips else x
        b = SimpleNamespace(x=pictures(self.images))
        if self.small is not None:
            b.low = pictures(self.small)
        if self.tokenizer:
            b.tokens = self.tokens[text]
        if self.clip:
            z_i, b.z_t = self.z_i[mirrored, i], self.z_t[text]
            b.z_i, b.dot = self.clip.whiten(z_i), (z_i * b.z_t).sum(-1)
        return b


@torch.no_grad()
def embed_images(clip, images):
    """uint8 (N, 3, H, W) → z_i (N, D)."""
    return torch.cat([clip.encode_image(to_float(x)) for x in images.split(500)])


def shifted(x, generator, most=4):
    """Every picture moved by up to `most` pixels, its border repeated: in place of CLIP's crops."""
    B, _, H, W = x.shape
    places = F.pad(x, [most] * 4, mode="replicate").unfold(2, H, 1).unfold(3, W, 1)
    top, left = torch.randint(2 * most + 1, (2, B), device=x.device, generator=generator)
    return places[torch.arange(B, device=x.device), :, top, left]


def build(run, pairs):
    """The part before its first step, with random weights (--seed) or those of --init. The buckets
    of a random AR prior are fitted to these pairs."""
    (kind, config), options = ALL_PARTS[run.part], dict(SIZES[run.args.size][run.stage])
    if run.stage in ("clip", "decoder", "upsampler"):
        options["image_size"] = run.image_size
    if run.stage != "upsampler":
        options |= {"vocab": pairs.tokenizer.vocab, "context": pairs.tokenizer.context}
    if run.clip:
        options["dim"] = run.clip.config.dim
    if run.args.text_only:
        options |= TEXT_ONLY
    if run.stage == "ar-prior":
        z_i = pairs.z_i.flatten(0, 1)                                        # (views·N, D)
        if run.initial:
            options |= {key: getattr(run.initial.config, key) for key in ("components", "buckets")}
        else:                                        # no more buckets than there are values
            options |= {"components": components_needed(run.clip.whiten(z_i).var(0, correction=0)),
                        "buckets": min(options.get("buckets", config.buckets), len(z_i))}
        run.say(f"writes {options['components']} axes of whitened z_i")
    torch.manual_seed(run.args.seed)
    model = kind(config(**options)).to(run.device, memory_format=torch.channels_last)
    model.tokenizer = pairs.tokenizer
    model.clip_id = secrets.token_hex(8) if run.stage == "clip" else run.clip and run.clip.clip_id
    if run.initial:
        try:
            model.load_state_dict(run.initial.state_dict())
        except RuntimeError as error:
            raise ValueError(f"--init {run.args.init}: its {run.part} does not fit --size "
                             f"{run.args.size} ({str(error).splitlines()[-1].strip()})") from None
    elif run.stage == "ar-prior":
        z_t = pairs.z_t[pairs.text_of[:, 0]].repeat(len(pairs.z_i), 1)
        model.fit(run.clip.whiten(z_i), (z_i * z_t).sum(-1))
    return model.train()


# ---- A run and its files -------------------------------------------------------------------------

class Run:
    """One stage's settings and files. What can be checked without the data is checked when one is
    made."""

    def __init__(self, stage, args):
        self.stage, self.args = stage, args
        self.part = "text_decoder" if args.text_only else stage.replace("-", "_")
        self.device, self.folder = find_device(args.device), Path(args.out or f"runs/{args.data}")
        typed = {name: getattr(args, name) for name in ("steps", "batch_size", "lr")}
        self.recipe = replace(RECIPES[args.size][stage], **{k: v for k, v in typed.items() if v})
        self.image_size = 32 if args.size == "small" or args.data == "cifar10" else 64
        self.files = {kind: self.folder / f"{self.part}.{kind}"
                      for kind in ("pt", "state.pt", "csv", "png")}
        check_out(self.folder)
        if args.init and Path(args.init).resolve() == self.folder.resolve():
            raise ValueError(f"--init {args.init}: its weights would be replaced on the way; "
                             f"choose another --out")
        if self.files["csv"].exists():
            open_log(self).close()                     # is another run at work?
        with about("--init"):
            self.initial = args.init and load_part(Path(args.init) / f"{self.part}.pt", self.device)
        self.clip = self.decoder = None
        if stage == "clip":
            self.check_neighbours()
        elif stage != "upsampler":
            self.clip = self.load_clip()
        if stage in ("prior", "ar-prior") and (path := self.find("decoder")):
            with suppress(ValueError, OSError):        # without a decoder that fits: no picture
                decoder = load_part(path, self.device)
                self.decoder = None if misfit(decoder, self.clip) else decoder
        if self.initial and self.clip:
            check_clip(self.initial, self.clip, f"--init {args.init}")
        flags = ("data", "data_dir", "limit", "size", "seed", "init")
        self.identity = {"stage": stage, "clip": self.clip and self.clip.clip_id,
                         **{name: getattr(args, name) for name in flags}, **asdict(self.recipe)}
        self.saved = self.load_state()

    def say(self, text):
        say(f"{self.stage}: {text}")

    def find(self, part):
        """Where a trained part lies: in this run's folder, in --init's, or shipped; or None."""
        folders = (self.folder, self.args.init, SHIPPED / self.args.data)
        paths = [Path(folder) / f"{part}.pt" for folder in folders if folder]
        return next((path for path in paths if path.exists()), None)

    def load_clip(self):
        a, path = self.args, self.find("clip")
        out = "ANOTHER" if path and path.parent == self.folder else self.folder      # keep that one
        remedy = f"python train.py --stage clip --data {a.data} --size {a.size} --out {out}"
        remedy += f" --data-dir {a.data_dir}" if a.data_dir else ""
        if path is None:
            raise FileNotFoundError(f"--out {self.folder}: it has no clip.pt; {remedy} makes it")
        clip, self.clip_path = load_part(path, self.device), path
        if clip.config.image_size != self.image_size:
            raise ValueError(f"{path}: sees {clip.config.image_size} pixels a side, and --size "
                             f"{self.args.size} has {self.image_size}; {remedy} makes one")
        return clip

    def check_neighbours(self):
        """Refuse a new CLIP beside parts that belong to another one: they would be of no use then,
        and --stage all would replace them."""
        if not self.args.restart and not self.files["state.pt"].exists():
            for part in ("prior", "ar_prior", "decoder", "text_decoder"):
                if (self.folder / f"{part}.pt").exists():
                    raise ValueError(f"--out {self.folder}: its {part}.pt would belong to another "
                                     f"CLIP; choose another folder, or --restart to give it up")

    def load_state(self):
        """The saved state to go on from, or None. Raises ValueError if it is damaged, or if its run
        had another identity."""
        path = self.files["state.pt"]
        if self.args.restart or not path.exists():
            return None
        try:
            saved = read_torch(path)
            before = dict(saved.pop("identity"))
            assert type(saved["step"]) is int
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
            raise ValueError(f"{path}: not a whole training state; --restart begins anew") from None
        if self.args.stage == "all" and before.get("clip") != self.identity["clip"]:
            return None                    # CLIP was trained anew here, so its parts are as well
        changed = [f"{name} was {before.get(name)}, now {now}"
                   for name, now in self.identity.items() if repr(before.get(name)) != repr(now)]
        if changed:
            raise ValueError(f"{path}: a run of another configuration ({'; '.join(changed)}); give "
                             f"the same to go on, or --stage {self.stage} --restart to begin anew")
        return saved


class State:
    """All that training changes: fresh, or as it was saved. Random numbers come from `generator`,
    the learning rate from `step`. So on the same CPU a stopped run goes on, bit for bit; on a GPU,
    some sums may be taken in another order."""

    def __init__(self, run, model):
        r = run.recipe
        self.model, self.ema = model, copy.deepcopy(model).eval().requires_grad_(False)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]          # biases, norms: no decay
        # differs from the paper: β₂ is 0.99 for all, there 0.91 to 0.999. Runs are short here.
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], r.lr, (0.9, 0.99),
            weight_decay=r.weight_decay, fused=True)
        self.generator = torch.Generator(run.device).manual_seed(run.args.seed)
        self.step, self.seconds, self.rows = 0, 0.0, []          # rows: of the log
        self.sums = torch.zeros(2, device=run.device)            # since the last row: loss, norm
        if run.saved:
            try:
                self.load(run.saved, r.steps)
            except Exception as error:       # whatever a damaged file holds, the answer is the same
                reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
                raise ValueError(f"{run.files['state.pt']}: damaged, or of other captions or "
                                 f"another device ({reason}); --restart begins anew") from None

    def update_ema(self):
        """Average the weights, for the most part over the last ninth of the steps so far.

        differs from the paper: its average forgets at a constant rate. In a short run that would
        keep the random first weights, or average over few steps at the end."""
        weights = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.ema.parameters()), weights, 9 / (10 + self.step))

    def dump(self):
        """All of it as a dict of numbers, strings and tensors."""
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict()["state"], "sums": self.sums,
                "generator": self.generator.get_state(), "clip_id": self.model.clip_id,
                "tokenizer": self.model.tokenizer and self.model.tokenizer.state(),
                "step": self.step, "seconds": self.seconds, "rows": self.rows}

    def load(self, saved, steps):
        """The inverse of `dump`. Raises some exception if `saved` was not dumped by such a run."""
        s = SimpleNamespace(**saved)
        assert s.tokenizer == self.dump()["tokenizer"], "its captions were others"
        assert 0 < s.step <= steps, f"its step is {s.step}"
        numbers = [s.seconds, *(n for row in s.rows for n in row.values())]
        assert all(type(n) in (int, float) for n in numbers) and s.seconds >= 0 and \
            type(s.rows) is list and all(r["step"] <= s.step for r in s.rows), "its log is wrong"
        assert type(s.clip_id) is type(self.model.clip_id), f"its clip_id is {s.clip_id!r}"
        self.model.load_state_dict(sound_weights(s.model))
        self.ema.load_state_dict(sound_weights(s.ema))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": s.optimizer, "param_groups": groups})
        for p in self.model.parameters():
            moments = sound_weights(self.optimizer.state[p]).values()
            assert [m.shape for m in moments] == [(), p.shape, p.shape], "a moment is missing"
        self.sums.copy_(sound_weights({"sums": s.sums})["sums"])
        self.generator.set_state(s.generator)
        self.step, self.seconds, self.rows = s.step, s.seconds, s.rows
        self.model.clip_id = self.ema.clip_id = s.clip_id


def save(run, state, pairs):
    """Write the part, then the state, so that there is never a state without its part."""
    check_finite(run, state)
    part = copy.deepcopy(state.ema)
    if run.stage == "clip":       # a part trained on this copy will not fit a later copy
        part.clip_id += f"-{state.step}"
        part.fit_axes(embed_images(part, pairs.images[:AXES_PICTURES]))
    args = {name: getattr(run.args, name) for name in ("data", "size", "limit", "seed")}
    trained = {**args, "steps": state.step, "batch_size": run.recipe.batch_size,
               "minutes": round(state.seconds / 60, 1), "device": run.device.type,
               "init": run.initial and run.initial.trained}
    with writing(run.folder):
        save_part(run.files["pt"], run.part, part, trained)
        write_torch(run.files["state.pt"], {"identity": run.identity, **state.dump()})


def check_finite(run, state):
    """Raises ValueError if a loss or gradient is not finite, so that good weights are kept."""
    if not state.sums.isfinite().all():
        raise ValueError(f"{run.stage}: at step {state.step} the loss or its gradient is no finite "
                         f"number any more; what was saved in {run.folder} stays; begin anew with "
                         f"--restart and an --lr below {run.recipe.lr}")


@contextmanager
def writing(folder):
    """A disk that is full, or can't be written any more, ends the run in one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:             # torch raises the second for a full disk
        reason = error if isinstance(error, OSError) else "is the disk full?"
        raise OSError(f"--out {folder}: can't be written ({reason}); what was saved there is "
                      f"whole, so make room and go on, or choose another folder") from None


def open_log(run):
    """The part's CSV file, opened, and locked, so that no other run trains this part here. The
    system takes the lock away when the file is closed or the process dies."""
    with writing(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        log = open(run.files["csv"], "a")
    try:
        import fcntl
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in run.folder.glob(f"{run.part}.*.tmp"):        # by a run that died as it wrote
            left.unlink()
    except BlockingIOError:
        raise ValueError(f"{log.name}: another run trains this part; wait for it, or choose another"
                         f" --out") from None
    except (ImportError, OSError):                     # Windows, and some disks, have no such locks
        pass
    return log


def write_log(path, rows):
    """The whole log anew: a run that was killed leaves rows that its state does not have."""
    columns = ["step", "minutes", "lr", "loss", "validation", *(k for row in rows for k in row)]
    with open(path, "w", newline="", encoding="utf-8") as file:      # closed here: errors come now
        writer = csv.DictWriter(file, dict.fromkeys(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def signals_heeded():
    """Ctrl-C and SIGTERM end the loop after the step in hand, so that the state can be saved.
    Yields a list, which they fill."""
    heard = []
    before = {number: signal.signal(number, lambda *_: heard.append(True))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- The speed -----------------------------------------------------------------------------------

def profile(run):
    """How fast a stage trains on this machine, and where its time goes: a row of a table. Nothing
    is saved, but that renders and embeddings stay in the cache."""
    (pairs, _), r, b = load_pairs(run), run.recipe, SimpleNamespace()
    state = State(run, build(run, pairs))
    check_memory(run, state.model, pairs)

    def forward():
        with autocast(run.device):
            b.loss = STAGES[run.stage](state.model, b.batch, state.generator)
    phases = {"data": lambda: vars(b).update(batch=pairs.draw(r.batch_size, state.generator)),
             "forward": forward,
             "backward": lambda: (state.optimizer.zero_grad(), b.loss.backward(),
                                  torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)),
             "optimizer": state.optimizer.step, "EMA": state.update_ema}
    with FlopCounterMode(display=False) as counter:
        for phase in phases.values():                    # the first step is slower, and not timed
            phase()
    spent, steps = dict.fromkeys(phases, 0.0), 0
    while steps < 3 or sum(spent.values()) < PROFILE_SECONDS:
        for name, phase in phases.items():
            spent[name] += timed(phase, run.device)
        steps += 1
    total = sum(spent.values())
    gflops = counter.get_total_flops() / 1e9 * steps / total
    return {"stage": run.stage, "pictures/s": f"{r.batch_size * steps / total:,.0f}",
            "GFLOP/s": f"{gflops:,.0f}",
            **{f"of {name}": f"{gflops / rate:.0%}" for name, rate in rates(run.device).items()},
            **{name: f"{time / total:.0%}" for name, time in spent.items()}}


def timed(f, device):
    """Seconds that f() takes, to the end of what it starts on the device."""
    began = time.perf_counter()
    f()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began


def rates(device):
    """GFLOP/s of this machine in matrix products and in 3×3 convolutions, forward and back."""
    n, N = (8192, 1024) if device.type == "cuda" else (1024, 16)     # a GPU needs much to do
    a = torch.randn(n, n, device=device, requires_grad=True)
    x = torch.randn(N, 64, 32, 32, device=device, requires_grad=True)
    conv = torch.nn.Conv2d(64, 64, 3, padding=1, device=device)
    work = {"products": (lambda: (a @ a).sum().backward(), 3 * 2 * n ** 3),
            "convolutions": (lambda: conv(x).sum().backward(), 3 * 2 * 9 * 64 * 64 * N * 32 ** 2)}
    with autocast(device):
        return {name: flop / 1e9 / min(timed(f, device) for _ in range(8))
                for name, (f, flop) in work.items()}


# ---- The command ---------------------------------------------------------------------------------

def parse(argv):
    parser = Parser(prog="train.py", description="Train unCLIP, or one part of it.")
    add = parser.add_argument
    add("--stage", default="all", choices=["all", *STAGES], help="default: %(default)s")
    add("--data", default="shapes", choices=data.DATASETS, help="default: %(default)s")
    add("--data-dir", help="where cifar10 (default: downloaded), coco or the folder is")
    add("--limit", type=int, help="how many training pictures (default: all; shapes: 60000, signs: "
        f"30000); the upsampler takes at most {LARGE_PICTURES}")
    add("--size", default="small", choices=SIZES, help="base: for a GPU (default: small)")
    add("--steps", type=int, help="default: the stage's recipe")
    add("--batch-size", type=int, help="pictures a step (default: the stage's recipe)")
    add("--lr", type=float, help="peak learning rate (default: the stage's recipe)")
    add("--seed", type=int, default=0, help="of first weights, batches and noise (default: 0)")
    add("--out", help="folder of the run (default: runs/<data>)")
    add("--init", help="folder of weights to begin with")
    add("--text-only", action="store_true", help="with --stage decoder: one of captions alone, to "
        "compare with")
    add("--restart", action="store_true", help="begin anew where a run was stopped or finished")
    add("--profile", action="store_true", help="train each stage for 20 seconds, say how fast "
        "that was, and save no weights; all but clip and upsampler need a clip.pt")
    args = parser.parse_args(argv)
    args.restart |= args.profile                             # a profile begins with no saved state
    return args


def check(args):
    """Refuse what the flags alone show to be wrong."""
    fewest = 2 if args.stage in ("all", "clip") else 1       # CLIP learns by comparing pairs
    for name, least, most in (("steps", 1, 10**9), ("batch_size", fewest, 10**6), ("lr", 1e-12, 1),
                              ("limit", 1, 10**9), ("seed", 0, 2**64 - 1)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:              # true of nan, too
            raise ValueError(f"--{name.replace('_', '-')} {value}: choose {least} to {most}")
    for name in "init", "out", "data_dir":                            # a shell's $UNSET, say
        if getattr(args, name) == "":
            raise ValueError(f"--{name.replace('_', '-')}: empty; name a folder, or leave it out")
    if args.text_only and args.stage != "decoder":
        raise ValueError(f"--text-only: is for --stage decoder, not {args.stage}")
    if args.data_dir and args.data in ("shapes", "signs"):
        raise ValueError(f"--data-dir {args.data_dir}: leave it out, --data {args.data} needs none")
    if args.init and args.stage == "all":
        raise ValueError(f"--init {args.init}: its parts belong to its own CLIP, not to a new one; "
                         f"choose one --stage")
    if args.init and not Path(args.init).is_dir():
        raise ValueError(f"--init {args.init}: no such folder of weights")


def command(argv):
    args = parse(argv)
    check(args)
    torch.set_float32_matmul_precision("high")                               # TF32 on a GPU
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage == "upsampler" and args.data == "cifar10":
            say("upsampler: left out, CIFAR-10 has no larger originals")
        elif args.profile:
            row = profile(Run(stage, args))
            head = [row, ["---"] * len(row)] if stage in ("clip", args.stage) else []
            for line in (*head, row.values()):
                print(f"| {' | '.join(line)} |", flush=True)
        elif not train(Run(stage, args)):
            return 130


def main(argv=None):
    """The command line; returns the exit status: 0 done, 2 a user's error, 130 stopped."""
    return run_command("train.py", command, argv)


if __name__ == "__main__":
    sys.exit(main())
