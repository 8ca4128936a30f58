"""How unCLIP is learnt: one loop, a table of stages.

    python train.py                              # every stage, on rendered shapes
    python train.py --stage prior                # one stage, on the CLIP that is there
    python train.py --data cifar10 --size base   # on real pictures, for one GPU

CLIP comes first and stays frozen; priors and decoder learn on its embeddings, computed once.
Losses go to runs/<data>/<part>.csv, pictures to watch to runs/<data>/<part>.png, and the weights
(an average over the run's last steps, "EMA") to runs/<data>/<part>.pt. A run that is stopped goes
on from runs/<data>/<part>.state.pt by the same command. Next chapter: sample.py.
"""

import argparse
import copy
import csv
import math
import secrets
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from clip_tiny import CLIP, CLIPConfig, Tokenizer, principal
from decoder import Decoder, DecoderConfig, Upsampler, UpsamplerConfig
from diffusion import Noise
from prior import ARPrior, ARPriorConfig, DiffusionPrior, DiffusionPriorConfig, PCATokens
from unclip import (PARTS, SHIPPED, UnCLIP, check_clip, load_part, read_torch, save_part,
                    write_torch)

SAVE_SECONDS = 180
SKETCHES = 4                                 # pictures the decoder sketches for one it denoises
UPSAMPLER_IMAGES = 3000                      # large renders cost time; every crop is a new picture
VALIDATION_IMAGES = 1000


@dataclass
class Recipe:
    """How a stage is trained, unless flags say otherwise."""
    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    beta2: float = 0.99                      # short runs: the second moment must keep up
    ema: float = 0.999


RECIPES = {
    "small": {"clip": Recipe(3200, 128, 1e-3, 0.05), "prior": Recipe(2500, 64, 1e-3, 0.02),
              "ar-prior": Recipe(1900, 64, 1e-3, 0.02), "decoder": Recipe(7000, 16, 1e-3),
              "upsampler": Recipe(3500, 16, 1e-3)},
    "base": {"clip": Recipe(12000, 512, 1e-3, 0.1), "prior": Recipe(20000, 512, 5e-4, 0.02),
             "ar-prior": Recipe(20000, 512, 5e-4, 0.02), "decoder": Recipe(60000, 256, 4e-4),
             "upsampler": Recipe(30000, 64, 4e-4)}}

# What --size changes in the models; everything else keeps its default.
SIZES = {
    "small": {stage: {} for stage in RECIPES["small"]},
    "base": {"clip": dict(patch=4, stem=64, width=256, depth=6, text_width=192, text_depth=3,
                          dim=128),
             "prior": dict(width=256), "ar-prior": dict(width=256),
             "decoder": dict(channels=(64, 128, 192), blocks=(2, 2, 2), emb_width=256),
             "upsampler": dict(channels=(64, 128, 192), blocks=(1, 2, 2), emb_width=256)}}

# What the tokenizer may learn: real captions have more words, and more of them.
TEXT = {"shapes": dict(vocab=1024, context=64), "real": dict(vocab=4096, context=77)}

WATCH = {"shapes": ["a red cube", "a small yellow sphere", "a large green cone", "a blue cylinder",
                    "a red cube on top of a blue cube", "a green sphere left of a purple cone"]}


# ---- Data on the device --------------------------------------------------------------------------

class Pairs:
    """A data set put on the device whole: a batch is an index.

    Captions repeat (20,000 pictures have far fewer different ones), so tokens and z_t are kept once
    for each, and a picture keeps the indices of its own.
    """

    def __init__(self, dataset, tokenizer, device):
        texts = sorted({caption for captions in dataset.captions for caption in captions})
        row = {text: k for k, text in enumerate(texts)}
        most = max(len(captions) for captions in dataset.captions)
        self.count = torch.tensor([len(captions) for captions in dataset.captions], device=device)
        self.row = torch.tensor([[row[c] for c in captions] + [0] * (most - len(captions))
                                 for captions in dataset.captions], device=device)
        self.texts, self.tokens = texts, tokenizer(texts, truncate=True).to(device)  # (texts, L)
        self.images, self.flips = dataset.images.to(device), dataset.flips   # (N, 3, H, W) uint8
        self.device = device

    @torch.no_grad()
    def embed(self, clip, batch=500):
        """Compute z_i (views, N, D), of mirrored pictures too where these may be, and z_t, once."""
        assert not clip.training
        views = [self.images, self.images.flip(3)] if self.flips else [self.images]
        self.z_i = torch.stack([torch.cat([clip.encode_image(data.to_float(x))
                                           for x in view.split(batch)]) for view in views])
        self.z_t = torch.cat([clip.encode_text(y) for y in self.tokens.split(batch)])
        return self

    def draw(self, n, generator):
        """n random items, a random caption and mirroring for each: (indices, rows, mirrored)."""
        i = torch.randint(len(self.images), (n,), device=self.device, generator=generator)
        u = torch.rand(2, n, device=self.device, generator=generator)
        row = self.row[i, (u[0] * self.count[i]).long()]
        return i, row, (u[1] < 0.5) & self.flips

    def pictures(self, i, mirrored):
        """Float pictures (n, 3, H, W) in [-1, 1]."""
        x = data.to_float(self.images[i])
        return torch.where(mirrored[:, None, None, None], x.flip(3), x) if self.flips else x


def shifted(x, generator, most=4):
    """Every picture moved by up to `most` pixels, its border repeated (CLIP's light crops)."""
    B, _, H, W = x.shape
    dy, dx = torch.randint(-most, most + 1, (2, B, 1), device=x.device, generator=generator)
    rows = (torch.arange(H, device=x.device) + dy).clamp(0, H - 1)
    columns = (torch.arange(W, device=x.device) + dx).clamp(0, W - 1)
    item = torch.arange(B, device=x.device)[:, None, None]
    return x[item, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


# ---- The stages ----------------------------------------------------------------------------------
# A stage has a model, data for training and validation, a loss on n random items of either, and
# mostly a picture to watch.

class ClipStage:
    def __init__(self, run):
        sets = run.load_data()
        captions = [caption for captions in sets[0].captions for caption in captions]
        tokenizer = Tokenizer.learn(captions, **run.text)
        if run.given:                                # its weights know the tokens of its own
            tokenizer, learnt = run.given.tokenizer, tokenizer
            tokenizer.words |= learnt.words
        self.model = CLIP(CLIPConfig(run.image_size, vocab=tokenizer.vocab,
                                     context=tokenizer.context, **run.sizes))
        self.model.tokenizer, self.model.clip_id = tokenizer, secrets.token_hex(8)
        self.data = [Pairs(d, tokenizer, run.device) for d in sets]

    def loss(self, model, pairs, n, generator):
        i, row, mirrored = pairs.draw(n, generator)
        x = pairs.pictures(i, mirrored)
        if pairs.flips and model.training:
            x = shifted(x, generator)
        return model.loss(x, pairs.tokens[row])

    def watch(self, model):
        return None


class EmbeddedStage:
    """What the stages on a frozen CLIP share: pairs with their z_i and z_t."""

    def __init__(self, run):
        self.run, self.clip, self.c = run, run.clip, run.clip.config
        self.data = [Pairs(d, self.clip.tokenizer, run.device).embed(self.clip)
                     for d in run.load_data()]


class PriorStage(EmbeddedStage):
    kind = "diffusion"

    def __init__(self, run):
        super().__init__(run)
        self.model = self.make(self.data[0])

    def make(self, pairs):
        c = self.c
        config = DiffusionPriorConfig(c.dim, c.vocab, c.context, **self.run.sizes)
        model = DiffusionPrior(config).to(self.run.device)
        model.whitening.fit(pairs.z_i.flatten(0, 1))
        return model

    def loss(self, model, pairs, n, generator):
        i, row, mirrored = pairs.draw(n, generator)
        z_i = pairs.z_i[mirrored.long(), i]
        return model.loss(z_i, pairs.z_t[row], pairs.tokens[row], generator)

    def watch(self, model):
        """Two pictures of each watched prompt, if there is a decoder to draw them."""
        decoder = self.run.find("decoder", self.clip)
        if decoder is None:
            return None
        unclip = UnCLIP(self.clip, decoder, **{"ar_prior" if self.kind == "ar" else "prior": model})
        texts = sorted(self.data[1].texts, key=len)[:6]          # cut, should all be too long
        prompts = WATCH.get(self.run.args.data) or \
            [text.encode()[:self.c.context - 3].decode(errors="ignore") for text in texts]
        x = unclip.generate(prompts, 2, prior=self.kind, upsample=False)
        return data.grid(data.to_uint8(x).cpu(), columns=4)


class ARPriorStage(PriorStage):
    kind = "ar"

    def make(self, pairs):
        run, c, z_i = self.run, self.c, pairs.z_i.flatten(0, 1)
        _, _, eigenvalues = principal(z_i)
        k = PCATokens.components_needed(eigenvalues)
        kept = (eigenvalues[:k].sum() / eigenvalues.sum()).item()
        run.say(f"PCA: {k} of {c.dim} components explain {100 * kept:.2f} % of the variance of z_i")
        config = ARPriorConfig(c.dim, c.vocab, c.context, k, **run.sizes)
        z_t = pairs.z_t[pairs.row[:, 0]].repeat(len(pairs.z_i), 1)
        return ARPrior(config).to(run.device).fit(z_i, z_t)


class DecoderStage(EmbeddedStage):
    def __init__(self, run):
        super().__init__(run)
        c = self.c
        sizes = {"text_width": c.text_width, "text_depth": c.text_depth, **run.sizes}
        self.model = Decoder(DecoderConfig(c.dim, c.vocab, c.context, run.image_size, **sizes))
        # differs from the paper, where it learns to read anew: it begins as a copy of CLIP's.
        self.model.text.load_state_dict(self.clip.text.state_dict())
        self.model.whitening.fit(self.data[0].z_i.flatten(0, 1))

    def loss(self, model, pairs, n, generator):
        i, row, mirrored = pairs.draw(SKETCHES * n, generator)
        given = pairs.pictures(i, mirrored), pairs.z_i[mirrored.long(), i], pairs.tokens[row]
        loss = model.loss(*(a[:n] for a in given), generator)
        return loss + model.sketch_loss(*given, generator)

    def watch(self, model):
        """Eight validation pictures; below, what the decoder makes of their z_i alone."""
        pairs = self.data[1]
        true = pairs.images[:8]
        noise = Noise(0, range(len(true)), true.shape[1:], "decoder", true.device)
        x = model.sample(pairs.z_i[0, :8], None, noise)
        return data.grid(torch.cat([true, data.to_uint8(x)]).cpu(), columns=len(true))


class UpsamplerStage:
    def __init__(self, run):
        self.model = Upsampler(UpsamplerConfig(**run.sizes))
        self.model.clip_id = None                            # it has no use for CLIP
        sets = run.load_data(run.image_size * self.model.config.factor)
        self.data = [d.images.to(run.device) for d in sets]

    def loss(self, model, images, n, generator):
        i = torch.randint(len(images), (n,), device=images.device, generator=generator)
        return model.loss(data.to_float(images[i]), generator)

    def watch(self, model):
        """Small pictures blurred and enlarged, by the upsampler, and the true large ones."""
        x = data.to_float(self.data[1][:4])
        low = F.avg_pool2d(x, model.config.factor)
        high = model.sample(low, Noise(0, range(len(x)), x.shape[1:], "upsampler 0", x.device))
        rows = torch.cat([model.enlarge(low), high, x])
        return data.grid(data.to_uint8(rows).cpu(), columns=len(x))


STAGES = {"clip": ClipStage, "prior": PriorStage, "ar-prior": ARPriorStage, "decoder": DecoderStage,
          "upsampler": UpsamplerStage}


# ---- A run ---------------------------------------------------------------------------------------

class Run:
    """One stage's settings, data and files."""

    def __init__(self, stage, args):
        self.stage, self.args, self.part = stage, args, stage.replace("-", "_")
        self.device = torch.device(args.device)
        self.folder = Path(args.out or f"runs/{args.data}")
        self.sizes = SIZES[args.size][stage]
        flags = {name: getattr(args, name) for name in ("steps", "batch_size", "lr")}
        self.recipe = replace(RECIPES[args.size][stage], **{k: v for k, v in flags.items() if v})
        self.image_size = 32 if args.size == "small" or args.data == "cifar10" else 64
        self.text = TEXT["shapes" if args.data == "shapes" else "real"]
        self.files = {kind: self.folder / f"{self.part}.{kind}"
                      for kind in ("pt", "state.pt", "csv", "png")}
        self.clip = None if stage in ("clip", "upsampler") else self.find("clip")
        if self.clip and self.clip.config.image_size != self.image_size:
            raise ValueError(f"CLIP sees {self.clip.config.image_size} pixels a side, --size "
                             f"{args.size} has {self.image_size}; python train.py --stage clip "
                             f"--data {args.data} --size {args.size} makes one that fits")
        self.given = self.load_given() if args.init else None

    def say(self, text):
        print(f"{self.stage}: {text}", file=sys.stderr)

    def load_data(self, size=None):
        """Training and validation set, pictures of size × size (default: the decoder's)."""
        options = dict(size=size or self.image_size, data_dir=self.args.data_dir)
        limit = self.args.limit
        if size and self.args.data == "shapes":
            limit = min(limit or UPSAMPLER_IMAGES, UPSAMPLER_IMAGES)
        return (data.load(self.args.data, "train", limit=limit, **options),
                data.load(self.args.data, "validation", limit=VALIDATION_IMAGES, **options))

    def find(self, part, clip=None):
        """A trained part: of this run's folder, of --init, or shipped. A missing CLIP is an error,
        another missing part None."""
        for folder in (self.folder, self.args.init, SHIPPED / self.args.data):
            path = folder and Path(folder) / f"{part}.pt"
            if path and path.exists():
                model = load_part(path, self.device)
                if clip is None or model.clip_id == clip.clip_id:
                    if folder != self.folder and part == "clip":
                        self.say(f"no clip.pt in {self.folder}, using {path}")
                    return model
        if part == "clip":
            raise FileNotFoundError(f"{self.folder}/clip.pt is missing; python train.py --stage "
                                    f"clip --data {self.args.data} makes it")

    def load_given(self):
        """The weights of this part that --init names."""
        path = Path(self.args.init) / f"{self.part}.pt"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such weights to begin with; see --init")
        model = load_part(path, self.device)
        if not isinstance(model, PARTS[self.part][0]):
            raise ValueError(f"{path}: not a {self.part}; see --init")
        if self.clip:
            check_clip(model, self.clip, path)
        return model

    def identity(self):
        """What a stopped run and its continuation must agree on."""
        given = ("data", "data_dir", "limit", "size", "seed", "init")
        return {"stage": self.stage, "clip": self.clip and self.clip.clip_id,
                **{k: getattr(self.args, k) for k in given}, **asdict(self.recipe)}


class State:
    """All that a run needs to go on: weights, their average, optimizer, generator, step, time."""

    def __init__(self, run, model):
        r = run.recipe
        self.model, self.ema = model, copy.deepcopy(model).eval().requires_grad_(False)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]          # biases, norms: no decay
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], r.lr, (0.9, r.beta2),
            weight_decay=r.weight_decay, fused=run.device.type == "cuda")
        self.generator = torch.Generator(run.device).manual_seed(run.args.seed)
        self.step, self.seconds = 0, 0.0

    def update_ema(self, decay):
        """The decay warms up, or a short run's average would be mostly its initialisation."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        average, now = list(self.ema.parameters()), [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(average, now, 1 - decay)

    def save(self, run):
        """The state to go on from; and the averaged weights, which are the part itself."""
        models = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        tokenizer = getattr(self.model, "tokenizer", None)
        write_torch(run.files["state.pt"], {
            **models, "generator": self.generator.get_state(), "step": self.step,
            "seconds": self.seconds, "identity": run.identity(), "clip_id": self.model.clip_id,
            "tokenizer": tokenizer and tokenizer.state()})
        self.ema.clip_id, self.ema.tokenizer = self.model.clip_id, tokenizer
        if run.part == "clip":         # it may go on, and what this copy taught won't fit it then
            self.ema.clip_id += f"-{self.step}"
        save_part(run.files["pt"], run.part, self.ema, {
            "data": run.args.data, "size": run.args.size, "limit": run.args.limit,
            "seed": run.args.seed, "steps": self.step, "batch_size": run.recipe.batch_size,
            "minutes": round(self.seconds / 60, 1), "device": run.device.type,
            "init": run.given and run.given.trained})

    def load(self, run):
        """Go on from a saved state; raises ValueError if it belongs to another configuration."""
        path = run.files["state.pt"]
        saved = read_torch(path)
        if not isinstance(saved, dict) or "identity" not in saved:
            raise ValueError(f"{path}: not a training state; --restart begins anew")
        changed = [f"{k} was {saved['identity'].get(k)}, now {v}" for k, v in run.identity().items()
                   if saved["identity"].get(k) != v]
        if changed:
            raise ValueError(f"{path}: a run of another configuration ({'; '.join(changed)}); give "
                             f"the same to go on, or --restart to begin anew")
        tokenizer = getattr(self.model, "tokenizer", None)
        if saved["tokenizer"] != (tokenizer and tokenizer.state()):
            raise ValueError(f"{path}: a run on other captions; --restart begins anew")
        try:
            for name in ("model", "ema", "optimizer"):
                getattr(self, name).load_state_dict(saved[name])
            self.generator.set_state(saved["generator"])
        except RuntimeError as error:
            raise ValueError(f"{path}: of another version, or from another device "
                             f"({str(error).splitlines()[-1].strip()}); --restart begins anew"
                             ) from None
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.model.clip_id = saved["clip_id"]


class Stop:
    """Ctrl-C and SIGTERM end the loop after the step in hand, so that the state can be saved."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def learning_rate(step, recipe):
    """differs from the paper: a linear warm-up, 2 % of the steps, then half a cosine to zero."""
    warm_up = max(1, recipe.steps // 50)
    if step < warm_up:
        return recipe.lr * (step + 1) / warm_up
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))


def train(run):
    """Train one stage to its end, or until a signal stops it; True if it is finished."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run.folder).close()
    except OSError as error:
        raise OSError(f"--out {run.folder}: can't be written ({error.strerror}); choose another"
                      ) from None
    torch.manual_seed(run.args.seed)
    stage, r = STAGES[run.stage](run), run.recipe
    model = stage.model.to(run.device, memory_format=torch.channels_last).train()
    model.clip_id = run.clip.clip_id if run.clip else model.clip_id
    if run.given:
        initialise(model, run)
    state = State(run, model)
    if run.args.restart:
        run.files["state.pt"].unlink(missing_ok=True)
    if not run.files["state.pt"].exists():
        run.files["csv"].unlink(missing_ok=True)
    else:
        state.load(run)
        run.say(f"step {state.step} of {r.steps}: " +
                ("going on" if state.step < r.steps else "finished already; --restart begins anew"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    run.say(f"{millions:.2f}M parameters, {r.steps} steps of {r.batch_size} on {run.device}")

    losses, first, began, saved = [], state.step, time.time() - state.seconds, time.time()
    with Stop() as stop, tqdm(total=r.steps, initial=state.step, desc=run.stage,
                            mininterval=1 if sys.stderr.isatty() else 30) as bar:
        while state.step < r.steps and not stop.asked:
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(state.step, r)
            with autocast(run.device):
                loss = stage.loss(model, stage.data[0], r.batch_size, state.generator)
            state.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            state.optimizer.step()
            state.step += 1
            state.update_ema(r.ema)
            losses.append(loss.detach())             # read now and then: reading waits for the GPU
            state.seconds = time.time() - began
            bar.update()
            if state.step % max(1, r.steps // 100) == 0 or state.step == r.steps:
                report(run, stage, state, torch.stack(losses).mean().item(), bar)
                losses = []
            if time.time() - saved > SAVE_SECONDS:
                state.save(run)
                saved = time.time()
        if state.step > first or not run.files["pt"].exists():
            state.save(run)                      # in here, where no second Ctrl-C can prevent it
    done = state.step >= r.steps
    run.say(f"{'finished' if done else 'stopped'} at step {state.step}, {state.seconds / 60:.1f} "
            f"minutes of training: {run.files['pt']}")
    return done and not stop.asked


def report(run, stage, state, loss, bar):
    """A line of the CSV log; every tenth time the validation loss and a picture as well."""
    if not math.isfinite(loss):
        raise ValueError(f"{run.stage}: the loss is {loss} at step {state.step}; try an --lr below "
                         f"{run.recipe.lr}")
    validation, steps = None, run.recipe.steps
    if state.step % max(1, steps // 10) < max(1, steps // 100) or state.step == steps:
        validation = validate(run, stage, state.ema)
        picture = stage.watch(state.ema)
        if picture is not None:
            data.write_png(run.files["png"], picture)
        bar.write(f"{run.stage}: step {state.step}, {state.seconds / 60:.1f} min, loss {loss:.4f}, "
                  f"validation {validation:.4f}", file=sys.stderr)
    new = not run.files["csv"].exists()
    with open(run.files["csv"], "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(["step", "minutes", "lr", "loss", "validation"])
        lr = state.optimizer.param_groups[0]["lr"]
        writer.writerow([state.step, f"{state.seconds / 60:.2f}", f"{lr:.3g}", f"{loss:.5f}",
                         "" if validation is None else f"{validation:.5f}"])
    bar.set_postfix(loss=f"{loss:.4f}")


@torch.no_grad()
def validate(run, stage, ema):
    """The averaged weights' loss on validation data, with the same draws and noise each time."""
    generator = torch.Generator(run.device).manual_seed(0)
    with autocast(run.device):
        return sum(stage.loss(ema, stage.data[1], 128, generator).item() for _ in range(4)) / 4


def autocast(device):
    """bf16 on CUDA, where it is fast; float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def initialise(model, run):
    """Take --init's weights of this part, if they fit."""
    path = Path(run.args.init) / f"{run.part}.pt"
    try:
        model.load_state_dict(run.given.state_dict())
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit the {run.part} of --size {run.args.size} "
                         f"({str(error).splitlines()[-1].strip()})") from None
    run.say(f"beginning with {path}")


# ---- The command ---------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):                    # argparse itself would print its usage, and leave
        raise ValueError(f"{message}; see --help")


def parse(argv):
    parser = Parser(prog="train.py", description="Train unCLIP, or one part of it.",
                    allow_abbrev=False)
    add = parser.add_argument
    add("--stage", default="all", choices=["all", *STAGES],
        help="what to train (default: %(default)s)")
    add("--data", default="shapes", choices=data.DATASETS,
        help="on what (default: %(default)s)")
    add("--data-dir", help="where cifar10 (default: downloaded), coco or the folder is")
    add("--limit", type=int, help="how many training pictures to use (default: all; shapes: 20000)")
    add("--size", default="small", choices=list(RECIPES),
        help="small: a laptop; base: one GPU (default: %(default)s)")
    add("--steps", type=int, help="training steps (default: the stage's recipe)")
    add("--batch-size", type=int, help="pictures a step (default: the stage's recipe)")
    add("--lr", type=float, help="peak learning rate (default: the stage's recipe)")
    add("--seed", type=int, default=0,
        help="of initialisation, batches and noise (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or mps (default: %(default)s)")
    add("--out", help="folder of the run (default: runs/<data>)")
    add("--init", help="folder of weights to begin with")
    add("--restart", action="store_true", help="begin anew where a run was stopped or finished")
    return parser.parse_args(argv)


def check(args):
    """Faults that can be told before anything is loaded or written."""
    for name in ("steps", "batch_size", "lr", "limit"):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if not 0 <= args.seed < 2**64:
        raise ValueError(f"--seed {args.seed}: must be 0 or more, and below 2**64")
    if args.init and args.stage == "all":
        raise ValueError(f"--init {args.init}: its parts belong to its own CLIP, not to a new "
                         f"one; choose one --stage")
    if args.data in ("coco", "folder") and not args.data_dir:
        raise ValueError(f"--data {args.data}: say where it is, with --data-dir DIR")
    if args.init and not Path(args.init).is_dir():
        raise ValueError(f"--init {args.init}: no such folder of weights")
    try:
        torch.zeros(1, device=args.device).cpu()
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {args.device}: not to be had here; try --device cpu") from None


def main(argv=None):
    """The command line; returns the exit status: 0 done, 2 a user's error, 130 stopped."""
    try:
        args = parse(argv)
        check(args)
        torch.set_float32_matmul_precision("high")                         # TF32 on a GPU
        stages = list(STAGES) if args.stage == "all" else [args.stage]
        for stage in stages:
            if stage == "upsampler" and args.data == "cifar10":
                print("upsampler: left out, CIFAR-10 has no larger originals", file=sys.stderr)
            elif not train(Run(stage, args)):
                return 130
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:                    # before or between the loops that heed it
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
