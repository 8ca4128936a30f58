"""Text and image in one space: the tokenizer, the Transformer, and CLIP (paper, sec. 2 and app. C).

CLIP is two encoders, trained so that a picture and its caption get the same direction. Everything
else in unCLIP hangs on its two outputs: z_i = encode_image(x) and z_t = encode_text(tokens).

The Transformer built here also serves both priors and the decoder. Next chapter: prior.py.
"""

import heapq
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Tokenizer -------------------------------------------------------------------------------

PAD, SOT, EOT = 0, 1, 2                        # padding, start of text, end of text
BYTES = 3                                      # ids 3..258 are the 256 bytes; merges come after


class Tokenizer:
    """Byte-level byte-pair encoding: any string has tokens, frequent words have one each.

    merges: pairs of token ids in the order they were learnt; the k-th makes id 259 + k.
    words: the words of the training captions, so that a prompt's unknown words can be named.
    context: the most tokens a text may have, start and end included.
    """

    def __init__(self, merges, words, context):
        self.merges, self.words, self.context = [tuple(m) for m in merges], set(words), context
        self.rank = {pair: k for k, pair in enumerate(self.merges)}
        self.vocab = BYTES + 256 + len(self.merges)
        self._encode_piece = lru_cache(100_000)(self._merge)

    @classmethod
    def learn(cls, captions, vocab=1024, context=64):
        """Learn merges from an iterable of strings, until `vocab` ids or no pair occurs twice."""
        counts = Counter(piece for caption in captions for piece in pieces(caption))
        words = {piece.strip() for piece in counts}
        spelt = [([BYTES + b for b in piece.encode(errors="replace")], n)
                 for piece, n in counts.items()]
        pairs, where = Counter(), defaultdict(set)        # a pair's count, and the pieces it is in
        for i, (ids, n) in enumerate(spelt):
            for pair in zip(ids, ids[1:]):
                pairs[pair] += n
                where[pair].add(i)
        merges, heap = [], [(-n, -a, -b) for (a, b), n in pairs.items()]      # most frequent first
        heapq.heapify(heap)
        while heap and BYTES + 256 + len(merges) < vocab:
            n, a, b = heapq.heappop(heap)
            best = (-a, -b)
            if pairs[best] != -n:                           # outdated: it was pushed anew since
                continue
            if pairs[best] < 2:
                break
            changed = set()
            for i in where.pop(best):                       # recount only the pieces that change
                ids, n = spelt[i]
                for pair in zip(ids, ids[1:]):
                    pairs[pair] -= n
                    changed.add(pair)
                ids = merge(ids, best, BYTES + 256 + len(merges))
                spelt[i] = (ids, n)
                for pair in zip(ids, ids[1:]):
                    pairs[pair] += n
                    changed.add(pair)
                    where[pair].add(i)
            for a, b in changed:
                heapq.heappush(heap, (-pairs[a, b], -a, -b))
            merges.append(best)
        return cls(merges, words, context)

    def _merge(self, piece):
        """The token ids of one piece of text: learnt merges, the earliest learnt first."""
        ids = [BYTES + b for b in piece.encode(errors="replace")]
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if pair not in self.rank:
                break
            ids = merge(ids, pair, BYTES + 256 + self.rank[pair])
        return ids

    def __call__(self, texts, truncate=False):
        """A list of texts → (B, L) long: start, tokens, end, padding; L is the longest's length.

        Raises ValueError for an empty or a too long text; not so with truncate, which cuts.
        """
        rows = []
        for text in texts:
            ids = [SOT] + [i for piece in pieces(text) for i in self._encode_piece(piece)] + [EOT]
            if len(ids) == 2 and not truncate:
                raise ValueError("the prompt is empty: describe a picture, as in \"a red cube\"")
            if len(ids) > self.context and not truncate:
                raise ValueError(f"the prompt \"{text[:40]}…\" has {len(ids)} tokens, the model "
                                 f"reads {self.context}: shorten it")
            rows.append(ids[:self.context - 1] + [EOT] if len(ids) > self.context else ids)
        length = max(len(ids) for ids in rows)
        return torch.tensor([ids + [PAD] * (length - len(ids)) for ids in rows])

    def decode(self, ids):
        """The text of a sequence of token ids (spaces and case normalised)."""
        def spell(i):
            if i < BYTES + 256:
                return bytes([i - BYTES]) if i >= BYTES else b""
            return b"".join(spell(part) for part in self.merges[i - BYTES - 256])
        return b"".join(spell(int(i)) for i in ids).decode(errors="replace").strip()

    def unknown_words(self, text):
        """The words of a text that never occurred in training, in order."""
        words = re.findall(r"\w+|[^\w\s!-~‐-…]+", text.lower())   # emoji are words, marks not
        return [word for k, word in enumerate(words) if word not in self.words | set(words[:k])]

    def state(self):
        """Plain lists and numbers, for a checkpoint; Tokenizer(**state) is the same tokenizer."""
        return {"merges": [list(m) for m in self.merges], "words": sorted(self.words),
                "context": self.context}


def pieces(text):
    """Lower-case words and marks, each with the space before it; joined, they are the text.

    None is long, though some languages write without spaces: merging takes the square of that.
    """
    return re.findall(r" ?\w{1,32}| ?[^\w\s]{1,32}", " " + " ".join(text.lower().split()))


def merge(ids, pair, new):
    """ids with every occurrence of the pair replaced by the id `new`."""
    out, k = [], 0
    while k < len(ids):
        if tuple(ids[k:k + 2]) == pair:
            out.append(new)
            k += 2
        else:
            out.append(ids[k])
            k += 1
    return out


# ---- Transformer -----------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head self-attention.

    Its keys and values may be preceded by those of a context (the decoder's text, projected, as in
    GLIDE), or by those of earlier calls (the priors' caches).
    """

    def __init__(self, width, heads, context_width=None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.context_kv = nn.Linear(context_width, 2 * width) if context_width else None

    def forward(self, x, mask=None, context=None, cache=None):
        """x (B, L, width) → the same; mask: bool, True where a query (row) may see a key (column),
        broadcastable to (B, heads, L, keys), the context's keys first; context (B, M,
        context_width); cache: a dict that holds the keys and values so far, and is updated."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)                       # each (B, L, width)
        if context is not None:
            k_context, v_context = self.context_kv(context).chunk(2, dim=-1)
            k, v = torch.cat([k_context, k], 1), torch.cat([v_context, v], 1)
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], 1), torch.cat([cache["v"], v], 1)
            cache["k"], cache["v"] = k, v
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, width/heads)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention, then x + MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x, mask=None, cache=None):
        x = x + self.attention(self.norm_1(x), mask, cache=cache)
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """`depth` blocks and a final norm; heads are 32 wide."""

    def __init__(self, width, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, width // 32) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for block in self.blocks:          # GPT-2's rule: the residual sum starts out no wider
            for linear in (block.attention.out, block.mlp[2]):
                nn.init.normal_(linear.weight, std=(2 * depth * width) ** -0.5)
                nn.init.zeros_(linear.bias)

    def forward(self, x, mask=None, caches=None):
        """x (B, L, width) → the same; mask as in Attention; caches: one dict a block, or None."""
        for k, block in enumerate(self.blocks):
            x = block(x, mask, caches[k] if caches else None)
        return self.norm(x)


def causal_mask(length, device=None):
    """(length, length) bool: position i sees positions ≤ i."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class TextEncoder(nn.Module):
    """Tokens embedded and read by a causal Transformer: CLIP's text tower, and the decoder's.

    Being causal, it never lets padding, which comes last, influence a token of the text.
    """

    def __init__(self, vocab, context, width, depth):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.transformer = Transformer(width, depth)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens):
        """tokens (B, L) → all outputs (B, L, width), and that at the text's end (B, width)."""
        L = tokens.shape[1]
        x = self.token(tokens) + self.position[:L]                   # (B, L, width)
        x = self.transformer(x, causal_mask(L, x.device))
        end = (tokens == EOT).long().argmax(dim=1)
        return x, x[torch.arange(len(x), device=x.device), end]


# ---- Embeddings as a network is shown them -----------------------------------------------------

class Whitening(nn.Module):
    """z_i along its principal axes, each divided by its spread: the large ones then vary alike.

    CLIP spends nearly all variance of z_i on what captions tell apart. Where a solid stands, and
    which of two colours is whose, is there too, but a hundred times smaller: a network that is
    shown z_i as it is finds it only after very long training. Axes below FLOOR are mostly noise,
    and stay small. Fitted to training embeddings; the identity before.
    """

    FLOOR = 0.03          # added to each variance before dividing, as a share of the mean variance

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.eye(dim))
        self.register_buffer("spread", torch.ones(dim))

    def fit(self, z_i):
        """Take mean, axes and spread from training embeddings z_i (N, D)."""
        mean, axes, values = principal(z_i)
        floor = self.FLOOR * values.mean() + 1e-6                 # which is above 0 for one z_i too
        self.mean.copy_(mean)
        self.axes.copy_(axes)
        self.spread.copy_(((values + floor) * len(mean)).sqrt())
        return self

    def forward(self, z_i):
        """z_i (B, D) → coordinates (B, D), the most telling first, of variance 1/D at most."""
        with torch.autocast(z_i.device.type, enabled=False):     # bfloat16 would blur small axes
            return (z_i - self.mean) @ self.axes.T / self.spread

    def inverse(self, coordinates):
        """coordinates (B, D) → z_i (B, D), whose norm is not mended."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return coordinates * self.spread @ self.axes + self.mean

    def std(self):
        """Standard deviations of the coordinates (D,): 1/√D on large axes, less near FLOOR."""
        v = self.spread ** 2
        share = 1 - self.FLOOR / (1 + self.FLOOR) * v.mean() / v        # of the variance, not FLOOR
        return (share.clamp(min=0) / len(v)).sqrt()

    def broad(self, difference):
        """The part of a difference of embeddings (B, D) along the few axes of high variance.

        Text embeddings are reliable only there; along the others they are far from any z_i, and
        whitening would magnify that.
        """
        axes = self.axes[self.spread ** 2 > 0.1 * (self.spread ** 2).mean()]
        return difference @ axes.T @ axes


def principal(z_i):
    """z_i (N, D) → mean (D,), axes (D, D) by decreasing eigenvalue, and the eigenvalues (D,).

    Centred: unit embeddings share a large mean, which would otherwise cost a component and make
    the paper's 1 % rule easy to meet without keeping what tells pictures apart.
    """
    z = z_i.cpu().double()                                      # MPS has neither eigh nor float64
    mean = z.mean(dim=0)
    values, axes = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    return mean.to(z_i), axes.T.flip(0).to(z_i), values.flip(0).clamp(min=0).to(z_i)


# ---- CLIP ------------------------------------------------------------------------------------

@dataclass
class CLIPConfig:
    """What CLIP's weights depend on. The defaults are the small size, for rendered shapes."""
    image_size: int = 32     # pixels a side
    patch: int = 8           # pixels a side that become one image token; a power of two
    stem: int = 24           # channels of the first convolution; double with each halving
    width: int = 128         # of the image tower's Transformer
    depth: int = 2
    text_width: int = 128
    text_depth: int = 2
    dim: int = 64            # of z_i and z_t, the paper's D
    vocab: int = 0           # of the tokenizer that belongs to these weights
    context: int = 64        # most tokens of a caption


class CLIP(nn.Module):
    """Two towers into one space of unit vectors (Radford et al. 2021; unCLIP's app. C).

    differs from the paper: trained with AdamW, not with SAM; and the image tower is read by
    the mean of its outputs, not at a class token.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        # differs from the paper: a ViT's patches are cut by one linear map; here by a few strided
        # convolutions, with which so small a ViT learns far more in the same minutes.
        widths = [min(c.width, c.stem * 2 ** k) for k in range(int(math.log2(c.patch)))] + [c.width]
        stem = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for w_in, w_out in zip(widths, widths[1:]):
            stem += [nn.GroupNorm(8, w_in), nn.GELU(),
                     nn.Conv2d(w_in, w_out, 3, stride=2, padding=1)]
        self.stem = nn.Sequential(*stem)
        self.position = nn.Parameter(torch.randn((c.image_size // c.patch) ** 2, c.width) * 0.02)
        self.image_transformer = Transformer(c.width, c.depth)
        self.text = TextEncoder(c.vocab, c.context, c.text_width, c.text_depth)
        self.image_projection = nn.Linear(c.width, c.dim, bias=False)
        self.text_projection = nn.Linear(c.text_width, c.dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, x):
        """x (B, 3, H, W) in [-1, 1] → z_i (B, D), unit norm."""
        patches = self.stem(x).flatten(2).transpose(1, 2)            # (B, patches, width)
        h = self.image_transformer(patches + self.position)
        return F.normalize(self.image_projection(h.mean(dim=1)).float(), dim=-1)

    def encode_text(self, tokens):
        """tokens (B, L) → z_t (B, D), unit norm: the activation at the text's end, projected."""
        _, end = self.text(tokens)
        return F.normalize(self.text_projection(end).float(), dim=-1)

    def loss(self, x, tokens):
        """Symmetric contrastive cross-entropy of B pairs: x (B, 3, H, W), tokens (B, L); a scalar.

        differs from the paper: captions repeat within a batch here. All pictures of one caption are
        right answers for it, and share the target's mass, so that equal ones are not pushed apart.
        """
        z_i, z_t = self.encode_image(x), self.encode_text(tokens)    # (B, D) each
        with torch.autocast(x.device.type, enabled=False):           # cosines need float32
            logits = self.logit_scale.clamp(max=math.log(100)).exp() * (z_i @ z_t.T)
        _, caption = tokens.unique(dim=0, return_inverse=True)
        same = (caption[:, None] == caption[None]).float()
        target = same / same.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
