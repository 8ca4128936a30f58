"""p(x | z_i, y): from an image embedding to pixels (paper, sec. 2.1), and from few pixels to many.

One UNet serves both: the Decoder gives it z_i and the caption, the Upsampler a small picture.
CLIP is nowhere in this file: z_i and tokens come in as tensors. Next chapter: data.py.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from clip_tiny import PAD, Attention, TextEncoder, Whitening
from diffusion import Diffusion, guided, timestep_embedding

Z_I_DROP, TEXT_DROP = 0.1, 0.5      # how often training hides each, for guidance (sec. 2.1)
Z_I_CUT = 0.25                      # how often it hides all but a few components of z_i
Z_I_TOKENS = 4                      # context tokens made of z_i
SKETCH = 8                          # pixels a side of the sketch


# ---- The UNet ----------------------------------------------------------------------------------

class ResBlock(nn.Module):
    """Two convolutions around a shortcut; the embedding scales and shifts what is between them."""

    def __init__(self, c_in, c_out, emb_width):
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_width, 2 * c_out)
        self.norm_2, self.conv_2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)               # a new block is its shortcut

    def forward(self, x, emb):
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_2(F.silu(self.norm_2(h) * (1 + scale) + shift))
        return self.shortcut(x) + h


class ImageAttention(nn.Module):
    """Every place of a feature map attends to every other, and to the context."""

    def __init__(self, channels, context_width):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.attention = Attention(channels, channels // 32, context_width)
        nn.init.zeros_(self.attention.out.weight)

    def forward(self, x, context, visible):
        """x (B, C, H, W), context (B, M, context_width), visible (B, M) bool → (B, C, H, W)."""
        B, C, H, W = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)                        # (B, H·W, C)
        mask = F.pad(visible, (0, H * W), value=True)[:, None, None]       # (B, 1, 1, M + H·W)
        h = self.attention(h, mask, context)
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class Level(nn.Module):
    """A ResBlock, and attention after it if the level has any."""

    def __init__(self, c_in, c_out, emb_width, context_width):
        super().__init__()
        self.block = ResBlock(c_in, c_out, emb_width)
        self.attention = ImageAttention(c_out, context_width) if context_width else None

    def forward(self, x, emb, context, visible):
        x = self.block(x, emb)
        return self.attention(x, context, visible) if self.attention else x


class UNet(nn.Module):
    """The modified ADM/GLIDE network: halve the picture level by level, and back, with shortcuts.

    channels: of each level, the finest first; blocks: ResBlocks of each level, one way;
    attention: for each level, whether it attends (needs context_width).
    """

    def __init__(self, c_in, c_out, channels, blocks, attention, emb_width, context_width=None):
        super().__init__()
        self.emb_width = emb_width
        self.time = nn.Sequential(nn.Linear(emb_width, emb_width), nn.SiLU(),
                                  nn.Linear(emb_width, emb_width))
        self.stem = nn.Conv2d(c_in, channels[0], 3, padding=1)
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        levels = list(zip(channels, blocks, [context_width if a else None for a in attention]))
        width = channels[0]
        for k, (C, n, attends) in enumerate(levels):
            if k > 0:
                self.shrink.append(nn.Conv2d(width, C, 3, stride=2, padding=1))
            self.down.append(nn.ModuleList(Level(C, C, emb_width, attends) for _ in range(n)))
            width = C
        self.middle = nn.ModuleList([Level(width, width, emb_width, levels[-1][2]),
                                     Level(width, width, emb_width, None)])
        for k, (C, n, attends) in reversed(list(enumerate(levels))):
            self.up.append(nn.ModuleList(Level(2 * C, C, emb_width, attends) for _ in range(n)))
            if k > 0:
                self.grow.append(nn.Conv2d(C, channels[k - 1], 3, padding=1))
        self.norm = nn.GroupNorm(8, channels[0])
        self.out = nn.Conv2d(channels[0], c_out, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, t, emb=0, context=None, visible=None):
        """x (B, c_in, H, W), t (B,), emb (B, emb_width) added to the timestep's, context
        (B, M, context_width), visible (B, M) bool, which of it is → (B, c_out, H, W)."""
        emb = F.silu(self.time(timestep_embedding(t, self.emb_width)) + emb)
        h, skips = self.stem(x), []
        for k, level in enumerate(self.down):
            if k > 0:
                h = self.shrink[k - 1](h)
            for block in level:
                h = block(h, emb, context, visible)
                skips.append(h)
        for block in self.middle:
            h = block(h, emb, context, visible)
        for k, level in enumerate(self.up):
            for block in level:
                h = block(torch.cat([h, skips.pop()], dim=1), emb, context, visible)
            if k < len(self.grow):
                h = self.grow[k](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.out(F.silu(self.norm(h)))


# ---- The decoder -------------------------------------------------------------------------------

@dataclass
class DecoderConfig:
    """What the weights depend on, and how they are best sampled."""
    dim: int                             # of z_i
    vocab: int                           # of CLIP's tokenizer
    context: int                         # most tokens of a caption
    image_size: int = 32                 # pixels a side
    channels: tuple = (32, 64, 128)      # of each level, the finest first
    blocks: tuple = (1, 1, 2)            # of each level
    attention: tuple = (False, True, True)
    emb_width: int = 128                 # of the timestep embedding
    text_width: int = 128
    text_depth: int = 2
    sketch_width: int = 512
    predict: str = "v"
    steps: int = 16                      # of sampling
    eta: float = 0.0
    guidance: float = 2.5


class Decoder(nn.Module):
    """Pictures from embeddings (sec. 2.1): z_i enters the UNet twice, the caption as in GLIDE.

    z_i is added to the timestep embedding, and makes four tokens of context; the caption's own
    Transformer adds its last output to the timestep embedding, and all its outputs to the context.
    differs from the paper: the UNet is also shown a sketch, the mean picture E[x | z_i, y] of 8×8
    pixels. That is what it should answer to pure noise, and what it is slowest to learn; a small
    MLP learns it from many more pictures in the same time.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # differs from the paper: it predicts eps, and learns the sampler's variance. A target of v
        # weighs all noise levels alike, which suits a short training; DDIM needs no variance.
        self.diffusion = Diffusion(predict=c.predict)
        self.scale = c.dim ** 0.5              # whitened coordinates → of variance 1 at most
        # differs from the paper: z_i is whitened, or what captions leave out would hardly be read
        self.whitening = Whitening(c.dim)
        self.null_z_i = nn.Parameter(torch.zeros(c.dim))
        self.null_text = nn.Parameter(torch.zeros(c.emb_width))
        self.z_i_emb = nn.Linear(c.dim, c.emb_width)
        self.z_i_tokens = nn.Linear(c.dim, Z_I_TOKENS * c.text_width)
        self.text = TextEncoder(c.vocab, c.context, c.text_width, c.text_depth)
        self.text_emb = nn.Linear(c.text_width, c.emb_width)
        self.sketch = nn.Sequential(
            nn.Linear(c.dim + c.emb_width, c.sketch_width), nn.GELU(),
            nn.Linear(c.sketch_width, c.sketch_width), nn.GELU(),
            nn.Linear(c.sketch_width, 3 * SKETCH * SKETCH), nn.Unflatten(1, (3, SKETCH, SKETCH)))
        self.unet = UNet(6, 3, c.channels, c.blocks, c.attention, c.emb_width, c.text_width)

    def forward(self, x_t, t, z_i, tokens, drop_z_i, drop_text):
        """The network f. x_t (B, 3, H, W); t (B,); z_i (B, D), of norm 1 or cut; tokens (B, L);
        drop_z_i, drop_text (B,) bool: whose condition to hide. → (B, 3, H, W)"""
        z_i, text, text_emb = self.read(z_i, tokens, drop_z_i, drop_text)
        emb = self.z_i_emb(z_i) + text_emb                               # (B, emb_width)
        z_i_tokens = self.z_i_tokens(z_i).unflatten(1, (Z_I_TOKENS, -1))
        context = torch.cat([z_i_tokens, text], dim=1)                   # (B, 4 + L, C)
        visible = (tokens != PAD) & ~drop_text[:, None]
        # detached: the sketch is to be the mean picture, and learns from sketch_loss alone
        sketch = self.sketch(torch.cat([z_i, text_emb], dim=1)).detach()
        x = torch.cat([x_t, F.interpolate(sketch, x_t.shape[-2:], mode="bilinear")], dim=1)
        return self.unet(x, t, emb, context, F.pad(visible, (Z_I_TOKENS, 0), value=True))

    def read(self, z_i, tokens, drop_z_i, drop_text):
        """The two conditions, or their nulls: z_i (B, D), the caption's outputs (B, L, C) and what
        it adds to the timestep embedding (B, emb_width)."""
        text, end = self.text(tokens)
        z_i = torch.where(drop_z_i[:, None], self.null_z_i, self.whitening(z_i) * self.scale)
        return z_i, text, torch.where(drop_text[:, None], self.null_text, self.text_emb(end))

    def hide(self, z_i, generator=None):
        """What training hides at random: z_i, perhaps cut; drop_z_i, drop_text (B,).

        differs from the paper: the cut, which keeps the first k components, log k being uniform. It
        prepares for Fig. 7, and for the AR prior, which draws no more than the first few.
        """
        B, D, device = *z_i.shape, z_i.device
        rand = lambda: torch.rand(B, 1, device=device, generator=generator)
        shown = (rand() > Z_I_CUT) | (torch.arange(D, device=device) < D ** rand())
        z_i = self.whitening.inverse(self.whitening(z_i) * shown)
        return z_i, rand()[:, 0] < Z_I_DROP, rand()[:, 0] < TEXT_DROP

    def sketch_loss(self, x, z_i, tokens, generator=None):
        """Mean squared error of the sketch, a scalar; takes what loss() takes."""
        z_i, *drops = self.hide(z_i, generator)
        z_i, _, text_emb = self.read(z_i, tokens, *drops)
        sketch = self.sketch(torch.cat([z_i, text_emb], dim=1))
        return F.mse_loss(sketch, F.adaptive_avg_pool2d(x, SKETCH))

    def loss(self, x, z_i, tokens, generator=None):
        """Error of the prediction at random t, with z_i hidden 10 %, the caption 50 % of the time.

        x (B, 3, H, W) in [-1, 1]; z_i (B, D), the true one of x, never a prior's; tokens (B, L);
        a scalar.
        """
        B, device = len(x), x.device
        t = torch.randint(1, self.diffusion.T + 1, (B,), device=device, generator=generator)
        z_i, *drops = self.hide(z_i, generator)
        eps = torch.randn(x.shape, device=device, generator=generator)
        f = lambda x_t, t: self(x_t, t, z_i, tokens, *drops)
        return self.diffusion.loss(f, x, t, eps)

    def predictor(self, z_i, tokens, guidance=1.0):
        """f(x_t, t) for the sampler and the inversion, guided by s = guidance.

        z_i (B, D) or None, tokens (B, L) or None, but not both: None is the null. Guidance's null
        drops both.
        """
        given = z_i if z_i is not None else tokens
        B, device = len(given), given.device
        drop = lambda condition: torch.full((B,), condition is None, device=device)
        drops, all_dropped = (drop(z_i), drop(tokens)), (drop(None), drop(None))
        z_i = torch.zeros(B, self.config.dim, device=device) if z_i is None else z_i
        tokens = torch.full((B, 1), PAD, device=device) if tokens is None else tokens
        return guided(self, guidance, (z_i, tokens, *drops), (z_i, tokens, *all_dropped))

    @torch.no_grad()
    def sample(self, z_i, tokens, noise, guidance=None, steps=None, eta=None):
        """z_i (B, D) (or z_t in its place, or None), tokens (B, L) or None → x (B, 3, H, W).

        noise(): (B, 3, H, W) standard normal, drawn once, and again at each step if eta > 0.
        """
        c = self.config
        guidance, steps, eta = (a if b is None else b for a, b in
                                zip((c.guidance, c.steps, c.eta), (guidance, steps, eta)))
        f = self.predictor(z_i, tokens, guidance)
        clip = lambda x_0: x_0.clamp(-1, 1)
        return clip(self.diffusion.sample(f, noise(), steps, eta, noise, clip))


# ---- The upsampler -----------------------------------------------------------------------------

@dataclass
class UpsamplerConfig:
    """What the weights depend on, and how they are best sampled."""
    factor: int = 4                      # 32 to 128; differs from the paper: 64 to 256 to 1,024
    channels: tuple = (24, 48, 96)
    blocks: tuple = (1, 1, 2)
    emb_width: int = 128
    predict: str = "v"
    steps: int = 10
    eta: float = 0.0


class Upsampler(nn.Module):
    """A larger picture from a small one (sec. 2.1): convolutions only, no caption, no guidance.

    Being convolutional it trains on crops, a quarter of the side, and is applied to whole pictures.
    differs from the paper: a second one, for larger pictures still, is trained there on input
    corrupted by BSR degradation; here any stage's input is slightly blurred. And it is blurred
    when sampling too: a network this small learns to undo just that blur, and would surround
    what is sharp already with halos.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.diffusion = Diffusion(predict=c.predict)
        self.unet = UNet(6, 3, c.channels, c.blocks, [False] * len(c.channels), c.emb_width)

    def enlarge(self, low):
        """(B, 3, h, w) → (B, 3, h·factor, w·factor), slightly blurred, bicubic."""
        return F.interpolate(blur(low), scale_factor=float(self.config.factor), mode="bicubic")

    def forward(self, x_t, t, low):
        """The network f: x_t (B, 3, H, W), t (B,), low (B, 3, H, W) enlarged → (B, 3, H, W)."""
        return self.unet(torch.cat([x_t, low], dim=1), t)

    def loss(self, x, generator=None):
        """x (B, 3, S, S) in [-1, 1], full size; trains on a crop of each, a quarter of the side."""
        B, S, device, k = len(x), x.shape[-1], x.device, self.config.factor
        low = self.enlarge(F.avg_pool2d(x, k))
        rand = lambda: torch.rand(B, device=device, generator=generator)
        side = S // 4                    # crops start on a small pixel's edge, as whole pictures do
        rows, columns = ((rand() * ((S - side) // k + 1)).long() * k for _ in range(2))
        i = torch.arange(side, device=device)
        where = (torch.arange(B, device=device)[:, None, None], slice(None),
                 (rows[:, None] + i)[:, :, None], (columns[:, None] + i)[:, None])
        x, low = (a[where].permute(0, 3, 1, 2) for a in (x, low))          # (B, 3, S/4, S/4)
        t = (rand() * self.diffusion.T).long() + 1
        eps = torch.randn(x.shape, device=device, generator=generator)
        return self.diffusion.loss(lambda x_t, t: self(x_t, t, low), x, t, eps)

    @torch.no_grad()
    def sample(self, low, noise, steps=None, eta=None):
        """low (B, 3, h, w) in [-1, 1] → (B, 3, h·factor, w·factor); noise() of that shape.

        differs from the paper: every estimate of x_0 is shifted, smoothly, to have the small
        picture's pixels as means. The network gets edges right, but flat colours only roughly.
        """
        c = self.config
        steps, eta = c.steps if steps is None else steps, c.eta if eta is None else eta
        enlarged = self.enlarge(low)
        f = lambda x_t, t: self(x_t, t, enlarged)

        def correct(x_0):
            x_0 = x_0.clamp(-1, 1)
            off = low - F.avg_pool2d(x_0, c.factor)
            return x_0 + F.interpolate(off, scale_factor=float(c.factor), mode="bicubic")
        return self.diffusion.sample(f, noise(), steps, eta, noise, correct).clamp(-1, 1)


def blur(x, sigma=0.6):
    """Gaussian blur, kernel 3: the slight corruption of the small picture (sec. 2.1)."""
    i = torch.arange(-1, 2, device=x.device, dtype=x.dtype)
    g = torch.exp(-(i / sigma) ** 2 / 2)
    kernel = (g[:, None] * g / g.sum() ** 2).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])
