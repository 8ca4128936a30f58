"""What several tests use."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)       # the models of the tests are tiny: more threads would only wait


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
                                             attention=(False, True), width=32, text_depth=1)),
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
