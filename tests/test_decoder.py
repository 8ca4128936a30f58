"""The decoder and the upsampler: which condition reaches what, and that they learn from it."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from clip_tiny import EOT, PAD, SOT, Attention
from decoder import (Decoder, DecoderConfig, ImageAttention, UNet, Upsampler, UpsamplerConfig, blur)
from unclip import UnCLIP

TOKENS = torch.tensor([[SOT, 5, 6, EOT], [SOT, 7, 8, EOT]])
NO, YES = torch.tensor([False]), torch.tensor([True])


def decoder(seed=0, **changes):
    torch.manual_seed(seed)
    tiny = dict(dim=8, vocab=10, context=8, image_size=8, channels=(16, 32), blocks=(1, 1),
                attention=(False, True), emb_width=32, text_width=32, text_depth=1, steps=10)
    return Decoder(DecoderConfig(**{**tiny, **changes}))


def upsampler(seed=0, **changes):
    torch.manual_seed(seed)
    tiny = dict(channels=(8, 16), blocks=(1, 1), emb_width=16, steps=2)
    return Upsampler(UpsamplerConfig(**{**tiny, **changes}))


def awake(model):
    """A model whose every weight acts: zero-initialised ones hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed)(), dim=-1)


# ---- The UNet ------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels, blocks, size", [((8,), (2,), 5), ((8, 16), (1, 2), 6),
                                                    ((8, 16, 24), (2, 1, 1), 12)])
def test_the_unet_keeps_height_and_width_at_any_depth(channels, blocks, size):
    unet = UNet(5, 3, channels, blocks, [False] * len(channels), 16)
    x = unet(torch.randn(2, 5, size, 2 * size), torch.tensor([1, 2]))
    assert x.shape == (2, 3, size, 2 * size)


def test_every_weight_of_the_decoder_is_in_use():
    model = awake(decoder())
    drops = torch.tensor([False, True])
    x = model(normal(2, 3, 8, 8)(), torch.tensor([1, 500]), unit(2, 8), TOKENS, drops, drops)
    (x.sum() + model.sketch_loss(x.detach(), unit(2, 8), TOKENS)).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_a_new_decoder_predicts_0():
    answer = decoder()(normal(1, 3, 8, 8)(), torch.tensor([9]), unit(1, 8), TOKENS[:1], NO, NO)
    assert answer.shape == (1, 3, 8, 8) and answer.abs().max() == 0


# ---- Conditions ----------------------------------------------------------------------------------

def ask(model, drop_z_i=NO, drop_text=NO, x_t=None, t=300, z_i=None, tokens=None):
    """The network's answer to one picture, with some of the inputs changed."""
    return model(normal(1, 3, 8, 8)() if x_t is None else x_t, torch.tensor([t]),
                 unit(1, 8) if z_i is None else z_i, TOKENS[:1] if tokens is None else tokens,
                 drop_z_i, drop_text)


@pytest.mark.parametrize("change", [
    dict(x_t=torch.ones(1, 3, 8, 8)), dict(t=301), dict(z_i=unit(1, 8, seed=1)),
    dict(tokens=TOKENS[1:]), dict(drop_z_i=YES), dict(drop_text=YES)])
def test_each_input_has_an_influence(change):
    model = awake(decoder())
    assert (ask(model, **change) - ask(model)).abs().max() > 1e-4


def test_a_dropped_z_i_has_none():
    model = awake(decoder())
    assert torch.equal(ask(model, YES), ask(model, YES, z_i=unit(1, 8, seed=1)))


@pytest.mark.parametrize("other", [[[SOT, 7, 8, EOT]], [[SOT, 5, EOT]], [[SOT, 9, 9, 9, 9, EOT]],
                                   [[PAD]]])
def test_a_dropped_caption_has_none_not_even_by_its_length(other):
    model = awake(decoder())
    changed = ask(model, drop_text=YES, tokens=torch.tensor(other))
    assert torch.allclose(changed, ask(model, drop_text=YES), atol=1e-5)


def test_padding_has_no_influence():
    model = awake(decoder())
    padded = F.pad(TOKENS[:1], (0, 4), value=PAD)
    assert torch.allclose(ask(model, tokens=padded), ask(model), atol=1e-5)


@pytest.mark.parametrize("change, all_ways", [
    (dict(z_i=unit(1, 8, seed=1)), ("embedding", "context", "sketch")),
    (dict(tokens=TOKENS[1:]), ("embedding", "context"))])
def test_each_condition_enters_by_several_ways(change, all_ways):
    """Any one way tells two conditions apart; with all shut nothing does."""
    shut = lambda *weights: [weight.data.zero_() for weight in weights]
    for ways in (*all_ways, ""):
        model = awake(decoder())
        if ways != "embedding":
            shut(model.z_i_emb.weight, model.text_emb.weight)
        if ways != "context":
            shut(*(module.attention.context_kv.weight for module in model.modules()
                   if isinstance(module, ImageAttention)))
        if ways != "sketch":
            shut(model.unet.stem.weight[:, 3:])
        difference = (ask(model, **change) - ask(model)).abs().max()
        assert (difference > 1e-5) == bool(ways), (ways, difference)


def test_the_image_attends_to_four_tokens_of_z_i_and_all_tokens_of_the_caption():
    model, shapes = awake(decoder()), []
    for module in model.modules():
        if isinstance(module, ImageAttention):
            module.register_forward_hook(lambda module, inputs, _: shapes.append(inputs[1].shape))
    ask(model)
    assert set(shapes) == {(1, 4 + TOKENS.shape[1], 32)} and len(shapes) == 3


def in_training(monkeypatch, B):
    """What a training batch of B shows the network: x_t, t, z_i, tokens, drop_z_i, drop_text."""
    model, shown = decoder(), []
    monkeypatch.setattr(model, "forward", lambda *inputs: shown.extend(inputs) or inputs[0])
    generator = torch.Generator().manual_seed(0)
    model.loss(torch.zeros(B, 3, 1, 1), unit(B, 8), TOKENS[[0] * B], generator)
    return shown


def test_training_drops_z_i_1_time_in_10_and_the_caption_every_other_independently(monkeypatch):
    z_i, text = (drop.float() for drop in in_training(monkeypatch, 4000)[4:])
    assert z_i.mean().item() == pytest.approx(0.1, abs=0.02)
    assert text.mean().item() == pytest.approx(0.5, abs=0.03)
    assert (z_i * text).mean().item() == pytest.approx(0.05, abs=0.012)


def test_training_cuts_z_i_1_time_in_4_after_a_log_uniform_number_of_components(monkeypatch):
    given, shown = unit(4000, 8), in_training(monkeypatch, 4000)[2]
    same = torch.isclose(shown, given)                    # unfitted, components are coordinates
    kept = same.sum(dim=1)
    assert torch.equal(same, torch.arange(8) < kept[:, None])          # the first ones
    assert (shown[~same] == 0).all()
    assert (kept < 8).float().mean().item() == pytest.approx(0.25 * math.log(7, 8), abs=0.02)
    assert (kept <= 2).float().mean().item() == pytest.approx(0.25 / 3, abs=0.015)


def test_training_visits_all_steps_from_1_to_T_alike(monkeypatch):
    t = in_training(monkeypatch, 100_000)[1]
    assert 1 <= t.min() < 20 and t.max() == 1000
    counts = t.sub(1).div(100, rounding_mode="floor").bincount() / len(t)
    assert torch.allclose(counts, torch.full((10,), 0.1), atol=0.005)


# ---- Guidance ------------------------------------------------------------------------------------

def test_guidance_drops_both_conditions_in_its_null_half_in_one_batch(monkeypatch):
    model, calls = decoder(), []
    monkeypatch.setattr(model, "forward", lambda x_t, t, z_i, tokens, drop_z_i, drop_text:
                        calls.append((drop_z_i.tolist(), drop_text.tolist())) or x_t)
    model.predictor(unit(2, 8), TOKENS, 3.0)(torch.zeros(2, 3, 8, 8), torch.tensor([5, 5]))
    assert calls == [([True, True, False, False], [True, True, False, False])]


def test_guidance_is_null_plus_s_times_the_difference():
    model, x_t, t, z_i = awake(decoder()), normal(1, 3, 8, 8)(), torch.tensor([300]), unit(1, 8)
    null, cond = ask(model, YES, YES), ask(model)
    for s in (0.0, 1.0, 2.5):
        guided = model.predictor(z_i, TOKENS[:1], s)(x_t, t)
        assert torch.allclose(guided, null + s * (cond - null), atol=1e-5)


def test_none_in_place_of_a_condition_is_its_null():
    model, x_t, t = awake(decoder()), normal(1, 3, 8, 8)(), torch.tensor([300])
    of_the_caption, of_z_i = model.predictor(None, TOKENS[:1]), model.predictor(unit(1, 8), None)
    assert torch.allclose(of_the_caption(x_t, t), ask(model, drop_z_i=YES), atol=1e-5)
    assert torch.allclose(of_z_i(x_t, t), ask(model, drop_text=YES), atol=1e-5)


def test_samples_are_in_range_and_by_default_use_the_config(monkeypatch):
    model = awake(decoder(steps=7, guidance=3.0))
    rows = []
    model.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    x = model.sample(unit(2, 8), TOKENS, normal(2, 3, 8, 8))
    assert x.shape == (2, 3, 8, 8) and -1 <= x.min() and x.max() <= 1
    assert rows == 7 * [4]
    model.sample(unit(2, 8), TOKENS, normal(2, 3, 8, 8), guidance=1.0, steps=3)
    assert rows[7:] == 3 * [2]


# ---- Learning ------------------------------------------------------------------------------------

def four_pictures():
    """Left half red, right green, upper blue, lower white, the rest black; and a z_i for each."""
    x = -torch.ones(4, 3, 8, 8)
    x[0, 0, :, :4] = x[1, 1, :, 4:] = x[2, 2, :4] = x[3, :, 4:] = 1
    return x, torch.eye(4, 8)


@pytest.fixture(scope="module")
def overfitted():
    model, (x, z_i) = decoder(), four_pictures()
    tokens, generator = TOKENS[[0] * 16], torch.Generator().manual_seed(0)     # one caption for all
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for _ in range(120):
        loss = model.loss(x.repeat(4, 1, 1, 1), z_i.repeat(4, 1), tokens, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def drawn(model, z_i, **options):
    """Which of the four pictures is nearest to each of those drawn, and how near it is."""
    x, _ = four_pictures()
    sample = model.sample(z_i, None, normal(len(z_i), 3, 8, 8), **{"guidance": 1.0, **options})
    distances = (sample[:, None] - x).square().mean(dim=(2, 3, 4))
    return distances.argmin(dim=1).tolist(), distances.min(dim=1).values.mean().item()


def test_the_decoder_learns_to_draw_four_pictures_from_their_z_i(overfitted):
    which, distance = drawn(overfitted, four_pictures()[1])
    assert which == [0, 1, 2, 3] and distance < 0.15    # any two of the four are 1.3 apart


def test_another_z_i_with_the_same_noise_draws_the_other_picture(overfitted):
    assert drawn(overfitted, four_pictures()[1][[2, 3, 1, 0]])[0] == [2, 3, 1, 0]


def test_control_without_z_i_it_cannot_know_which(overfitted):
    _, z_i = four_pictures()
    null = overfitted.null_z_i.detach() / overfitted.scale
    which, _ = drawn(overfitted, null.expand(32, -1))
    assert len(set(which)) > 1


def test_the_sketch_learns_the_mean_of_the_pictures_that_share_a_condition():
    """The best answer to pure noise: sharp where z_i tells all, a blend where it does not."""
    model, (x, z_i) = decoder(), four_pictures()
    generator = torch.Generator().manual_seed(0)
    z_i[3] = z_i[2]                                                    # blue and white alike
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model.sketch_loss(x.repeat(8, 1, 1, 1), z_i.repeat(8, 1), TOKENS[[0] * 32], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    no = torch.zeros(4, dtype=torch.bool)
    z, _, text_emb = model.read(z_i, TOKENS[[0] * 4], no, no)
    expected = torch.cat([x[:2], x[2:].mean(dim=0, keepdim=True).expand(2, -1, -1, -1)])
    sketch = model.sketch(torch.cat([z, text_emb], dim=1))
    assert (sketch - expected).square().mean() < 0.02 < (sketch - x).square().mean()


# ---- The upsampler -------------------------------------------------------------------------------

def test_the_upsampler_has_no_attention():
    attends = lambda model: any(isinstance(module, Attention) for module in model.modules())
    assert not attends(upsampler()) and attends(decoder())


@pytest.mark.parametrize("height, width", [(8, 8), (12, 8), (32, 32)])
def test_the_upsampler_applies_to_other_sizes_than_it_was_trained_on(height, width):
    model = awake(upsampler())
    x = model.sample(torch.zeros(2, 3, height, width), normal(2, 3, 4 * height, 4 * width))
    assert x.shape == (2, 3, 4 * height, 4 * width) and -1 <= x.min() and x.max() <= 1


@pytest.mark.parametrize("factor", [2, 4])
def test_enlarging_shifts_nothing(factor):
    """A small picture's pixel stands for a block: a slope keeps its block means, edges apart."""
    low = torch.linspace(-1, 1, 12).expand(1, 3, 12, 12)
    high = upsampler(factor=factor).enlarge(low)
    assert high.shape == (1, 3, 12 * factor, 12 * factor)
    inner = slice(3, -3)
    assert torch.allclose(F.avg_pool2d(high, factor)[..., inner], low[..., inner], atol=1e-4)


def test_the_small_picture_has_an_influence_but_none_far_away():
    model, x_t, t = awake(upsampler()), normal(1, 3, 64, 64)(), torch.tensor([300])
    for module in model.modules():                         # whose statistics see the whole picture
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda h: h
    low, changed = torch.zeros(2, 1, 3, 64, 64)
    changed[:, :, 0, 0] = 3.0
    difference = (model(x_t, t, changed) - model(x_t, t, low)).abs().amax(dim=(0, 1))
    assert difference[0, 0] > 1e-4 and difference[32:, 32:].max() == 0


def test_training_sees_crops_of_a_quarter_of_the_side_everywhere(monkeypatch):
    model, crops = upsampler(), []
    monkeypatch.setattr(model, "forward", lambda x_t, t, low: crops.append((x_t, low)) or x_t)
    model.loss(torch.zeros(200, 3, 64, 64), torch.Generator().manual_seed(0))
    x_t, low = crops[0]
    assert x_t.shape == low.shape == (200, 3, 16, 16)


def test_both_crops_are_of_one_place_on_the_small_picture_s_grid(monkeypatch):
    """Pictures whose red is the row and whose green is the column tell where a crop is from."""
    model, seen, i = upsampler(), [], torch.linspace(-1, 1, 64)
    monkeypatch.setattr(model, "forward", lambda x_t, t, low: seen.append(low) or x_t)
    monkeypatch.setattr(model.diffusion, "loss", lambda f, x, t, eps: seen.append(x) or f(x, t))
    x = torch.stack([i[:, None].expand(64, 64), i.expand(64, 64), torch.zeros(64, 64)])
    model.loss(x.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    high, low = seen
    rows, columns = ((high[:, k, 0, 0] + 1) * 63 / 2 / 4 for k in (0, 1))     # in small pixels
    for place in (rows, columns):
        assert torch.allclose(place, place.round(), atol=1e-3)                # aligned
        assert set(place.round().int().tolist()) == set(range(13))            # and everywhere
    assert abs(torch.corrcoef(torch.stack([rows, columns]))[0, 1]) < 0.2
    inside = (rows > 1) & (rows < 11) & (columns > 1) & (columns < 11)   # bicubic bends at edges
    assert torch.allclose(low[inside, :2], high[inside, :2], atol=0.02)


def test_the_blur_is_the_paper_s_sums_to_one_and_keeps_flat_colour():
    point = torch.zeros(1, 3, 5, 5)
    point[:, :, 2, 2] = 1
    kernel = blur(point)
    assert torch.allclose(kernel.sum(dim=(2, 3)), torch.ones(1, 3))
    assert (kernel[0, 0] > 0).sum() == 9
    beside_centre = kernel[0, 0, 2, 1] / kernel[0, 0, 2, 2]
    assert beside_centre.item() == pytest.approx(math.exp(-1 / (2 * 0.6**2)))
    flat = torch.full((2, 3, 6, 6), 0.3)
    assert torch.allclose(blur(flat), flat)


def test_the_small_picture_is_blurred_once_in_training_and_in_use_alike(monkeypatch):
    """Blurred in training alone, it made the sampler sharpen what was sharp: halos."""
    model, calls = upsampler(), []
    monkeypatch.setattr("decoder.blur", lambda x: calls.append(x) or x)
    model.sample(torch.zeros(1, 3, 8, 8), normal(1, 3, 32, 32))
    model.loss(torch.zeros(1, 3, 64, 64))
    assert [x.shape for x in calls] == [(1, 3, 8, 8), (1, 3, 16, 16)]


def test_the_upsampler_learns_to_follow_the_small_picture():
    model, generator = upsampler(steps=5), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    smooth = lambda n: F.interpolate(torch.rand(n, 3, 4, 4, generator=generator) * 2 - 1,
                                     scale_factor=8.0, mode="bilinear")
    for _ in range(100):
        loss = model.loss(smooth(16), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    low = F.avg_pool2d(smooth(8), 4)
    f = lambda x_t, t: model.eval()(x_t, t, model.enlarge(low))
    x = model.diffusion.sample(f, normal(8, 3, 32, 32)(), 5)           # nothing corrected
    error = lambda x: (F.avg_pool2d(x, 4) - low).square().mean().item()
    assert error(x) < 0.1 and error(x.flip(0)) > 0.2       # control: another small picture's


@pytest.mark.parametrize("factor", [2, 4])
def test_the_small_picture_s_colours_are_kept_whatever_the_network_says(factor):
    model, low = awake(upsampler(factor=factor)), normal(8, 3, 8, 8)().clamp(-2, 2) / 3
    off = lambda x: (F.avg_pool2d(x, factor) - low).abs().mean().item()
    noise = normal(8, 3, 8 * factor, 8 * factor)
    f = lambda x_t, t: model(x_t, t, model.enlarge(low))
    assert off(model.sample(low, noise)) < 0.08
    assert off(model.diffusion.sample(f, noise(), model.config.steps)) > 0.2       # control


def test_a_cascade_of_two_upsamplers_is_a_list():
    clip = nn.Module()
    clip.logit_scale = nn.Parameter(torch.zeros(()))
    unclip = UnCLIP(clip, upsamplers=[awake(upsampler()), awake(upsampler(factor=2, steps=1))])
    x = unclip.upsample(torch.zeros(2, 3, 8, 8))
    assert x.shape == (2, 3, 64, 64)
    assert not torch.equal(x[0], x[1])                     # each picture has noise of its own
