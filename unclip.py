"""unCLIP on one page: text → z_t → z_i → picture (Ramesh et al. 2022, "Hierarchical
Text-Conditional Image Generation with CLIP Latents", arXiv 2204.06125).

    caption y ── CLIP ──► z_t ── prior ──► z_i ── decoder ──► 32×32 ── upsampler ──► 128×128

The paper's idea: p(x|y) = p(x|z_i, y) p(z_i|y). A *prior* draws a CLIP image embedding that fits
the caption; a *decoder* draws a picture that has this embedding. Because z_i says what matters in a
picture and x_T, the noise it was drawn from, says the rest, pictures can also be reconstructed,
varied, interpolated and edited by their captions (sec. 3), all of it below.

Reading order: unclip → diffusion → clip_tiny → prior → decoder → data → train → sample → evaluate.
"""

import math
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from clip_tiny import CLIP, CLIPConfig, Tokenizer
from decoder import Decoder, DecoderConfig, Upsampler, UpsamplerConfig
from diffusion import Noise
from prior import ARPrior, ARPriorConfig, DiffusionPrior, DiffusionPriorConfig

PARTS = {"clip": (CLIP, CLIPConfig), "prior": (DiffusionPrior, DiffusionPriorConfig),
         "ar_prior": (ARPrior, ARPriorConfig), "decoder": (Decoder, DecoderConfig),
         "upsampler": (Upsampler, UpsamplerConfig)}
SHIPPED = Path(__file__).parent / "weights"
FORMAT = 1


class UnCLIP:
    """CLIP, priors, decoder and upsamplers in one. Pictures are float (B, 3, H, W) in [-1, 1].

    Priors and decoder may be None; upsamplers: a list, from small to large. Starting noise is a
    function of (seed, the picture's index within its prompt) alone.
    """

    def __init__(self, clip, decoder=None, prior=None, ar_prior=None, upsamplers=()):
        self.clip, self.decoder, self.upsamplers = clip, decoder, list(upsamplers)
        self.priors = {"diffusion": prior, "ar": ar_prior}
        self.device = clip.logit_scale.device

    @classmethod
    def load(cls, folder=SHIPPED / "shapes", device="cpu"):
        """The parts found in a folder; those missing there from the shipped weights, if they belong
        to the same CLIP (a line on stderr says so). Raises ValueError or OSError, in one line."""
        return cls(**load_parts(folder, device))

    # ---- Drawing (sec. 2) ------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, captions, n=4, seed=0, prior="diffusion", guidance=None, steps=None,
                 eta=None, upsample=True, batch=4, **prior_options):
        """n pictures of each caption (a string, or several) → (captions·n, 3, H, W), in order.

        prior: "diffusion" or "ar"; "text" gives the decoder z_t in place of z_i, "none" the caption
        alone (sec. 5.1 compares them). guidance (1 = none), steps and eta are the decoder's, None
        for its defaults. batch: pictures drawn at a time. prior_options: candidates (diffusion), or
        top_half and temperature (ar). Raises ValueError if a part is missing, or a caption is empty
        or too long.
        """
        captions = [captions] if isinstance(captions, str) else captions
        pictures = []
        for caption in captions:
            tokens = self.clip.tokenizer([caption]).to(self.device)
            for k in range(0, n, batch):
                rows = range(k, min(k + batch, n))
                y = tokens.expand(len(rows), -1)
                z_i = self.draw_z_i(y, prior, seed, rows, **prior_options)
                noise = self.noise(seed, rows, "decoder")
                x = self.part("decoder").sample(z_i, y, noise, guidance, steps, eta)
                pictures.append(self.upsample(x, seed, rows) if upsample else x)
        return torch.cat(pictures)

    @torch.no_grad()
    def draw_z_i(self, tokens, prior, seed, rows, candidates=2, **options):
        """Captions (B, L) → z_i (B, D) by the prior named, or None by "none"; row b has picture
        rows[b]'s noise."""
        if prior == "none":
            return None
        z_t = self.clip.encode_text(tokens)
        if prior == "text":
            # differs from the paper: only z_t's part along the axes of high variance is used
            whitening = self.part("decoder").whitening
            return F.normalize(whitening.mean + whitening.broad(z_t - whitening.mean), dim=1)
        if prior not in self.priors:
            raise ValueError(f"unknown prior {prior!r}: choose diffusion, ar, text or none")
        if self.priors[prior] is None:
            stage = {"diffusion": "prior", "ar": "ar-prior"}[prior]
            raise ValueError(f"there are no weights of the {prior} prior: "
                             f"python train.py --stage {stage}, or choose another --prior")
        if prior == "ar":
            generators = Noise(seed, rows, (), "ar prior").generators
            return self.priors["ar"].sample(z_t, tokens, generators, **options)
        which = [f"{i}.{c}" for i in rows for c in range(candidates)]
        noise = Noise(seed, which, z_t.shape[1:], "prior", self.device)
        return self.priors["diffusion"].sample(z_t, tokens, noise, candidates, **options)

    def upsample(self, x, seed=0, rows=None, batch=4):
        """(B, 3, h, w) → (B, 3, H, W) through all upsamplers; without any, x itself."""
        rows = rows or range(len(x))
        for k, upsampler in enumerate(self.upsamplers):
            shape = (3, *(side * upsampler.config.factor for side in x.shape[2:]))
            parts = []
            for i in range(0, len(x), batch):
                noise = Noise(seed, rows[i:i + batch], shape, f"upsampler {k}", self.device)
                parts.append(upsampler.sample(x[i:i + batch], noise))
            x = torch.cat(parts)
        return x

    # ---- Manipulating (sec. 3) ---------------------------------------------------------------
    # Unguided (unless asked) and unclipped, or the inversion would not invert. The caption plays no
    # part.

    @torch.no_grad()
    def latent(self, x, steps=50):
        """x (B, 3, H, W), of the decoder's size → (z_i (B, D), x_T like x), what CLIP sees and what
        it does not."""
        z_i = self.clip.encode_image(x)
        decoder = self.part("decoder")
        return z_i, decoder.diffusion.invert(decoder.predictor(z_i, None), x, steps)

    @torch.no_grad()
    def decode(self, z_i, x_T, steps=50, eta=0.0, noise=None, guidance=1.0):
        """(z_i, x_T) → pictures; the inverse of `latent` at eta 0, guidance 1, the same steps.

        noise(): standard normal like x_T, needed if eta > 0.
        """
        decoder = self.part("decoder")
        f = decoder.predictor(z_i, None, guidance)
        return decoder.diffusion.sample(f, x_T, steps, eta, noise).clamp(-1, 1)

    def reconstruct(self, x, steps=50, guidance=1.0):
        """Pictures to latents and back."""
        return self.decode(*self.latent(x, steps), steps, guidance=guidance)

    def vary(self, x, n=8, eta=1.0, seed=0, steps=50, guidance=1.0):
        """n pictures with the z_i of x (1, 3, H, W): the larger eta, the more varies (sec. 3.1)."""
        z_i, x_T = (a.expand(n, *a.shape[1:]) for a in self.latent(x, steps))
        noise = self.noise(seed, range(n), "variation")
        return self.decode(z_i, x_T, steps, eta, noise, guidance)

    def interpolate(self, a, b, n=7, fixed_noise=False, seed=0, steps=50, guidance=1.0):
        """n pictures from a to b (each (1, 3, H, W)), ends included, along slerp of z_i (sec. 3.2).

        x_T is slerped as well, so that the ends are the pictures given; or one random x_T for all.
        """
        t = torch.linspace(0, 1, n, device=self.device)
        between = lambda a, b: slerp(a.expand(n, *a.shape[1:]), b.expand(n, *b.shape[1:]), t)
        if fixed_noise:
            z_i = between(self.clip.encode_image(a), self.clip.encode_image(b))
            x_T = self.noise(seed, [0], "decoder")().expand(n, -1, -1, -1)
        else:
            z_i, x_T = map(between, self.latent(a, steps), self.latent(b, steps))
        return self.decode(z_i, x_T, steps, guidance=guidance)

    def edit(self, x, to, base="a photo", n=7, theta=0.5, steps=50, guidance=1.0):
        """A text diff (sec. 3.3): n pictures from x (1, 3, H, W) towards the caption `to`.

        z_i turns by a fraction rising from 0 to theta towards norm(z_t − z_t0), z_t0 being that of
        the picture's present caption, or of a dummy as "a photo"; x_T stays that of x.
        """
        z_i, x_T = self.latent(x, steps)
        z_d = self.text_diff([to], [base])
        thetas = torch.linspace(0, theta, n, device=self.device)
        z_i = slerp(z_i.expand(n, -1), z_d.expand(n, -1), thetas)
        return self.decode(z_i, x_T.expand(n, *x_T.shape[1:]), steps, guidance=guidance)

    @torch.no_grad()
    def text_diff(self, to, base):
        """B captions to arrive at, and B, or one, to depart from → z_d = norm(z_t − z_t0) (B, D).

        differs from the paper: only the part of the difference along the axes of high variance; the
        rest would move the solid to another place.
        """
        z_t, z_t0 = (self.clip.encode_text(self.clip.tokenizer(y).to(self.device))
                     for y in (to, base))
        return F.normalize(self.part("decoder").whitening.broad(z_t - z_t0), dim=1)

    # ---- Helpers -----------------------------------------------------------------------------

    def part(self, name):
        """The decoder, or a clear message if its weights are missing."""
        model = getattr(self, name)
        if model is None:
            raise ValueError(f"there are no weights of the {name}: python train.py --stage {name}")
        return model

    def noise(self, seed, rows, stream):
        """Starting noise for pictures of the decoder's size."""
        size = self.part("decoder").config.image_size
        return Noise(seed, rows, (3, size, size), stream, self.device)


def slerp(a, b, t):
    """Along the great circle from a to b (B, …): t (B,) or a number, 0 is a and 1 is b.

    For unit vectors all results are unit vectors at equal angles. Tensors of any norm (noise) are
    weighted alike, with the angle between their directions.
    """
    shape = [-1] + [1] * (a.dim() - 1)
    t = torch.as_tensor(t, dtype=torch.float64, device=a.device).expand(len(a)).view(shape)
    flat_a, flat_b = (F.normalize(v.flatten(1).double(), dim=1) for v in (a, b))
    cosine = (flat_a * flat_b).sum(dim=1).clamp(-1, 1).view(shape)
    omega = torch.acos(cosine)
    sin = torch.sin(omega)
    straight = sin < 1e-6                 # the sine formula divides 0 by 0; the line is the circle
    weight_a = torch.where(straight, 1 - t, torch.sin((1 - t) * omega) / sin)
    weight_b = torch.where(straight, t, torch.sin(t * omega) / sin)
    mix = weight_a * a + weight_b * b
    # between opposite ends all great circles are equally short; one by the axis farthest off
    axis = F.one_hot(flat_a.abs().argmin(dim=1), flat_a.shape[1]).to(flat_a)
    aside = F.normalize(axis - (axis * flat_a).sum(1, keepdim=True) * flat_a, dim=1)
    aside = (aside * a.flatten(1).norm(dim=1, keepdim=True)).view_as(a)
    detour = torch.cos(math.pi * t) * a + torch.sin(math.pi * t) * aside
    mix = torch.where(cosine < -1 + 1e-7, detour, mix)
    return mix.to(a.dtype)


# ---- Checkpoints -------------------------------------------------------------------------------

def save_part(path, part, model, trained, half=False):
    """Write a part's weights with all it takes to use them; beside, then renamed.

    trained: how, a dict; its "data" names the data set. model.clip_id names the CLIP that the part
    belongs to. half: in half precision, as the shipped weights are:

        model = load_part("runs/shapes/prior.pt")
        save_part("weights/shapes/prior.pt", "prior", model, model.trained, half=True)
    """
    weights = {k: v.detach().cpu().to(torch.float16 if half and v.is_floating_point() else v.dtype)
               for k, v in model.state_dict().items()}
    checkpoint = {"format": FORMAT, "part": part, "config": asdict(model.config),
                  "weights": weights, "clip_id": model.clip_id, "trained": trained}
    if part == "clip":
        checkpoint["tokenizer"] = model.tokenizer.state()
    write_torch(path, checkpoint)


def write_torch(path, value):
    """torch.save that never leaves half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + f".{os.getpid()}.tmp")
    try:
        torch.save(value, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_torch(path):
    """A file of plain tensors and numbers; one that is anything else is refused, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # torch's, about files that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception:        # a broken archive makes torch raise anything, even a nameless OSError
        raise ValueError(f"{path}: refused, not a whole checkpoint of plain weights (cut short? "
                         f"code in it?); use a file written by train.py") from None


def load_part(path, device="cpu"):
    """The model of a checkpoint, in eval mode, with .clip_id, .trained (and CLIP's .tokenizer)."""
    checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("part") not in PARTS:
        raise ValueError(f"{path}: not a checkpoint of this project; use a file by train.py")
    if checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path}: checkpoint format {checkpoint.get('format')}, this code reads "
                         f"{FORMAT}; train it again")
    kind, config = PARTS[checkpoint["part"]]
    try:
        model = kind(config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["weights"], strict=True)
        model.clip_id, model.trained = checkpoint["clip_id"], checkpoint["trained"]
        model.trained["data"]                        # load_parts looks there for what is lacking
        if kind is CLIP:
            model.tokenizer = Tokenizer(**checkpoint["tokenizer"])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: its weights do not fit this code ({reason}); "
                         f"train it again") from None
    return model.to(device).eval().requires_grad_(False)


def load_parts(folder, device="cpu"):
    """The keyword arguments of UnCLIP from a folder and, for what it lacks, the shipped weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of weights; "
                                f"python train.py makes runs/shapes")
    found = {part: load_part(folder / f"{part}.pt", device)
             for part in PARTS if (folder / f"{part}.pt").exists()}
    if not found:
        raise FileNotFoundError(f"{folder}: no weights in it (clip.pt, decoder.pt, …); "
                                f"python train.py makes them")
    shipped = SHIPPED / next(iter(found.values())).trained["data"]
    if "clip" not in found and not (shipped / "clip.pt").exists():
        raise FileNotFoundError(f"{folder}: clip.pt is missing; "
                                f"python train.py --stage clip makes it")
    clip = found.get("clip") or load_part(shipped / "clip.pt", device)
    for part, model in found.items():
        check_clip(model, clip, folder / f"{part}.pt")
    if folder.resolve() != shipped.resolve():
        for part in PARTS:
            path = shipped / f"{part}.pt"
            if part not in found and path.exists():
                model = clip if part == "clip" else load_part(path, device)
                if model.clip_id in (clip.clip_id, None):
                    found[part] = model
                    print(f"{part}: not in {folder}, using the shipped {path}", file=sys.stderr)
    upsampler = found.pop("upsampler", None)
    return {**found, "upsamplers": [upsampler] if upsampler else []}


def check_clip(model, clip, path):
    """Refuse a part that was trained on the embeddings of another CLIP."""
    if model.clip_id not in (clip.clip_id, None):
        raise ValueError(f"{path}: belongs to another CLIP ({model.clip_id}, here is "
                         f"{clip.clip_id}); train it again on this one")
