"""Noise and its reversal: the one diffusion process of the prior, the decoder and the upsampler.

The paper diffuses embeddings (sec. 2.2) and pixels (sec. 2.1) with one cosine schedule, except in
its last upsampler. Here this schedule serves every part. This file knows no network: a model is a
function f(x_t, t), and x is any tensor whose first axis counts samples, vectors (B, D) as well as
images (B, C, H, W).

Time runs from 0, the data, to T, pure noise. Adding noise is a rotation. With an angle φ_t that
grows from 0 to almost 90 degrees,

    x_t = cos φ_t · x_0 + sin φ_t · eps          cos φ_t = √ᾱ_t,   sin φ_t = √(1 − ᾱ_t)
    v_t = cos φ_t · eps − sin φ_t · x_0          the direction in which x_t moves as φ grows

so x_0 and eps are x_t and v_t, turned back by φ_t. In this project the t of z_t means *text*; a
noised image embedding is called z_i_t. Next chapter: clip_tiny.py.
"""

import copy
import hashlib
import math

import torch
import torch.nn as nn


def cosine_alphas_bar(T):
    """alphas_bar[0..T] of the cosine schedule (Nichol & Dhariwal 2021), float64; [0] is 1."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)      # as they do; without it ᾱ_T would be 0
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])


class Diffusion(nn.Module):
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I), and ways back from x_T to x_0. It has no weights.

    objective: what the loss compares, "x_0" (sec. 2.2) or "eps" (GLIDE's; sec. 2.1 builds on it).
    differs from the paper: the network always answers v (Salimans & Ho 2022), from which x_0 and
    eps are computed. At low noise x_0 is almost a copy of x_t, and at high noise eps is. A network
    copies only roughly. From v, `x_0_and_eps` computes both, and its first term is that copy. (The
    Upsampler copies another picture.)
    power: a sampler's times are evenly spaced if it is 1, and denser near 0 if it is more.
    """

    def __init__(self, objective, power=1, T=1000):
        super().__init__()
        assert objective in ("x_0", "eps"), objective
        self.objective, self.power, self.T = objective, power, T
        self.alphas_bar = cosine_alphas_bar(T)           # on the CPU: MPS has no float64
        self.register_buffer("cos", self.alphas_bar.sqrt().float(), persistent=False)
        self.register_buffer("sin", (1 - self.alphas_bar).sqrt().float(), persistent=False)

    def rotation(self, t, like):
        """cos φ_t and sin φ_t at the times t (B,) in 0..T, shaped to multiply `like` (B, …)."""
        shape = [-1] + [1] * (like.dim() - 1)
        return self.cos[t].view(shape), self.sin[t].view(shape)

    # ---- Training --------------------------------------------------------------------------

    def q_sample(self, x_0, t, eps):
        """x_0 (B, …), times t (B,) in 0..T, standard normal eps like x_0 → x_t (B, …)."""
        cos, sin = self.rotation(t, x_0)
        return cos * x_0 + sin * eps

    def x_0_and_eps(self, v, x_t, t):
        """The network's answer v at x_t and times t (B,), turned back → x_0 and eps, like x_t."""
        cos, sin = self.rotation(t, x_t)
        return cos * x_t - sin * v, sin * x_t + cos * v

    def loss(self, f, x_0, generator=None):
        """f's mean squared error of x_0 or of eps, for data x_0 (B, …), each at a random time t in
        1..T and with noise of its own: a scalar.

        differs from the paper, where it compares eps: the error of eps is the error of x_0 times
        the signal-to-noise ratio. Here this weight stays between 0.1 and 5 (the 5 is min-SNR's,
        Hang et al. 2023). Without limits low noise would get most of the weight, though only edges
        are left to be found there. High noise, where the layout is decided, would get almost none.
        """
        t = torch.randint(1, self.T + 1, x_0.shape[:1], device=x_0.device, generator=generator)
        eps = torch.randn(x_0.shape, device=x_0.device, generator=generator)
        x_t = self.q_sample(x_0, t, eps)
        x_0_hat, eps_hat = self.x_0_and_eps(f(x_t, t).float(), x_t, t)
        error = lambda a, b: (a - b).square().flatten(1).mean(dim=1)           # (B,)
        of_x_0, of_eps = error(x_0_hat, x_0), error(eps_hat, eps)
        if self.objective == "x_0":
            return of_x_0.mean()
        return of_eps.clamp(0.1 * of_x_0, 5 * of_x_0).mean()

    # ---- Sampling --------------------------------------------------------------------------

    def timesteps(self, steps):
        """The times T = t_n > … > t_1 > t_0 = 0 that a sampler visits in n = `steps` steps.

        t_k is T (k / n)^power, rounded, and moved up where two times would be equal.
        Raises ValueError unless 1 ≤ steps ≤ T.
        """
        if not 1 <= steps <= self.T:
            raise ValueError(f"{steps} sampling steps: choose from 1 to {self.T}")
        times = [0]
        for k in range(1, steps + 1):
            times.append(max(round(self.T * (k / steps) ** self.power), times[-1] + 1))
        return times[::-1]

    @torch.no_grad()
    def sample(self, f, x_T, steps, eta=1.0, noise=None, clamp=False, watch=None):
        """Follow f from the noise x_T (B, …) back to data x_0 (B, …), in 1..T steps.

        eta 1 draws each x_s from q(x_s | x_t, x_0), which is DDPM's ancestral sampling. eta 0 adds
        no noise, which is DDIM (Song et al. 2021): x_T decides all. noise(): fresh standard normal
        noise like x_T, needed if eta > 0. clamp: every estimate of x_0 is kept in [-1, 1], where
        pixels are. watch(t, x_t, x_0) is called at each step.
        Raises ValueError unless eta is from 0 to 1 and steps from 1 to T.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: choose from 0 to 1")
        x_t, times = x_T, self.timesteps(steps)
        for t, s in zip(times, times[1:]):                             # from time t to time s < t
            ts = torch.full((len(x_t),), t, device=x_t.device)
            x_0, eps = self.x_0_and_eps(f(x_t, ts).float(), x_t, ts)
            ab_t, ab_s = self.alphas_bar[t].item(), self.alphas_bar[s].item()
            if clamp:
                x_0 = x_0.clamp(-1, 1)
                eps = (x_t - math.sqrt(ab_t) * x_0) / math.sqrt(1 - ab_t)
            if watch:
                watch(t, x_t, x_0)
            # Of the noise that belongs to time s, a part of std `fresh` is new, the rest is eps.
            fresh = eta * math.sqrt((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s))
            x_t = math.sqrt(ab_s) * x_0 + math.sqrt(1 - ab_s - fresh ** 2) * eps
            if fresh > 0:
                x_t = x_t + fresh * noise()
        return x_t

    @torch.no_grad()
    def invert(self, f, x_0, steps, iterations=3):
        """DDIM inversion (sec. 3): x_0 (B, …) → the x_T from which `sample` with eta 0 gives it
        back, with the same f, the same steps (2 or more), and no clamp.

        A step of DDIM from t down to s turns x_t by δ = φ_t − φ_s, in the plane of x_t and v:

            x_s = cos δ · x_t − sin δ · v(x_t, t)        so        x_t = (x_s + sin δ · v) / cos δ

        The v on the right belongs to the x_t that is sought. So x_t is found by iteration: x_s is
        the first guess, and each right side is a better one. If a round no longer changes x_t, the
        step is undone exactly. Three rounds come close; the first step, next to the data, is mended
        slowest. With a single step, δ would be almost 90 degrees, and cos δ almost 0: so it takes
        two or more.
        differs from the paper: the usual DDIM inversion does not iterate.
        """
        if steps < 2:
            raise ValueError(f"{steps} steps invert nothing: choose 2 or more")
        angle = self.alphas_bar.sqrt().acos().tolist()
        times, x_s = self.timesteps(steps)[::-1], x_0
        for s, t in zip(times, times[1:]):                               # from time s up to t > s
            ts = torch.full((len(x_0),), t, device=x_0.device)
            delta, x_t = angle[t] - angle[s], x_s
            for _ in range(iterations):
                x_t = (x_s + math.sin(delta) * f(x_t, ts).float()) / math.cos(delta)
            x_s = x_t
        return x_s


def guided(f, guidance, conditions):
    """Classifier-free guidance (sec. 2.1, 2.2): f's answer is pushed away from the unconditional.

    f(*inputs, *conditions): a network. Its inputs are x_t and t, or the AR prior's symbols; inputs
    and conditions are tensors (B, …). cond is f's answer to the conditions, null its answer where
    all of them are hidden, which is to say zeros. Returns g(*inputs) = null + guidance·(cond −
    null): guidance 1 is the plain network, 0 the unconditional. Both answers come from one batch.
    x_0, eps and v are affine in each other at a fixed x_t, so it does not matter which is mixed.
    """
    if guidance == 1:
        return lambda *inputs: f(*inputs, *conditions)
    both = [torch.cat([torch.zeros_like(c), c]) for c in conditions]

    def g(*inputs):
        null, cond = f(*(torch.cat([x, x]) for x in inputs), *both).chunk(2)
        return null + guidance * (cond - null)

    return g


class Noise:
    """Standard normal noise in which every picture has a generator of its own.

    Picture i's k-th noise depends on (seed, keys[i], purpose) and k alone, not on the batch, and is
    made on the CPU. So a picture comes out the same in any batch and on any device, up to rounding.
    """

    def __init__(self, seed, keys, shape, purpose="", device="cpu"):
        self.shape, self.device = shape, device
        hashes = [hashlib.sha256(f"{seed}/{key}/{purpose}".encode()).digest()[:7] for key in keys]
        self.generators = [torch.Generator().manual_seed(int.from_bytes(h, "big")) for h in hashes]

    def __call__(self):
        """The next (len(keys), *shape) of noise."""
        rows = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(rows).to(self.device)

    def select(self, indices):
        """The same noise for some of the pictures; one may be named twice."""
        some = copy.copy(self)
        some.generators = [self.generators[i].clone_state() for i in indices]
        return some


def timestep_embedding(t, width):
    """Cosines and sines of t (B,) at `width`/2 wavelengths, from 2π to almost 10000·2π →
    (B, width)."""
    k = torch.arange(width // 2, device=t.device) / (width // 2)
    angles = t[:, None].float() * torch.exp(-math.log(10000) * k)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
