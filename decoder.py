"""p(x | z_i, y): from an image embedding to pixels (paper, sec. 2.1), and from few pixels to many.

Decoder and Upsampler each have a UNet of the class below. It reads x_t and a second picture: the
sketch that the Decoder makes of z_i, or the small picture, which the Upsampler has enlarged.
CLIP is nowhere in this file. z_i, whitened (CLIP.whiten), and tokens come in as tensors; a hidden
condition is all zeros. Next chapter: train.py.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from clip_tiny import PAD, TextEncoder
from diffusion import Diffusion, guided, timestep_embedding

# ---- The UNet ----------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """Two convolutions and a shortcut past them: x (B, c_in, H, W) → (B, c_out, H, W). Between the
    two, emb (B, emb_width), which holds the timestep and the conditions, scales and shifts."""

    def __init__(self, c_in, c_out, emb_width):
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_width, 2 * c_out)
        self.norm_2, self.conv_2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)               # a new block starts near its shortcut

    def forward(self, x, emb):
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_2(F.silu(self.norm_2(h) * (1 + scale) + shift))
        return self.shortcut(x) + h


class ImageAttention(nn.Module):
    """Every place of a feature map attends to every other, and to the context (GLIDE): keys and
    values of both are concatenated."""

    def __init__(self, channels, context_width):
        super().__init__()
        self.heads = channels // 32
        self.norm, self.qkv = nn.GroupNorm(8, channels), nn.Linear(channels, 3 * channels)
        self.context_kv = nn.Linear(context_width, 2 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, context, visible):
        """x (B, C, H, W), context (B, M, context_width), visible (B, M) bool → (B, C, H, W)."""
        B, C, H, W = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)                        # (B, H·W, C)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        k_context, v_context = self.context_kv(context).chunk(2, dim=-1)   # (B, M, C) each
        k, v = torch.cat([k_context, k], 1), torch.cat([v_context, v], 1)  # (B, M + H·W, C)
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        mask = F.pad(visible, (0, H * W), value=True)[:, None, None]       # (B, 1, 1, M + H·W)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)        # (B, heads, H·W, 32)
        h = self.out(h.transpose(1, 2).flatten(2))                         # (B, H·W, C)
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class UNetBlock(nn.Module):
    """A ResBlock, and attention after it if its level attends."""

    def __init__(self, c_in, c_out, emb_width, context_width):
        super().__init__()
        self.block = ResBlock(c_in, c_out, emb_width)
        self.attention = ImageAttention(c_out, context_width) if context_width else None

    def forward(self, x, emb, context, visible):
        x = self.block(x, emb)
        return self.attention(x, context, visible) if self.attention else x


class UNet(nn.Module):
    """A small UNet, as ADM's and GLIDE's: halve the picture level by level, and back, with skips.

    differs from the paper: ADM and GLIDE shrink and grow by residual blocks, have one more skip and
    block at each level of the way up, and heads of 64 channels (here 32).
    channels: of each level, the finest first. blocks: how many each level has on the way down, and
    again on the way up. attention: for each level, whether it attends (needs context_width).
    """

    def __init__(self, channels, blocks, attention, emb_width, context_width=None):
        super().__init__()
        self.emb_width = emb_width
        self.time = nn.Sequential(nn.Linear(emb_width, emb_width), nn.SiLU(),
                                  nn.Linear(emb_width, emb_width))
        self.stem = nn.Conv2d(6, channels[0], 3, padding=1)     # x_t and a picture, 3 channels each
        self.down, self.shrink, self.up, self.grow = (nn.ModuleList() for _ in range(4))
        reading = [context_width if a else None for a in attention]     # the context's width
        levels = list(zip(channels, blocks, reading))
        for k, (C, n, reads) in enumerate(levels):
            if k > 0:
                self.shrink.append(nn.Conv2d(channels[k - 1], C, 3, stride=2, padding=1))
            self.down.append(nn.ModuleList(UNetBlock(C, C, emb_width, reads) for _ in range(n)))
        C, _, reads = levels[-1]                                        # the coarsest
        self.middle = nn.ModuleList([UNetBlock(C, C, emb_width, reads),
                                     UNetBlock(C, C, emb_width, None)])
        for k, (C, n, reads) in reversed(list(enumerate(levels))):
            self.up.append(nn.ModuleList(UNetBlock(2 * C, C, emb_width, reads) for _ in range(n)))
            if k > 0:
                self.grow.append(nn.Conv2d(C, channels[k - 1], 3, padding=1))
        self.norm = nn.GroupNorm(8, channels[0])
        self.out = nn.Conv2d(channels[0], 3, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, t, emb=0, context=None, visible=None):
        """x (B, 6, H, W), t (B,), emb (B, emb_width) added to the timestep's, context
        (B, M, context_width), visible (B, M) bool → (B, 3, H, W)."""
        emb = F.silu(self.time(timestep_embedding(t, self.emb_width)) + emb)   # (B, emb_width)
        h, skips = self.stem(x), []                                            # (B, C_0, H, W)
        for k, level in enumerate(self.down):
            if k > 0:
                h = self.shrink[k - 1](h)                                      # (B, C_k, H/2^k, …)
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
        return self.out(F.silu(self.norm(h)))                                  # (B, 3, H, W)


# ---- The decoder -------------------------------------------------------------------------------

@dataclass
class DecoderConfig:
    """What the weights depend on."""
    dim: int                             # of z_i
    vocab: int                           # of CLIP's tokenizer
    context: int                         # most tokens of a caption (not what attention reads)
    image_size: int = 32                 # pixels a side
    channels: tuple = (32, 64, 128)      # of each level, the finest first
    blocks: tuple = (1, 1, 2)            # of each level
    attention: tuple = (False, True, True)
    width: int = 128                     # of the timestep embedding and the caption's Transformer
    text_depth: int = 2
    sketch_size: int = 16                # pixels a side of the sketch, see Decoder
    sketch_width: int = 1024             # of the MLP that draws it
    sketch_depth: int = 3                # its hidden layers
    # How often training hides each condition (sec. 2.1). They are hidden independently, so in 5 %
    # of cases both are. Guidance needs a network that can draw without both; the manipulations
    # need one that can draw without a caption.
    drop_z_i: float = 0.1                # 1: a text-only decoder, like GLIDE
    drop_text: float = 0.5


class Decoder(nn.Module):
    """Pictures from embeddings (sec. 2.1), and from captions as in GLIDE.

    As in the paper, z_i is added to the timestep embedding, and makes four tokens of context. The
    caption is read by the decoder's own Transformer, whose output at the text's end is added to the
    timestep embedding; all its outputs join the context. In training, z_i is that of the picture
    itself: the decoder learns to invert CLIP. In drawing, a prior's z_i takes its place, of which
    there is no picture yet.
    differs from the paper: the variance of a sampling step is DDPM's, not learnt. The caption's
    Transformer is causal, GLIDE's is not. And z_i enters in a third way: the UNet is shown a
    sketch, a small estimate of the mean picture E[x | z_i]. This mean is the best guess of x_0 from
    pure noise. The UNet learns it slowly; an MLP learns it soon, and is cheap.
    """

    Z_I_TOKENS = 4

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.diffusion = Diffusion(objective="eps")
        self.z_i_emb = nn.Linear(c.dim, c.width)
        self.z_i_tokens = nn.Linear(c.dim, self.Z_I_TOKENS * c.width)
        self.text = TextEncoder(c.vocab, c.context, c.width, c.text_depth)
        self.text_emb = nn.Linear(c.width, c.width)
        widths, side = [c.dim] + [c.sketch_width] * c.sketch_depth, c.sketch_size
        hidden = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.GELU())]
        self.sketch = nn.Sequential(*hidden, nn.Linear(widths[-1], 3 * side ** 2),
                                    nn.Unflatten(1, (3, side, side)))
        self.unet = UNet(c.channels, c.blocks, c.attention, c.width, c.width)

    def forward(self, x_t, t, z_i, tokens):
        """The network f: x_t (B, 3, H, W), t (B,), z_i (B, D), tokens (B, L) → v (B, 3, H, W)."""
        z_i = z_i * (self.config.drop_z_i < 1)       # a text-only decoder never learnt to read it
        text, end = self.text(tokens)                                    # (B, L, width), (B, width)
        emb = self.z_i_emb(z_i) + self.text_emb(end)                     # (B, width)
        z_i_tokens = self.z_i_tokens(z_i).unflatten(1, (self.Z_I_TOKENS, -1))     # (B, 4, width)
        context = torch.cat([z_i_tokens, text], dim=1)                   # (B, 4 + L, width)
        visible = F.pad(tokens != PAD, (self.Z_I_TOKENS, 0), value=True)          # (B, 4 + L)
        # Detached: the sketch is to be the mean picture, and learns from its own error alone.
        sketch = self.draw_sketch(z_i).detach()                          # (B, 3, 16, 16)
        x = torch.cat([x_t, F.interpolate(sketch, x_t.shape[-2:], mode="bilinear")], dim=1)
        return self.unet(x, t, emb, context, visible)

    def draw_sketch(self, z_i):
        """z_i (B, D) → E[x | z_i] (B, 3, sketch_size, sketch_size)."""
        return self.sketch(4 * z_i)     # 4: the MLP then reacts more to z_i, and learns faster

    def sketch_error(self, x, z_i):
        """The mean squared error of the sketches of x (B, 3, H, W) by z_i (B, D): a scalar."""
        return F.mse_loss(self.draw_sketch(z_i), F.adaptive_avg_pool2d(x, self.config.sketch_size))

    def loss(self, x, z_i, tokens, generator=None):
        """The weighted error at random t (Diffusion.loss), and that of the sketch: a scalar.

        x (B, 3, H, W) in [-1, 1]; z_i (B, D), whitened; tokens (B, L).
        """
        u = torch.rand(2, len(x), 1, device=x.device, generator=generator)
        z_i, tokens = z_i * (u[0] >= self.config.drop_z_i), tokens * (u[1] >= self.config.drop_text)
        f = lambda x_t, t: self(x_t, t, z_i, tokens)
        return self.diffusion.loss(f, x, generator) + self.sketch_error(x, z_i)

    def given(self, z_i, tokens, guidance=1.0):
        """The f(x_t, t) that Diffusion.sample and .invert follow, given these conditions.

        z_i (B, D), or None to hide it; tokens (B, L), or None to hide them. One must be given.
        """
        z_i = tokens.new_zeros(len(tokens), self.config.dim).float() if z_i is None else z_i
        tokens = z_i.new_full((len(z_i), 1), PAD).long() if tokens is None else tokens
        return guided(self, guidance, (z_i, tokens))

    @torch.no_grad()
    def sample(self, z_i, tokens, noise, guidance=1.5, steps=32, eta=1.0, watch=None):
        """z_i (B, D) or None, tokens (B, L) or None → x (B, 3, H, W) in [-1, 1].

        noise(): (B, 3, H, W) standard normal, drawn once, and at each step but the last if eta > 0.
        watch is called at each step (Diffusion.sample).
        """
        f = self.given(z_i, tokens, guidance)
        return self.diffusion.sample(f, noise(), steps, eta, noise, clamp=True, watch=watch)


# ---- The upsampler -----------------------------------------------------------------------------

@dataclass
class UpsamplerConfig:
    """What the weights depend on."""
    factor: int = 4                      # 32 to 128; the paper: 64 to 256 to 1,024
    image_size: int = 32                 # pixels a side of the small pictures in training
    channels: tuple = (16, 48, 96)
    blocks: tuple = (1, 1, 2)
    width: int = 128                     # of the timestep embedding


class Upsampler(nn.Module):
    """A larger picture from a small one (sec. 2.1): convolutions only, no caption, no guidance.

    The small picture has decided what is to be seen: the paper found that a caption does not help
    here. It trains on crops of half the side (the paper: a quarter), and draws whole pictures. That
    works because a convolution does the same at every place; attention would meet more places than
    in training. (GroupNorm alone looks at the whole picture.) In training the small picture is
    slightly corrupted, because what the decoder draws is not as clean as a render.
    differs from the paper: the UNet's answer is added to the v that belongs to x_0 = the enlarged
    picture. That picture is nearly right, and a network alone would copy it only roughly. The price
    is paid near t = 0, where x_t would be a better guess: no step of `sample` starts there.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.diffusion = Diffusion(objective="eps")
        self.unet = UNet(c.channels, c.blocks, [False] * len(c.channels), c.width)

    def forward(self, x_t, t, enlarged):
        """The network f: x_t and enlarged (B, 3, H, W), t (B,) → v (B, 3, H, W)."""
        cos, sin = self.diffusion.rotation(t, x_t)
        v = (cos * x_t - enlarged) / sin                                 # if x_0 were enlarged
        return v + self.unet(torch.cat([x_t, enlarged], dim=1), t)

    def enlarge(self, low):
        """(B, 3, h, w) → (B, 3, h·factor, w·factor), bicubic."""
        return F.interpolate(low, scale_factor=float(self.config.factor), mode="bicubic")

    def loss(self, x, low, generator=None):
        """The weighted error (Diffusion.loss) on a random crop of each picture, S/2 a side: a
        scalar. x (B, 3, S, S) in [-1, 1]; low (B, 3, S/factor, S/factor), the same pictures in the
        size in which the decoder learns them."""
        rand = lambda *shape: torch.rand(*shape, device=x.device, generator=generator)
        low = corrupt(low, rand, torch.randn(low.shape, device=x.device, generator=generator))
        x, enlarged = crop(x, self.enlarge(low), x.shape[-1] // 2, self.config.factor, rand)
        return self.diffusion.loss(lambda x_t, t: self(x_t, t, enlarged), x, generator)

    @torch.no_grad()
    def sample(self, low, noise, steps=3, eta=0.0):
        """low (B, 3, h, w) in [-1, 1] → (B, 3, h·factor, w·factor) in [-1, 1]; noise() of that
        shape."""
        enlarged = self.enlarge(low)
        f = lambda x_t, t: self(x_t, t, enlarged)
        return self.diffusion.sample(f, noise(), steps, eta, noise, clamp=True)


def corrupt(low, rand, noise):
    """Small pictures (B, 3, h, w) in [-1, 1] → each blurred (sec. 2.1), by a random share, and with
    noise of a random std of at most 0.03. noise: standard normal, like low. rand(*shape): uniform
    random numbers.

    differs from the paper: the paper's first upsampler only blurs, its second corrupts more.
    """
    blurred, level = rand(2, len(low), 1, 1, 1)
    return low.lerp(blur(low), blurred) + 0.03 * level * noise


def blur(x, sigma=0.6):
    """Gaussian blur of x (B, C, H, W), sigma in pixels. This sigma and 3×3 kernel are app. C's."""
    i = torch.arange(-1, 2, device=x.device, dtype=x.dtype)
    g = torch.exp(-(i / sigma) ** 2 / 2)
    kernel = (g[:, None] * g / g.sum() ** 2).expand(x.shape[1], 1, 3, 3)
    with torch.autocast(x.device.type, enabled=False):               # bf16 would round pictures
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=x.shape[1])


def crop(x, enlarged, side, factor, rand):
    """The same random square of each picture of x and enlarged (B, 3, H, W): (B, 3, side, side).

    The squares start at multiples of `factor`, on the edge of a small pixel, as whole pictures do.
    """
    B, H = len(x), x.shape[-1]
    top, left = (rand(2, B) * ((H - side) // factor + 1)).long() * factor
    i = torch.arange(side, device=x.device)
    rows, columns = (top[:, None] + i)[:, :, None], (left[:, None] + i)[:, None]
    where = torch.arange(B, device=x.device)[:, None, None], slice(None), rows, columns
    return x[where].permute(0, 3, 1, 2), enlarged[where].permute(0, 3, 1, 2)
