"""The diffusion process, against what can be worked out with a pencil.

Gaussian data and mixtures of Gaussians have an exact optimal denoiser E[x_0 | x_t]. Handed to the
sampler in place of a network it leaves nothing to blame on training.
"""

import math

import pytest
import torch

from diffusion import Diffusion, Noise, guided, timestep_embedding

MEAN = torch.tensor([0.0, 1.0, -0.5, 0.3])        # four independent Gaussians, side by side
STD = torch.tensor([0.1, 0.3, 1.0, 2.0])


def as_prediction(diffusion, x_0, x_t, t):
    """The estimate x_0 at x_t, in the units in which this diffusion's network would answer."""
    signal, noise = diffusion.signal_and_noise(t, x_t)
    eps = (x_t - signal * x_0) / noise
    return {"x_0": x_0, "eps": eps, "v": signal * eps - noise * x_0}[diffusion.predict]


def gaussian(diffusion, mean=MEAN, std=STD):
    """The optimal network for data N(mean, std²)."""
    def f(x_t, t):
        signal, noise = diffusion.signal_and_noise(t, x_t)
        gain = signal * std**2 / (signal**2 * std**2 + noise**2)
        return as_prediction(diffusion, mean + gain * (x_t - signal * mean), x_t, t)
    return f


def two_modes(diffusion, modes=(-1.0, 1.0), shares=(0.3, 0.7), std=0.05):
    """The optimal network for data (B, 1) that are at one of two modes, give or take std."""
    modes, shares = torch.tensor(modes), torch.tensor(shares)

    def f(x_t, t):
        signal, noise = diffusion.signal_and_noise(t, x_t)
        var = signal**2 * std**2 + noise**2
        which = (shares.log() - (x_t - signal * modes) ** 2 / (2 * var)).softmax(dim=1)
        each = modes + signal * std**2 / var * (x_t - signal * modes)
        return as_prediction(diffusion, (which * each).sum(dim=1, keepdim=True), x_t, t)
    return f


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def misses(x, tolerance=0.05):
    """Whether samples (B, 4) miss the mean or the spread of the four Gaussians."""
    mean_off = ((x.mean(dim=0) - MEAN).abs() / STD).max()
    std_off = (x.std(dim=0) / STD - 1).abs().max()
    return bool(mean_off > tolerance or std_off > tolerance)


# ---- The schedule ------------------------------------------------------------------------------

def test_the_schedule_falls_from_one_to_almost_nothing_in_float64():
    alphas_bar = Diffusion().alphas_bar
    assert alphas_bar.dtype == torch.float64 and alphas_bar.shape == (1001,)
    assert alphas_bar[0] == 1 and 0 < alphas_bar[-1] < 1e-6
    assert (alphas_bar.diff() < 0).all()


def test_no_step_of_the_schedule_destroys_more_than_999_in_1000():
    alphas_bar = Diffusion().alphas_bar
    betas = 1 - alphas_bar[1:] / alphas_bar[:-1]
    assert betas.max() == pytest.approx(0.999) and betas.min() > 0


def test_the_schedule_is_the_cosine_before_its_bound_acts():
    t = torch.tensor([1, 250, 500, 750], dtype=torch.float64)
    f = lambda t: torch.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(Diffusion().alphas_bar[t.long()], f(t) / f(torch.zeros(1).double()))


# ---- Noising, and the three units of a prediction ------------------------------------------------

@pytest.mark.parametrize("t", [1, 300, 1000])
def test_q_sample_has_the_moments_of_q(t):
    diffusion = Diffusion()
    x_0, eps = torch.full((20000, 1), 2.0), normal(20000, 1)()
    x_t = diffusion.q_sample(x_0, torch.full((20000,), t), eps)
    ab = diffusion.alphas_bar[t]
    assert x_t.mean().item() == pytest.approx(2 * ab.sqrt().item(), abs=0.03)
    assert x_t.std().item() == pytest.approx((1 - ab).sqrt().item(), rel=0.03)


def test_each_row_is_noised_to_its_own_step():
    diffusion, x_0, eps = Diffusion(), normal(3, 2, 4, 4)(), normal(3, 2, 4, 4, seed=1)()
    together = diffusion.q_sample(x_0, torch.tensor([1, 500, 1000]), eps)
    for row, t in enumerate((1, 500, 1000)):
        alone = diffusion.q_sample(x_0[row:row + 1], torch.tensor([t]), eps[row:row + 1])
        assert torch.equal(together[row:row + 1], alone)


@pytest.mark.parametrize("predict", ["x_0", "eps", "v"])
def test_every_prediction_tells_both_x_0_and_eps(predict):
    diffusion, t = Diffusion(predict=predict), torch.tensor([1, 100, 500, 999])
    x_0, eps = normal(4, 6)().double(), normal(4, 6, seed=1)().double()
    x_t = diffusion.q_sample(x_0, t, eps)
    prediction = as_prediction(diffusion, x_0, x_t, t)
    found_x_0, found_eps = diffusion.x_0_and_eps(prediction, x_t, t)
    assert torch.allclose(found_x_0, x_0) and torch.allclose(found_eps, eps)


@pytest.mark.parametrize("predict", ["x_0", "eps", "v"])
def test_the_loss_is_zero_for_the_right_answer_and_mean_squared_error_beside_it(predict):
    diffusion, t = Diffusion(predict=predict), torch.tensor([1, 100, 500, 900])
    x_0, eps = normal(4, 6)().double(), normal(4, 6, seed=1)().double()
    f = lambda x_t, t: as_prediction(diffusion, x_0, x_t, t)
    assert diffusion.loss(f, x_0, t, eps) < 1e-9
    beside = diffusion.loss(lambda x_t, t: f(x_t, t) + 3, x_0, t, eps)
    assert beside.item() == pytest.approx(9, rel=1e-4)


# ---- The grid ----------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 10, 25, 64, 500, 999, 1000])
def test_the_grid_falls_strictly_from_T_to_0(steps):
    grid = Diffusion().grid(steps)
    assert len(grid) == steps + 1 and grid[0] == 1000 and grid[-1] == 0
    assert all(t > t_next for t, t_next in zip(grid, grid[1:]))


def test_as_many_steps_as_there_are_visit_all_of_them():
    assert Diffusion(T=50).grid(50) == list(range(50, -1, -1))


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_an_impossible_number_of_steps_is_refused_with_the_choice(steps):
    with pytest.raises(ValueError, match=f"{steps} sampling steps.*1 to 1000"):
        Diffusion().grid(steps)


@pytest.mark.parametrize("steps, kept", [(25, 0.84), (64, 0.94)])
def test_few_steps_keep_most_of_the_variance_of_narrow_data(steps, kept):
    diffusion = Diffusion()
    f = gaussian(diffusion, torch.zeros(1).double(), torch.full((1,), 0.1).double())
    gain = diffusion.sample(f, torch.ones(1, 1).double(), steps)      # f is linear: x_0 = gain·x_T
    assert (gain / 0.1).item() ** 2 == pytest.approx(kept, abs=0.01)


# ---- The sampler -------------------------------------------------------------------------------

@pytest.mark.parametrize("predict, eta", [("x_0", 0.0), ("x_0", 0.5), ("x_0", 1.0), ("v", 1.0)])
def test_exact_gaussian_denoisers_give_the_data_back(predict, eta):
    diffusion, noise = Diffusion(predict=predict), normal(4000, 4)
    x = diffusion.sample(gaussian(diffusion), noise(), 300, eta, noise)
    assert not misses(x)


def test_control_the_posterior_variance_taken_for_its_root_is_found_out():
    diffusion, noise = Diffusion(), normal(4000, 4)
    x_T, grid = noise(), diffusion.grid(300)
    ab = [diffusion.alphas_bar[t].item() for t in grid]
    stds = iter([math.sqrt((1 - b) / (1 - a) * (1 - a / b)) for a, b in zip(ab, ab[1:])])
    x = diffusion.sample(gaussian(diffusion), x_T, 300, 1.0, lambda: noise() * next(stds))
    assert misses(x)


def test_control_noise_used_twice_is_found_out():
    diffusion, x_T = Diffusion(), normal(4000, 4)()
    assert misses(diffusion.sample(gaussian(diffusion), x_T, 300, 1.0, lambda: x_T))


def test_eta_1_is_the_ancestral_step_of_ddpm():
    """Every step against the posterior q(x_{t−1} | x_t, x_0) of Ho et al. 2020."""
    diffusion = Diffusion(T=10, predict="x_0")
    x_T, x_0, eps = (normal(5, 3, seed=k)() for k in range(3))
    path = []
    diffusion.sample(lambda x_t, t: x_0, x_T, 10, 1.0, lambda: eps, trace=path.append)
    for k, t in enumerate(range(10, 1, -1)):
        x_t = path[k - 1] if k else x_T
        ab, before = diffusion.alphas_bar[t], diffusion.alphas_bar[t - 1]
        beta = 1 - ab / before
        mean = (before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - ab)
        variance = (1 - before) / (1 - ab) * beta
        assert torch.allclose(path[k], mean + variance.sqrt() * eps, atol=1e-5)


def test_eta_0_draws_no_noise():
    diffusion = Diffusion()
    diffusion.sample(gaussian(diffusion), normal(2, 4)(), 20, 0.0, noise=None)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_both_modes_of_a_mixture_come_out_in_their_shares(eta):
    diffusion, noise = Diffusion(), normal(4000, 1)
    x = diffusion.sample(two_modes(diffusion), noise(), 200, eta, noise)
    assert ((x.abs() - 1).abs() < 0.2).float().mean() > 0.99
    assert (x > 0).float().mean().item() == pytest.approx(0.7, abs=0.03)


def test_control_a_single_network_call_gives_the_mean_and_neither_mode():
    diffusion = Diffusion()
    x = diffusion.sample(two_modes(diffusion), normal(4000, 1)(), 1)
    assert x.mean().item() == pytest.approx(0.3 * -1 + 0.7 * 1, abs=0.02) and x.std() < 0.02


def clip(x_0):
    return x_0.clamp(-1, 1)


def test_clipping_ends_in_range_although_the_network_says_3():
    diffusion, noise = Diffusion(), normal(100, 1)
    f = lambda x_t, t: torch.full_like(x_t, 3.0)
    assert diffusion.sample(f, noise(), 50).min() > 2.9
    for eta in (0.0, 1.0):
        x = diffusion.sample(f, noise(), 50, eta, noise, clip)
        assert torch.allclose(x, torch.ones_like(x), atol=1e-3)


def test_clipping_an_estimate_of_x_0_corrects_eps_to_fit():
    """x_t is still √ᾱ x_0 + √(1−ᾱ) eps, with the clipped x_0 of 1 in place of the network's 3."""
    diffusion, path, grid = Diffusion(), [], Diffusion().grid(10)
    f = lambda x_t, t: torch.full_like(x_t, 3.0)
    diffusion.sample(f, normal(5, 1)(), 10, correct=clip, trace=path.append)
    ab, ab_next = (diffusion.alphas_bar[grid[k]].item() for k in (6, 7))
    eps = (path[5] - math.sqrt(ab)) / math.sqrt(1 - ab)
    assert torch.allclose(path[6], math.sqrt(ab_next) + math.sqrt(1 - ab_next) * eps, atol=1e-5)


def test_vectors_and_pictures_share_the_sampler():
    diffusion = Diffusion()
    f = gaussian(diffusion, torch.tensor(0.2), torch.tensor(0.5))
    x_T = normal(3, 2, 4, 4)()
    as_pictures, as_vectors = (diffusion.sample(f, x, 10) for x in (x_T, x_T.flatten(1)))
    assert torch.equal(as_pictures.flatten(1), as_vectors)


# ---- Guidance ----------------------------------------------------------------------------------

def conditional(diffusion):
    """A network f(x_t, t, mean): optimal for N(mean, 0.5²)."""
    return lambda x_t, t, mean: gaussian(diffusion, mean, torch.tensor(0.5))(x_t, t)


def test_s_1_is_the_plain_network_and_s_0_the_null_one():
    diffusion = Diffusion()
    f, x_t, t = conditional(diffusion), normal(5, 1)(), torch.arange(1, 6) * 100
    mean, null = torch.full((5, 1), 2.0), torch.zeros(5, 1)
    assert torch.equal(guided(f, 1, (mean,), (null,))(x_t, t), f(x_t, t, mean))
    assert torch.equal(guided(f, 0, (mean,), (null,))(x_t, t), f(x_t, t, null))


@pytest.mark.parametrize("s, rows", [(1, [5]), (0, [10]), (3, [10])])
def test_guidance_is_one_call_of_a_doubled_batch(s, rows):
    calls = []

    def f(x_t, t, mean):
        assert len(x_t) == len(t) == len(mean)
        calls.append(len(x_t))
        return x_t
    guided(f, s, (torch.ones(5, 1),), (torch.zeros(5, 1),))(torch.zeros(5, 1), torch.ones(5).long())
    assert calls == rows


@pytest.mark.parametrize("predict", ["x_0", "eps", "v"])
def test_guidance_moves_a_gaussian_by_s_times_the_difference_of_the_means(predict):
    """∇log p_null^(1−s) p_cond^s of two Gaussians of one width is that of a third, moved along."""
    diffusion, s = Diffusion(predict=predict), 3
    mean, null = torch.full((4000, 1), 0.4), torch.full((4000, 1), -0.2)
    f = guided(conditional(diffusion), s, (mean,), (null,))
    x = diffusion.sample(f, normal(4000, 1)(), 500)
    assert x.mean().item() == pytest.approx(-0.2 + s * (0.4 + 0.2), abs=0.04)
    assert x.std().item() == pytest.approx(0.5, rel=0.04)


# ---- Inversion ---------------------------------------------------------------------------------

def round_trip(**how):
    """The root mean square error, in the data's standard deviations, of inverting and sampling."""
    diffusion = Diffusion(predict="v")
    f, x_0 = gaussian(diffusion), MEAN + STD * normal(500, 4)()
    x_T = diffusion.invert(f, x_0, 50, how.pop("iterations", 3))
    error = (diffusion.sample(f, x_T, how.pop("steps", 50), **how) - x_0) / STD
    return error.square().mean().sqrt().item()


def test_inversion_finds_the_noise_that_gives_the_data_back():
    assert round_trip() < 0.002


def test_inversion_works_on_a_mixture_but_for_the_few_on_the_watershed():
    diffusion = Diffusion(predict="v")
    f = two_modes(diffusion)
    x_0 = diffusion.sample(f, normal(500, 1)(), 200)
    x_T = diffusion.invert(f, x_0, 100)
    assert ((diffusion.sample(f, x_T, 100) - x_0).abs() < 0.01).float().mean() > 0.98


def test_inverted_data_are_standard_normal():
    diffusion = Diffusion(predict="v")
    x_T = diffusion.invert(gaussian(diffusion), MEAN + STD * normal(4000, 4)(), 200)
    assert x_T.mean(dim=0).abs().max() < 0.1 and (x_T.std(dim=0) - 1).abs().max() < 0.05


def test_control_clipping_or_another_grid_or_fewer_iterations_or_noise_do_not_invert():
    right = round_trip()
    assert round_trip(correct=clip) > 5 * right
    assert round_trip(steps=25) > 5 * right
    assert round_trip(iterations=1) > 5 * right
    assert round_trip(eta=0.5, noise=normal(500, 4)) > 5 * right


# ---- Noise and time ----------------------------------------------------------------------------

def test_a_row_of_noise_depends_on_seed_index_and_stream_alone():
    alone = Noise(7, [3], (3, 4, 4), "decoder")
    among = Noise(7, [0, 3, 5], (3, 4, 4), "decoder")
    for _ in range(3):                                     # the first draw and those after it
        assert torch.equal(alone()[0], among()[1])


@pytest.mark.parametrize("other", [(8, [3], "a"), (7, [4], "a"), (7, [3], "b"), (73, [""], "a")])
def test_another_seed_index_or_stream_is_other_noise(other):
    seed, indices, stream = other
    same, different = Noise(7, [3], (50,), "a")(), Noise(seed, indices, (50,), stream)()
    assert not torch.isclose(same, different).any()


def test_noise_is_standard_normal_fresh_at_each_call_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    noise = Noise(0, range(100), (100,))
    first, second = noise(), noise()
    assert torch.equal(before, torch.random.get_rng_state())
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    assert abs((first * second).mean()) < 0.05


def test_every_step_has_a_timestep_embedding_of_its_own():
    embedding = timestep_embedding(torch.arange(1001), 64)
    assert embedding.shape == (1001, 64) and embedding.abs().max() <= 1
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(1001)
    assert distances.min() > 0.1
