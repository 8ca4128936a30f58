"""Where the parts meet: drawing, manipulating, and slerp.

Manipulations are tested on a toy in which everything is known: its CLIP sees a picture's mean
colour alone, and its decoder is the exact denoiser of pictures about that colour.
"""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import normal, tiny_parts
from diffusion import Diffusion
from unclip import UnCLIP, slerp

PROMPTS = ["a red cube", "a large sphere on top of a blue cube", "a blue cone"]
QUICK = dict(steps=2, guidance=1.0, upsample=False)


@pytest.fixture(scope="module")
def model(tiny_unclip):
    return tiny_unclip


# ---- slerp ---------------------------------------------------------------------------------------

TS = torch.linspace(0, 1, 11)
A, B = F.normalize(normal(2, 64)(), dim=1)


def path(a, b):
    return slerp(a.expand(11, *a.shape), b.expand(11, *b.shape), TS)


def test_slerp_of_unit_vectors_goes_from_a_to_b_on_the_sphere_by_equal_angles():
    way = path(A, B)
    assert torch.allclose(way.norm(dim=1), torch.ones(11), atol=1e-6)
    assert torch.allclose(way[0], A, atol=1e-6) and torch.allclose(way[-1], B, atol=1e-6)
    angles = (way[1:] * way[:-1]).double().sum(dim=1).acos()
    assert torch.allclose(angles, ((A @ B).double().acos() / 10).expand(10), atol=1e-4)
    assert torch.allclose(slerp(A[None], B[None], 0.3)[0], way[3], atol=1e-6)  # one t for all rows


def test_slerp_of_nearly_equal_vectors_is_straight_and_of_opposite_ones_refused():
    for distance in (0.0, 1e-6, 1e-2):
        near = F.normalize(A + distance * B, dim=0)
        assert torch.allclose(path(A, near), torch.lerp(A, near, TS[:, None]), atol=1e-4)
    with pytest.raises(ValueError, match="opposite"):
        path(A, F.normalize(-A + 1e-5 * B, dim=0))


def test_slerp_of_noise_keeps_it_noise():
    """The angle is that of the directions; the weights act on the noise as it is."""
    a, b = normal(2, 3, 16, 16)()
    way = path(a, b)
    assert torch.allclose(way[0], a, atol=1e-5) and torch.allclose(way[-1], b, atol=1e-5)
    assert (way.std(dim=(1, 2, 3)) - 1).abs().max() < 0.05 and torch.lerp(a, b, 0.5).std() < 0.8


# ---- Drawing -------------------------------------------------------------------------------------

def test_pictures_have_the_size_of_the_last_stage_and_noise_of_their_own(model):
    x = model.generate(PROMPTS[:1], n=1, steps=1)
    small = model.generate(PROMPTS[0], n=2, **QUICK)
    assert x.shape == (1, 3, 128, 128) and x.abs().max() <= 1 and small.abs().max() <= 1
    assert small.shape == (2, 3, 32, 32) and not torch.allclose(*small, atol=1e-2)


def test_nothing_to_draw_and_a_picture_of_another_size_are_refused(model):
    x = model.generate(PROMPTS[:1], n=1, steps=1)
    for captions, n in ([], 4), ("a red cube", 0):
        with pytest.raises(ValueError, match="nothing to draw"):
            model.generate(captions, n)
    for make in model.vary, lambda x: model.interpolate(x, x, fixed_noise=True):
        with pytest.raises(ValueError, match="128×128 pixels.* sees 32×32: resize"):
            make(x)
    with pytest.raises(ValueError, match="nothing to draw"):
        model.vary(x[..., :32, :32], n=0, steps=2)


@pytest.mark.parametrize("prior", ["diffusion", "ar", "text", "none"])
def test_pictures_come_caption_by_caption_the_same_bytes_in_any_company(model, prior):
    five = model.generate(PROMPTS[0], n=5, prior=prior, **QUICK)
    company = model.generate([*PROMPTS[1:], PROMPTS[0]], n=3, prior=prior, **QUICK)  # two lengths
    assert torch.equal(company[6:], five[:3])


def test_variations_and_upsampled_pictures_are_the_same_bytes_too_and_their_noise_is_their_row_s(
        model):
    small = normal(5, 3, 8, 8)().clamp(-1, 1)
    five = model.upsample(small, 0, range(5))
    for rows in ([0], [4, 1, 2, 3, 0]):
        assert torch.equal(model.upsample(small[rows], 0, rows), five[rows]), rows
    assert not torch.allclose(model.upsample(small[:1], 0, [1]), five[:1], atol=1e-2)
    bare = UnCLIP(model.clip)                                         # an upsampler may be missing
    assert torch.equal(bare.upsample(small, 0, range(5)), small)
    x = normal(1, 3, 32, 32)().clamp(-1, 1)
    five = model.vary(x, n=5, steps=3)
    assert torch.equal(model.vary(x, n=3, steps=3), five[:3])
    for other in (five[1], model.vary(x, n=1, steps=3, seed=1)[0]):
        assert not torch.allclose(five[0], other, atol=1e-2)


def test_each_prior_draws_the_kind_of_z_i_that_its_name_says(model):
    tokens = model.clip.tokenizer([PROMPTS[0]] * 2)
    z_t = model.clip.encode_text(tokens)
    z_i = {prior: model.draw_z_i(tokens, 0, [0, 1], prior)
           for prior in ("diffusion", "ar", "text", "none")}
    assert z_i["none"] is None and torch.allclose(z_i["text"], z_t, atol=1e-5)
    for prior in ("diffusion", "ar"):
        assert torch.allclose(z_i[prior].norm(dim=1), torch.ones(2), atol=1e-5)
        assert not torch.allclose(z_i[prior][0], z_i[prior][1], atol=1e-2)
        assert not torch.allclose(z_i[prior], z_t, atol=1e-2)
    with pytest.raises(ValueError, match="unknown prior 'gan': choose diffusion, ar, text or none"):
        model.draw_z_i(tokens, 0, [0, 1], "gan")


def test_the_decoder_is_shown_z_i_whitened_in_drawing_and_in_manipulating():
    model, given = UnCLIP(**tiny_parts()), []
    model.clip.mean.fill_(0.1), model.clip.std.fill_(0.5)
    model.part("decoder").register_forward_pre_hook(lambda _, inputs: given.append(inputs[2]))
    tokens, x = model.clip.tokenizer(PROMPTS[:1]), normal(1, 3, 32, 32)().clamp(-1, 1)
    z_i = model.clip.encode_image(x)
    model.draw_x(z_i, tokens, 0, [0], guidance=1.0, steps=1), model.reconstruct(x, steps=2)
    assert len(given) > 3 and all(torch.allclose(z[:1], (z_i - 0.1) / 0.5) for z in given)


def test_a_text_counts_along_the_main_axes_alone():
    model = UnCLIP(**tiny_parts())
    model.clip.main[8:] = 0
    tokens = model.clip.tokenizer(PROMPTS)
    z_t, z_i = model.clip.encode_text(tokens), model.draw_z_i(tokens, 0, range(3), "text")
    white = model.clip.whiten(z_t)
    kept = torch.cat([white[:, :8], 0 * white[:, 8:]], dim=1)
    assert torch.allclose(z_i, model.clip.unwhiten(kept), atol=1e-5)
    z_d = model.text_diff(PROMPTS[:2], PROMPTS[2:])
    assert (z_d[:, 8:] == 0).all() and torch.allclose(z_d.norm(dim=1), torch.ones(2))
    plain = F.normalize((z_t[:2] - z_t[2:])[:, :8], dim=1)
    assert torch.allclose(z_d[:, :8], plain, atol=1e-5)


def test_of_two_candidates_the_one_with_the_larger_dot_is_kept(model):
    tokens, rows = model.clip.tokenizer([PROMPTS[0]]).expand(20, -1), range(20)
    z_t = model.clip.encode_text(tokens)
    dots = [(model.draw_z_i(tokens, 0, rows, candidates=n) * z_t).sum(dim=1) for n in (1, 2)]
    assert (dots[1] >= dots[0] - 1e-5).all() and 0 < (dots[1] > dots[0] + 1e-4).sum() < 20
    default = (model.draw_z_i(tokens, 0, rows) * z_t).sum(dim=1)
    assert torch.equal(default, dots[1])


# ---- Manipulating --------------------------------------------------------------------------------

class ToyCLIP:
    """z_i: the mean colour, on the unit sphere of four numbers. z_t: that of the colour named."""
    COLOURS = {"red": [0.5, -0.5, -0.5], "blue": [-0.5, -0.5, 0.5], "a photo": [0.0, 0.0, 0.0]}
    logit_scale, main = torch.zeros(()), torch.ones(4)

    def encode_image(self, x):
        return F.normalize(F.pad(x.mean(dim=(2, 3)), (0, 1), value=1.0), dim=1)

    def tokenizer(self, texts):
        return torch.tensor([list(self.COLOURS).index(text) for text in texts])

    def encode_text(self, tokens):
        colours = torch.tensor(list(self.COLOURS.values()))[tokens]
        return F.normalize(F.pad(colours, (0, 1), value=1.0), dim=1)

    def whiten(self, z):
        return 2 * z - 1


class ToyDecoder:
    """The exact denoiser of 4×4 pictures N(the colour that z_i says, 0.1²)."""
    diffusion, config = Diffusion("eps"), SimpleNamespace(image_size=4)

    def __init__(self):
        self.asked = []

    def given(self, z_i, tokens, guidance=1.0):
        assert tokens is None and guidance == 1.0
        z_i = (z_i + 1) / 2
        self.asked.append(z_i)
        mean, std = (z_i[:, :3] / z_i[:, 3:])[:, :, None, None], 0.1

        def f(x_t, t):
            cos, sin = self.diffusion.rotation(t, x_t)
            eps = sin / (cos ** 2 * std ** 2 + sin ** 2) * (x_t - cos * mean)
            return (eps - sin * x_t) / cos               # v, as x_0 is (x_t − sin·eps)/cos
        return f


@pytest.fixture
def toy():
    return UnCLIP(ToyCLIP(), ToyDecoder())


def picture(colour, seed=0):
    """(1, 3, 4, 4) about a colour, of exactly that mean."""
    noise = normal(1, 3, 4, 4, seed=seed)()
    return torch.tensor(colour)[None, :, None, None] + 0.1 * pattern(noise)


def colour(x):
    return x.mean(dim=(2, 3))


def pattern(x):
    return x - x.mean(dim=(2, 3), keepdim=True)


RED, BLUE = picture([0.5, -0.5, -0.5]), picture([-0.5, -0.5, 0.5], seed=1)


def test_a_picture_comes_back_from_its_latent_and_from_another_z_i_comes_another(toy):
    assert (toy.reconstruct(RED) - RED).abs().max() < 1e-3
    _, x_T = toy.latent(RED)
    other = toy.decode(toy.clip.encode_image(BLUE), x_T)
    assert torch.allclose(colour(other), colour(BLUE), atol=0.05)


def test_the_larger_eta_the_more_varies_and_what_clip_sees_stays(toy):
    off = []
    for eta in (0.0, 0.3, 1.0):
        varied = toy.vary(RED, n=50, eta=eta)
        off.append((varied - RED).square().mean().sqrt().item())
        assert varied.shape == (50, 3, 4, 4) and (colour(varied) - colour(RED)).abs().max() < 0.15
    assert off[0] < 1e-3 and off[0] < off[1] < off[2]
    assert off[2] == pytest.approx(0.1 * math.sqrt(2), rel=0.15)      # as far as a stranger


def test_interpolation_turns_evenly_and_with_fixed_noise_only_what_clip_sees_is_interpolated(toy):
    strip = toy.interpolate(RED, BLUE, n=5)
    assert strip.shape == (5, 3, 4, 4)
    assert (strip[0] - RED).abs().max() < 1e-3 and (strip[-1] - BLUE).abs().max() < 1e-3
    along = (toy.clip.encode_image(strip) @ toy.clip.encode_image(BLUE).T)[:, 0].acos()
    assert torch.allclose(along.diff(), along.diff().mean().expand(4), atol=0.03)
    strip = toy.interpolate(RED, BLUE, n=5, fixed_noise=True)
    assert (pattern(strip) - pattern(strip[:1])).abs().max() < 0.02   # all of one pattern …
    assert (strip[0] - RED).abs().max() > 0.1                         # … which is not RED's
    assert torch.allclose(colour(strip[:1]), colour(RED), atol=0.1)
    assert torch.allclose(colour(strip[4:]), colour(BLUE), atol=0.1)


def test_an_edit_turns_z_i_towards_the_text_diff_by_theta_and_keeps_the_pattern(toy):
    strip = toy.edit(RED, "blue", "red", n=4, theta=0.3)
    z_i, z = torch.cat(toy.parts["decoder"].asked[1:])[:4], toy.clip.encode_image(RED)[0]
    z_t, z_t0 = toy.clip.encode_text(torch.tensor([1, 0]))
    z_d = F.normalize(z_t - z_t0, dim=0)
    assert torch.allclose(toy.text_diff(["blue"], ["red"]), z_d[None])
    whole, thetas = (z @ z_d).acos(), torch.linspace(0, 0.3, 4)
    assert torch.allclose(z_i.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose((z_i @ z).clamp(-1, 1).acos(), whole * thetas, atol=2e-3)
    assert torch.allclose((z_i @ z_d).acos(), whole * (1 - thetas), atol=2e-3)
    assert strip.shape == (4, 3, 4, 4) and (strip[0] - RED).abs().max() < 1e-3
    assert (pattern(strip) - pattern(RED)).abs().max() < 0.02
    assert (colour(strip)[:, 0].diff() < 0).all() and (colour(strip)[:, 2].diff() > 0).all()
    assert torch.equal(toy.edit(RED, "blue", n=2), toy.edit(RED, "blue", "a photo", n=2))
    assert torch.allclose(toy.edit(RED, "blue", "red", 1, 0.3), strip[3:], atol=1e-4)
    with pytest.raises(ValueError, match="--to \"red\".*choose another"):
        toy.edit(RED, "red", "red", n=2)
