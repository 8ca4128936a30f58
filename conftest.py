"""What several tests use."""
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)       # the models of the tests are tiny: more threads would only wait


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; pytest -m slow runs these alone")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow runs it"))


def shake(model, by=0.05):
    """Add noise to all weights: layers that start at zero would hide what comes before them."""
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn_like(p)
    return model


def normal(*shape, seed=0):
    """A function that returns the next standard normal tensor of this shape."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator)


def learn(model, loss, steps, lr):
    """Train the model by loss() for a few steps; the learning rate rises at once and falls late."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10, 3 * (1 - step / steps))
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def same_bits(a, b):
    """Are two tensors, or dicts of tensors and other things, the same?"""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def tiny_parts():
    """Every part, tiny and untrained, with one CLIP and its tokenizer: {part: model}."""
    from clip_tiny import CLIP, CLIPConfig, Tokenizer
    from decoder import Decoder, DecoderConfig, Upsampler, UpsamplerConfig
    from prior import ARPrior, ARPriorConfig, DiffusionPrior, DiffusionPriorConfig
    from shapes import COLOURS, SHAPES

    captions = [caption for colour in COLOURS for shape in SHAPES
                for caption in (f"a {colour} {shape}", f"a photo of a small {colour} {shape}",
                                f"a large {shape} on top of a {colour} {shape}")]
    tokenizer = Tokenizer.learn(captions, vocab=300, context=32)
    text = dict(vocab=tokenizer.vocab, context=tokenizer.context)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "clip": CLIP(CLIPConfig(**text, width=64, depth=1, dim=16)),
            "prior": DiffusionPrior(DiffusionPriorConfig(16, **text, width=32, depth=1)),
            "ar_prior": ARPrior(ARPriorConfig(16, **text, components=4, buckets=8, width=32,
                                              depth=1)),
            "decoder": Decoder(DecoderConfig(16, **text, channels=(16, 32), blocks=(1, 1),
                                             attention=(False, True), width=64, text_depth=1,
                                             sketch_width=32)),
            "upsampler": Upsampler(UpsamplerConfig(channels=(8, 8), blocks=(1, 1), width=16))}
        for part, model in parts.items():
            shake(model).eval().requires_grad_(False)
            model.tokenizer, model.trained = tokenizer, {"data": "shapes", "seed": 0, "steps": 0}
            model.clip_id = None if part == "upsampler" else "tiny"       # which needs no CLIP
        z_i, z_t = torch.nn.functional.normalize(torch.randn(2, 200, 16), dim=-1)
        parts["clip"].fit_axes(z_i)
        parts["ar_prior"].fit(parts["clip"].whiten(z_i), (z_i * z_t).sum(-1))
    return parts


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A folder with a checkpoint of every tiny part: fast, and good for nothing.

    Read only: it is shared by all tests; copy it (shutil.copytree) to change it.
    """
    from checkpoints import save_part

    folder = tmp_path_factory.mktemp("weights")
    for part, model in tiny_parts().items():
        save_part(folder / f"{part}.pt", part, model, model.trained)
    return folder


# ---- train.py on tiny models ---------------------------------------------------------------------

TINY = {"clip": dict(width=64, depth=1, dim=16), "prior": dict(width=32, depth=1),
        "ar-prior": dict(width=32, depth=1, buckets=8),
        "decoder": dict(channels=(8, 32), blocks=(1, 1), attention=(False, True), width=64,
                        text_depth=1, sketch_width=32),
        "upsampler": dict(channels=(8,), blocks=(1,), width=16)}
FEW = dict(LARGE_PICTURES=4, VALIDATION_PICTURES=6, VALIDATION_DRAWS=16, LOG_ROWS=3)


@contextmanager
def tiny_models(tmp_path_factory):
    """Tiny models, few pictures, which are rendered once, and no shipped weights."""
    import checkpoints
    import train

    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        patch.setenv("UNCLIP_CACHE", str(base / "cache"))
        patch.setitem(train.SIZES, "small", TINY)
        for name, value in FEW.items():
            patch.setattr(train, name, value)
        for module in (train, checkpoints):
            patch.setattr(module, "SHIPPED", base / "nothing")
        yield


@pytest.fixture(scope="module")
def tiny_training(tmp_path_factory):
    with tiny_models(tmp_path_factory):
        yield


def type_train(*argv, steps=2, limit=24):
    """Call train.py as it is typed → its exit status."""
    import train

    return train.main([str(a) for a in ("--device", "cpu", "--limit", limit, "--batch-size", 8,
                                        "--steps", steps, *argv)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which every stage ran, for two steps. Read only; copy it to change it."""
    folder = tmp_path_factory.mktemp("trained")
    with tiny_models(tmp_path_factory):
        assert type_train("--out", folder) == 0
    return folder
