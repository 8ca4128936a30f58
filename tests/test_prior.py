"""Both priors: what each position may see, what a hidden caption leaves behind, and learning.

What they learn at the end is a law that is known: so it can be told how far off they are.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from clip_tiny import EOT, PAD, SOT
from conftest import learn, normal, seeded, shake
from judge import energy_distance
from prior import ARPrior, ARPriorConfig, Codes, DiffusionPrior, DiffusionPriorConfig

D = 4
TOKENS = torch.tensor([[SOT, 5, EOT], [SOT, 6, EOT]])
Z_T = F.normalize(torch.tensor([[1.0, 0.3, 0, 0], [-1.0, 0.3, 0, 0]]), dim=1)


def diffusion_prior():
    torch.manual_seed(0)
    return DiffusionPrior(DiffusionPriorConfig(D, vocab=10, context=8, width=32, depth=1))


def ar_prior(components=3, buckets=8):
    torch.manual_seed(0)
    prior = ARPrior(ARPriorConfig(D, vocab=10, context=8, components=components, buckets=buckets,
                                  width=32, depth=1))
    return prior.fit(torch.randn(500, D), torch.randn(500))


BOTH = pytest.mark.parametrize("make", [diffusion_prior, ar_prior])


def awake(make):
    """A prior whose every weight acts: layers that start at zero hide mistakes."""
    return shake(make(), by=0.1).eval()


def generators(n, seed=0):
    return [seeded(1000 * seed + k) for k in range(n)]


def ask(prior, z_t=Z_T[:1], tokens=TOKENS[:1], z_i_t=normal(1, D)(), t=300, symbols=(3, 0, 1)):
    """The network's answer to captions, everything else held fixed unless it is given."""
    B = len(tokens)
    if isinstance(prior, DiffusionPrior):
        return prior(z_i_t.expand(B, D), torch.full((B,), t), z_t, tokens)
    return prior(z_t, tokens, torch.tensor(symbols).expand(B, -1))


def sequence(prior, **given):
    """What enters the Transformer, and what leaves it: (B, L, width) each."""
    seen = []
    hook = prior.transformer.register_forward_hook(lambda _, x, h: seen.extend([x[0], h]))
    ask(prior, **given)
    hook.remove()
    return seen


def changed(a, b):
    """The positions at which two sequences (1, L, …) differ."""
    return ((a - b).flatten(2).abs().amax(dim=(0, 2)) > 1e-6).nonzero().flatten().tolist()


# ---- The sequence, and the caption shown and hidden ----------------------------------------------

@pytest.mark.parametrize("make, change, position", [
    (diffusion_prior, dict(tokens=TOKENS[1:]), 1), (diffusion_prior, dict(z_t=Z_T[1:]), 3),
    (diffusion_prior, dict(t=301), 4), (diffusion_prior, dict(z_i_t=torch.ones(1, D)), 5),
    (ar_prior, dict(tokens=TOKENS[1:]), 1), (ar_prior, dict(z_t=Z_T[1:]), 3),
    (ar_prior, dict(symbols=(4, 0, 1)), 4), (ar_prior, dict(symbols=(3, 5, 1)), 5),
    (ar_prior, dict(symbols=(3, 0, 2)), 6)])
def test_the_sequence_is_the_papers_and_no_position_sees_a_later_one(make, change, position):
    """Caption of three, z_t; then time, noised z_i, final embedding; or the dot and two codes."""
    prior = awake(make)
    (x, h), (x_2, h_2) = sequence(prior), sequence(prior, **change)
    assert x.shape == (1, 7, 32)
    assert changed(x, x_2) == [position] and changed(h, h_2) == list(range(position, 7))
    if make == diffusion_prior:                                      # read at the final embedding
        assert torch.allclose(ask(prior), prior.out(h[:, -1]))
    else:                                                # logits of the dot and of three codes
        assert changed(ask(prior), ask(prior, **change)) == list(range(max(position - 3, 0), 4))


@BOTH
def test_padding_has_no_influence_and_a_hidden_caption_is_one_null_whatever_its_length(make):
    prior, nothing = awake(make), torch.zeros(1, D)
    padded = F.pad(TOKENS[:1], (0, 4), value=PAD)
    assert torch.allclose(ask(prior, tokens=padded), ask(prior), atol=1e-5)
    short, long = (ask(prior, nothing, torch.full((1, n), PAD)) for n in (1, 8))
    assert short.isfinite().all() and torch.allclose(short, long, atol=1e-5)
    both = ask(prior, torch.cat([Z_T[:1], nothing]), torch.cat([TOKENS[:1], 0 * TOKENS[:1]]))
    assert torch.allclose(both, torch.cat([ask(prior), short]), atol=1e-5)     # row by row
    assert not torch.allclose(both[0], both[1], atol=1e-3)


@BOTH
def test_training_hides_z_t_and_the_whole_caption_together_one_time_in_ten(make):
    prior, shown, N = make(), [], 4000
    prior.register_forward_pre_hook(lambda _, inputs: shown.append(
        inputs[2:4] if isinstance(prior, DiffusionPrior) else inputs[:2]))
    dot = [torch.zeros(N)] if isinstance(prior, ARPrior) else []
    prior.loss(torch.randn(N, D), Z_T[[0] * N], *dot, TOKENS[[0] * N], seeded())
    z_t, tokens = shown[0]
    hidden = (z_t == 0).all(dim=1)
    assert hidden.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert (tokens[hidden] == PAD).all() and torch.equal(z_t[~hidden], Z_T[[0] * N][~hidden])
    assert torch.equal(tokens[~hidden], TOKENS[[0] * N][~hidden])


# ---- The scale of z_i, and its codes -------------------------------------------------------------

def test_z_i_is_scaled_as_in_the_paper_and_an_exact_network_draws_it_unscaled(monkeypatch):
    """17.2 for unit vectors of 1,024 coordinates is a standard deviation of 17.2/√1024. For data
    N(0, SCALE²) the best v is known; what is drawn must be N(0, 1)."""
    prior, seen, N = diffusion_prior(), [], 4000
    assert prior.diffusion.objective == "x_0"            # what the paper's loss compares
    with monkeypatch.context() as patch:
        patch.setattr(prior.diffusion, "loss", lambda f, x_0, generator: seen.append(x_0))
        prior.loss(z_i := normal(N, D)(), Z_T[[0] * N], TOKENS[[0] * N])
    assert torch.allclose(seen[0], z_i * 17.2 / math.sqrt(1024)) and prior.SCALE == 0.5375

    def exact(z_i_t, t, z_t, tokens):
        cos, sin = prior.diffusion.rotation(t, z_i_t)
        x_0 = cos * prior.SCALE ** 2 / (cos ** 2 * prior.SCALE ** 2 + sin ** 2) * z_i_t
        return cos * (z_i_t - cos * x_0) / sin - sin * x_0
    monkeypatch.setattr(prior, "forward", exact)
    z_i = prior.sample(Z_T[[0] * N], TOKENS[[0] * N], normal(N, D), steps=100)
    assert z_i.mean().abs() < 0.03 and z_i.std().item() == pytest.approx(1, abs=0.03)


def test_codes_are_equally_full_rise_with_the_value_and_decode_to_the_mean_of_their_bucket():
    values, codes = normal(2000, 3)() * torch.tensor([0.1, 1.0, 5.0]) + 2, Codes(3, 16)
    codes.fit(values)
    found = codes.encode(values)
    for k in range(3):
        assert (found[:, k].bincount(minlength=16) == 125).all()
        assert (found[values[:, k].argsort(), k].diff() >= 0).all()
        mean = torch.zeros(16).index_add(0, found[:, k], values[:, k]) / 125
        assert torch.allclose(codes.decode(found)[:, k], mean[found[:, k]], atol=1e-5)
    assert codes.encode(torch.tensor([[-99.0] * 3, [99.0] * 3])).tolist() == [[0] * 3, [15] * 3]


# ---- The autoregressive prior --------------------------------------------------------------------

def test_training_shows_the_true_dot_and_codes_in_equally_full_buckets():
    prior, shown, (z_i, dot) = ar_prior(), [], (normal(800, D)(), normal(800)())
    prior.fit(z_i, dot)
    prior.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[2]))
    loss = prior.loss(z_i, Z_T[[0] * 800], dot, TOKENS[[0] * 800])
    assert loss.item() == pytest.approx(math.log(8))                 # a new prior is at chance
    assert shown[0].shape == (800, 3)                                # the last code is only asked
    for k, values in enumerate((dot, z_i[:, 0], z_i[:, 1])):
        assert (shown[0][values.argsort(), k].diff() >= 0).all()     # they rise with the value
        assert (shown[0][:, k].bincount() == 100).all()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_at_temperature_0_each_code_is_the_likeliest_given_those_before_it(guidance):
    """With guidance s the logits are null + s·(cond − null); the null has no caption and no z_t. By
    default s is 2."""
    def logits(symbols):
        null = prior(0 * Z_T, 0 * TOKENS, symbols)
        return null + guidance * (prior(Z_T, TOKENS, symbols) - null)
    prior, options = awake(ar_prior), dict(top_half=False, temperature=0)
    options |= {} if guidance == 2 else {"guidance": guidance}
    z_i = prior.sample(Z_T, TOKENS, generators(2), **options)
    assert torch.equal(z_i, prior.sample(Z_T, TOKENS, generators(2, seed=7), **options))
    dot = logits(torch.zeros(2, 0).long())[:, 0].argmax(dim=1, keepdim=True)
    symbols = torch.cat([dot, prior.codes.encode(z_i[:, :3])], dim=1)
    assert torch.equal(logits(symbols[:, :-1]).argmax(dim=2), symbols)
    assert (z_i[:, 3] == 0).all()                                    # a coordinate without a code


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_symbols_are_drawn_with_the_softmax_of_their_logits(monkeypatch, temperature):
    prior, N = ar_prior(components=1), 4000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 0.5, 0.5, -9.0])
    monkeypatch.setattr(prior, "forward", lambda z_t, tokens, symbols:
                        logits.expand(N, symbols.shape[1] + 1, 8))
    z_i = prior.sample(Z_T[[0] * N], TOKENS[[0] * N], generators(N), False, temperature, 1.0)
    found = prior.codes.encode(z_i[:, :1])[:, 0].bincount(minlength=8) / N
    assert torch.allclose(found, (logits / temperature).softmax(dim=0), atol=0.02)


def test_the_top_half_of_the_dots_is_drawn_from_by_default():
    for options, dots in ({}, {4, 5, 6, 7}), (dict(top_half=False), set(range(8))):
        prior, drawn = ar_prior(), []                                # a new one: all are as likely
        prior.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[2]))
        prior.sample(Z_T[[0] * 400], TOKENS[[0] * 400], generators(400), **options)
        assert [symbols.shape[1] for symbols in drawn] == [0, 1, 2, 3]
        assert set(drawn[1][:, 0].tolist()) == dots


# ---- Learning ------------------------------------------------------------------------------------

SPREAD = torch.tensor([0.3, 1.0, 0.3, 0.5])
CENTRE = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 1, 0]])
Y = torch.arange(800) % 2


def gaussians(y, seed):
    """z_i of captions y (N,): N(CENTRE of the caption, SPREAD²)."""
    return CENTRE[y] + SPREAD * normal(len(y), D, seed=seed)()


def coins(y, seed):
    """z_i of captions y (N,): coordinate 0 is near +1 with a probability of 80 or 20 %, coordinate
    1 has the same sign in 90 %, the rest is 0."""
    u = torch.rand(2, len(y), generator=seeded(seed))
    first = torch.where(u[0] < torch.where(y == 0, 0.8, 0.2), 1.0, -1.0)
    second = torch.where(u[1] < 0.9, first, -first)
    z_i = torch.stack([first, second, 0 * first, 0 * first], dim=1)
    return z_i + 0.05 * normal(len(y), D, seed=seed)()


def learnt(prior, law, steps, shuffled=False):
    """Trained on 1,024 pairs of the law; with shuffled, the captions belong to other z_i."""
    y, generator = torch.arange(1024) % 2, seeded()
    z_i = law(y, seed=1)
    y = y[torch.randperm(1024, generator=generator)] if shuffled else y
    dot = (z_i * Z_T[y]).sum(dim=1)
    if isinstance(prior, ARPrior):
        prior.fit(z_i, dot)

    def loss():
        i = torch.randint(1024, (128,), generator=generator)
        given = [Z_T[y[i]], dot[i]] if isinstance(prior, ARPrior) else [Z_T[y[i]]]
        return prior.loss(z_i[i], *given, TOKENS[y[i]], generator)
    return learn(prior, loss, steps, lr=5e-3)


@pytest.fixture(scope="module")
def trained():
    return learnt(diffusion_prior(), gaussians, steps=250)


def draw(prior, y=Y, steps=16, **options):
    return prior.sample(Z_T[y], TOKENS[y], normal(len(y), D), steps, **options)


def test_the_diffusion_prior_learns_a_conditional_gaussian_better_than_any_regressor(trained):
    z_i, one_call = draw(trained, steps=32), draw(trained, steps=1)
    for y in (0, 1):
        mine, data = z_i[Y == y], gaussians(Y[Y == y], seed=2)
        best = CENTRE[y].expand(400, D)                   # the answer of a perfect regressor
        assert ((mine.mean(dim=0) - CENTRE[y]).abs() < 0.3).all()
        assert ((mine.std(dim=0) / SPREAD).log2().abs() < 0.7).all()
        off, of_best, of_one_call = (energy_distance(a / SPREAD, data / SPREAD).item()
                                     for a in (mine, best, one_call[Y == y]))
        assert 5 * off < of_best and 2 * off < of_one_call


def test_guidance_0_hides_all_of_the_caption_and_guidance_1_is_the_default(trained):
    y = Y[:200]
    one, other = (draw(trained, asked, guidance=0.0) for asked in (y, 1 - y))
    plain = draw(trained, y)
    assert torch.allclose(one, other, atol=1e-4) and one[:, 0].std() > 0.5
    assert torch.equal(plain, draw(trained, y, guidance=1.0))
    assert (plain[y == 0, 0].mean() - one[y == 0, 0].mean()).abs() > 0.3


@pytest.mark.parametrize("shuffled, expected", [
    (False, [[0.72, 0.08, 0.02, 0.18], [0.18, 0.02, 0.08, 0.72]]),
    (True, [[0.45, 0.05, 0.05, 0.45]] * 2)])
def test_the_autoregressive_prior_learns_a_discrete_law_but_not_from_shuffled_captions(
        shuffled, expected):
    prior = learnt(ar_prior(components=2, buckets=4), coins, 100, shuffled)
    z_i = prior.sample(Z_T[Y], TOKENS[Y], generators(800), top_half=False, guidance=1.0)
    for y in (0, 1):                                      # (+, +), (+, −), (−, +), (−, −)
        signs = 2 * (z_i[Y == y, 0] < 0) + (z_i[Y == y, 1] < 0)
        found = signs.bincount(minlength=4) / 400
        assert torch.allclose(found, torch.tensor(expected[y]), atol=0.1)
    if not shuffled:
        fit = lambda z_i: (z_i * Z_T[Y]).sum(dim=1).mean()
        top_half = prior.sample(Z_T[Y], TOKENS[Y], generators(800), guidance=1.0)
        assert fit(top_half) > fit(z_i) + 0.1
