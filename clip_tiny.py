"""Text and image in one space: the tokenizer, the Transformer, and CLIP (paper, sec. 2 and app. C).

CLIP is two encoders, trained so that the embeddings of a picture and its caption point the same
way. Priors and decoder depend on CLIP's two outputs: z_i = encode_image(x) and z_t =
encode_text(tokens). CLIP is frozen after its own training: if it went on changing, z_i would no
longer mean what the prior and the decoder have learnt.

The Transformer built here also serves both priors and the decoder. Next chapter: prior.py.
"""

import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Tokenizer -------------------------------------------------------------------------------

PAD, SOT, EOT = 0, 1, 2    # padding (0, so that tokens * 0 is a caption of padding), start, end
FIRST_BYTE, FIRST_MERGE = 3, 259       # ids 3..258 are the 256 bytes; from 259 on, merges


class Tokenizer:
    """Byte-level byte-pair encoding: any string has tokens, frequent words have one each.

    merges: pairs of token ids in the order in which they were learnt; the k-th makes id 259 + k.
    words: the words of the training captions, so that a prompt's unknown words can be named.
    context: the most tokens that a text may have, start and end included.
    """

    def __init__(self, merges, words, context):
        self.merges, self.words, self.context = [tuple(m) for m in merges], set(words), context
        self.rank = {pair: k for k, pair in enumerate(self.merges)}
        self.vocab = FIRST_MERGE + len(self.merges)
        self.spell = lru_cache(100_000)(self._spell)

    @classmethod
    def learn(cls, captions, vocab=1024, context=64):
        """Learn merges from strings, until there are `vocab` ids or no pair occurs twice."""
        counts = Counter(piece for caption in captions for piece in pieces(caption))
        words = {piece.strip() for piece in counts}
        # The 10,000 most frequent pieces are enough to learn from, and keep this loop short.
        spelt = [([FIRST_BYTE + b for b in piece.encode(errors="replace")], n)
                 for piece, n in counts.most_common(10_000)]
        merges = []
        while FIRST_MERGE + len(merges) < vocab:
            pairs = Counter()
            for ids, n in spelt:
                for pair in zip(ids, ids[1:]):
                    pairs[pair] += n
            best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
            if best is None or pairs[best] < 2:
                break
            spelt = [(merge(ids, best, FIRST_MERGE + len(merges)), n) for ids, n in spelt]
            merges.append(best)
        return cls(merges, words, context)

    def _spell(self, piece):
        """The token ids of one piece of text: learnt merges are applied, the earliest first."""
        ids = [FIRST_BYTE + b for b in piece.encode(errors="replace")]
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if pair not in self.rank:
                break
            ids = merge(ids, pair, FIRST_MERGE + self.rank[pair])
        return ids

    def __call__(self, texts, truncate=False):
        """A list of texts → (B, L) long: start, tokens, end, padding; L is the longest's length.

        Raises ValueError for an empty or a too long text. With truncate, long texts are cut and
        empty ones allowed instead.
        """
        rows = []
        for text in texts:
            ids = [SOT] + [i for piece in pieces(text) for i in self.spell(piece)] + [EOT]
            if len(ids) == 2 and not truncate:
                raise ValueError("the prompt is empty: describe a picture, as in \"a red cube\"")
            if len(ids) > self.context and not truncate:
                raise ValueError(f"the prompt \"{text[:40]}…\" has {len(ids)} tokens, the model "
                                 f"reads {self.context}: shorten it")
            rows.append(ids[:self.context - 1] + [EOT] if len(ids) > self.context else ids)
        length = max(len(ids) for ids in rows)
        return torch.tensor([ids + [PAD] * (length - len(ids)) for ids in rows])

    def text(self, ids):
        """The text of a sequence of token ids (spaces and case are normalised)."""
        def spelling(i):
            if i < FIRST_MERGE:
                return bytes([i - FIRST_BYTE]) if i >= FIRST_BYTE else b""
            return b"".join(spelling(part) for part in self.merges[i - FIRST_MERGE])
        return b"".join(spelling(int(i)) for i in ids).decode(errors="replace").strip()

    def unknown_words(self, text):
        """The words of a text that never occurred in training, in order."""
        words = [piece.strip() for piece in pieces(text)]
        return [word for word in dict.fromkeys(words)
                if word not in self.words and not re.fullmatch(r"[!-/:-@[-`{-~]+", word)]

    def state(self):
        """Plain lists and numbers, for a checkpoint; Tokenizer(**state) is the same tokenizer."""
        return {"merges": [list(m) for m in self.merges], "words": sorted(self.words),
                "context": self.context}


def pieces(text):
    """Lower-case words and marks, each with the space before it; joined, they are the text.

    Pieces are at most 32 letters long: some languages write without spaces, and the time to merge
    a piece grows with the square of its length.
    """
    text = unicodedata.normalize("NFC", text.lower())      # é is one letter, however it was typed
    return re.findall(r" ?\w{1,32}| ?[^\w\s]{1,32}", " " + " ".join(text.split()))


def merge(ids, pair, new):
    """ids with every occurrence of the pair replaced by the id `new`."""
    out = []
    for i in ids:
        if (*out[-1:], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


# ---- Transformer -----------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention; heads are 32 wide."""

    def __init__(self, width):
        super().__init__()
        self.heads = width // 32
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask=None):
        """x (B, L, width) → the same; mask: bool (…, L, L), True where a query (row) may see a key
        (column)."""
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for a in self.qkv(x).chunk(3, dim=-1))            # each (B, heads, L, 32)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention, then x + MLP."""

    def __init__(self, width):
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x, mask=None):
        x = x + self.attention(self.norm_1(x), mask)
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """`depth` blocks and a final norm: x (B, L, width) → the same; mask as in Attention."""

    def __init__(self, width, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for block in self.blocks:          # as in GPT-2: small, or x would grow with depth
            for linear in (block.attention.out, block.mlp[2]):
                nn.init.normal_(linear.weight, std=(2 * depth * width) ** -0.5)
                nn.init.zeros_(linear.bias)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def causal_mask(visible):
    """visible (B, L) bool → (B, 1, L, L) bool: position i sees the visible positions before it.

    Each also sees itself, because the softmax of a row that sees nothing is not defined.
    """
    L, device = visible.shape[1], visible.device
    past = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    return (past & visible[:, None] | torch.eye(L, dtype=torch.bool, device=device))[:, None]


class TextEncoder(nn.Module):
    """Tokens embedded and read by a causal Transformer: CLIP's text tower, and the decoder's.

    Because it is causal, padding, which comes last, has no influence on the tokens of the text.
    """

    def __init__(self, vocab, context, width, depth):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.transformer = Transformer(width, depth)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens):
        """tokens (B, L) → all outputs (B, L, width), and the output at the text's end (B, width).
        A hidden caption (all padding) has no end: its first output is taken."""
        x = self.token(tokens) + self.position[:tokens.shape[1]]     # (B, L, width)
        x = self.transformer(x, causal_mask(torch.ones_like(tokens[:1], dtype=torch.bool)))
        end = (tokens == EOT).long().argmax(dim=1)
        return x, x[torch.arange(len(x), device=x.device), end]


# ---- CLIP ------------------------------------------------------------------------------------

@dataclass
class CLIPConfig:
    """What CLIP's weights depend on. The defaults are the small size, for rendered shapes."""
    vocab: int                  # of the tokenizer that belongs to these weights
    context: int                # most tokens of a caption
    image_size: int = 32        # pixels a side
    patch: int = 8              # pixels a side that become one image token: 1, 2, 4, 8 or 16
    stem: tuple = (24, 48, 96)  # channels on the way from the picture to its patches
    width: int = 128            # of both Transformers
    depth: int = 2
    dim: int = 64               # of z_i and z_t, the paper's D


class CLIP(nn.Module):
    """Two towers into one space of unit vectors (Radford et al. 2021; unCLIP's app. C).

    differs from the paper: trained with AdamW alone, without SAM; and the image tower is read by
    the mean of its outputs, not at a class token.
    """

    LEAST_SHARE = 0.03       # see `whiten`

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # differs from the paper: a ViT cuts its patches by one linear map; here by a few strided
        # convolutions, which see a shape's edges at full size.
        # The first `full` of them keep the resolution, each of the others halves it.
        widths, full = [3, *c.stem, c.width], len(c.stem) + 1 - int(math.log2(c.patch))
        stem = []
        for k, (w_in, w_out) in enumerate(zip(widths, widths[1:])):
            stem += [nn.GroupNorm(8, w_in), nn.GELU()] if k else []
            stem += [nn.Conv2d(w_in, w_out, 3, stride=1 if k < full else 2, padding=1)]
        self.stem = nn.Sequential(*stem)
        self.position = nn.Parameter(torch.randn((c.image_size // c.patch) ** 2, c.width) * 0.02)
        self.image_transformer = Transformer(c.width, c.depth)
        self.text = TextEncoder(c.vocab, c.context, c.width, c.depth)
        self.image_projection = nn.Linear(c.width, c.dim, bias=False)
        self.text_projection = nn.Linear(c.width, c.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.register_buffer("mean", torch.zeros(c.dim))             # these are set by fit_axes
        self.register_buffer("std", torch.ones(c.dim))
        self.register_buffer("main", torch.ones(c.dim))              # 1 for a main axis, or else 0

    def encode_image(self, x):
        """x (B, 3, H, W) in [-1, 1] → z_i (B, D), unit norm: the mean of the outputs, projected.
        Raises ValueError if x is of another size than CLIP's."""
        side = self.config.image_size
        if x.shape[-2:] != (side, side):
            raise ValueError(f"pictures of {x.shape[-1]}×{x.shape[-2]} pixels, and CLIP sees "
                             f"{side}×{side}: resize them")
        patches = self.stem(x).flatten(2).transpose(1, 2)            # (B, patches, width)
        h = self.image_transformer(patches + self.position)          # (B, patches, width)
        return F.normalize(self.image_projection(h.mean(dim=1)).float(), dim=-1)

    def encode_text(self, tokens):
        """tokens (B, L) → z_t (B, D), unit norm: the output at the text's end, projected."""
        _, end = self.text(tokens)
        return F.normalize(self.text_projection(end).float(), dim=-1)

    def loss(self, x, tokens):
        """Symmetric contrastive cross-entropy of B pairs: x (B, 3, H, W), tokens (B, L); a scalar.

        Captions repeat within a batch here. That needs no care: equal captions have equal z_t, so
        the loss is the same whichever of them counts as a picture's own.
        """
        with torch.no_grad():   # in place: a clamp in the graph has no gradient above its limit
            self.logit_scale.clamp_(max=math.log(100))
        z_i, z_t = self.encode_image(x), self.encode_text(tokens)    # (B, D) each
        with torch.autocast(x.device.type, enabled=False):           # bf16 is too coarse here
            logits = self.logit_scale.exp() * (z_i @ z_t.T)          # (B, B)
        own = torch.arange(len(logits), device=logits.device)        # the diagonal: (B,)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    # ---- z_i as the other networks are shown it ----------------------------------------------

    @torch.no_grad()
    def fit_axes(self, z_i):
        """Turn the space so that its axes are the principal axes of z_i (N, D), largest first.

        Training calls this on each copy that it saves. Both projections turn alike, so no angle
        changes. The axes serve the AR prior's codes (sec. 2.2), Fig. 7, and `whiten`. The main
        axes, the first ones, hold 99 % of the variance (`components_needed`), and nearly all that
        captions name. Along the others z_t is unlike any z_i.
        Returns the variances along the axes (D,).
        """
        z = z_i.cpu().double()                                       # MPS has no float64
        variances, axes = torch.linalg.eigh((z - z.mean(0)).T @ (z - z.mean(0)) / len(z))
        variances, axes = variances.flip(0).clamp(min=0), axes.T.flip(0)
        for projection in (self.image_projection, self.text_projection):
            projection.weight.copy_(axes @ projection.weight.cpu().double())
        self.mean.copy_(axes @ z.mean(0))
        self.std.copy_((variances + self.LEAST_SHARE * variances.mean() + 1e-9).sqrt())
        self.main.copy_(torch.arange(len(variances)) < components_needed(variances))
        return variances

    def whiten(self, z):
        """z (B, D) → centred, and divided by `std` along each axis: at most unit variance.

        differs from the paper: priors and decoder are shown z_i like this. z_i also holds where an
        object is, but along axes of a hundredth of the variance. A network that is shown plain z_i
        learns these axes only after very long training. std² is the variance plus LEAST_SHARE of
        the mean variance. Axes with less than that stay smaller than the others, but they matter:
        in the shipped CLIP of shapes they are 46 of 64, and tell best where an object is.
        """
        return (z - self.mean) / self.std

    def unwhiten(self, z):
        """The inverse of `whiten`, brought back to unit norm."""
        return F.normalize(z * self.std + self.mean, dim=-1)


def components_needed(variances, error=0.01):
    """The paper's rule (sec. 2.2): the fewest principal components that leave less than 1 % of the
    variance. variances (D,): along the principal axes, largest first."""
    variances = variances.cpu().double()                             # MPS has no float64
    left = 1 - variances.cumsum(0) / variances.sum()
    return int((left >= error).sum()) + 1
