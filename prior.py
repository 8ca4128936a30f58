"""p(z_i | y): the image embedding that a caption may have (paper, sec. 2.2), drawn in two ways.

A caption fits many pictures, so it has many z_i. A prior draws one of them, given the caption's
tokens and z_t, the caption's own embedding. Since z_t is a function of y, p(z_i | y, z_t) is
p(z_i | y). Both of the paper's priors are here:

    DiffusionPrior     z_i is un-noised, all coordinates at once
    ARPrior            z_i is written down as codes, one after another

CLIP itself is nowhere in this file. Embeddings and tokens come in as tensors, and z_i is whitened
(CLIP.whiten). A hidden condition is all zeros: no z_t, and a caption of padding.

Next chapter: decoder.py.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from clip_tiny import PAD, Transformer, causal_mask
from diffusion import Diffusion, guided, timestep_embedding


# ---- The diffusion prior -----------------------------------------------------------------------

@dataclass
class DiffusionPriorConfig:
    """What the weights depend on."""
    dim: int                 # of z_i and z_t
    vocab: int               # of CLIP's tokenizer
    context: int             # most tokens of a caption
    width: int = 192
    depth: int = 5
    drop_text: float = 0.1   # how often training hides the caption, for guidance (sec. 2.2)


class DiffusionPrior(nn.Module):
    """A causal Transformer that un-noises z_i (sec. 2.2).

    The sequence: [caption tokens | z_t | timestep | noised z_i | a learnt final embedding]. Each
    position sees itself and what stands before it, but no padding. So the final embedding sees
    all, and the output there is v. The loss compares the z_i computed from v with the true z_i.
    differs from the paper: the paper's prior reads "encoded text", this one embedded tokens. (App.
    C names a text encoder for the AR prior only, so the paper may do the same.)
    """

    # The noise schedule was made for pixels in [-1, 1], so the paper scales z_i to their variance.
    # Its factor is 17.2 for z_i of unit norm with 1,024 coordinates, whose std is 1/√1024: the
    # product is 0.5375. Here that is the factor: main axes of whitened z_i have a std of nearly 1.
    SCALE = 0.5375

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # x_0 is z_i here. The paper found a loss on x_0 better than on eps, and gives no reason.
        # power=2: a sampler's steps are smaller near t = 0, where the axes that whitening leaves
        # small are decided.
        self.diffusion = Diffusion(objective="x_0", power=2)
        self.token = nn.Embedding(c.vocab, c.width)
        self.position = nn.Parameter(torch.randn(c.context + 4, c.width) * 0.02)
        self.z_t = nn.Linear(c.dim, c.width)
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(),
                                  nn.Linear(c.width, c.width))
        self.z_i = nn.Linear(c.dim, c.width)
        self.final = nn.Parameter(torch.randn(c.width) * 0.02)
        self.transformer = Transformer(c.width, c.depth)
        self.out = nn.Linear(c.width, c.dim)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z_i_t, t, z_t, tokens):
        """The network f: z_i_t (B, D), SCALE·z_i with noise; t (B,); z_t (B, D); tokens (B, L) →
        v (B, D)."""
        B, L = tokens.shape
        text = self.token(tokens)                                             # (B, L, width)
        # The factors of z_t and z_i_t bring their coordinates to order 1.
        z_t = self.z_t(z_t * self.config.dim ** 0.5)[:, None]                 # (B, 1, width)
        time = self.time(timestep_embedding(t, self.config.width))[:, None]   # (B, 1, width)
        z_i_t = self.z_i(z_i_t / self.SCALE)[:, None]                         # (B, 1, width)
        final = self.final.expand(B, 1, -1)                                   # (B, 1, width)
        position = torch.cat([self.position[:L], self.position[-4:]])         # (L + 4, width)
        x = torch.cat([text, z_t, time, z_i_t, final], dim=1) + position      # (B, L + 4, width)
        visible = F.pad(tokens != PAD, (0, 4), value=True)                    # (B, L + 4)
        return self.out(self.transformer(x, causal_mask(visible))[:, -1])     # (B, D)

    def loss(self, z_i, z_t, tokens, generator=None):
        """The mean of (SCALE·ẑ_i − SCALE·z_i)² at random t: a scalar. ẑ_i is computed from the
        answer v at (z_i_t, t, y).

        z_i (B, D), whitened; z_t (B, D), unit norm; tokens (B, L). Where training hides the caption
        it hides z_t too: z_t would give the caption away.
        """
        u = torch.rand(len(z_i), 1, device=z_i.device, generator=generator)
        shown = u >= self.config.drop_text
        f = lambda z_i_t, t: self(z_i_t, t, z_t * shown, tokens * shown)
        return self.diffusion.loss(f, z_i * self.SCALE, generator)

    @torch.no_grad()
    def sample(self, z_t, tokens, noise, steps=32, eta=0.0, guidance=1.0):
        """z_t (B, D), tokens (B, L) → z_i (B, D), whitened. noise(): (B, D) standard normal.

        The paper trained its prior for guidance (sec. 2.2), and then found that guidance hurts
        (sec. 5.5). So this prior is unguided by default.
        differs from the paper: the paper samples by Analytic-DPM, this code by DDIM. In few steps
        DDPM adds too little noise, so its z_i vary too little. DDIM loses about half as much: of
        exact Gaussians 32 steps keep 84 to 92 % of the spread, 32 of DDPM 70 to 86 %.
        """
        f = guided(self, guidance, (z_t, tokens))
        return self.diffusion.sample(f, noise(), steps, eta, noise) / self.SCALE


# ---- The autoregressive prior --------------------------------------------------------------------

@dataclass
class ARPriorConfig:
    """What the weights depend on."""
    dim: int                 # of z_i and z_t
    vocab: int               # of CLIP's tokenizer
    context: int             # most tokens of a caption
    components: int          # coordinates of z_i, one code each; the paper: 319 of 1,024
    buckets: int = 64        # values a code may have; the paper: 1,024
    width: int = 192
    depth: int = 4
    drop_text: float = 0.1   # as in the paper, for guidance


class Codes(nn.Module):
    """Real numbers as small integers, and back. Each of n columns has buckets of its own.

    The buckets of a column hold equally many training values each (the paper does not give its
    edges), and decode to the mean of what they hold. Edges and centres are saved with the prior.
    """

    def __init__(self, n, buckets):
        super().__init__()
        self.register_buffer("edges", torch.zeros(n, buckets - 1))
        self.register_buffer("centres", torch.zeros(n, buckets))

    def fit(self, values):
        """Take edges and centres from training values (N, n); N is at least the buckets."""
        n, buckets = self.centres.shape
        assert len(values) >= buckets, (len(values), buckets)
        cuts = torch.arange(1, buckets, device=values.device) * len(values) // buckets
        values = values.sort(dim=0).values                                      # (N, n)
        self.edges.copy_(values[cuts].T)
        groups = torch.tensor_split(values, cuts.tolist())
        self.centres.copy_(torch.stack([group.mean(dim=0) for group in groups], dim=1))

    def encode(self, values):
        """values (B, n) → codes (B, n) long, rising with the value."""
        return torch.searchsorted(self.edges, values.T.contiguous(), right=True).T

    def decode(self, codes):
        """codes (B, n) → values (B, n)."""
        return self.centres.gather(1, codes.T).T


class ARPrior(nn.Module):
    """A causal Transformer that writes z_i down as codes, one after another (sec. 2.2).

    The sequence: [caption tokens | z_t | dot | code 1 | … | code k]. Code j is coordinate j of z_i
    in buckets. CLIP.fit_axes made the axes principal ones, so the first codes say most, and k of
    them are enough: those that hold 99 % of the variance.

    The dot is z_i·z_t in buckets: it says how well the picture fits its caption. In training z_i is
    known, so the true dot is shown. In sampling z_i is not known yet: the dot is drawn first, and
    then the codes given the dot. If the dot is drawn from p(dot | y), z_i follows p(z_i | y). If it
    is drawn from the upper half alone, this asks for a good fit. The dot and the codes are the
    symbols. Each position sees itself and what stands before it; its target is the next symbol.
    differs from the paper: the paper's AR prior has a Transformer text encoder (app. C);
    here the tokens are embedded. And k covers 99 % of the variance of whitened z_i, not of plain
    z_i: where objects are is in axes that hold little of the plain variance.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.codes, self.dots = Codes(c.components, c.buckets), Codes(1, c.buckets)
        self.token = nn.Embedding(c.vocab, c.width)
        self.z_t = nn.Linear(c.dim, c.width)
        # The last row of these two is never read: the last code is only a target.
        self.symbol = nn.Parameter(torch.randn(1 + c.components, c.buckets, c.width) * 0.02)
        self.position = nn.Parameter(torch.randn(c.context + 2 + c.components, c.width) * 0.02)
        self.transformer = Transformer(c.width, c.depth)
        self.out = nn.Parameter(torch.zeros(1 + c.components, c.width, c.buckets))
        nn.init.normal_(self.token.weight, std=0.02)

    def fit(self, z_i, dot):
        """Take the buckets from training pairs: whitened z_i (N, D), and dot (N,) = z_i·z_t."""
        self.codes.fit(z_i[:, :self.config.components])
        self.dots.fit(dot[:, None])
        return self

    def forward(self, z_t, tokens, symbols):
        """z_t (B, D), tokens (B, L), symbols (B, n) long, the dot and then codes, n ≤ components →
        the logits of symbol 0 (the dot), 1, … n, each given all before it: (B, n + 1, buckets).
        """
        (B, L), n = tokens.shape, symbols.shape[1]
        text = self.token(tokens)                                             # (B, L, width)
        z_t = self.z_t(z_t * self.config.dim ** 0.5)[:, None]                 # (B, 1, width)
        written = self.symbol[torch.arange(n, device=symbols.device), symbols]      # (B, n, width)
        after = self.position[self.config.context:][:n + 1]                   # (n + 1, width)
        position = torch.cat([self.position[:L], after])                      # (L + 1 + n, width)
        x = torch.cat([text, z_t, written], dim=1) + position                 # (B, L + 1 + n, …)
        visible = F.pad(tokens != PAD, (0, 1 + n), value=True)                # (B, L + 1 + n)
        h = self.transformer(x, causal_mask(visible))[:, L:]                  # (B, n + 1, width)
        return torch.einsum("bnw,nwm->bnm", h, self.out[:n + 1])

    def loss(self, z_i, z_t, dot, tokens, generator=None):
        """Mean cross-entropy of the dot and the codes, in nats (log `buckets` is chance): a scalar.

        z_i (B, D), whitened; z_t (B, D), unit norm; dot (B,) = z_i·z_t; tokens (B, L). Where the
        caption and z_t are hidden the dot is not: it is one of the symbols.
        """
        codes = self.codes.encode(z_i[:, :self.config.components].float())
        symbols = torch.cat([self.dots.encode(dot[:, None].float()), codes], dim=1)
        u = torch.rand(len(tokens), 1, device=tokens.device, generator=generator)
        shown = u >= self.config.drop_text
        logits = self(z_t * shown, tokens * shown, symbols[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), symbols.flatten())

    @torch.no_grad()
    def sample(self, z_t, tokens, generators, top_half=True, temperature=1.0, guidance=2.0):
        """z_t (B, D), tokens (B, L) → z_i (B, D), whitened; coordinates without a code are 0, the
        mean. generators: one CPU torch.Generator a row.

        top_half: the dot is drawn from p(dot | y), cut to the upper half of the training values.
        temperature: 0 takes the likeliest symbol each time. guidance: how strongly the caption and
        z_t guide each symbol, the dot too (sec. 2.2). With top_half False, temperature 1 and
        guidance 1, z_i follows p(z_i | y).
        differs from the paper: the paper says "the top half of the distribution", and no condition.
        Here the dot is drawn given y, since not every caption can be fitted equally well.
        differs from the paper: the paper found that guidance hurts (sec. 5.5). Here half of the
        unguided z_i for "a purple cylinder", a pair that training never held, show a blue one.
        """
        next_logits = guided(lambda symbols, z_t, tokens: self(z_t, tokens, symbols)[:, -1].float(),
                             guidance, (z_t, tokens))
        symbols = tokens.new_zeros(len(tokens), 0)
        for k in range(1 + self.config.components):
            logits = next_logits(symbols)                                     # (B, buckets)
            if k == 0 and top_half:                                  # buckets are equally full
                logits[:, :self.config.buckets // 2] = -torch.inf
            # Gumbel's trick: the argmax below is a draw from softmax(logits / temperature).
            u = torch.stack([torch.rand(self.config.buckets, generator=g) for g in generators])
            gumbel = -torch.log(-torch.log(u.to(logits.device).clamp(min=1e-20)))
            drawn = (logits + temperature * gumbel).argmax(dim=1, keepdim=True)
            symbols = torch.cat([symbols, drawn], dim=1)
        values = self.codes.decode(symbols[:, 1:])
        return F.pad(values, (0, self.config.dim - values.shape[1]))
