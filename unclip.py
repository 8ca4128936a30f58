"""unCLIP on one page: text → z_t → z_i → picture (Ramesh et al. 2022, "Hierarchical
Text-Conditional Image Generation with CLIP Latents", arXiv 2204.06125).

    caption y ── CLIP ──► z_t ── prior ──► z_i ── decoder ──► 32×32 ── upsampler ──► 128×128

The paper's idea (sec. 2): a picture x has exactly one CLIP image embedding z_i, so p(x | y) =
p(x, z_i | y). By the chain rule this is p(x | z_i, y) p(z_i | y). A *prior* draws an embedding that
fits the caption. A *decoder* draws a picture that has this embedding. z_i says what matters in a
picture, and noise says the rest. A sampler starts from noise, x_T. If it adds no more on its way
(eta 0), x_T alone holds all the rest. With z_i and x_T, pictures can also be reconstructed, varied,
interpolated, and edited by captions (sec. 3).

Reading order: unclip, diffusion, clip_tiny, prior, decoder, which are the paper; then train,
sample, shapes, data, judge, evaluate, checkpoints.
"""

from itertools import groupby

import torch
import torch.nn.functional as F

from checkpoints import SHIPPED, load_parts
from diffusion import Noise

BATCH = 4                                               # pictures drawn at a time
PRIORS = {"diffusion": "prior", "ar": "ar_prior"}       # by name: the part that holds its weights


class UnCLIP:
    """CLIP, priors, decoder and upsampler in one. Pictures are float (B, 3, H, W) in [-1, 1].
    Given ones (sec. 3) have the size that CLIP sees and the decoder draws, as those of
    generate(…, upsample=False) have. Another size, and n = 0, raise ValueError.

    Every part but CLIP may be None. All that is random is a function of the seed and of a picture's
    row, its index within its prompt. CLIP is frozen: it is no sub-module of the others, so their
    training can't change it, and its embeddings can be computed once and kept. In this file z_i has
    unit norm. Priors and decoder see z_i whitened (CLIP.whiten): centred, each main axis divided by
    about its spread, and the others enlarged, but less than that. Otherwise they would hardly learn
    axes along which z_i varies little.
    """

    def __init__(self, clip, decoder=None, prior=None, ar_prior=None, upsampler=None):
        self.clip, self.device = clip, clip.logit_scale.device
        self.parts = {"decoder": decoder, "prior": prior, "ar_prior": ar_prior,
                      "upsampler": upsampler}

    @classmethod
    def load(cls, folder=SHIPPED / "shapes", device="cpu"):
        """Load the parts in a folder. For a part that is missing there, the shipped one is taken,
        if it belongs to the same CLIP. Raises ValueError or OSError, in one line."""
        return cls(**load_parts(folder, device))

    def part(self, name):
        """A part, or a clear message if its weights are not there."""
        if self.parts[name] is None:
            raise ValueError(f"there are no weights of the {name.replace('_', ' ')}: python "
                             f"train.py --stage {name.replace('_', '-')} --data "
                             f"{self.clip.trained['data']}, with the --out of its CLIP, makes them")
        return self.parts[name]

    # ---- Drawing (sec. 2) ------------------------------------------------------------------

    def generate(self, captions, n=4, seed=0, prior="diffusion", upsample=True, batch=BATCH, **how):
        """n pictures of each caption (a string, or several) → (captions·n, 3, H, W), in order.

        prior: "diffusion" or "ar" (autoregressive). With "text" the decoder gets z_t in place of
        z_i, along the main axes, which hold 99 % of z_i's variance; with "none", the caption alone
        (sec. 5.1 compares them). how: guidance (1 = none), steps and eta, as in Decoder.sample.
        Guidance makes a picture fit its caption and z_i better. It does not change z_i, so what z_i
        tells stays as varied as without guidance (sec. 5.3).
        Raises ValueError if a part is missing, a caption is empty or too long, or there is nothing
        to draw.
        """
        captions = [captions] if isinstance(captions, str) else captions
        if not captions or n < 1:
            raise ValueError(f"{len(captions)} captions, {n} pictures of each: nothing to draw")
        pictures = {}
        for tokens, rows, places in self.batches(captions, n, batch):
            z_i = self.draw_z_i(tokens, seed, rows, prior)                       # p(z_i | y)
            x = self.draw_x(z_i, tokens, seed, rows, **how)                      # p(x | z_i, y)
            x = self.upsample(x, seed, rows) if upsample else x
            pictures.update(zip(places, x))
        return torch.stack([pictures[place] for place in range(len(captions) * n)])

    def batches(self, captions, n, batch):
        """Yields batches: tokens (batch, L), and each picture's row and place in the result.

        All captions of a batch have L tokens. A batch of fewer than `batch` pictures is filled up
        with copies. Rounding depends on the shape of a batch, so without both rules a picture would
        depend on what else is drawn.
        """
        tokens = [self.clip.tokenizer([caption]).to(self.device) for caption in captions]
        work = sorted((tokens[k].shape[1], k, row)
                      for k in range(len(captions)) for row in range(n))
        for _, group in groupby(work, key=lambda job: job[0]):       # captions of one length
            group = list(group)
            for i in range(0, len(group), batch):
                jobs = (group[i:i + batch] + [group[-1]] * batch)[:batch]
                yield (torch.cat([tokens[k] for _, k, _ in jobs]), [row for _, _, row in jobs],
                       [k * n + row for _, k, row in jobs])

    @torch.no_grad()
    def draw_z_i(self, tokens, seed, rows, prior="diffusion", candidates=2, **options):
        """Tokens of captions (B, L) → z_i (B, D), unit norm, by the prior named; None for "none".

        options go to the prior's `sample`. candidates: how many z_i the diffusion prior draws for
        each caption; the one with the largest z_i·z_t is kept. That one fits the caption better, at
        the price of some variety. The paper draws two. The AR prior needs no choice: it is told
        that z_i·z_t is large (sec. 2.2).
        """
        if prior == "none":
            return None
        z_t = self.clip.encode_text(tokens)                                      # (B, D)
        if prior == "text":
            # differs from the paper: the paper takes z_t whole. Here only z_t's main axes are kept
            # (CLIP.fit_axes): along the others, z_t is unlike any z_i.
            return self.clip.unwhiten(self.clip.whiten(z_t) * self.clip.main)
        if prior not in PRIORS:
            raise ValueError(f"unknown prior {prior!r}: choose diffusion, ar, text or none")
        model = self.part(PRIORS[prior])
        if prior == "ar":
            generators = Noise(seed, rows, (), "ar prior").generators
            return self.clip.unwhiten(model.sample(z_t, tokens, generators, **options))
        keys = [f"{row}.{c}" for c in range(candidates) for row in rows]
        noise = Noise(seed, keys, z_t.shape[1:], "prior", self.device)
        z_i = model.sample(z_t.repeat(candidates, 1), tokens.repeat(candidates, 1), noise,
                           **options)
        z_i = self.clip.unwhiten(z_i).unflatten(0, (candidates, -1))        # (candidates, B, D)
        best = (z_i * z_t).sum(-1).argmax(dim=0)                                 # (B,)
        return z_i[best, torch.arange(len(best), device=self.device)]

    def draw_x(self, z_i, tokens, seed, rows, **how):
        """z_i (B, D) or None, tokens (B, L) or None → pictures of the decoder's size."""
        z_i = None if z_i is None else self.clip.whiten(z_i)
        return self.part("decoder").sample(z_i, tokens, self.noise(seed, rows, "decoder"), **how)

    def upsample(self, x, seed, rows):
        """(B, 3, h, w) → (B, 3, H, W); without an upsampler, x itself."""
        upsampler = self.parts["upsampler"]
        if upsampler is None:
            return x
        shape = (3, *(side * upsampler.config.factor for side in x.shape[2:]))
        return in_batches(len(x), lambda i: upsampler.sample(
            x[i], Noise(seed, [rows[k] for k in i], shape, "upsampler", self.device)))

    def noise(self, seed, rows, purpose):
        """Noise for pictures of the decoder's size, to start from and to add on the way."""
        size = self.part("decoder").config.image_size
        return Noise(seed, rows, (3, size, size), purpose, self.device)

    # ---- Manipulating (sec. 3) ---------------------------------------------------------------
    # By default nothing is guided here, and nothing is clamped on the way: a latent is to lead back
    # to its picture. The caption is hidden: what a picture shows is in its z_i.

    @torch.no_grad()
    def latent(self, x, steps=50):
        """x (B, 3, H, W), of the decoder's size → z_i (B, D), which is what CLIP sees, and x_T
        (B, 3, H, W), which holds all the rest, by DDIM inversion."""
        decoder, z_i = self.part("decoder"), self.clip.encode_image(x)
        f = decoder.given(self.clip.whiten(z_i), None)
        return z_i, decoder.diffusion.invert(f, x, steps)

    def decode(self, z_i, x_T, steps=50, eta=0.0, noise=None, guidance=1.0):
        """z_i and x_T → pictures. With eta 0, guidance 1 and the same steps, it almost
        undoes `latent`.

        noise: a diffusion.Noise for as many pictures, needed if eta > 0.
        """
        decoder, z_i = self.part("decoder"), self.clip.whiten(z_i)

        def some(i):
            f = decoder.given(z_i[i], None, guidance)
            return decoder.diffusion.sample(f, x_T[i], steps, eta, noise and noise.select(i))
        return in_batches(len(z_i), some).clamp(-1, 1)

    def reconstruct(self, x, steps=50, guidance=1.0):
        """Pictures (B, 3, H, W) to latents and back."""
        return self.decode(*self.latent(x, steps), steps, guidance=guidance)

    def vary(self, x, n=8, eta=1.0, seed=0, steps=50, guidance=1.0):
        """n pictures with the z_i of x (1, 3, H, W): the larger eta is, the more they vary (sec.
        3.1). What stays is what CLIP sees in x."""
        z_i, x_T = (a.expand(n, *a.shape[1:]) for a in self.latent(x, steps))
        noise = self.noise(seed, range(n), "variation")
        return self.decode(z_i, x_T, steps, eta, noise, guidance)

    def interpolate(self, a, b, n=7, fixed_noise=False, seed=0, steps=50, guidance=1.0):
        """n pictures from a to b (each (1, 3, H, W)), ends included, along slerp of z_i (sec. 3.2).

        x_T is slerped as well, so that the ends are the given pictures; with fixed_noise it is one
        random x_T for all.
        """
        t = torch.linspace(0, 1, n)
        between = lambda u, v: slerp(u.expand(n, *u.shape[1:]), v.expand(n, *v.shape[1:]), t)
        if fixed_noise:
            z_i = between(self.clip.encode_image(a), self.clip.encode_image(b))
            x_T = self.noise(seed, [0], "decoder")().expand(n, -1, -1, -1)
        else:
            z_i, x_T = map(between, self.latent(a, steps), self.latent(b, steps))
        return self.decode(z_i, x_T, steps, guidance=guidance)

    def edit(self, x, to, base="a photo", n=7, theta=0.5, steps=50, guidance=1.0):
        """A text diff (sec. 3.3): n pictures from x (1, 3, H, W) towards the caption `to`.

        z_i turns towards norm(z_t − z_t0) by a fraction that rises from 0 to theta (n = 1: theta);
        the paper chooses a theta from 0.25 to 0.5. z_t0 belongs to the picture's present caption,
        or to a dummy such as "a photo". x_T stays that of x.
        """
        z_d = self.text_diff([to], [base])
        z_i, x_T = self.latent(x, steps)
        z_i = slerp(z_i.expand(n, -1), z_d.expand(n, -1), torch.linspace(theta, 0, n).flip(0))
        return self.decode(z_i, x_T.expand(n, *x_T.shape[1:]), steps, guidance=guidance)

    @torch.no_grad()
    def text_diff(self, to, base):
        """B captions `to`, and B captions `base`, or one → z_d = norm(z_t − z_t0) (B, D).

        differs from the paper: only z_d's main axes are kept. The others would move the objects.
        Raises ValueError if both captions mean the same.
        """
        z_t, z_t0 = (self.clip.encode_text(self.clip.tokenizer(y).to(self.device))
                     for y in (to, base))
        z_d = (z_t - z_t0) * self.clip.main
        if (z_d.norm(dim=1) < 1e-5).any():                           # what is left is rounding
            raise ValueError(f'--to "{", ".join(to)}": means the same as the caption that it is '
                             f'edited from; choose another')
        return F.normalize(z_d, dim=1)


def in_batches(n, f, batch=BATCH):
    """Call f on the indices 0 … n − 1, `batch` at a time, and join the results. The last batch is
    filled up with copies, for the reason that `UnCLIP.batches` gives."""
    if n < 1:
        raise ValueError(f"{n} pictures: nothing to draw")
    indices = [*range(n), *[n - 1] * (-n % batch)]
    return torch.cat([f(indices[i:i + batch]) for i in range(0, len(indices), batch)])[:n]


def slerp(a, b, t):
    """Spherical interpolation of a and b (B, …); t, (B,) or a number, is 0 at a and 1 at b.

    Unit vectors give unit vectors on the great circle from a to b, and equal steps of t give equal
    angles. Other tensors (noise) get the same weights, by the angle between their directions.
    Raises ValueError for opposite vectors, between which no way is the shortest.
    """
    flat_a, flat_b = (F.normalize(v.flatten(1).cpu().double(), dim=1) for v in (a, b))
    omega = (flat_a * flat_b).sum(dim=1).clamp(-1, 1).acos()                     # (B,)
    if (omega > 3.1415).any():
        raise ValueError("slerp between opposite vectors: every great circle joins them")
    t = torch.as_tensor(t, dtype=torch.float64).cpu().expand(len(a))
    straight = omega < 1e-6                # there sin(tΩ)/sin Ω is 0/0, and its limit is t
    sin = torch.where(straight, 1.0, omega.sin())
    weight_a = torch.where(straight, 1 - t, ((1 - t) * omega).sin() / sin)
    weight_b = torch.where(straight, t, (t * omega).sin() / sin)
    weight_a, weight_b = (w.to(a).view([-1] + [1] * (a.dim() - 1)) for w in (weight_a, weight_b))
    return weight_a * a + weight_b * b
