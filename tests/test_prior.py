"""Both priors: what each position may see, what a dropped caption leaves behind, and learning.

The toy at the end has a known answer. There are two captions and four places where z_i can be; each
caption leads to two of them, equally often. Its z_t is nearer to the first of the two.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from clip_tiny import EOT, PAD, SOT, principal
from prior import (ARPrior, ARPriorConfig, DiffusionPrior, DiffusionPriorConfig, PCATokens,
                   causal_mask_of)

D = 8
AXES = torch.eye(D)
TOKENS = torch.tensor([[SOT, 5, EOT], [SOT, 6, EOT]])
Z_T = F.normalize(torch.stack([0.8 * AXES[0] + 0.4 * AXES[1] + 0.4 * AXES[4],
                               0.8 * AXES[2] + 0.4 * AXES[3] + 0.4 * AXES[5]]), dim=1)


def toy(N=1024, seed=0):
    """z_i (N, D) about one of the first four axes, and which caption each has (N,)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (N,), generator=generator)
    axis = 2 * y + torch.randint(2, (N,), generator=generator)
    return F.normalize(AXES[axis] + 0.1 * torch.randn(N, D, generator=generator), dim=1), y


def diffusion_prior(seed=0):
    torch.manual_seed(seed)
    return DiffusionPrior(DiffusionPriorConfig(dim=D, vocab=10, context=8, width=32, depth=1,
                                               steps=20))


def ar_prior(seed=0):
    torch.manual_seed(seed)
    prior = ARPrior(ARPriorConfig(dim=D, vocab=10, context=8, components=5, buckets=16,
                                  dot_buckets=8, width=32, depth=1))
    z_i, y = toy()
    return prior.fit(z_i, Z_T[y])


def awake(prior):
    """A prior whose every weight acts: zero-initialised ones hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return prior.eval()


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


def one_call(prior, z_t, tokens, drop):
    """The network's answer to one caption (B = 1), everything else held fixed."""
    drop = torch.tensor([drop])
    if isinstance(prior, DiffusionPrior):
        return prior(normal(1, D)(), torch.tensor([300]), z_t, tokens, drop)
    out = prior(z_t, tokens, torch.tensor([3]), torch.arange(5)[None], drop)
    return torch.cat([logits.flatten(1) for logits in out], dim=1)


def through_the_transformer(prior, *inputs):
    """The sequence that enters the Transformer, in however many pieces, and the one that leaves."""
    entering, leaving = [], []
    hooks = [prior.transformer.register_forward_hook(hook) for hook in (
        lambda module, inputs, output: entering.append(inputs[0]),
        lambda module, inputs, output: leaving.append(output))]
    prior(*inputs)
    for hook in hooks:
        hook.remove()
    return torch.cat(entering, dim=1), torch.cat(leaving, dim=1)


def changed(a, b):
    """The positions at which two sequences (1, L, width) differ."""
    return ((a - b).abs().amax(dim=(0, 2)) > 1e-5).nonzero().flatten().tolist()


BOTH = pytest.mark.parametrize("make", [diffusion_prior, ar_prior])


# ---- What both have in common --------------------------------------------------------------------

def test_the_mask_is_causal_hides_what_is_invisible_and_leaves_no_row_empty():
    mask = causal_mask_of(torch.tensor([[True, False]]), 4)
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@BOTH
def test_the_caption_and_z_t_each_have_an_influence(make):
    prior = awake(make())
    answer = one_call(prior, Z_T[:1], TOKENS[:1], False)
    assert (one_call(prior, Z_T[:1], TOKENS[1:], False) - answer).abs().max() > 1e-3
    assert (one_call(prior, Z_T[1:], TOKENS[:1], False) - answer).abs().max() > 1e-3


@BOTH
def test_a_dropped_caption_has_none_not_even_by_its_length(make):
    prior = awake(make())
    answer = one_call(prior, Z_T[:1], TOKENS[:1], True)
    long = torch.tensor([[SOT, 7, 8, 9, 7, EOT]])
    for z_t, tokens in [(Z_T[1:], TOKENS[:1]), (Z_T[:1], TOKENS[1:]), (Z_T[1:], long)]:
        assert torch.allclose(one_call(prior, z_t, tokens, True), answer, atol=1e-5)


@BOTH
def test_the_drop_mask_is_per_caption(make):
    prior = awake(make())
    given, dropped = (one_call(prior, Z_T[:1], TOKENS[:1], drop) for drop in (False, True))
    z_t, tokens, drop = Z_T[[0, 0]], TOKENS[[0, 0]], torch.tensor([False, True])
    if make is diffusion_prior:
        both = prior(normal(1, D)().expand(2, D), torch.tensor([300, 300]), z_t, tokens, drop)
    else:
        out = prior(z_t, tokens, torch.tensor([3, 3]), torch.arange(5).expand(2, 5), drop)
        both = torch.cat([a.flatten(1) for a in out], dim=1)
    assert torch.allclose(both, torch.cat([given, dropped]), atol=1e-5)
    assert not torch.allclose(given, dropped, atol=1e-3)


@BOTH
def test_padding_has_no_influence(make):
    prior = awake(make())
    padded = F.pad(TOKENS[:1], (0, 4), value=PAD)
    assert torch.allclose(one_call(prior, Z_T[:1], padded, False),
                          one_call(prior, Z_T[:1], TOKENS[:1], False), atol=1e-5)


@BOTH
def test_training_drops_one_caption_in_ten(make):
    prior, drops = make(), []
    prior.caption.register_forward_hook(lambda module, inputs, output: drops.append(inputs[2]))
    z_i, y = toy()
    for seed in range(4):
        prior.loss(z_i, Z_T[y], TOKENS[y], torch.Generator().manual_seed(seed))
    assert torch.cat(drops).float().mean().item() == pytest.approx(0.1, abs=0.02)


@BOTH
def test_the_loss_is_a_function_of_its_generator(make):
    prior, (z_i, y) = awake(make()), toy(64)
    a, b, c = (prior.loss(z_i, Z_T[y], TOKENS[y], torch.Generator().manual_seed(seed))
               for seed in (0, 0, 1))
    assert a == b != c


@BOTH
def test_samples_are_unit_vectors_one_for_each_caption(make):
    prior = awake(make())
    z_i = prior.sample(Z_T, TOKENS, *([normal(4, D)] if make is diffusion_prior else []))
    assert z_i.shape == (2, D) and torch.allclose(z_i.norm(dim=1), torch.ones(2), atol=1e-5)


# ---- The diffusion prior -------------------------------------------------------------------------

def test_scaled_embeddings_spread_like_pixels_whatever_their_dimension():
    for dim in (8, 64, 512):
        prior = DiffusionPrior(DiffusionPriorConfig(dim, vocab=10, context=8, width=32, depth=1))
        z_i = F.normalize(normal(500, dim)(), dim=1)
        assert (z_i * prior.scale).std().item() == pytest.approx(0.5375, rel=0.01)


def test_the_scale_is_17_2_at_the_paper_s_1024():
    prior = DiffusionPrior(DiffusionPriorConfig(dim=1024, vocab=10, context=8, width=32, depth=1))
    assert prior.scale == pytest.approx(17.2)


def test_the_target_is_the_scaled_z_i_itself():
    """A new prior answers 0 whatever it sees, so its error is the target's mean square."""
    z_i, y = toy(64)
    loss = diffusion_prior().loss(z_i, Z_T[y], TOKENS[y])
    assert loss.item() == pytest.approx(0.5375**2, rel=1e-3)
    whitened = diffusion_prior()
    whitened.whitening.fit(z_i)
    loss = whitened.loss(z_i, Z_T[y], TOKENS[y])
    expected = (whitened.whitening(z_i) * whitened.scale).square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-3) and expected < 0.5375**2


def diffusion_inputs(**changes):
    given = dict(z_i_t=normal(1, D)(), t=torch.tensor([300]), z_t=Z_T[:1], tokens=TOKENS[:1],
                 drop=torch.tensor([False]))
    return {**given, **changes}.values()


@pytest.mark.parametrize("change, position", [
    (dict(tokens=torch.tensor([[SOT, 6, EOT]])), 1), (dict(z_t=Z_T[1:]), 3),
    (dict(t=torch.tensor([301])), 4), (dict(z_i_t=torch.ones(1, D)), 5)])
def test_the_sequence_is_caption_z_t_time_z_i_t_final_and_causal(change, position):
    prior = awake(diffusion_prior())
    (x, h), (x_2, h_2) = (through_the_transformer(prior, *diffusion_inputs(**c))
                          for c in ({}, change))
    assert x.shape == (1, 7, 32)                                         # 3 tokens and 4 more
    assert changed(x, x_2) == [position]
    assert changed(h, h_2) == list(range(position, 7))


def test_the_answer_is_read_at_the_final_embedding():
    prior = awake(diffusion_prior())
    _, h = through_the_transformer(prior, *diffusion_inputs())
    assert torch.allclose(prior(*diffusion_inputs()), prior.out(h[:, -1]))


def test_of_two_candidates_the_one_with_the_larger_dot_is_kept():
    prior, B = awake(diffusion_prior()), 20
    z_t, tokens, noise = Z_T[[0] * B], TOKENS[[0] * B], normal(2 * B, D)()
    first, second = (prior.sample(z_t, tokens, lambda: noise[k::2], candidates=1) for k in (0, 1))
    best = prior.sample(z_t, tokens, lambda: noise, candidates=2)
    first_wins = (first * z_t).sum(1) > (second * z_t).sum(1)
    assert 0 < first_wins.sum() < B
    assert torch.allclose(best, torch.where(first_wins[:, None], first, second), atol=1e-5)


def test_the_answer_and_z_i_t_are_weighed_by_their_precision():
    """Two independent measurements of errors a and b make one of error 1/√(1/a² + 1/b²)."""
    prior, z_i = diffusion_prior(), 0.5 * normal(20_000, D)()
    answer = z_i + prior.config.error * torch.randn(z_i.shape)
    for t in (1, 50, 100, 1000):
        ts = torch.full((len(z_i),), t)
        z_i_t = prior.diffusion.q_sample(z_i, ts, torch.randn(z_i.shape))
        off = (prior.weighed(answer, z_i_t, ts) - z_i).square().mean().sqrt().item()
        ab = prior.diffusion.alphas_bar[t].item()
        assert off == pytest.approx((1 / prior.config.error**2 + ab / (1 - ab)) ** -0.5, rel=0.02)


def test_small_axes_come_out_as_small_as_they_are():
    """Gaussian data, their exact posterior mean: no noise is left where the data are narrow."""
    prior, g = diffusion_prior(), torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2.5, D)
    z_i = F.normalize(1 + torch.randn(20_000, D, generator=g) * spread, dim=1)
    prior.whitening.fit(z_i)
    data = (prior.whitening(z_i) * prior.scale).std(0)
    assert torch.allclose(prior.scale * prior.whitening.std(), data, atol=0.01)

    def exact(x_t, t):
        signal, noise = prior.diffusion.signal_and_noise(t, x_t)
        return data**2 * signal / (data**2 * signal**2 + noise**2) * x_t

    def ratio():
        f = lambda x_t, t: prior.weighed(exact(x_t, t), x_t, t)
        return prior.diffusion.sample(f, torch.randn(4000, D, generator=g), 32).std(0) / data

    small = data < 0.15
    assert small.sum() == 2
    assert (ratio() > 0.8).all() and (ratio() < 1.25).all()
    prior.whitening.std = lambda: torch.ones(D)              # control: one error for all axes
    assert (ratio()[small] > 1.35).all()


def test_axes_of_least_variance_are_not_drawn():
    prior, g = awake(diffusion_prior()), torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2.5, D)
    prior.whitening.fit(F.normalize(1 + torch.randn(20_000, D, generator=g) * spread, dim=1))
    z_t, tokens = Z_T[:1].expand(200, -1), TOKENS[:1].expand(200, -1)

    def drawn():
        """How much each axis varies between samples of one caption."""
        z_i = prior.sample(z_t, tokens, normal(200, D), candidates=1)
        return prior.whitening(z_i).std(0) * D ** 0.5

    small = prior.whitening.std() * D ** 0.5 < prior.config.least
    assert small.tolist() == [False] * (D - 1) + [True]
    everywhere, prior.config.least = drawn(), 0.0
    assert everywhere[small].item() < 0.01 and (everywhere[~small] > 0.03).all()
    assert drawn()[small].item() > 0.03                          # control


def test_one_candidate_is_the_plain_sample():
    prior, noise, no = awake(diffusion_prior()), normal(2, D)(), torch.zeros(2, dtype=torch.bool)
    f = lambda x, t: prior.weighed(prior(x, t, Z_T, TOKENS, no), x, t)
    plain = prior.diffusion.sample(f, noise, prior.config.steps)
    z_i = prior.sample(Z_T, TOKENS, lambda: noise, candidates=1)
    assert torch.allclose(z_i, F.normalize(plain, dim=1), atol=1e-6)


def test_two_candidates_are_the_default():
    with pytest.raises(RuntimeError):
        awake(diffusion_prior()).sample(Z_T, TOKENS, normal(2, D))       # noise for one each
    awake(diffusion_prior()).sample(Z_T, TOKENS, normal(4, D))


# ---- PCA tokens ----------------------------------------------------------------------------------

def cloud(N=2000, dim=12, seed=0):
    """Unit vectors of unequal spread along rotated axes, about a mean that is not 0."""
    spread = 0.6 ** torch.arange(dim)
    rotation = torch.linalg.qr(normal(dim, dim, seed=seed)()).Q
    z = (normal(N, dim, seed=seed + 1)() * spread) @ rotation
    return F.normalize(z + 1.5 * rotation[3], dim=1)


def fitted(components, buckets):
    return PCATokens(12, components, buckets).fit(cloud())


@pytest.mark.parametrize("components, buckets, error",
                         [(12, 128, 0.002), (12, 8, 0.03), (5, 128, 0.03)])
def test_codes_and_back_is_nearly_the_same_embedding(components, buckets, error):
    z_i = cloud()
    back = fitted(components, buckets).decode(fitted(components, buckets).encode(z_i))
    assert torch.allclose(back.norm(dim=1), torch.ones(len(z_i)), atol=1e-5)
    relative = (back - z_i).square().sum() / (z_i - z_i.mean(dim=0)).square().sum()
    assert error / 10 < relative < error


def test_more_buckets_lose_less():
    z_i, errors = cloud(seed=0), []
    for buckets in (4, 16, 64, 256):
        pca = fitted(12, buckets)
        errors.append((pca.decode(pca.encode(z_i)) - z_i).square().mean().item())
    assert all(more > less for more, less in zip(errors, errors[1:]))


def test_components_come_by_decreasing_eigenvalue_and_are_the_variances_along_the_axes():
    z_i = cloud()
    mean, axes, values = principal(z_i)
    assert (values.diff() <= 0).all()
    assert torch.allclose(((z_i - mean) @ axes.T).var(dim=0, correction=0), values, atol=1e-6)
    assert torch.allclose(axes @ axes.T, torch.eye(12), atol=1e-5)


def test_the_paper_s_rule_takes_the_fewest_components_that_lose_less_than_one_percent():
    z_i = cloud()
    mean, axes, values = principal(z_i)
    k = PCATokens.components_needed(values)
    lost = [((z_i - mean) - (z_i - mean) @ axes[:n].T @ axes[:n]).square().sum().item()
            / (z_i - mean).square().sum().item() for n in (k - 1, k)]
    assert lost[0] >= 0.01 > lost[1]
    assert PCATokens.components_needed(torch.tensor([0.9, 0.08, 0.015, 0.005])) == 3


def test_buckets_hold_equally_many_training_embeddings():
    codes = fitted(12, 16).encode(cloud())
    assert codes.min() == 0 and codes.max() == 15
    counts = torch.stack([codes[:, k].bincount(minlength=16) for k in range(12)])
    assert (counts - 2000 / 16).abs().max() <= 2                         # rounding may move one


def test_a_bucket_decodes_to_the_mean_of_what_it_holds():
    pca, z_i = fitted(12, 16), cloud()
    values = (z_i - pca.mean) @ pca.axes.T
    held = values[pca.encode(z_i)[:, 0] == 5, 0]
    assert pca.centres[0, 5].item() == pytest.approx(held.mean().item(), abs=1e-3)


def test_fewer_embeddings_than_buckets_leave_no_code_undefined():
    pca = PCATokens(12, 12, 64).fit(cloud(10))
    assert pca.decode(torch.arange(64)[:, None].expand(64, 12)).isfinite().all()


def test_the_pca_and_the_edges_are_part_of_the_prior_s_state():
    prior, other = ar_prior(), ARPrior(ar_prior().config)
    other.load_state_dict(prior.state_dict())
    z_i, _ = toy(50, seed=3)
    assert torch.equal(other.pca.encode(z_i), prior.pca.encode(z_i))
    assert torch.equal(other.dot_edges, prior.dot_edges) and other.dot_edges.abs().sum() > 0


# ---- The autoregressive prior --------------------------------------------------------------------

def ar_inputs(**changes):
    given = dict(z_t=Z_T[:1], tokens=TOKENS[:1], dot=torch.tensor([3]), codes=torch.arange(5)[None],
                 drop=torch.tensor([False]))
    return {**given, **changes}.values()


@pytest.mark.parametrize("change, position", [
    (dict(tokens=torch.tensor([[SOT, 6, EOT]])), 1), (dict(z_t=Z_T[1:]), 3),
    (dict(dot=torch.tensor([4])), 4), (dict(codes=torch.tensor([[9, 1, 2, 3, 4]])), 5),
    (dict(codes=torch.tensor([[0, 1, 2, 9, 4]])), 8)])
def test_the_sequence_is_caption_z_t_dot_codes_and_causal(change, position):
    prior = awake(ar_prior())
    (x, h), (x_2, h_2) = (through_the_transformer(prior, *ar_inputs(**c)) for c in ({}, change))
    assert x.shape == (1, 9, 32)                  # 3 tokens, z_t, dot, all codes but the last
    assert changed(x, x_2) == [position]
    assert changed(h, h_2) == list(range(position, 9))


@pytest.mark.parametrize("k", range(5))
def test_a_code_has_an_influence_on_later_logits_alone(k):
    prior, codes = awake(ar_prior()), torch.arange(5)[None]
    other = codes.clone()
    other[0, k] = 15
    (dot, logits), (dot_2, logits_2) = prior(*ar_inputs()), prior(*ar_inputs(codes=other))
    assert torch.allclose(dot, dot_2, atol=1e-5)
    assert changed(logits, logits_2) == list(range(k + 1, 5))


def test_the_dot_has_an_influence_on_the_codes_and_none_on_its_own_logits():
    prior = awake(ar_prior())
    (dot, logits), (dot_2, logits_2) = prior(*ar_inputs()), prior(*ar_inputs(dot=torch.tensor([7])))
    assert torch.allclose(dot, dot_2, atol=1e-5) and changed(logits, logits_2) == list(range(5))


def test_the_same_code_means_another_thing_in_another_place():
    prior = ar_prior()
    embedded = prior.embed(torch.full((1, 5), 7))[0] - prior.position[2:]
    assert (torch.cdist(embedded, embedded) + torch.eye(5)).min() > 1e-2


def test_codes_are_alike_as_they_are_close():
    prior = ARPrior(ARPriorConfig(D, vocab=10, context=8, components=1, width=32, depth=1))
    embedded = prior.embed(torch.arange(64)[:, None])[:, 0]                      # (64, width)
    near, far = (embedded[k:] - embedded[:-k] for k in (1, 16))
    assert near.norm(dim=1).mean() < 0.7 * far.norm(dim=1).mean()
    _, logits = awake(prior)(*ar_inputs(codes=torch.tensor([[5]])))
    logits = logits[0, 0].detach()
    waves = torch.linalg.lstsq(prior.waves, logits[:, None]).solution            # 24 make them all
    assert torch.allclose(prior.waves @ waves, logits[:, None], atol=1e-4)
    assert logits.std() > 0.05 and prior.waves.shape == (64, 24)


def test_training_shows_the_true_dot_in_equally_filled_buckets():
    prior, dots, (z_i, y) = ar_prior(), [], toy()
    prior.dot.register_forward_hook(lambda module, inputs, output: dots.append(inputs[0]))
    prior.loss(z_i, Z_T[y], TOKENS[y])
    order = (z_i * Z_T[y]).sum(dim=1).argsort()
    assert (dots[0][order].diff() >= 0).all()                            # it grows with z_i·z_t
    assert (dots[0].bincount() - 1024 / 8).abs().max() <= 2


def test_a_new_prior_is_at_chance():
    z_i, y = toy()
    chance = (5 * math.log(16) + math.log(8)) / 6
    assert ar_prior().loss(z_i, Z_T[y], TOKENS[y]).item() == pytest.approx(chance, rel=0.05)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampling_with_its_caches_follows_the_logits_of_one_pass(guidance):
    """At temperature 0 each symbol is the likeliest by forward's logits, given those before it."""
    prior = awake(ar_prior())
    tokens = torch.cat([TOKENS, torch.tensor([[PAD, PAD]] * 2)], dim=1)
    tokens[1] = torch.tensor([SOT, 6, 7, 8, EOT])                        # one row padded, one not
    found = []
    prior.pca.decode = lambda codes: found.append(codes)
    prior.sample(Z_T, tokens, guidance=guidance, temperature=0.0)
    codes = found[0]
    no = torch.zeros(2, dtype=torch.bool)

    def logits(dot):
        cond, null = prior(Z_T, tokens, dot, codes, no), prior(Z_T, tokens, dot, codes, ~no)
        return [b + guidance * (a - b) for a, b in zip(cond, null)]

    n = prior.config.dot_buckets // 2                        # the dot comes from the upper half
    dot = n + logits(torch.zeros(2).long())[0][:, n:].argmax(dim=1)
    assert torch.equal(codes, logits(dot)[1].argmax(dim=2))
    assert len(codes.unique()) > 2 and not torch.equal(codes[0], codes[1])


def test_sampling_draws_from_the_logits_that_training_fits():
    """The first code's frequencies over many draws, against forward's own probabilities."""
    prior, N = awake(ar_prior()), 4000
    codes = []
    prior.pca.decode = lambda drawn: codes.append(drawn) or drawn
    torch.manual_seed(0)
    prior.sample(Z_T[[0] * N], TOKENS[[0] * N], top_half=False)
    no, all_dots = torch.zeros(8, dtype=torch.bool), torch.arange(8)
    dot, logits = prior(Z_T[[0] * 8], TOKENS[[0] * 8], all_dots, torch.zeros(8, 5).long(), no)
    expected = dot[0].softmax(dim=0) @ logits[:, 0].softmax(dim=1)       # Σ p(dot) p(code 1 | dot)
    found = codes[0][:, 0].bincount(minlength=16) / N
    assert (found - expected).abs().max() < 0.03 and expected.max() > 0.1


def dots_drawn(prior, **options):
    drawn, N = [], 400
    hook = prior.dot.register_forward_hook(lambda module, inputs, output: drawn.append(inputs[0]))
    prior.sample(Z_T[[0] * N], TOKENS[[0] * N], generators(N), **options)
    hook.remove()
    return drawn[0]


def test_top_half_draws_the_dot_from_the_upper_half_of_its_buckets():
    prior = awake(ar_prior())
    assert set(dots_drawn(prior, top_half=True).tolist()) == {4, 5, 6, 7}
    assert set(dots_drawn(prior, top_half=False).tolist()) & {0, 1, 2, 3}


def test_a_row_is_a_function_of_its_generator_alone():
    prior, y = awake(ar_prior()), torch.tensor([0, 1, 0])
    together = prior.sample(Z_T[y], TOKENS[y], generators(3))
    alone = prior.sample(Z_T[:1], TOKENS[:1], generators(1, seed=2))
    assert torch.allclose(together[2:], alone, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    torch.manual_seed(0)
    drawn = ARPrior.draw(logits.expand(20000, 4), None, temperature).bincount(minlength=4) / 20000
    assert torch.allclose(drawn, (logits / temperature).softmax(dim=0), atol=0.015)


def test_temperature_0_needs_no_luck():
    prior = awake(ar_prior())
    samples = [prior.sample(Z_T, TOKENS, generators(2, seed), top_half=False, temperature=0)
               for seed in (0, 7)]
    assert torch.equal(*samples)


def test_without_guidance_each_step_is_one_row_a_caption_and_with_it_two():
    prior, rows = awake(ar_prior()), []
    prior.transformer.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    prior.sample(Z_T, TOKENS, guidance=1.0)
    prior.sample(Z_T, TOKENS, guidance=2.0)
    assert rows == 6 * [2] + 6 * [4]


# ---- Learning ------------------------------------------------------------------------------------

def trained(prior, shuffled=False, steps=200):
    (z_i, y), generator = toy(), torch.Generator().manual_seed(0)
    if shuffled:
        y = y[torch.randperm(len(y), generator=generator)]
    optimizer = torch.optim.AdamW(prior.parameters(), lr=4e-3, fused=True)
    for _ in range(steps):
        i = torch.randint(len(z_i), (64,), generator=generator)
        loss = prior.loss(z_i[i], Z_T[y[i]], TOKENS[y[i]], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return prior


def draw(prior, **biased):
    """200 samples of each caption, unbiased unless asked, and their captions."""
    y = torch.arange(2).repeat(200)
    if isinstance(prior, DiffusionPrior):
        candidates = biased.pop("candidates", 1)
        return prior.sample(Z_T[y], TOKENS[y], normal(400 * candidates, D), candidates), y
    top_half = biased.pop("top_half", False)
    return prior.sample(Z_T[y], TOKENS[y], generators(400), top_half, **biased), y


def right(z_i, y):
    """The share of samples at one of the two places to which their caption leads."""
    return (z_i[:, :4].argmax(dim=1) // 2 == y).float().mean().item()


def first_of_two(z_i):
    return (z_i[:, :4].argmax(dim=1) % 2 == 0).float().mean().item()


def dot(z_i, y):
    return (z_i * Z_T[y]).sum(dim=1).mean().item()


@pytest.fixture(scope="module")
def trained_diffusion():
    return trained(diffusion_prior())


@pytest.fixture(scope="module")
def trained_ar():
    return trained(ar_prior(), steps=300)


@pytest.mark.parametrize("which", ["trained_diffusion", "trained_ar"])
def test_each_caption_leads_to_both_of_its_places_and_to_no_other(which, request):
    z_i, y = draw(request.getfixturevalue(which))
    assert right(z_i, y) > 0.95
    assert 0.25 < first_of_two(z_i) < 0.75                      # a regressor has one answer
    assert z_i[:, :4].max(dim=1).values.mean() > 0.9            # at the places, not between


@pytest.mark.parametrize("make, steps", [(diffusion_prior, 200), (ar_prior, 300)])
def test_control_with_shuffled_captions_they_lead_anywhere(make, steps):
    z_i, y = draw(trained(make(), shuffled=True, steps=steps))
    assert 0.3 < right(z_i, y) < 0.7
    assert z_i[:, :4].max(dim=1).values.mean() > 0.9            # it did learn where z_i can be


def test_the_better_of_two_candidates_raises_the_dot(trained_diffusion):
    assert dot(*draw(trained_diffusion, candidates=2)) > dot(*draw(trained_diffusion)) + 0.03


def test_the_top_half_raises_the_dot(trained_ar):
    assert dot(*draw(trained_ar, top_half=True)) > dot(*draw(trained_ar)) + 0.03


@pytest.mark.parametrize("which", ["trained_diffusion", "trained_ar"])
def test_guidance_0_hides_the_caption_all_of_it_and_nothing_but_it(which, request):
    """Hid it the noised z_i, or the codes so far, all samples would be alike."""
    prior, y = request.getfixturevalue(which), torch.arange(2).repeat(200)
    luck = (lambda: (normal(400, D), 1)) if which == "trained_diffusion" else (
        lambda: (generators(400), False))
    z_i, other = (prior.sample(Z_T[c], TOKENS[c], *luck(), guidance=0.0) for c in (y, 1 - y))
    assert torch.allclose(z_i, other, atol=1e-4)
    assert z_i.var(dim=0).sum() > 0.25


def test_sampling_leaves_the_weights_alone(trained_diffusion, trained_ar):
    for prior in (trained_diffusion, trained_ar):
        before = copy.deepcopy(prior.state_dict())
        draw(prior)
        assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
