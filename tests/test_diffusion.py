"""The diffusion process, against what can be worked out with a pencil.

Gaussian data have an exact optimal denoiser E[x_0 | x_t]. Here it takes the place of a network, so
that nothing can be blamed on training.
"""
import itertools
import math

import pytest
import torch

from conftest import normal, seeded
from diffusion import Diffusion, Noise, timestep_embedding

MEAN = torch.tensor([0.0, 1.0, -0.5, 0.3])        # four independent Gaussians, side by side
STD = torch.tensor([0.1, 0.3, 1.0, 2.0])
PROCESS = Diffusion("eps")


def as_v(x_0, x_t, t, process=PROCESS):
    """The network's answer v that means the estimate x_0 at x_t."""
    cos, sin = process.rotation(t, x_t)
    return cos * (x_t - cos * x_0) / sin - sin * x_0


def gaussian(x_t, t):
    """The optimal network for data N(MEAN, STD²)."""
    cos, sin = PROCESS.rotation(t, x_t)
    gain = cos * STD ** 2 / (cos ** 2 * STD ** 2 + sin ** 2)
    return as_v(MEAN + gain * (x_t - cos * MEAN), x_t, t)


def misses(x, tolerance=0.05):
    """Whether samples (B, 4) miss the mean or the spread of the four Gaussians."""
    mean_off = ((x.mean(dim=0) - MEAN).abs() / STD).max()
    std_off = (x.std(dim=0) / STD - 1).abs().max()
    return bool(mean_off > tolerance or std_off > tolerance)


# ---- Noising, and what the loss compares -------------------------------------------------------

def test_alphas_bar_is_the_cosine_and_falls_by_at_most_999_in_1000_a_step():
    alphas_bar, t = PROCESS.alphas_bar, torch.tensor([1, 250, 500, 750])
    assert alphas_bar.dtype == torch.float64 and alphas_bar.shape == (1001,)
    assert alphas_bar[0] == 1 and 0 < alphas_bar[-1] < 1e-6
    betas = 1 - alphas_bar[1:] / alphas_bar[:-1]
    assert betas.max() == pytest.approx(0.999) and betas.min() > 0
    f = lambda t: torch.cos((t.double() / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(alphas_bar[t], f(t) / f(torch.zeros(1)))


@pytest.mark.parametrize("objective", ["x_0", "eps"])
def test_the_loss_is_zero_for_the_right_v_and_weighs_an_error_of_v_by_the_objective(objective):
    """An error of 3 in v is one of 3 sin φ in x_0, and of 3 cos φ in eps; the square of the latter
    counts for no more than 5 times, and no less than a tenth of, the square of the former."""
    process, x_0, seen = Diffusion(objective), normal(500, 6)(), []
    right = lambda x_t, t: seen.append((x_t, t)) or as_v(x_0, x_t, t)
    assert process.loss(right, x_0, seeded()) < 1e-8
    wrong = process.loss(lambda x_t, t: right(x_t, t) + 3, x_0, seeded()).item()
    x_t, t = seen[1]
    cos, sin = process.rotation(t, x_0)
    eps = (x_t - cos * x_0) / sin
    assert abs(eps.mean()) < 0.05 and eps.std().item() == pytest.approx(1, abs=0.05)
    assert 1 <= t.min() and t.max() <= 1000 and abs(t.float().mean() - 500) < 50
    of_eps, of_x_0 = 9 * process.alphas_bar[t], 9 * (1 - process.alphas_bar[t])
    assert (of_eps > 5 * of_x_0).any() and (of_eps < 0.1 * of_x_0).any()
    expected = of_eps.clamp(0.1 * of_x_0, 5 * of_x_0) if objective == "eps" else of_x_0
    assert wrong == pytest.approx(expected.mean().item(), rel=1e-4)


# ---- The sampler -------------------------------------------------------------------------------

def test_times_fall_strictly_from_T_to_0_and_impossible_steps_and_etas_are_refused():
    for steps, power in itertools.product((1, 2, 64, 999, 1000), (1, 2)):
        times = Diffusion("x_0", power).timesteps(steps)
        assert len(times) == steps + 1 and times[0] == 1000 and times[-1] == 0
        assert all(t > s for t, s in zip(times, times[1:]))
    assert Diffusion("x_0", power=2).timesteps(4) == [1000, 562, 250, 62, 0]
    for steps in (-1, 0, 1001):
        with pytest.raises(ValueError, match=f"{steps} sampling steps.*1 to 1000"):
            PROCESS.sample(gaussian, torch.zeros(1, 4), steps)
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"eta {eta}: choose from 0 to 1"):
            PROCESS.sample(gaussian, torch.zeros(1, 4), 8, eta)
    with pytest.raises(ValueError, match="1 steps.*2 or more"):
        PROCESS.invert(gaussian, torch.zeros(1, 4), 1)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_exact_denoisers_of_gaussians_the_sampler_gives_the_data_back(eta):
    noise = normal(4000, 4)
    assert not misses(PROCESS.sample(gaussian, noise(), 300, eta, noise))
    if eta == 1:                                # control: the first noise again at every step
        x_T = noise()
        assert misses(PROCESS.sample(gaussian, x_T, 300, eta, lambda: x_T))


def test_with_eta_1_each_step_is_the_posterior_of_ddpm():
    """Against q(x_{t−1} | x_t, x_0) of Ho et al. 2020, its mean and its standard deviation."""
    process, path = Diffusion("eps", T=10), {}
    x_T, x_0, eps = (normal(5, 3, seed=k)() for k in range(3))
    process.sample(lambda x_t, t: as_v(x_0, x_t, t, process), x_T, 10, 1.0, lambda: eps,
                   watch=lambda t, x_t, x_0: path.update({t: x_t}))
    assert sorted(path) == list(range(1, 11)) and torch.equal(path[10], x_T)
    for t in range(10, 1, -1):
        ab, before = process.alphas_bar[t], process.alphas_bar[t - 1]
        beta = 1 - ab / before
        mean = before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * path[t]
        std = ((1 - before) / (1 - ab) * beta).sqrt()
        assert torch.allclose(path[t - 1], (mean / (1 - ab) + std * eps).float(), atol=1e-4)


def test_clipping_keeps_estimates_in_range_and_corrects_eps_to_fit_x_t():
    three = lambda x_t, t: as_v(torch.full_like(x_t, 3.0), x_t, t)   # x_0 = 3, which no pixel is
    x_T, path, times = normal(100, 1)(), [], PROCESS.timesteps(10)
    assert PROCESS.sample(three, x_T, 10, eta=0.0).min() > 2.9
    x = PROCESS.sample(three, x_T, 10, 0.0, clamp=True, watch=lambda *step: path.append(step))
    assert torch.allclose(x, torch.ones_like(x), atol=1e-3)
    assert [t for t, _, _ in path] == times[:-1] and all((x_0 == 1).all() for _, _, x_0 in path)
    t, s = (PROCESS.alphas_bar[times[k]].item() for k in (5, 6))
    eps = (path[5][1] - math.sqrt(t) * 1) / math.sqrt(1 - t)
    assert torch.allclose(path[6][1], math.sqrt(s) * 1 + math.sqrt(1 - s) * eps, atol=1e-5)


# ---- Inversion ---------------------------------------------------------------------------------

def error_of_return(steps=50, iterations=3, back=None, **how):
    """The error of inverting and sampling again, in standard deviations of the data."""
    x_0 = MEAN + STD * normal(500, 4)()
    x_T = PROCESS.invert(gaussian, x_0, steps, iterations)
    x = PROCESS.sample(gaussian, x_T, back or steps, **{"eta": 0.0, **how})
    return ((x - x_0) / STD).square().mean().sqrt().item()


@pytest.mark.parametrize("iterations, order", [(1, 1), (2, 2)])
def test_each_iteration_of_the_inversion_adds_one_order_of_accuracy(iterations, order):
    coarse, fine = (error_of_return(steps, iterations) for steps in (100, 200))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


def test_inversion_gives_noise_and_the_data_back_but_not_with_clipping_other_steps_or_noise():
    right = error_of_return()
    assert right < 0.002
    assert error_of_return(clamp=True) > 5 * right
    assert error_of_return(back=25) > 5 * right
    assert error_of_return(eta=0.5, noise=normal(500, 4)) > 5 * right
    x_T = PROCESS.invert(gaussian, MEAN + STD * normal(2000, 4)(), 200)
    assert x_T.mean(dim=0).abs().max() < 0.1 and (x_T.std(dim=0) - 1).abs().max() < 0.08


# ---- Noise and time ----------------------------------------------------------------------------

def test_noise_is_standard_normal_fresh_at_each_call_and_other_for_another_seed_index_or_purpose():
    before = torch.random.get_rng_state()
    noise = Noise(7, range(100), (100,), "a")
    first, second = noise(), noise()
    assert torch.equal(before, torch.random.get_rng_state())         # the global one is left alone
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.05
    assert abs((first * second).mean()) < 0.05
    for seed, index, purpose in (8, 3, "a"), (7, 103, "a"), (7, 3, "b"), (73, "", "a"):
        other = Noise(seed, [index], (100,), purpose)()
        assert not torch.isclose(first, other, atol=1e-7).all(dim=1).any()


def test_every_step_has_a_timestep_embedding_of_its_own():
    embedding = timestep_embedding(torch.arange(1001), 64)
    assert embedding.shape == (1001, 64) and embedding.abs().max() <= 1
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(1001)
    assert distances.min() > 0.1
