"""The tokenizer, the Transformer's masks, and what CLIP is supposed to learn."""

import math
import random
import time
from collections import Counter

import pytest
import torch

from clip_tiny import (BYTES, CLIP, EOT, PAD, SOT, Attention, CLIPConfig, TextEncoder, Tokenizer,
                       Transformer, Whitening, causal_mask, merge, pieces, principal)

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
PLACES = {"top left": (0, 0), "top right": (0, 4), "bottom left": (4, 0), "bottom right": (4, 4)}
CAPTIONS = [f"{colour} patch {place}" for colour in COLOURS for place in PLACES]
WORLD = ["Häuser, größer!", "猫が好き", "🦊🦊 emoji\u200d", "a\x00b", "İstanbul",
         "e\u0301", "…---…", "_ 1_2", "\ufffd"]


def patches(copies, seed):
    """Noisy pictures of each of the 16 captions: (copies·16, 3, 8, 8), and their captions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(copies * len(CAPTIONS), 3, 8, 8, generator=generator) * 0.2
    names = [(colour, place) for colour in COLOURS for place in PLACES] * copies
    for picture, (colour, place) in zip(x, names):
        i, j = PLACES[place]
        picture[:, i:i + 4, j:j + 4] += torch.tensor(COLOURS[colour])[:, None, None]
    return x.clamp(-1, 1), CAPTIONS * copies


def tiny_clip(tokenizer, seed=0):
    torch.manual_seed(seed)
    return CLIP(CLIPConfig(image_size=8, patch=4, width=32, depth=1, text_width=32, text_depth=1,
                           dim=16, vocab=tokenizer.vocab, context=tokenizer.context))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.learn(CAPTIONS, vocab=300, context=32)


@pytest.fixture
def clip(tokenizer):
    return tiny_clip(tokenizer).eval()


# ---- Tokenizer -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text", CAPTIONS[:2] + WORLD)
def test_any_unicode_comes_back_from_its_tokens_but_for_case_and_spaces(tokenizer, text):
    assert tokenizer.decode(tokenizer([text])[0]) == " ".join(text.lower().split())


def test_random_unicode_comes_back_too():
    tokenizer, dice = Tokenizer([], [], context=1000), random.Random(0)
    planes = [range(1, 0x800), range(0x800, 0xD800), range(0xE000, 0x110000)]     # no surrogates
    for _ in range(200):
        text = "".join(chr(dice.choice(dice.choice(planes))) for _ in range(20))
        assert tokenizer.decode(tokenizer([text])[0]) == " ".join(text.lower().split())


def test_half_a_surrogate_pair_is_a_question_mark_and_no_error(tokenizer):
    assert tokenizer.decode(tokenizer(["a \ud83d b"])[0]) == "a ? b"


def test_case_and_spaces_make_no_difference(tokenizer):
    assert torch.equal(tokenizer(["A  Red\n cube "]), tokenizer(["a red cube"]))


def test_a_row_is_start_tokens_end_and_padding(tokenizer):
    short, long = tokenizer(["red patch", "red patch top left"]).tolist()
    assert short[0] == long[0] == SOT and long[-1] == EOT and len(short) == len(long)
    end = short.index(EOT)
    assert set(short[end + 1:]) == {PAD} and PAD not in short[:end] and PAD not in long


def test_learning_is_a_function_of_the_captions(tokenizer):
    again = Tokenizer.learn(iter(CAPTIONS), vocab=300, context=32)
    shuffled = Tokenizer.learn(CAPTIONS[::-1], vocab=300, context=32)
    assert again.state() == shuffled.state() == tokenizer.state()


def test_frequent_words_become_one_token(tokenizer):
    assert tokenizer(["red patch top"]).shape == (1, 2 + 3)            # " red", " patch", " top"
    bytes_only = Tokenizer([], [], context=32)
    assert bytes_only(["red patch top"]).shape == (1, 2 + len(" red patch top"))


def test_merges_are_made_most_frequent_first():
    first, second = Tokenizer.learn(["abab ab", "cd ab"] * 2, vocab=261, context=9).merges
    a, b, space = (3 + ord(c) for c in "ab ")
    assert first == (a, b) and second == (space, 259)                  # "ab", then " ab"


def test_no_merge_is_learnt_beyond_the_vocabulary_or_from_a_single_occurrence():
    assert Tokenizer.learn(CAPTIONS, vocab=265, context=9).vocab == 265
    assert Tokenizer.learn(["abc"], vocab=1024, context=9).vocab == 259


def test_merges_are_those_of_counting_anew_after_each():
    texts = ["".join(random.Random(i).choices("abc", k=12)) for i in range(30)] + ["aaaa aaa"] * 3
    spelt, merges = [[BYTES + b for b in p.encode()] for t in texts for p in pieces(t)], []
    for new in range(BYTES + 256, BYTES + 256 + 40):
        counts = Counter(pair for ids in spelt for pair in zip(ids, ids[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        spelt = [merge(ids, best, new) for ids in spelt]
    assert Tokenizer.learn(texts, vocab=BYTES + 256 + 40).merges == merges


def test_text_without_blanks_takes_no_time(tokenizer):
    text = "".join(chr(0x4E00 + i % 997) for i in range(30_000))
    began = time.time()
    assert tokenizer([text], truncate=True).shape == (1, tokenizer.context)
    assert "".join(pieces(text)) == " " + text and time.time() - began < 5


def test_every_id_is_below_vocab(tokenizer):
    assert tokenizer(CAPTIONS).max() < tokenizer.vocab <= 300


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_prompt_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="empty"):
        tokenizer(["a red patch", text])


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(tokenizer):
    with pytest.raises(ValueError, match="42 tokens.*32"):
        tokenizer(["red " * 40])


def test_a_prompt_of_exactly_the_context_is_read(tokenizer):
    assert tokenizer(["red " * 30]).shape == (1, 32)


def test_truncation_keeps_the_end_of_text(tokenizer):
    ids = tokenizer(["red " * 40], truncate=True)
    assert ids.shape == (1, 32) and ids[0, -1] == EOT


def test_unknown_words_are_named_once_and_in_order(tokenizer):
    assert tokenizer.unknown_words("Red Fox, a red patch; zebra-fox") == ["fox", "a", "zebra"]
    assert tokenizer.unknown_words(CAPTIONS[0]) == []
    assert tokenizer.unknown_words("a “red” patch – 🟥!") == ["a", "🟥"]


def test_the_state_is_plain_and_makes_the_same_tokenizer(tokenizer):
    state = tokenizer.state()
    again = Tokenizer(**state)
    assert again.state() == state and torch.equal(again(CAPTIONS), tokenizer(CAPTIONS))
    assert type(state["merges"][0]) is list and type(state["words"]) is list


# ---- Transformer ---------------------------------------------------------------------------------

def test_under_the_causal_mask_later_positions_have_no_influence():
    torch.manual_seed(0)
    model, x = Transformer(64, 2), torch.randn(2, 9, 64)
    changed = torch.cat([x[:, :5], torch.randn(2, 4, 64)], dim=1)
    before, after = model(x, causal_mask(9)), model(changed, causal_mask(9))
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-2)


def test_control_without_the_mask_they_have():
    torch.manual_seed(0)
    model, x = Transformer(64, 2), torch.randn(2, 9, 64)
    changed = torch.cat([x[:, :5], torch.randn(2, 4, 64)], dim=1)
    assert not torch.allclose(model(x)[:, :5], model(changed)[:, :5], atol=1e-3)


def test_cached_keys_and_values_give_the_plain_result():
    torch.manual_seed(0)
    model, x, mask = Transformer(64, 2), torch.randn(2, 9, 64), causal_mask(9)
    caches = [{}, {}]
    parts = [model(x[:, a:b], mask[a:b, :b], caches) for a, b in [(0, 4), (4, 5), (5, 9)]]
    assert torch.allclose(torch.cat(parts, dim=1), model(x, mask), atol=1e-5)


def test_attention_reads_its_context_and_not_what_the_mask_hides():
    torch.manual_seed(0)
    attention = Attention(32, 1, context_width=8)
    x, context = torch.randn(1, 5, 32), torch.randn(1, 3, 8)
    mask = torch.tensor([True, True, False] + 5 * [True])[None, None, None]
    y = attention(x, mask, context)
    hidden, seen = context.clone(), context.clone()
    hidden[:, 2], seen[:, 1] = 9.0, 9.0
    assert torch.allclose(attention(x, mask, hidden), y, atol=1e-6)
    assert not torch.allclose(attention(x, mask, seen), y, atol=1e-3)


# ---- CLIP ----------------------------------------------------------------------------------------

def test_the_text_encoder_is_causal(tokenizer):
    torch.manual_seed(0)
    encoder = TextEncoder(tokenizer.vocab, 32, 32, 2)
    a, b = tokenizer(["red patch top left", "red patch top right"])[:, None]
    same = int((a == b).long().cumprod(dim=1).sum())                   # how many tokens they share
    assert same == 4
    assert torch.allclose(encoder(a)[0][:, :same], encoder(b)[0][:, :same], atol=1e-6)


def test_the_text_is_read_at_its_end(tokenizer):
    torch.manual_seed(0)
    encoder, tokens = TextEncoder(tokenizer.vocab, 32, 32, 2), tokenizer(["red patch", CAPTIONS[0]])
    outputs, end = encoder(tokens)
    for row, ids in enumerate(tokens.tolist()):
        assert torch.equal(end[row], outputs[row, ids.index(EOT)])


def test_padding_has_no_influence(clip, tokenizer):
    alone, among = tokenizer(["red patch"]), tokenizer(["red patch", CAPTIONS[0]])
    assert among.shape[1] > alone.shape[1]
    assert torch.allclose(clip.encode_text(alone)[0], clip.encode_text(among)[0], atol=1e-6)


@pytest.mark.parametrize("patch", [1, 2, 4, 8, 16])
def test_a_patch_of_any_power_of_two_becomes_one_token(patch):
    clip, tokens = CLIP(CLIPConfig(image_size=16, patch=patch, width=32, depth=1, vocab=259)), []
    clip.image_transformer.register_forward_hook(lambda module, inputs, _: tokens.append(inputs[0]))
    clip.encode_image(torch.zeros(1, 3, 16, 16))
    assert tokens[0].shape == (1, (16 // patch) ** 2, 32)


def test_embeddings_are_unit_vectors(clip, tokenizer):
    x, captions = patches(1, seed=0)
    for z in (clip.encode_image(x), clip.encode_text(tokenizer(captions))):
        assert z.shape == (16, 16) and torch.allclose(z.norm(dim=1), torch.ones(16), atol=1e-5)


NOTHING = torch.empty(0)                          # in place of pictures that nobody looks at


def fixed(clip, z_i, z_t, scale=0.0):
    """The same CLIP with embeddings given by hand, whatever it is asked to encode."""
    clip.encode_image, clip.encode_text = lambda x: z_i, lambda tokens: z_t
    clip.logit_scale.data.fill_(scale)
    return clip


def test_equal_captions_share_the_target_by_hand_computed_value(clip):
    """Three pairs, two of them with one caption: its columns are equal, so each takes half."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    tokens = torch.tensor([[SOT, 9, EOT], [SOT, 9, EOT], [SOT, 8, EOT]])
    loss = fixed(clip, torch.stack([a, a, b]), torch.stack([a, a, b])).loss(NOTHING, tokens)
    of_the_pair = math.log(2 * math.e + 1) - 1                         # row logits 1, 1, 0
    of_the_single = math.log(2 + math.e) - 1                           # row logits 0, 0, 1
    assert loss.item() == pytest.approx((2 * of_the_pair + of_the_single) / 3)


def test_equal_captions_are_not_pushed_apart(clip):
    """Two pictures of one caption, all at one point, and another pair far away: all is well."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    fixed(clip, z, z, math.log(100)).loss(NOTHING, torch.tensor([[5], [5], [6]])).backward()
    assert z.grad.abs().max() < 1e-6


def test_two_pictures_of_one_caption_are_pulled_to_it_alike(clip):
    z_i = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, -1.0]], requires_grad=True)
    z_t = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    fixed(clip, z_i, z_t).loss(NOTHING, torch.tensor([[5], [5], [6]])).backward()
    assert torch.allclose(z_i.grad[0], z_i.grad[1]) and z_i.grad[0, 0] < 0


def test_the_loss_is_the_same_with_the_towers_exchanged(clip):
    torch.manual_seed(0)
    z_i, z_t = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    tokens = torch.tensor([[1], [2], [2], [3], [4], [1]])
    there = fixed(clip, z_i, z_t, 1.0).loss(NOTHING, tokens)
    assert there.item() == pytest.approx(fixed(clip, z_t, z_i, 1.0).loss(NOTHING, tokens).item())


def test_embeddings_that_tell_nothing_cost_log_B(clip):
    z = torch.ones(8, 4) / 2
    loss = fixed(clip, z, z, scale=2.0).loss(NOTHING, torch.arange(8)[:, None])
    assert loss.item() == pytest.approx(math.log(8))


def test_the_temperature_starts_at_the_paper_s_and_is_bounded_at_100(clip, tokenizer):
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    x, captions = patches(1, seed=0)
    losses = []
    for scale in (100, 1000):
        clip.logit_scale.data.fill_(math.log(scale))
        losses.append(clip.loss(x, tokenizer(captions)).item())
    assert losses[0] == pytest.approx(losses[1])


def train_and_test(tokenizer, captions_of, steps):
    """Train on 64 pairs; the share of 64 new pictures whose nearest caption is their own."""
    clip, (x, captions) = tiny_clip(tokenizer), patches(4, seed=1)
    tokens = tokenizer(captions_of(captions))
    optimizer = torch.optim.AdamW(clip.parameters(), lr=7e-4, fused=True)
    for _ in range(steps):
        loss = clip.loss(x, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        new, _ = patches(4, seed=2)
        nearest = (clip.encode_image(new) @ clip.encode_text(tokenizer(CAPTIONS)).T).argmax(dim=1)
    return (nearest == torch.arange(16).repeat(4)).float().mean().item()


def test_clip_learns_which_caption_belongs_to_a_new_picture(tokenizer):
    assert train_and_test(tokenizer, lambda captions: captions, steps=80) > 0.9


def test_control_with_shuffled_captions_it_cannot(tokenizer):
    shuffled = lambda captions: random.Random(0).sample(captions, len(captions))
    assert train_and_test(tokenizer, shuffled, steps=80) < 0.3


# ---- Whitening -----------------------------------------------------------------------------------

def cloud(N=2000, seed=0):
    """N vectors about one point, of spread 1, 0.1, 0.01 … along axes that are not the coordinates'."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    spread = 10.0 ** -torch.arange(6)
    return (torch.randn(N, 6, generator=generator) * spread) @ turn + 3.0


def test_an_unfitted_whitening_is_the_identity():
    z = cloud(5)
    assert torch.equal(Whitening(6)(z), z) and torch.equal(Whitening(6).inverse(z), z)


def test_whitening_gives_each_axis_the_same_spread_but_stretches_tiny_ones_less():
    z = cloud()
    whitening = Whitening(6).fit(z)
    values = principal(z)[2]
    covariance = torch.cov(whitening(z).T, correction=0) * 6                 # 1 would be fully white
    expected = values / (values + 0.03 * values.mean())
    assert torch.allclose(covariance, torch.diag(expected), atol=1e-3)
    assert expected[0] > 0.99 and expected[-1] < 1e-3
    assert whitening(z).mean(0).abs().max() < 1e-4


def test_the_inverse_of_whitening_gives_new_vectors_back():
    whitening = Whitening(6).fit(cloud())
    other = cloud(10, seed=1) * 2
    assert torch.allclose(whitening.inverse(whitening(other)), other, atol=1e-4)


def test_a_single_vector_can_be_whitened():
    whitening = Whitening(6).fit(cloud(1))
    assert whitening(cloud(1)).abs().max() < 1e-3 and whitening(cloud(9)).isfinite().all()
