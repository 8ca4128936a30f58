"""What several tests use."""
import csv
import json
import os
import pickle
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent
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
    generator = seeded(seed)
    return lambda: torch.randn(shape, generator=generator)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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


def raising(error):
    """A function that raises this error, whatever it is given."""
    def fail(*_, **__):
        raise error
    return fail


class Surprise:
    """A pickle that runs code when it is opened."""

    def __reduce__(self):
        return os.system, ("touch was_here",)


TINY = {"clip": dict(width=64, depth=1, dim=16), "prior": dict(width=32, depth=1),
        "ar-prior": dict(width=32, depth=1, buckets=8),
        "decoder": dict(channels=(8, 32), blocks=(1, 1), attention=(False, True), width=64,
                        text_depth=1, sketch_width=32),
        "upsampler": dict(channels=(8, 8), blocks=(1, 1), width=16)}


def tiny_parts(side=32):
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
            "clip": CLIP(CLIPConfig(**text, image_size=side, **TINY["clip"])),
            "prior": DiffusionPrior(DiffusionPriorConfig(16, **text, **TINY["prior"])),
            "ar_prior": ARPrior(ARPriorConfig(16, **text, components=4, **TINY["ar-prior"])),
            "decoder": Decoder(DecoderConfig(16, **text, image_size=side, **TINY["decoder"])),
            "upsampler": Upsampler(UpsamplerConfig(**TINY["upsampler"]))}
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


@pytest.fixture(scope="session")
def tiny_unclip(tiny_weights):
    from unclip import UnCLIP

    return UnCLIP.load(tiny_weights)


@pytest.fixture
def loaded(tiny_unclip, monkeypatch):
    """Weights in a folder called tiny are not read again: that takes longer than to draw."""
    from unclip import UnCLIP

    load = UnCLIP.load
    monkeypatch.setattr(UnCLIP, "load", lambda folder, *device: (
        tiny_unclip if str(folder) == "tiny" else load(folder, *device)))


# ---- train.py on tiny models ---------------------------------------------------------------------

FEW = dict(LARGE_PICTURES=4, VALIDATION_PICTURES=6, VALIDATION_DRAWS=8, LOG_ROWS=3)


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


def log(path):
    """The rows of a log, as dicts."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def bytes_in(folder):
    """The bytes of each file of a folder."""
    return {path: path.read_bytes() for path in folder.iterdir()}


def at_step(monkeypatch, step, do):
    """Do something at the end of a step of training."""
    import train

    update = train.State.update_ema
    monkeypatch.setattr(train.State, "update_ema", lambda state: (
        update(state), state.step == step and do(state)))


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which every stage ran, for two steps. Read only; copy it to change it."""
    folder = tmp_path_factory.mktemp("trained")
    with tiny_models(tmp_path_factory):
        assert type_train("--out", folder) == 0
    return folder


# ---- Data sets in files --------------------------------------------------------------------------

def picture(path, size=(40, 30), colour=(200, 30, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def batch(i, n=20):
    pixels = np.random.default_rng(i).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": [k % 10 for k in range(n)],
            b"batch_label": b"a batch" if i else b""}        # pickle writes b"" in another way


def write_cifar(root, n=20):
    """The six files of CIFAR-10, with n random pictures each → their folder."""
    (folder := root / "cifar-10-batches-py").mkdir(parents=True)
    for i, name in enumerate(BATCHES):
        (folder / name).write_bytes(pickle.dumps(batch(i, n), protocol=2))
    return folder


def write_coco(root, n=6, change=None):
    """n plain pictures of n shades with two captions each; `change` edits the annotations."""
    for part in ("train2017", "val2017"):
        table = {"images": [], "annotations": []}
        for i in range(n):
            name = f"{i:012d}.jpg"
            if not (root / part / name).exists():
                blue = 100 if part == "train2017" else 200
                picture(root / part / name, (60 + i, 50), (20 * i, 100, blue))
            table["images"].append({"id": i, "file_name": name})
            table["annotations"] += [{"image_id": i, "caption": f" Thing {i},\n no. {j} "}
                                     for j in range(2)]
        change and change(table)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(table))
    return root


def write_metadata(root, n=40, more=b"", words="thing {}".format):
    """n plain pictures of n shades; every other one has a second caption."""
    rows = []
    for i in range(n):
        picture(root / f"{i}.png", colour=(5 * i, 0, 0))
        text = words(i) if i % 2 else [words(i), f"ding {i}"]
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (root / "metadata.jsonl").write_bytes("\n".join(rows).encode() + b"\n" + more)
    return root
