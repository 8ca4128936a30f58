"""Where the parts meet: drawing, manipulating, checkpoints, and who may import whom.

Manipulations are tested on a toy in which everything is known: its CLIP sees a picture's mean
colour alone, and its decoder is the exact denoiser of pictures about that colour.
"""

import ast
import copy
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import unclip
from clip_tiny import CLIP, Whitening
from conftest import ROOT
from decoder import Decoder, Upsampler
from diffusion import Diffusion
from prior import ARPrior, DiffusionPrior
from unclip import UnCLIP, load_part, save_part, slerp, write_torch

PROMPTS = ["a red cube", "a large blue sphere"]


@pytest.fixture(scope="module")
def model(tiny_weights):
    return UnCLIP.load(tiny_weights)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape, seed=0):
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def bits(model):
    return copy.deepcopy(model.state_dict())


def same_bits(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in after)


# ---- slerp ---------------------------------------------------------------------------------------

T = torch.linspace(0, 1, 11)


def between(a, b, t=T):
    return slerp(a.expand(len(t), *a.shape), b.expand(len(t), *b.shape), t)


def test_slerp_of_unit_vectors_stays_on_the_sphere():
    path = between(unit(64), unit(64, seed=1))
    assert torch.allclose(path.norm(dim=1), torch.ones(11), atol=1e-6)


def test_slerp_begins_at_a_and_ends_at_b():
    a, b = unit(64), unit(64, seed=1)
    path = between(a, b)
    assert torch.allclose(path[0], a, atol=1e-6) and torch.allclose(path[-1], b, atol=1e-6)


def test_slerp_turns_by_equal_angles():
    path = between(unit(64), unit(64, seed=1)).double()
    steps = (path[1:] * path[:-1]).sum(dim=1).acos()
    whole = (path[0] @ path[-1]).acos()
    assert torch.allclose(steps, whole.expand(10) / 10, atol=1e-5)


def test_control_a_straight_line_neither_keeps_the_norm_nor_the_angles():
    a, b = unit(64), unit(64, seed=1)
    path = torch.lerp(a, b, T[:, None])
    assert path.norm(dim=1).min() < 0.9


def test_slerp_takes_one_t_for_all_rows_or_one_each():
    a, b = unit(3, 8), unit(3, 8, seed=1)
    each = slerp(a, b, torch.tensor([0.2, 0.5, 0.9]))
    for row, t in enumerate((0.2, 0.5, 0.9)):
        assert torch.allclose(each[row], slerp(a, b, t)[row], atol=1e-6)


@pytest.mark.parametrize("distance", [0.0, 1e-8, 1e-6, 1e-4, 1e-2])
def test_slerp_of_nearly_equal_vectors_is_finite_and_in_between(distance):
    a = unit(64)
    b = F.normalize(a + distance * unit(64, seed=1), dim=0)
    path = between(a, b)
    assert path.isfinite().all()
    assert torch.allclose(path, torch.lerp(a, b, T[:, None]), atol=1e-4)


@pytest.mark.parametrize("distance", [0.0, 1e-8, 1e-6, 1e-4, 1e-2])
def test_slerp_of_opposite_vectors_is_finite_and_stays_on_the_sphere(distance):
    a = unit(64)
    b = F.normalize(-a + distance * unit(64, seed=1), dim=0)
    path = between(a, b)
    assert torch.allclose(path.norm(dim=1), torch.ones(11), atol=1e-3)
    assert torch.allclose(path[0], a, atol=1e-3) and torch.allclose(path[-1], b, atol=1e-3)
    assert (path[5] @ a).abs() < 0.1                         # half way round, at a right angle


def test_slerp_of_noise_keeps_it_noise():
    """The angle is that of the normalised, flattened tensors; the weights act on the raw ones."""
    a, b = normal(3, 16, 16), normal(3, 16, 16, seed=1)
    path = between(a, b)
    assert path.shape == (11, 3, 16, 16) and torch.allclose(path[0], a, atol=1e-5)
    assert torch.allclose(path[-1], b, atol=1e-5)
    assert (path.std(dim=(1, 2, 3)) - 1).abs().max() < 0.05
    assert torch.lerp(a, b, 0.5).std() < 0.8                 # control: a straight line does not


def test_slerp_of_noise_with_itself_is_itself():
    a = normal(3, 8, 8)
    assert torch.allclose(between(a, a), a.expand(11, 3, 8, 8), atol=1e-5)


# ---- Drawing -------------------------------------------------------------------------------------

def test_n_pictures_of_each_caption_come_caption_by_caption(model):
    x = model.generate(PROMPTS, n=3)
    assert x.shape == (6, 3, 128, 128) and -1 <= x.min() and x.max() <= 1
    assert torch.allclose(x[3:], model.generate(PROMPTS[1], n=3), atol=1e-4)


def test_without_the_upsampler_they_are_the_decoder_s_size(model):
    assert model.generate(PROMPTS[0], n=1, upsample=False).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("prior", ["diffusion", "ar", "text", "none"])
def test_a_picture_depends_neither_on_the_batch_nor_on_its_companions(model, prior):
    draw = lambda captions, n, batch: model.generate(captions, n, prior=prior, batch=batch, eta=1.0)
    many = draw(PROMPTS, 5, 2)
    assert torch.allclose(many[5:8], draw(PROMPTS[1], 3, 4), atol=1e-3)
    assert not torch.allclose(many[5], many[6], atol=1e-2)   # but each has noise of its own


def test_the_same_seed_is_the_same_picture_and_another_is_another(model):
    a, b, c = (model.generate(PROMPTS[0], n=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)


def given_to_the_decoder(model, **options):
    """The z_i and tokens that the decoder is asked for one prompt."""
    asked = []
    toy = SimpleNamespace(config=model.decoder.config, whitening=model.decoder.whitening,
                          sample=lambda *args: asked.append(args[:2]) or args[2]())
    UnCLIP(model.clip, toy, model.priors["diffusion"], model.priors["ar"]).generate(
        PROMPTS[0], n=2, **options)
    return asked[0]


def test_each_prior_gives_the_decoder_what_its_name_says(model):
    tokens = model.clip.tokenizer([PROMPTS[0]])
    z_t = model.clip.encode_text(tokens)
    given = {prior: given_to_the_decoder(model, prior=prior)
             for prior in ("diffusion", "ar", "text", "none")}
    assert all(torch.equal(y, tokens.expand(2, -1)) for _, y in given.values())
    assert given["none"][0] is None
    assert torch.allclose(given["text"][0], z_t.expand(2, -1), atol=1e-6)
    for prior in ("diffusion", "ar"):
        z_i = given[prior][0]
        assert z_i.shape == (2, 16) and torch.allclose(z_i.norm(dim=1), torch.ones(2), atol=1e-5)
        assert not torch.allclose(z_i, z_t.expand(2, -1), atol=1e-2)


def test_the_prior_s_options_reach_it(model):
    z_t = model.clip.encode_text(model.clip.tokenizer([PROMPTS[0]]))
    dots = [given_to_the_decoder(model, candidates=candidates)[0] @ z_t.T for candidates in (1, 8)]
    assert (dots[1] >= dots[0] - 1e-5).all() and (dots[1] > dots[0]).any()


def test_more_candidates_keep_the_noise_of_fewer(model):
    tokens = model.clip.tokenizer([PROMPTS[0]])
    one, again = (model.draw_z_i(tokens, "diffusion", 0, [3], candidates=1) for _ in range(2))
    among = [model.draw_z_i(tokens.expand(4, -1), "diffusion", 0, range(4), candidates=1)[3:]]
    assert torch.equal(one, again) and torch.allclose(one, among[0], atol=1e-5)


def test_a_missing_part_or_prior_is_named_with_the_remedy(model):
    bare = UnCLIP(model.clip)
    with pytest.raises(ValueError, match="no weights of the diffusion prior.*--stage prior"):
        bare.generate(PROMPTS)
    with pytest.raises(ValueError, match="no weights of the ar prior.*--stage ar-prior"):
        bare.generate(PROMPTS, prior="ar")
    with pytest.raises(ValueError, match="no weights of the decoder.*--stage decoder"):
        bare.generate(PROMPTS, prior="text")
    with pytest.raises(ValueError, match="unknown prior 'gan': choose diffusion, ar, text or none"):
        bare.generate(PROMPTS, prior="gan")


# ---- CLIP is frozen, and nobody's part -----------------------------------------------------------

def test_no_model_has_clip_inside_it(model):
    for other in (model.priors["diffusion"], model.priors["ar"], model.decoder, *model.upsamplers):
        assert not any(isinstance(module, CLIP) for module in other.modules())
        assert not any("clip" in name for name, _ in other.named_parameters())


def test_using_unclip_changes_no_bit_of_it(model):
    parts = [model.clip, model.decoder, *model.priors.values(), *model.upsamplers]
    before = [bits(part) for part in parts]
    x = model.generate(PROMPTS[0], n=1, upsample=False)
    model.generate(PROMPTS[0], n=1, prior="ar")
    model.vary(x, n=2, steps=2)
    model.edit(x, "a blue cube", n=2, steps=2)
    assert all(same_bits(part, b) for part, b in zip(parts, before))
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_training_prior_and_decoder_changes_no_bit_of_clip_and_none_of_its_answers(tiny_weights):
    clip, prior, ar_prior, decoder = (load_part(tiny_weights / f"{part}.pt").requires_grad_(True)
                                      for part in ("clip", "prior", "ar_prior", "decoder"))
    before, x, tokens = bits(clip), normal(8, 3, 32, 32).clamp(-1, 1), clip.tokenizer(PROMPTS * 4)
    z_i, z_t = clip.encode_image(x).detach(), clip.encode_text(tokens).detach()
    for trained in (prior, ar_prior, decoder):
        trained.train()
        weights, optimizer = bits(trained), torch.optim.AdamW(trained.parameters(), lr=1e-2)
        pairs = (x, z_i, tokens) if trained is decoder else (z_i, z_t, tokens)
        trained.loss(*pairs).backward()
        optimizer.step()
        assert not same_bits(trained, weights)                         # it did learn something
    assert same_bits(clip, before) and all(p.grad is None for p in clip.parameters())
    assert torch.equal(clip.encode_image(x), z_i)


# ---- Manipulating --------------------------------------------------------------------------------

class ToyCLIP(nn.Module):
    """z_i: the mean colour on the unit sphere of four numbers. z_t: that of the colour named."""

    COLOURS = {"red": [0.5, -0.5, -0.5], "blue": [-0.5, -0.5, 0.5], "a photo": [0.0, 0.0, 0.0]}

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, x):
        return F.normalize(F.pad(x.mean(dim=(2, 3)), (0, 1), value=1.0), dim=1)

    def tokenizer(self, texts):
        return torch.tensor([list(self.COLOURS).index(text) for text in texts])

    def encode_text(self, tokens):
        colours = torch.tensor(list(self.COLOURS.values()))[tokens]
        return F.normalize(F.pad(colours, (0, 1), value=1.0), dim=1)


class ToyDecoder:
    """The exact denoiser of 4×4 pictures N(the colour that z_i says, 0.1²)."""

    def __init__(self):
        self.diffusion, self.config = Diffusion(predict="v"), SimpleNamespace(image_size=4)
        self.whitening, self.asked = Whitening(4), []

    def predictor(self, z_i, tokens, guidance=1.0):
        assert tokens is None and guidance == 1.0
        self.asked.append(z_i)
        mean, std = (z_i[:, :3] / z_i[:, 3:])[:, :, None, None], 0.1

        def f(x_t, t):
            signal, noise = self.diffusion.signal_and_noise(t, x_t)
            var = signal**2 * std**2 + noise**2
            eps = noise / var * (x_t - signal * mean)
            return (eps - noise * x_t) / signal              # v, x_0 being (x_t − noise·eps)/signal
        return f


@pytest.fixture
def toy():
    return UnCLIP(ToyCLIP(), ToyDecoder())


def picture(colour, seed=0):
    """(1, 3, 4, 4) about a colour, of exactly that mean."""
    noise = normal(1, 3, 4, 4, seed=seed)
    noise = noise - noise.mean(dim=(2, 3), keepdim=True)
    return torch.tensor(colour)[None, :, None, None] + 0.1 * noise


RED, BLUE = picture([0.5, -0.5, -0.5]), picture([-0.5, -0.5, 0.5], seed=1)


def test_a_picture_comes_back_from_its_latent(toy):
    assert (toy.reconstruct(RED) - RED).abs().max() < 1e-3


def test_so_it_does_from_the_real_decoder(model):
    """Even an untrained network is inverted: what its sampler draws unclipped is found again."""
    decoder = model.decoder
    z_i = unit(2, 16)
    x = decoder.diffusion.sample(decoder.predictor(z_i, None), normal(2, 3, 32, 32), 20)
    x_T = decoder.diffusion.invert(decoder.predictor(z_i, None), x, 20)
    back = decoder.diffusion.sample(decoder.predictor(z_i, None), x_T, 20)
    assert (back - x).square().mean().sqrt() < 1e-2 * x.std()


def test_control_with_another_z_i_the_same_noise_is_another_picture(toy):
    _, x_T = toy.latent(RED)
    other = toy.decode(toy.clip.encode_image(BLUE), x_T)
    assert torch.allclose(other.mean(dim=(2, 3)), BLUE.mean(dim=(2, 3)), atol=0.05)


def test_the_latent_s_noise_is_standard_normal(toy):
    _, x_T = toy.latent(torch.cat([picture([0.2, 0.1, -0.3], seed) for seed in range(100)]))
    assert abs(x_T.mean()) < 0.1 and abs(x_T.std() - 1) < 0.1


def test_variations_at_eta_0_are_the_picture_itself(toy):
    varied = toy.vary(RED, n=3, eta=0.0)
    assert varied.shape == (3, 3, 4, 4) and (varied - RED).abs().max() < 1e-3


def test_the_larger_eta_the_more_varies_and_what_clip_sees_stays(toy):
    off = []
    for eta in (0.0, 0.3, 0.6, 1.0):
        varied = toy.vary(RED, n=50, eta=eta)
        off.append((varied - RED).square().mean().sqrt().item())
        colours = varied.mean(dim=(2, 3)) - RED.mean(dim=(2, 3))
        assert colours.abs().max() < 0.15
    assert off[0] < off[1] < off[2] < off[3]
    assert off[3] == pytest.approx(0.1 * math.sqrt(2), rel=0.15)        # as far as a stranger


def test_the_first_variations_do_not_depend_on_how_many_are_asked_for(toy):
    assert torch.allclose(toy.vary(RED, n=2), toy.vary(RED, n=5)[:2], atol=1e-5)


def test_interpolation_ends_at_the_two_pictures(toy):
    path = toy.interpolate(RED, BLUE, n=5)
    assert path.shape == (5, 3, 4, 4)
    assert (path[0] - RED).abs().max() < 1e-3 and (path[-1] - BLUE).abs().max() < 1e-3


def test_interpolation_turns_red_to_blue_evenly(toy):
    z_i = toy.clip.encode_image(toy.interpolate(RED, BLUE, n=5))
    along = (z_i @ toy.clip.encode_image(BLUE).T)[:, 0].acos()
    assert torch.allclose(along.diff(), along.diff().mean().expand(4), atol=0.03)


def test_fixed_noise_interpolates_what_clip_sees_alone(toy):
    toy.decoder.diffusion.invert = None                                 # nothing is inverted
    path = toy.interpolate(RED, BLUE, n=5, fixed_noise=True)
    rest = path - path.mean(dim=(2, 3), keepdim=True)
    assert (rest - rest[:1]).abs().max() < 0.02                         # all of one pattern …
    assert (path[0] - RED).abs().max() > 0.1                            # … which is not RED's
    assert torch.allclose(path[0].mean(dim=(1, 2)), RED[0].mean(dim=(1, 2)), atol=0.1)


def test_an_edit_begins_with_the_picture(toy):
    strip = toy.edit(RED, "blue", "red", n=4)
    assert strip.shape == (4, 3, 4, 4) and (strip[0] - RED).abs().max() < 1e-3


def test_an_edit_turns_z_i_towards_the_difference_of_the_captions_by_theta(toy):
    toy.edit(RED, "blue", "red", n=4, theta=0.3)
    z_i, z = toy.decoder.asked[-1], toy.clip.encode_image(RED)[0]
    z_t, z_t0 = toy.clip.encode_text(torch.tensor([1, 0]))
    z_d = F.normalize(z_t - z_t0, dim=0)
    whole, thetas = (z @ z_d).acos(), torch.linspace(0, 0.3, 4)
    assert torch.allclose(z_i.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose((z_i @ z).clamp(-1, 1).acos(), whole * thetas, atol=2e-3)
    assert torch.allclose((z_i @ z_d).acos(), whole * (1 - thetas), atol=2e-3)


def test_what_pictures_hardly_differ_in_is_left_out_of_text_embeddings(toy):
    spread = torch.tensor([0.3, 0.01, 0.3])                  # red and blue tell pictures apart
    z_i = F.normalize(F.pad(normal(1000, 3) * spread, (0, 1), value=1.0), dim=1)
    toy.decoder.whitening.fit(z_i)
    z_d = toy.text_diff(["blue"], ["a photo"])[0]
    plain = F.normalize(toy.clip.encode_text(torch.tensor([1])) - torch.eye(4)[3:], dim=1)[0]
    assert plain[1] < -0.3 and z_d[1].abs() < 0.02
    assert torch.allclose(z_d.norm(), torch.tensor(1.0)) and (z_d @ plain) > 0.7
    z_t = toy.draw_z_i(torch.tensor([1]), "text", 0, range(1))[0]
    assert z_t[1].abs() < 0.02 and z_t[0] < -0.3 < 0.3 < z_t[2]


def test_an_edit_keeps_the_pattern_and_changes_the_colour(toy):
    strip = toy.edit(RED, "blue", "red", n=4, theta=0.3)
    rest = strip - strip.mean(dim=(2, 3), keepdim=True)
    assert (rest - rest[:1]).abs().max() < 0.02
    red, blue = strip.mean(dim=(2, 3))[:, 0], strip.mean(dim=(2, 3))[:, 2]
    assert (red.diff() < 0).all() and (blue.diff() > 0).all()


def test_without_a_base_the_edit_starts_from_a_photo(toy):
    assert torch.equal(toy.edit(RED, "blue", n=2), toy.edit(RED, "blue", "a photo", n=2))


# ---- Checkpoints ---------------------------------------------------------------------------------

PARTS = pytest.mark.parametrize("part, kind", [
    ("clip", CLIP), ("prior", DiffusionPrior), ("ar_prior", ARPrior), ("decoder", Decoder),
    ("upsampler", Upsampler)])


@PARTS
def test_a_part_is_the_same_bits_after_saving_and_loading(tiny_weights, tmp_path, part, kind):
    model = load_part(tiny_weights / f"{part}.pt")
    save_part(tmp_path / "deep" / "again.pt", part, model, model.trained)
    again = load_part(tmp_path / "deep" / "again.pt")
    assert type(again) is kind and again.config == model.config
    assert same_bits(again, model.state_dict())
    assert (again.clip_id, again.trained) == (model.clip_id, model.trained)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["again.pt"]


@PARTS
def test_half_precision_is_half_the_size_and_nearly_the_same(tiny_weights, tmp_path, part, kind):
    model = load_part(tiny_weights / f"{part}.pt")
    save_part(tmp_path / "half.pt", part, model, model.trained, half=True)
    again = load_part(tmp_path / "half.pt")
    assert all(p.dtype == torch.float32 for p in again.parameters())
    for name, value in again.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-3, atol=1e-6), name
    weights = torch.load(tmp_path / "half.pt", weights_only=True)["weights"]
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert again.clip_id == model.clip_id                    # it is still the same CLIP's


def test_clip_carries_its_tokenizer(tiny_weights, tmp_path):
    clip = load_part(tiny_weights / "clip.pt")
    save_part(tmp_path / "clip.pt", "clip", clip, clip.trained)
    assert load_part(tmp_path / "clip.pt").tokenizer.state() == clip.tokenizer.state()


def test_loaded_parts_are_in_eval_mode_and_without_gradients(tiny_weights):
    decoder = load_part(tiny_weights / "decoder.pt")
    assert not decoder.training and not any(p.requires_grad for p in decoder.parameters())


def broken(checkpoint, how):
    weights = checkpoint["weights"]
    name = next(iter(weights))
    if how == "a weight missing":
        del weights[name]
    elif how == "a weight too many":
        weights["extra"] = torch.zeros(1)
    elif how == "a weight of another shape":
        weights[name] = torch.zeros(3, 3)
    elif how == "an unknown field in its config":
        checkpoint["config"]["colour"] = "red"
    elif how == "no CLIP named":
        del checkpoint["clip_id"]
    elif how == "another format":
        checkpoint["format"] = 999
    elif how == "an unknown prediction":
        checkpoint["config"]["predict"] = "x_1"
    elif how == "no data set named":
        del checkpoint["trained"]["data"]
    elif how == "an unknown part":
        checkpoint["part"] = "gan"
    return checkpoint


@pytest.mark.parametrize("how", [
    "a weight missing", "a weight too many", "a weight of another shape",
    "an unknown field in its config", "no CLIP named", "no data set named",
    "an unknown prediction", "another format", "an unknown part"])
def test_a_checkpoint_is_refused_in_one_line_that_names_it_if_it_has(tiny_weights, tmp_path, how):
    path = tmp_path / "decoder.pt"
    write_torch(path, broken(torch.load(tiny_weights / "decoder.pt", weights_only=True), how))
    with pytest.raises(ValueError) as error:
        load_part(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


class Surprise:
    """A pickle that runs code when it is opened."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the code was run')",))


@pytest.mark.parametrize("kind", ["truncated", "empty", "picture", "text", "code", "list",
                                  "module"])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line_that_names_it(
        tiny_weights, tmp_path, kind):
    path, good = tmp_path / "decoder.pt", (tiny_weights / "decoder.pt").read_bytes()
    content = {"truncated": good[:len(good) // 2], "empty": b"", "text": b"hello",
               "picture": b"\x89PNG\r\n\x1a\n" + bytes(100), "code": {"part": Surprise()},
               "list": [1, 2], "module": nn.Linear(1, 1)}[kind]
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError) as error:
        load_part(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_checkpoint_is_written_beside_and_renamed(tmp_path, monkeypatch):
    real, targets = torch.save, []
    monkeypatch.setattr(torch, "save", lambda value, to: targets.append(to) or real(value, to))
    write_torch(tmp_path / "x.pt", {"a": 1})
    assert len(targets) == 1 and targets[0].parent == tmp_path and targets[0].name != "x.pt"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.pt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "x.pt"
    write_torch(path, {"a": 1})
    with pytest.raises(Exception):
        write_torch(path, {"a": lambda: None})                          # can't be pickled
    assert torch.load(path, weights_only=True) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# ---- Folders of weights --------------------------------------------------------------------------

@pytest.fixture
def shipped(tiny_weights, tmp_path, monkeypatch):
    """Shipped weights of every part, and an empty run folder beside them."""
    shutil.copytree(tiny_weights, tmp_path / "weights" / "shapes")
    monkeypatch.setattr(unclip, "SHIPPED", tmp_path / "weights")
    (tmp_path / "run").mkdir()
    return tmp_path / "weights" / "shapes"


def retrained(source, target, part, **changes):
    """A copy of a part, with some fields of the checkpoint changed."""
    checkpoint = torch.load(source / f"{part}.pt", weights_only=True)
    write_torch(target / f"{part}.pt", {**checkpoint, **changes})


def test_what_a_run_lacks_is_taken_from_the_shipped_weights_and_said_so(shipped, tmp_path, capsys):
    retrained(shipped, tmp_path / "run", "prior", trained={"data": "shapes", "seed": 5, "steps": 9})
    model = UnCLIP.load(tmp_path / "run")
    assert model.priors["diffusion"].trained["seed"] == 5              # the run's own comes first
    assert model.decoder and model.priors["ar"] and len(model.upsamplers) == 1
    out, err = capsys.readouterr()
    assert out == "" and sorted(line.split(":")[0] for line in err.splitlines()) == [
        "ar_prior", "clip", "decoder", "upsampler"]


def test_shipped_parts_of_another_clip_are_not_taken(shipped, tmp_path, capsys):
    retrained(shipped, tmp_path / "run", "clip", clip_id="new")
    model = UnCLIP.load(tmp_path / "run")
    assert model.decoder is None and model.priors == {"diffusion": None, "ar": None}
    assert len(model.upsamplers) == 1                                   # which knows no CLIP
    assert "decoder" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["prior", "ar_prior", "decoder"])
def test_a_part_of_another_clip_is_refused_with_both_names(shipped, part):
    retrained(shipped, shipped, part, clip_id="other")
    with pytest.raises(ValueError, match=f"{part}.pt: belongs to another CLIP.*other.*tiny"):
        UnCLIP.load(shipped)


def test_a_folder_without_weights_says_how_to_make_them(tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match="train.py"):
            UnCLIP.load(folder)


def test_without_any_clip_the_stage_that_makes_it_is_named(shipped, tmp_path):
    shutil.copy(shipped / "prior.pt", tmp_path / "run")
    (shipped / "clip.pt").unlink()
    with pytest.raises(FileNotFoundError, match="--stage clip"):
        UnCLIP.load(tmp_path / "run")


# ---- Architecture --------------------------------------------------------------------------------

PACKAGES = {"torch", "numpy", "PIL", "tqdm"}
LEAVES = {"train", "sample", "evaluate"}
ARROWS = {"diffusion": set(), "clip_tiny": set(), "data": set(),
          "prior": {"diffusion", "clip_tiny"}, "decoder": {"diffusion", "clip_tiny"},
          "unclip": {"diffusion", "clip_tiny", "prior", "decoder"}}


def imports(path):
    """The top-level names of all modules imported anywhere in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import, and this is no package"
            names.add(node.module.split(".")[0])
    return names


CHAPTERS = {path.stem: imports(path) for path in sorted(ROOT.glob("*.py"))
            if path.stem != "conftest"}


@pytest.mark.parametrize("chapter", ARROWS)
def test_a_chapter_imports_only_those_below_it(chapter):
    ours = CHAPTERS[chapter] & CHAPTERS.keys()
    assert ours <= ARROWS[chapter], f"{chapter}.py imports {sorted(ours - ARROWS[chapter])}"


def test_nothing_imports_a_leaf():
    assert {name: found & LEAVES for name, found in CHAPTERS.items() if found & LEAVES} == {}


def test_there_are_no_other_chapters():
    assert CHAPTERS.keys() <= ARROWS.keys() | LEAVES


def test_the_book_needs_four_packages_and_its_tests_one_more():
    known = set(sys.stdlib_module_names) | CHAPTERS.keys() | {"conftest"}
    for name, found in CHAPTERS.items():
        assert found <= known | PACKAGES, f"{name}.py imports {sorted(found - known - PACKAGES)}"
    tests = list((ROOT / "tests").glob("*.py"))
    for path in tests:
        found = imports(path) - known - PACKAGES - {other.stem for other in tests}
        assert found <= {"pytest"}, f"{path.name} imports {sorted(found)}"
