"""The tokenizer, the Transformer's masks, what CLIP is supposed to learn, and the axes of z_i."""
import math
import random
import unicodedata

import pytest
import torch
import torch.nn.functional as F

from clip_tiny import (CLIP, EOT, PAD, SOT, CLIPConfig, TextEncoder, Tokenizer, causal_mask,
                       components_needed, pieces)
from conftest import learn, normal

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
PLACES = {"top left": (0, 0), "top right": (0, 4), "bottom left": (4, 0), "bottom right": (4, 4)}
CAPTIONS = [f"{colour} patch {place}" for colour in COLOURS for place in PLACES]
WORLD = ["Häuser, größer!", "猫が好き", "🦊🦊 emoji\u200d", "a\x00b", "İstanbul", "e\u0301 É",
         "…---…", "_ 1_2", "\ufffd", "a dog!🔥", "x" * 40 + "!" * 40, "नमस्ते", "1\u2028\x1f2"]
TOKENIZER = Tokenizer.learn(CAPTIONS, vocab=300, context=32)


def patches(copies, seed):
    """Noisy pictures of each of the 16 captions: (copies·16, 3, 8, 8), and their captions."""
    x = 0.2 * normal(copies * 16, 3, 8, 8, seed=seed)()
    names = [(colour, place) for colour in COLOURS for place in PLACES] * copies
    for picture, (colour, place) in zip(x, names):
        i, j = PLACES[place]
        picture[:, i:i + 4, j:j + 4] += torch.tensor(COLOURS[colour])[:, None, None]
    return x.clamp(-1, 1), CAPTIONS * copies


def tiny_clip(**changes):
    torch.manual_seed(0)
    tiny = dict(image_size=8, patch=4, width=32, depth=1, dim=16)
    return CLIP(CLIPConfig(TOKENIZER.vocab, TOKENIZER.context, **{**tiny, **changes}))


# ---- Tokenizer ---------------------------------------------------------------------------------

def normal_form(text):
    return " ".join(unicodedata.normalize("NFC", text.lower()).split())


def test_any_text_comes_back_from_its_tokens_but_for_case_spaces_and_composition():
    tokenizer, dice = Tokenizer(TOKENIZER.merges, [], context=1000), random.Random(0)
    planes = [range(1, 0x800), range(0x800, 0xD800), range(0xE000, 0x110000)]     # no surrogates
    strange = ["".join(chr(dice.choice(dice.choice(planes))) for _ in range(20))
               for _ in range(100)]
    for text in CAPTIONS[:2] + WORLD + strange:
        assert tokenizer.text(tokenizer([text])[0]) == normal_form(text), ascii(text)
    assert TOKENIZER.text(TOKENIZER(["a \ud83d b"])[0]) == "a ? b"     # half a surrogate pair
    short, long = TOKENIZER(["red patch", "red patch top left"]).tolist()
    end = short.index(EOT)
    assert short[0] == long[0] == SOT and long[-1] == EOT and len(short) == len(long)
    assert set(short[end + 1:]) == {PAD} and PAD not in short[:end] and PAD not in long
    assert max(short + long) < TOKENIZER.vocab <= 300


def test_learning_merges_the_most_frequent_first_whatever_the_order_and_saves_all_it_knows():
    first, second = Tokenizer.learn(["abab ab", "cd ab"] * 2, vocab=261, context=9).merges
    a, b, space = (3 + ord(c) for c in "ab ")
    assert first == (a, b) and second == (space, 259)                  # "ab", then " ab"
    assert Tokenizer.learn(CAPTIONS, vocab=265, context=9).vocab == 265
    assert Tokenizer.learn(["abc"], vocab=1024, context=9).vocab == 259     # no pair occurs twice
    assert TOKENIZER(["red patch top"]).shape == (1, 2 + 3)            # " red", " patch", " top"
    state = Tokenizer.learn(iter(CAPTIONS[::-1]), vocab=300, context=32).state()
    assert state == TOKENIZER.state() == Tokenizer(**state).state()


def test_an_empty_or_too_long_prompt_is_refused_unless_it_may_be_cut_and_no_piece_is_long():
    for text in "", "  ", "\n\t":
        assert TOKENIZER([text], truncate=True).tolist() == [[SOT, EOT]]
    assert TOKENIZER(["red " * 30]).shape == (1, 32)
    for text, words in ("\n", "empty"), ("red " * 40, "42 tokens.*32"):
        with pytest.raises(ValueError, match=words):
            TOKENIZER(["a red patch", text])
    text = "".join(chr(0x4E00 + i % 997) for i in range(30_000))         # no blank is in it
    ids = TOKENIZER([text], truncate=True)
    assert ids.shape == (1, 32) and ids[0, -1] == EOT
    assert "".join(pieces(text)) == " " + text
    assert max(map(len, pieces(text))) <= 33         # merging takes time by the square of a piece


def test_unknown_words_are_named_once_and_none_is_unknown_in_a_caption_that_was_learnt():
    assert TOKENIZER.unknown_words("Red Fox, a red patch; zebra-fox") == ["fox", "a", "zebra"]
    assert TOKENIZER.unknown_words("a “red” patch – 🟥!") == ["a", "“", "”", "–", "🟥!"]
    for caption in CAPTIONS[:1] + WORLD:
        tokenizer = Tokenizer.learn([caption] * 3)
        for text in (caption, caption.upper(), unicodedata.normalize("NFD", caption)):
            if normal_form(text) == normal_form(caption):    # "ß".upper() is another word, "SS"
                assert tokenizer.unknown_words(text) == [], ascii(text)
                assert torch.equal(tokenizer([text]), tokenizer([caption])), ascii(text)


# ---- Transformer -------------------------------------------------------------------------------

def test_the_mask_is_causal_hides_padding_and_leaves_no_row_empty():
    mask = causal_mask(torch.tensor([[True, False, True, True], [False] * 4]))
    assert mask.shape == (2, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert mask[1, 0].int().tolist() == torch.eye(4).int().tolist()


def test_the_text_encoder_is_causal_is_read_at_the_texts_end_and_padding_has_no_influence():
    torch.manual_seed(0)
    encoder = TextEncoder(TOKENIZER.vocab, 32, 32, 2)
    tokens = TOKENIZER(["red patch top left", "red patch top right", "red patch"])
    outputs, end = encoder(tokens)
    assert tokens[0].eq(tokens[1]).tolist()[:4] == [True] * 4          # start, red, patch, top
    assert torch.allclose(outputs[0, :4], outputs[1, :4], atol=1e-6)
    for row, ids in enumerate(tokens.tolist()):
        assert torch.equal(end[row], outputs[row, ids.index(EOT)])
    assert torch.allclose(encoder(TOKENIZER(["red patch"]))[1][0], end[2], atol=1e-6)


# ---- CLIP --------------------------------------------------------------------------------------

def fixed_loss(z_i, z_t, tokens, scale=0.0):
    """CLIP's loss of embeddings that are given by hand, whatever the pictures are."""
    clip = tiny_clip()
    clip.encode_image, clip.encode_text = lambda x: z_i, lambda tokens: z_t
    clip.logit_scale.data.fill_(scale)
    return clip.loss(torch.empty(0), tokens), clip


def test_clips_loss_is_the_closed_form_where_captions_repeat_and_treats_both_towers_alike():
    """Three pairs, two of them with one caption, and so with one z_t."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    tokens = torch.tensor([[SOT, 9, EOT], [SOT, 9, EOT], [SOT, 8, EOT]])
    loss, _ = fixed_loss(torch.stack([a, a, b]), torch.stack([a, a, b]), tokens)
    of_the_pair = math.log(2 * math.e + 1) - 1                         # row logits 1, 1, 0
    of_the_single = math.log(2 + math.e) - 1                           # row logits 0, 0, 1
    assert loss.item() == pytest.approx((2 * of_the_pair + of_the_single) / 3)
    z = F.normalize(normal(2, 3, 2)(), dim=-1)
    there, back = (fixed_loss(*pair, tokens, 1.0)[0].item() for pair in (z, z.flip(0)))
    assert there == pytest.approx(back)


def test_the_temperature_starts_as_in_the_paper_is_at_most_100_and_comes_back_down_from_there():
    assert tiny_clip().logit_scale.exp().item() == pytest.approx(1 / 0.07)
    (z_i, z_t), tokens = F.normalize(normal(2, 6, 4)(), dim=-1), torch.arange(6)[:, None]
    at = lambda scale: fixed_loss(z_i, z_t, tokens, math.log(scale))
    assert at(100)[0].item() == pytest.approx(at(1000)[0].item()) != at(50)[0].item()
    for scale in (100, 1000):                              # no pair fits, so that down is better
        _, clip = at(scale)
        optimizer = torch.optim.AdamW([clip.logit_scale], lr=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            clip.loss(torch.empty(0), tokens).backward()
            optimizer.step()
        assert clip.logit_scale.exp() < 50


@pytest.mark.parametrize("shuffled", [False, True])
def test_clip_learns_which_caption_belongs_to_a_new_picture_but_not_from_shuffled_ones(shuffled):
    clip, (x, captions) = tiny_clip(), patches(3, seed=1)
    tokens = TOKENIZER(random.Random(0).sample(captions, 48) if shuffled else captions)
    learn(clip, lambda: clip.loss(x, tokens), steps=50, lr=3e-3)
    nearest = (clip.encode_image(patches(4, seed=2)[0]) @
               clip.encode_text(TOKENIZER(CAPTIONS)).T).argmax(dim=1)
    right = (nearest == torch.arange(16).repeat(4)).float().mean()
    assert right < 0.3 if shuffled else right > 0.9


# ---- The axes of z_i ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def turned():
    """A CLIP after fit_axes; what it now sees in pictures and captions, the variances along its
    axes, and what it saw before."""
    clip, x, tokens = tiny_clip().requires_grad_(False), patches(20, seed=0)[0], TOKENIZER(CAPTIONS)
    before = clip.encode_image(x), clip.encode_text(tokens)
    variances = clip.fit_axes(before[0])
    return clip, clip.encode_image(x), clip.encode_text(tokens), variances, before


def test_fit_axes_keeps_every_dot_product_uncorrelates_coordinates_and_marks_the_main_ones(turned):
    clip, z_i, z_t, variances, (z_i_before, z_t_before) = turned
    assert torch.allclose(z_i @ z_i.T, z_i_before @ z_i_before.T, atol=1e-5)
    assert torch.allclose(z_i @ z_t.T, z_i_before @ z_t_before.T, atol=1e-5)
    covariance = torch.cov(z_i.T.double(), correction=0)
    assert torch.allclose(covariance, torch.diag(variances), atol=1e-6)
    assert (variances.diff() <= 0).all() and variances[0] > 3 * variances[8]
    k = components_needed(variances)                     # the fewest that leave less than 1 %
    assert components_needed(torch.tensor([0.9, 0.08, 0.015, 0.005])) == 3
    assert components_needed(torch.ones(64)) == 64 and components_needed(torch.ones(1000)) == 991
    assert clip.main.tolist() == [1.0] * k + [0.0] * (16 - k) and 1 < k < 16


def test_whitened_z_i_are_centred_none_is_blown_up_and_unwhiten_undoes_it(turned):
    clip, z_i, z_t, variances, _ = turned
    white = clip.whiten(z_i)
    assert white.mean(dim=0).abs().max() < 1e-3
    expected = variances / (variances + clip.LEAST_SHARE * variances.mean())
    assert torch.allclose(white.var(dim=0, correction=0).double(), expected, atol=1e-3)
    assert 0.95 < expected[0] < 1 and expected[-1] < 0.6
    assert torch.equal(tiny_clip().whiten(z_i), z_i)                   # before the fit
    for z in (z_i, z_t):
        assert torch.allclose(clip.unwhiten(clip.whiten(z)), z, atol=1e-5)
    drawn = clip.unwhiten(torch.randn(50, 16))
    assert torch.allclose(drawn.norm(dim=1), torch.ones(50), atol=1e-5)
