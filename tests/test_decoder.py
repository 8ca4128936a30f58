"""The decoder and the upsampler: which condition reaches what, and that they learn from it."""
import math

import pytest
import torch
import torch.nn.functional as F

from clip_tiny import EOT, PAD, SOT, Attention
from conftest import learn, normal, seeded, shake
from decoder import (Decoder, DecoderConfig, ImageAttention, Upsampler, UpsamplerConfig, blur,
                     corrupt, crop)

TOKENS = torch.tensor([[SOT, 5, 6, EOT], [SOT, 7, 8, EOT]])
X_T, Z_I, OTHER_Z_I = normal(1, 3, 8, 8)(), normal(1, 8, seed=1)(), normal(1, 8, seed=2)()


def decoder(**changes):
    torch.manual_seed(0)
    return Decoder(DecoderConfig(
        **changes, dim=8, vocab=10, context=8, image_size=8, channels=(16, 32), blocks=(1, 1),
        attention=(False, True), width=32, text_depth=1, sketch_width=64))


def upsampler(**changes):
    torch.manual_seed(0)
    return Upsampler(UpsamplerConfig(channels=(8, 8), blocks=(1, 1), width=16, **changes))


def ask(model, x_t=X_T, t=300, z_i=Z_I, tokens=TOKENS[:1]):
    """The decoder's answer to one picture, with some of the inputs changed."""
    return model(x_t, torch.full((len(x_t),), t), z_i, tokens)


# ---- The networks --------------------------------------------------------------------------------

def test_a_new_decoder_answers_0_and_its_sketch_learns_by_its_own_error_alone():
    assert ask(decoder()).abs().max() == 0
    model, other, t = shake(decoder()), shake(upsampler()), torch.tensor([9])
    ask(model).square().sum().backward()
    assert model.sketch[0].weight.grad is None
    answer = lambda low: other(X_T, t, low) + low / other.diffusion.rotation(t, X_T)[1]
    assert not torch.allclose(answer(X_T), answer(-X_T), atol=1e-3)  # its UNet sees low, too


# ---- The decoder's conditions --------------------------------------------------------------------

@pytest.mark.parametrize("change", [dict(z_i=OTHER_Z_I), dict(tokens=TOKENS[1:])])
def test_z_i_and_caption_enter_twice_by_the_timestep_embedding_and_by_attention(change):
    """Either way tells two conditions apart, and the sketch tells two z_i apart; with all shut
    nothing does. The picture attends to four tokens of z_i and all tokens of the caption."""
    for ways in ("embedding", "attention"), ("embedding",), ("attention",), ("sketch",), ():
        model, shapes = shake(decoder()), set()
        with torch.no_grad():
            if "embedding" not in ways:
                model.z_i_emb.weight.zero_(), model.text_emb.weight.zero_()
            if "sketch" not in ways:
                model.sketch[0].weight.zero_()
        for module in model.modules():
            if isinstance(module, ImageAttention):
                module.register_forward_hook(lambda _, inputs, h: shapes.add(inputs[1].shape))
                if "attention" not in ways:
                    torch.nn.init.zeros_(module.context_kv.weight)
        difference = (ask(model, **change) - ask(model)).abs().max()
        told = bool(ways) and not (ways == ("sketch",) and "tokens" in change)
        assert (difference > 1e-5) == told, (ways, difference)
        assert shapes == {(1, 4 + 4, 32)}


def test_padding_has_no_influence_and_a_hidden_caption_is_one_null_row_by_row():
    model, hidden = shake(decoder()), torch.full((1, 4), PAD)
    assert torch.allclose(ask(model, tokens=F.pad(TOKENS[:1], (0, 4))), ask(model), atol=1e-5)
    null = ask(model, z_i=0 * Z_I, tokens=hidden)
    longer = ask(model, z_i=0 * Z_I, tokens=torch.full((1, 8), PAD))
    assert torch.allclose(longer, null, atol=1e-5)
    both = ask(model, X_T.expand(2, -1, -1, -1), z_i=torch.cat([Z_I, 0 * Z_I]),
               tokens=torch.cat([TOKENS[:1], hidden]))
    assert torch.allclose(both, torch.cat([ask(model), null]), atol=1e-5)
    assert null.isfinite().all() and not torch.allclose(both[0], both[1], atol=1e-4)


def test_training_hides_z_i_once_in_10_and_the_caption_every_other_time():
    model, shown, B = decoder(), [], 10_000
    model.forward = lambda *inputs: shown.extend(inputs) or inputs[0]
    model.loss(torch.zeros(B, 3, 1, 1), Z_I.expand(B, -1), TOKENS[[0] * B], seeded())
    x_t, t, z_i, tokens = shown
    no_z_i, no_text = (z_i == 0).all(dim=1).float(), (tokens == PAD).all(dim=1).float()
    assert no_z_i.mean().item() == pytest.approx(0.1, abs=0.012)
    assert no_text.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (no_z_i * no_text).mean().item() == pytest.approx(0.05, abs=0.009)
    assert torch.equal(z_i[no_z_i == 0].unique(dim=0), Z_I)          # the others as they are
    assert torch.equal(tokens[no_text == 0].unique(dim=0), TOKENS[:1])


def test_a_text_only_decoder_reads_the_caption_alone():
    model = shake(decoder(drop_z_i=1.0, sketch_depth=0))
    assert torch.equal(ask(model, z_i=OTHER_Z_I), ask(model, z_i=0 * Z_I))
    assert not torch.allclose(ask(model, tokens=TOKENS[1:]), ask(model), atol=1e-5)


def test_guidance_is_the_null_plus_s_times_the_difference_in_one_call_and_none_is_the_null():
    model, t, calls = shake(decoder()), torch.tensor([300]), []
    null, cond = ask(model, z_i=0 * Z_I, tokens=0 * TOKENS[:1]), ask(model)
    model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    for s in (0.0, 1.0, 2.5):
        answer = model.given(Z_I, TOKENS[:1], s)(X_T, t)
        assert torch.allclose(answer, null + s * (cond - null), atol=1e-5)
    assert calls == [2, 1, 2]                                        # both answers by one batch
    no_z_i, no_text = ask(model, z_i=0 * Z_I), ask(model, tokens=0 * TOKENS[:1])
    assert torch.allclose(model.given(None, TOKENS[:1])(X_T, t), no_z_i, atol=1e-6)
    assert torch.allclose(model.given(Z_I, None)(X_T, t), no_text, atol=1e-6)


# ---- Learning ------------------------------------------------------------------------------------

PICTURES = -torch.ones(4, 3, 8, 8)        # left half red, right green, upper blue, lower white
PICTURES[0, 0, :, :4] = PICTURES[1, 1, :, 4:] = PICTURES[2, 2, :4] = PICTURES[3, :, 4:] = 1
Z_OF_PICTURES = 2 * torch.eye(4, 8)


def test_the_decoder_learns_a_handful_of_pictures_and_which_z_i_belongs_to_which():
    model, generator = decoder(), seeded()
    x, z_i = PICTURES.repeat(4, 1, 1, 1), Z_OF_PICTURES.repeat(4, 1)
    learn(model, lambda: model.loss(x, z_i, TOKENS[[0] * 16], generator), steps=110, lr=1.2e-2)
    draw = lambda z_i: model.sample(z_i, None, normal(len(z_i), 3, 8, 8), 1.0, steps=16)
    far = lambda x: (x[:, None] - PICTURES).square().mean(dim=(2, 3, 4))
    for order in ([0, 1, 2, 3], [2, 3, 1, 0]):                       # with the same noise
        off = far(draw(Z_OF_PICTURES[order]))
        assert off.argmin(dim=1).tolist() == order
        assert off.min(dim=1).values.mean() < 0.15                   # any two are 1.3 apart


# ---- The upsampler -------------------------------------------------------------------------------

def test_the_upsampler_has_no_attention_so_it_applies_to_pictures_of_any_size():
    attends = lambda model: any(isinstance(m, (Attention, ImageAttention)) for m in model.modules())
    assert not attends(upsampler()) and attends(decoder())
    for height, width in (8, 8), (12, 6), (32, 32):
        noise = normal(2, 3, 4 * height, 4 * width)
        x = shake(upsampler()).sample(torch.zeros(2, 3, height, width), noise, steps=2)
        assert x.shape == (2, 3, 4 * height, 4 * width) and -1 <= x.min() and x.max() <= 1


def test_the_upsampler_learns_from_crops_of_half_the_side_and_slightly_corrupted_small_pictures():
    model, shown = upsampler(), []
    model.register_forward_pre_hook(lambda _, inputs: shown.extend(inputs))
    model.loss(torch.zeros(50, 3, 32, 32), torch.zeros(50, 3, 8, 8), seeded())
    x_t, t, enlarged = shown
    assert x_t.shape == enlarged.shape == (50, 3, 16, 16)
    assert 0 < enlarged.std() < 0.04 and 1 <= t.min() and t.max() > 500


def test_a_new_upsampler_gives_the_enlarged_picture_from_any_noise_and_enlarging_shifts_nothing():
    """A small picture's pixel stands for a block: a slope keeps its block means, edges apart."""
    model, low = upsampler(), 0.3 * normal(2, 3, 8, 8)()
    for steps in (1, 3):
        x = model.sample(low, normal(2, 3, 32, 32), steps)
        assert torch.allclose(x, model.enlarge(low).clamp(-1, 1), atol=1e-3)
    for factor in (2, 4):
        low = torch.linspace(-1, 1, 12).expand(1, 3, 12, 12)
        high = upsampler(factor=factor).enlarge(low)
        assert high.shape == (1, 3, 12 * factor, 12 * factor)
        assert torch.allclose(F.avg_pool2d(high, factor)[..., 3:-3], low[..., 3:-3], atol=1e-4)


def test_a_crop_is_the_same_square_of_both_pictures_aligned_and_anywhere():
    i, rand = torch.arange(64.0), seeded()
    place = torch.stack([i[:, None].expand(64, 64), i.expand(64, 64)]).expand(500, 2, 64, 64)
    high, low = crop(place, -place, 16, 4, lambda *shape: torch.rand(*shape, generator=rand))
    assert high.shape == (500, 2, 16, 16) and torch.equal(high, -low)
    top, left = high[:, :, 0, 0].T
    assert set(top.tolist()) == set(left.tolist()) == set(range(0, 49, 4))
    assert abs(torch.corrcoef(torch.stack([top, left]))[0, 1]) < 0.2
    assert torch.equal(high, high[:, :, :1, :1] + place[:1, :, :16, :16])    # nothing is turned


def test_small_pictures_are_blurred_and_made_noisy_by_amounts_from_none_to_the_most():
    """The blur sums to one, has the given width, and keeps flat colour."""
    point = torch.zeros(1, 3, 5, 5)
    point[:, :, 2, 2] = 1
    kernel = blur(point)
    assert torch.allclose(kernel.sum(dim=(2, 3)), torch.ones(1, 3))
    assert (kernel[0, 0] > 0).sum() == 9
    beside = kernel[0, 0, 2, 1] / kernel[0, 0, 2, 2]
    assert beside.item() == pytest.approx(math.exp(-1 / (2 * 0.6 ** 2)))
    assert torch.equal(kernel, kernel.transpose(2, 3)) and torch.equal(kernel, kernel.flip(2))
    flat = torch.full((2, 3, 6, 6), 0.3)
    assert torch.allclose(blur(flat), flat)
    low, noise, r = normal(3, 3, 8, 8)(), normal(3, 3, 8, 8, seed=1)(), torch.tensor([0., 0.5, 1])
    some = corrupt(low, lambda *shape: r.expand(2, 3).view(shape), noise)
    assert torch.equal(some[0], low[0])
    assert torch.allclose(some[1], (low + blur(low))[1] / 2 + 0.015 * noise[1], atol=1e-6)
    assert torch.allclose(some[2], blur(low)[2] + 0.03 * noise[2], atol=1e-6)


def test_the_upsampler_learns_a_texture_that_enlarging_can_not_give_and_keeps_to_its_picture():
    """Light and dark blocks have opposite checks, which are too fine for a small picture."""
    model, generator, checks = upsampler(), seeded(), torch.zeros(32, 32)
    checks[::2, ::2] = checks[1::2, 1::2] = 1
    blocks = lambda n: checks * F.interpolate(
        torch.randn(n, 3, 4, 4, generator=generator).sign(), scale_factor=8.0)
    x, t = blocks(8), torch.full((8,), 500)
    x_t, low = model.diffusion.q_sample(x, t, normal(8, 3, 32, 32)()), F.avg_pool2d(x, 4)

    def error(low):
        v = model(x_t, t, model.enlarge(low))
        return F.mse_loss(model.diffusion.x_0_and_eps(v, x_t, t)[0], x).item()
    enlarged = error(low)                                            # by the new one
    loss = lambda x: model.loss(x, F.avg_pool2d(x, 4), generator)
    learn(model, lambda: loss(blocks(8)), steps=40, lr=1e-2)
    assert error(low) < 0.6 * enlarged < 1.5 * enlarged < error(low.flip(0))     # of another's
