"""p(z_i | y): the image embedding that a caption may have (paper, sec. 2.2), drawn in two ways.

A caption fits many pictures, so it has many z_i. A prior draws one of them, given the caption's
tokens and z_t, the caption's own embedding. Both priors of the paper are here, with one face:

    loss(z_i, z_t, tokens, …)      training objective, from true pairs
    sample(z_t, tokens, …)         z_i, unit norm, one for each caption

CLIP itself is nowhere in this file: embeddings and tokens come in. Next chapter: decoder.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from clip_tiny import PAD, Transformer, Whitening, causal_mask, principal
from diffusion import Diffusion, guided, timestep_embedding

TEXT_DROP = 0.1          # how often training hides the caption, for guidance (sec. 2.2)


class Caption(nn.Module):
    """The beginning of both priors' sequences: [caption tokens | z_t], or learnt nulls if dropped.

    differs from the paper: it says "encoded text"; the tokens are embedded here, straight into the
    prior's own Transformer, which the paper's parameter counts suggest as well.
    """

    def __init__(self, vocab, context, dim, width):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.z_t = nn.Linear(dim, width)
        self.null_z_t = nn.Parameter(torch.randn(width) * 0.02)
        self.scale = dim ** 0.5              # unit vectors → coordinates of about unit variance
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, z_t, tokens, drop):
        """z_t (B, D), tokens (B, L), drop (B,) bool → (B, L + 1, width), and which may be seen.

        Where a caption is dropped nothing of it can be seen, not even its length.
        """
        text = self.token(tokens) + self.position[:tokens.shape[1]]               # (B, L, width)
        z_t = torch.where(drop[:, None], self.null_z_t, self.z_t(z_t * self.scale))
        visible = (tokens != PAD) & ~drop[:, None]                                # (B, L)
        return torch.cat([text, z_t[:, None]], 1), F.pad(visible, (0, 1), value=True)


def causal_mask_of(visible, length):
    """visible (B, P), for the first P of `length` positions → (B, 1, length, length) bool mask.

    Causal, and hiding what is not visible; each position sees itself, so that no row is empty.
    """
    visible = F.pad(visible, (0, length - visible.shape[1]), value=True)
    itself = torch.eye(length, dtype=torch.bool, device=visible.device)
    return (causal_mask(length, visible.device) & visible[:, None] | itself)[:, None]


# ---- The diffusion prior -----------------------------------------------------------------------

@dataclass
class DiffusionPriorConfig:
    """What the weights depend on, and how they are best sampled."""
    dim: int                 # of z_i and z_t
    vocab: int               # of CLIP's tokenizer
    context: int             # most tokens of a caption
    width: int = 192
    depth: int = 5
    error: float = 0.1       # of the network's answer, rms of a coordinate at most, at low noise
    least: float = 0.2       # axes with a smaller spread, as a share of the largest, are not drawn
    steps: int = 32          # of sampling
    eta: float = 0.0
    guidance: float = 1.0    # the paper found that guiding the prior hurts


class DiffusionPrior(nn.Module):
    """A causal Transformer that un-noises z_i (sec. 2.2).

    differs from the paper: it is sampled by plain DDIM, not with Analytic-DPM's variance.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # The paper scales z_i by 17.2 = 0.5375·√1024: a coordinate of a unit vector has standard
        # deviation 1/√D, pixels in [-1, 1] have 0.5375. The same rule here, for any D.
        self.scale = 0.5375 * c.dim ** 0.5
        # differs from the paper: what is diffused is whitened z_i, or its small axes would come out
        # as noise. The large ones then have 0.5375, those below Whitening.FLOOR less.
        self.whitening = Whitening(c.dim)
        self.diffusion = Diffusion(predict="x_0")        # the paper: better than predicting eps
        self.caption = Caption(c.vocab, c.context, c.dim, c.width)
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(),
                                  nn.Linear(c.width, c.width))
        self.z_i = nn.Linear(c.dim, c.width)
        self.final = nn.Parameter(torch.randn(c.width) * 0.02)
        self.position = nn.Parameter(torch.randn(4, c.width) * 0.02)     # z_t, t, z_i_t, final
        self.transformer = Transformer(c.width, c.depth)
        self.out = nn.Linear(c.width, c.dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z_i_t, t, z_t, tokens, drop):
        """The network f: the un-noised z_i, whitened and scaled (B, D). z_i_t (B, D), the same
        noised; t (B,); z_t (B, D); tokens (B, L); drop (B,) bool, whose captions to hide."""
        return self.predict(z_i_t, t, *self.read(z_t, tokens, drop))

    def read(self, z_t, tokens, drop):
        """The part of the sequence before t: what may be seen, and each block's keys and values.

        The mask being causal, none of it depends on what follows: a sampler reads a caption once.
        """
        x, visible = self.caption(z_t, tokens, drop)                             # (B, L + 1, width)
        x = torch.cat([x[:, :-1], x[:, -1:] + self.position[0]], 1)
        caches = [{} for _ in range(self.config.depth)]
        self.transformer(x, causal_mask_of(visible, x.shape[1]), caches)
        return visible, *(cache[key] for cache in caches for key in "kv")

    def predict(self, z_i_t, t, visible, *keys_and_values):
        """The rest of the sequence, [t | z_i_t | final], given what `read` returned → (B, D)."""
        time = self.time(timestep_embedding(t, self.config.width))               # (B, width)
        x = torch.stack([time, self.z_i(z_i_t), self.final.expand_as(time)], 1) + self.position[1:]
        mask = causal_mask_of(visible, visible.shape[1] + 3)[:, :, -3:]
        caches = [dict(k=k, v=v) for k, v in zip(keys_and_values[::2], keys_and_values[1::2])]
        return self.out(self.transformer(x, mask, caches)[:, -1])

    def loss(self, z_i, z_t, tokens, generator=None):
        """(f(z_i^(t), t, y) − z_i)², z_i whitened and scaled, averaged; a scalar.

        z_i, z_t (B, D), unit norm; tokens (B, L). t is random, 10 % of the captions are hidden.
        """
        B, device = len(z_i), z_i.device
        t = torch.randint(1, self.diffusion.T + 1, (B,), device=device, generator=generator)
        eps = torch.randn(z_i.shape, device=device, generator=generator)
        drop = torch.rand(B, device=device, generator=generator) < TEXT_DROP
        f = lambda z_i_t, t: self(z_i_t, t, z_t, tokens, drop)
        return self.diffusion.loss(f, self.whitening(z_i) * self.scale, t, eps)

    def weighed(self, answer, z_i_t, t):
        """The network's answer and z_i_t itself (B, D), scaled, at the steps t, each weighed by its
        precision, 1/error² → (B, D).

        differs from the paper: a Transformer copies z_i_t only roughly. With little noise left its
        answer is farther off than z_i_t, and samples come out too much alike. But along an axis on
        which z_i hardly varies it can't be far off, and z_i_t would leave its noise there.
        """
        signal, noise = self.diffusion.signal_and_noise(t, z_i_t)
        error = (self.scale * self.whitening.std() / 2).clamp(max=self.config.error)        # (D,)
        weight = (error * signal / noise) ** 2                   # precision of z_i_t / the answer's
        return (answer + weight * z_i_t / signal) / (1 + weight)

    @torch.no_grad()
    def sample(self, z_t, tokens, noise, candidates=2, guidance=None, steps=None, eta=None):
        """z_t (B, D), tokens (B, L) → z_i (B, D), unit norm.

        noise(): (B·candidates, D) standard normal, a caption's candidates side by side. Of each
        caption's candidates the one with the largest z_t·z_i is kept: two in the paper, 1 for an
        unbiased sample.
        """
        c = self.config
        guidance, steps, eta = (a if b is None else b for a, b in
                                zip((c.guidance, c.steps, c.eta), (guidance, steps, eta)))
        z_t, tokens = (a.repeat_interleave(candidates, 0) for a in (z_t, tokens))
        keep = torch.zeros(len(z_t), dtype=torch.bool, device=z_t.device)
        g = guided(self.predict, guidance, self.read(z_t, tokens, keep),
                   self.read(z_t, tokens, ~keep) if guidance != 1 else ())
        f = lambda z_i_t, t: self.weighed(g(z_i_t, t), z_i_t, t)
        z_i = self.diffusion.sample(f, noise(), steps, eta, noise) / self.scale
        # differs from the paper: along axes of little variance all z_i are the mean. What a prior
        # draws there fits the rest of z_i badly, and the decoder, which reads it, draws the misfit.
        drawn = self.whitening.std() * c.dim ** 0.5 >= c.least       # whitened: 1/√D is the largest
        z_i = F.normalize(self.whitening.inverse(z_i * drawn), dim=-1)
        best = (z_i * z_t).sum(-1).view(-1, candidates).argmax(dim=1)
        row = torch.arange(len(best), device=best.device)
        return z_i.view(len(best), candidates, -1)[row, best]


# ---- The autoregressive prior --------------------------------------------------------------------

@dataclass
class ARPriorConfig:
    """What the weights depend on, and how they are best sampled."""
    dim: int                 # of z_i and z_t
    vocab: int               # of CLIP's tokenizer
    context: int             # most tokens of a caption
    components: int          # PCA components, one code each
    buckets: int = 64        # values a code may have
    waves: int = 24          # cosines that its embedding and its logits are made of
    dot_buckets: int = 32    # values the quantised z_i·z_t may have
    width: int = 192
    depth: int = 4
    temperature: float = 0.8     # of drawing; the paper leaves it open
    guidance: float = 1.0


class PCATokens(nn.Module):
    """z_i as a few integers, and back (sec. 2.2): PCA, then each component put into a bucket.

    The buckets of a component hold equally many training embeddings each (the paper leaves the
    edges open), and decode to the mean of what they hold. All of it is state, saved with the prior.
    """

    def __init__(self, dim, components, buckets):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.zeros(components, dim))
        self.register_buffer("edges", torch.zeros(components, buckets - 1))
        self.register_buffer("centres", torch.zeros(components, buckets))

    @staticmethod
    def components_needed(eigenvalues, error=0.01):
        """The paper's rule: the fewest components with a relative squared error below 1 %."""
        left = 1 - eigenvalues.double().cumsum(0) / eigenvalues.double().sum()
        return int((left >= error).sum()) + 1

    def fit(self, z_i):
        """Take mean, axes, edges and centres from training embeddings z_i (N, D)."""
        k, buckets = self.centres.shape
        z_i = z_i.repeat(math.ceil(buckets / len(z_i)), 1)    # of too few, or a bucket is empty
        mean, axes, _ = principal(z_i)
        self.mean.copy_(mean)
        self.axes.copy_(axes[:k])
        values = ((z_i - mean) @ axes[:k].T).sort(dim=0).values             # (N, k), each sorted
        cuts = torch.arange(1, buckets, device=z_i.device) * len(z_i) // buckets
        self.edges.copy_(values[cuts].T)
        groups = torch.tensor_split(values, cuts.tolist())
        self.centres.copy_(torch.stack([group.mean(dim=0) for group in groups], dim=1))
        return self

    def encode(self, z_i):
        """z_i (B, D) → codes (B, components) long, the most telling component first."""
        values = (z_i - self.mean) @ self.axes.T                                # (B, k)
        return torch.searchsorted(self.edges, values.T.contiguous(), right=True).T

    def decode(self, codes):
        """codes (B, components) → z_i (B, D), unit norm."""
        values = self.centres.gather(1, codes.T).T                              # (B, k)
        return F.normalize(values @ self.axes + self.mean, dim=-1)


class ARPrior(nn.Module):
    """A causal Transformer that writes z_i down as codes, one after another (sec. 2.2).

    Sequence: [caption tokens | z_t | dot | code 1 | … | code k]. The dot is the quantised z_i·z_t.
    How can a function of z_i be an input, when z_i is what we are after? Read it as the first code:
    it says how well the picture fits its caption, and the codes after it are drawn given that.
    Training shows the true one. A sampler may draw it like any code, from p(dot | y): then z_i
    follows p(z_i | y); or from the upper half of all values alone: then it asks for good fits.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.pca = PCATokens(c.dim, c.components, c.buckets)
        self.register_buffer("dot_edges", torch.zeros(c.dot_buckets - 1))
        self.caption = Caption(c.vocab, c.context, c.dim, c.width)
        self.dot = nn.Embedding(c.dot_buckets, c.width)
        # differs from the paper: a code is no word, but a place on a scale, where neighbours mean
        # nearly the same. So its vector and its logit are made of a few cosines along that scale. A
        # free vector for every code would have to learn the order from the data, and overfits.
        x = (torch.arange(c.buckets) + 0.5) / c.buckets
        waves = (math.pi * x[:, None] * torch.arange(c.waves)).cos()           # (buckets, waves)
        self.register_buffer("waves", waves, persistent=False)
        self.code = nn.Parameter(torch.randn(c.components, c.waves, c.width) * 0.02)
        self.position = nn.Parameter(torch.randn(2 + c.components, c.width) * 0.02)    # z_t, dot, …
        self.transformer = Transformer(c.width, c.depth)
        self.dot_logits = nn.Linear(c.width, c.dot_buckets)
        self.code_logits = nn.Parameter(torch.zeros(c.components, c.width, c.waves))
        nn.init.normal_(self.dot.weight, std=0.02)

    def fit(self, z_i, z_t):
        """Take the PCA, the buckets and the dot's edges from training pairs, (N, D) each."""
        self.pca.fit(z_i)
        dots, n = (z_i * z_t).sum(-1).sort().values, self.config.dot_buckets
        self.dot_edges.copy_(dots[torch.arange(1, n, device=dots.device) * len(dots) // n])
        return self

    def embed(self, codes, first=0):
        """codes (B, n) of the components first … first + n − 1 → (B, n, width)."""
        end = first + codes.shape[1]
        x = torch.einsum("bkm,kmw->bkw", self.waves[codes], self.code[first:end])
        return x + self.position[2 + first:2 + end]

    def prefix(self, z_t, tokens, drop):
        """[caption tokens | z_t] (B, L + 1, width), and which of it may be seen."""
        x, visible = self.caption(z_t, tokens, drop)
        return torch.cat([x[:, :-1], x[:, -1:] + self.position[0]], 1), visible

    def forward(self, z_t, tokens, dot, codes, drop):
        """Logits of the dot (B, dot_buckets) and of every code given all before it (B, k, buckets).

        z_t (B, D); tokens (B, L); dot (B,) long; codes (B, k) long; drop (B,) bool, whom to hide.
        """
        prefix, visible = self.prefix(z_t, tokens, drop)
        dot = (self.dot(dot) + self.position[1])[:, None]
        x = torch.cat([prefix, dot, self.embed(codes[:, :-1])], 1)           # (B, L + 1 + k, width)
        h = self.transformer(x, causal_mask_of(visible, x.shape[1]))[:, tokens.shape[1]:]
        code_logits = torch.einsum("bkw,kwm->bkm", h[:, 1:], self.code_logits) @ self.waves.T
        return self.dot_logits(h[:, 0]), code_logits

    def loss(self, z_i, z_t, tokens, generator=None):
        """Cross-entropy of the codes and the dot, the caption hidden 10 % of the time; a scalar, in
        nats a symbol (log `buckets` is chance). z_i, z_t (B, D), unit norm; tokens (B, L)."""
        with torch.autocast(z_i.device.type, enabled=False):         # bfloat16 would blur the codes
            codes = self.pca.encode(z_i)
            dot = torch.bucketize((z_i * z_t).sum(-1), self.dot_edges, right=True)
        drop = torch.rand(len(z_i), device=z_i.device, generator=generator) < TEXT_DROP
        dot_logits, code_logits = self(z_t, tokens, dot, codes, drop)
        symbols = codes.numel() + dot.numel()
        return (F.cross_entropy(code_logits.flatten(0, 1).float(), codes.flatten(), reduction="sum")
                + F.cross_entropy(dot_logits.float(), dot, reduction="sum")) / symbols

    @torch.no_grad()
    def sample(self, z_t, tokens, generators=None, top_half=True, guidance=None, temperature=None):
        """z_t (B, D), tokens (B, L) → z_i (B, D), unit norm.

        top_half: draw the dot from the upper half of its training distribution (the paper's way; by
        the model's own p(dot | y), which knows what a caption can attain), else from all of it:
        with temperature 1, an unbiased sample. generators: one CPU generator a row, or None for
        torch's own.
        """
        c, (B, L), device = self.config, tokens.shape, tokens.device
        s = c.guidance if guidance is None else guidance
        temperature = c.temperature if temperature is None else temperature
        drop = torch.zeros(B, dtype=torch.bool, device=device)
        again = lambda a: torch.cat([a, a]) if s != 1 else a
        z_t, tokens = again(z_t), again(tokens)
        if s != 1:                                          # the null half runs beside the other
            drop = torch.cat([~drop, drop])
        x, visible = self.prefix(z_t, tokens, drop)
        caches = [{} for _ in range(c.depth)]               # keys and values of what is read
        mask = causal_mask_of(visible, L + 1 + c.components)
        dot_logits = guide(self.dot_logits(self.step(x, mask, caches)), s)
        if top_half:                                        # all buckets are equally full
            dot_logits[:, :c.dot_buckets // 2] = -math.inf
        dot = self.draw(dot_logits, generators, temperature)
        x, codes = (self.dot(again(dot)) + self.position[1])[:, None], []
        for k in range(c.components):
            logits = self.step(x, mask, caches) @ self.code_logits[k] @ self.waves.T
            codes.append(self.draw(guide(logits, s), generators, temperature))
            x = self.embed(again(codes[k])[:, None], k)
        return self.pca.decode(torch.stack(codes, 1))

    def step(self, x, mask, caches):
        """Read on, x (B, n, width) after what the caches hold → the last output (B, width)."""
        seen = caches[0]["k"].shape[1] if caches[0] else 0
        end = seen + x.shape[1]
        return self.transformer(x, mask[:, :, seen:end, :end], caches)[:, -1]

    @staticmethod
    def draw(logits, generators, temperature):
        """One value a row of logits (B, n), by the Gumbel trick; temperature 0: the largest."""
        if temperature == 0:
            return logits.argmax(dim=-1)
        if generators is None:
            u = torch.rand(logits.shape, device=logits.device)
        else:
            u = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in generators])
        gumbel = -torch.log(-torch.log(u.to(logits.device).clamp(1e-20, 1 - 1e-7)))
        return (logits.float() / temperature + gumbel).argmax(dim=-1)


def guide(logits, s):
    """Classifier-free guidance on logits (2·B, n), null half first → (B, n); s = 1 has none."""
    if s == 1:
        return logits
    null, cond = logits.chunk(2)
    return null + s * (cond - null)
