"""What several tests use."""
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(min(2, torch.get_num_threads()))       # tiny models: more would only wait


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """A folder with a checkpoint of every part, tiny and untrained: fast, and good for nothing.

    Read only: it is shared by all tests; copy it (shutil.copytree) to change it.
    """
    from clip_tiny import CLIP, CLIPConfig, Tokenizer
    from data import COLOURS, SHAPES
    from decoder import Decoder, DecoderConfig, Upsampler, UpsamplerConfig
    from prior import ARPrior, ARPriorConfig, DiffusionPrior, DiffusionPriorConfig
    from unclip import save_part

    captions = [caption for colour in COLOURS for shape in SHAPES
                for caption in (f"a {colour} {shape}", f"a photo of a small {colour} {shape}",
                                f"a large {shape} on top of a {colour} {shape}")]
    tokenizer = Tokenizer.learn(captions, vocab=300, context=32)
    text = dict(vocab=tokenizer.vocab, context=tokenizer.context)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "clip": CLIP(CLIPConfig(patch=8, width=32, depth=1, text_width=32, text_depth=1, dim=16,
                                    **text)),
            "prior": DiffusionPrior(DiffusionPriorConfig(dim=16, width=32, depth=1, steps=4,
                                                         **text)),
            "ar_prior": ARPrior(ARPriorConfig(dim=16, components=4, buckets=8, dot_buckets=4,
                                              width=32, depth=1, **text)),
            "decoder": Decoder(DecoderConfig(dim=16, channels=(16, 32), blocks=(1, 1),
                                             attention=(False, True), emb_width=32, text_width=32,
                                             text_depth=1, steps=3, **text)),
            "upsampler": Upsampler(UpsamplerConfig(channels=(8, 8), blocks=(1, 1), emb_width=16,
                                                   steps=2))}
        with torch.no_grad():
            for model in parts.values():     # for outputs start at zero: nothing would matter
                for p in model.parameters():
                    p += 0.05 * torch.randn_like(p)
        z_i, z_t = torch.nn.functional.normalize(torch.randn(2, 200, 16), dim=-1)
        parts["ar_prior"].fit(z_i, z_t)
    folder = tmp_path_factory.mktemp("weights")
    for part, model in parts.items():
        model.tokenizer = tokenizer
        model.clip_id = "tiny" if part != "upsampler" else None       # which needs no CLIP
        save_part(folder / f"{part}.pt", part, model, {"data": "shapes", "seed": 0, "steps": 0})
    return folder
