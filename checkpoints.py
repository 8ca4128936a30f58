"""Weights on disk: saving, loading, and refusing what would draw nonsense.

A part of unCLIP is one file, <part>.pt: a plain dict of numbers, strings and tensors, which torch
reads without running any code in it. Priors and decoder belong to the one CLIP on whose embeddings
they were trained. Each CLIP has an id: a random number and the step at which it was saved. Each
copy of its file keeps the id, and a part that was trained on this CLIP stores the id as clip_id.
"""

import argparse
import os
import sys
import tempfile
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch

from clip_tiny import CLIP, CLIPConfig, Tokenizer
from decoder import Decoder, DecoderConfig, Upsampler, UpsamplerConfig
from prior import ARPrior, ARPriorConfig, DiffusionPrior, DiffusionPriorConfig

PARTS = {"clip": (CLIP, CLIPConfig), "prior": (DiffusionPrior, DiffusionPriorConfig),
         "ar_prior": (ARPrior, ARPriorConfig), "decoder": (Decoder, DecoderConfig),
         "upsampler": (Upsampler, UpsamplerConfig)}
ALL_PARTS = PARTS | {"text_decoder": PARTS["decoder"]}  # the last only for evaluate.py to compare
SHIPPED = Path(__file__).parent / "weights"
FORMAT = 2


# ---- Files -------------------------------------------------------------------------------------

def write_torch(path, value):
    """torch.save that never leaves half a file: it writes a second file and renames that."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())          # or a power cut could leave the new name, but no bytes
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_torch(path):
    """A file of plain tensors, numbers and strings. Raises ValueError or OSError, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # torch warns of files that are refused anyway
            with zipfile.ZipFile(path) as file:
                assert file.testzip() is None        # torch does not compare the checksums
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise OSError(f"{path}: {error.strerror}; use a file written by train.py") from None
    except Exception:                        # a broken archive makes torch raise almost anything
        raise ValueError(f"{path}: refused, not a whole checkpoint of plain weights (cut short? "
                         f"code in it?); use a file written by train.py") from None


# ---- Parts -------------------------------------------------------------------------------------

def save_part(path, part, model, trained, half=False):
    """Write a part's weights, with all that is needed to use them.

    trained: a dict that says how; its "data" names the data set. model.config, model.clip_id and,
    for CLIP, model.tokenizer are written too. half: in half precision, as shipped weights are:

        model = load_part("runs/shapes/prior.pt")
        save_part("weights/shapes/prior.pt", "prior", model, model.trained, half=True)
    """
    weights = {k: v.detach().cpu().to(torch.float16 if half and v.is_floating_point() else v.dtype)
               for k, v in model.state_dict().items()}
    checkpoint = {"format": FORMAT, "part": part, "config": asdict(model.config),
                  "weights": weights, "clip_id": model.clip_id, "trained": trained}
    if part == "clip":
        checkpoint["tokenizer"] = model.tokenizer.state()
    write_torch(path, checkpoint)


def load_part(path, device="cpu", parts=ALL_PARTS):
    """The model in <part>.pt, in eval mode, with .clip_id, .trained (and CLIP's .tokenizer).

    parts: a table like PARTS. Raises ValueError or OSError, in one line: of a device that is not
    there, or that names the file, for anything that is not a sound checkpoint of that part.
    """
    checkpoint, part = read_torch(path), Path(path).stem
    try:
        kind, config = parts[part]
        held = checkpoint["format"], checkpoint["part"]
        assert held == (FORMAT, part), f"its format and part are {held}, not {(FORMAT, part)}"
        model = kind(sound_config(config, checkpoint["config"]))
        model.load_state_dict(sound_weights(checkpoint["weights"]), strict=True)
        model.clip_id, model.trained = checkpoint["clip_id"], checkpoint["trained"]
        assert isinstance(model.clip_id, str | None), "its clip_id is no text"
        assert isinstance(model.trained, dict) and isinstance(model.trained["data"], str), \
            "it does not say on what it was trained"
        if part == "clip":
            model.tokenizer = Tokenizer(**checkpoint["tokenizer"])
            sizes = model.tokenizer.vocab, model.tokenizer.context
            assert sizes == (model.config.vocab, model.config.context), \
                f"its tokenizer has {sizes}, its weights have another vocabulary and context"
    except Exception as error:       # whatever a damaged file holds, the answer is the same
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(f"{path}: its content does not fit this code ({reason}); train it again, "
                         f"or use another file") from None
    model.to(find_device(device), memory_format=torch.channels_last)     # a CPU convolves faster so
    return model.eval().requires_grad_(False)


def sound_config(config, values):
    """The config dataclass made of a dict of values; an assertion fails if one makes no sense."""
    for field in fields(config):
        value = values.get(field.name, field.default)
        numbers = value if field.type is tuple else (value,)
        most = 1 if field.type is float else 2 ** 13
        assert isinstance(value, field.type) and all(
            isinstance(n, (int, float)) and 0 <= n <= most for n in numbers), \
            f"{field.name} is {value!r}"
    return config(**values)


def sound_weights(weights):
    """The weights, if all of them are real, finite numbers."""
    for name, value in weights.items():
        assert not value.is_complex() and value.isfinite().all(), f"{name} is not finite"
    return weights


# ---- Folders -----------------------------------------------------------------------------------

def misfit(model, clip):
    """Why a part can't be used with this CLIP, as text; "" if it can. It must have learnt from the
    embeddings of this CLIP (an upsampler needs none), and share the settings that both have."""
    if not isinstance(model, Upsampler) and model.clip_id != clip.clip_id:
        return f"belongs to another CLIP ({model.clip_id}, here is {clip.clip_id})"
    both = {key: getattr(clip.config, key) for key in ("image_size", "dim", "vocab", "context")}
    differ = [f"{key} {its}, not {own}" for key, own in both.items()
              if (its := getattr(model.config, key, own)) != own]
    return f"does not fit its CLIP ({', '.join(differ)})" if differ else ""


def check_clip(model, clip, path):
    """Refuse a part that can't be used with this CLIP."""
    if reason := misfit(model, clip):
        raise ValueError(f"{path}: {reason}; train it again on this one")


def load_parts(folder, device="cpu"):
    """The parts of a folder and, where it lacks one, the shipped part that fits its CLIP → {part:
    model}. A line on stderr names each shipped part. Raises ValueError or OSError, in one line."""
    folder = Path(folder)
    there = [part for part in ALL_PARTS if (folder / f"{part}.pt").exists()]
    if not there:
        raise FileNotFoundError(f"{folder}: no folder with weights (clip.pt, decoder.pt, …); "
                                f"python train.py makes runs/shapes")
    found = {part: load_part(folder / f"{part}.pt", device) for part in there if part in PARTS}
    first = found.get(there[0]) or load_part(folder / f"{there[0]}.pt")    # text_decoder.pt alone
    shipped = SHIPPED / first.trained["data"]
    clip = found.get("clip")
    if clip is None:
        path = shipped / "clip.pt"
        clip = load_part(path, device) if path.exists() else None
        if clip is None or first.clip_id not in (clip.clip_id, None):    # an upsampler's is None
            raise FileNotFoundError(f"{folder}: clip.pt is missing; copy the one of its parts' "
                                    f"CLIP, or train all: python train.py")
    for part, model in found.items():
        check_clip(model, clip, folder / f"{part}.pt")
    for part in PARTS:
        path = shipped / f"{part}.pt"
        if part not in found and path.exists():
            model = clip if part == "clip" else load_part(path, device)
            if not misfit(model, clip):
                found[part] = model
                say(f"{part}: not in {folder}, using the shipped {path}")
    return found


# ---- Commands ----------------------------------------------------------------------------------
# What the command lines of train.py, sample.py and evaluate.py share.

class Parser(argparse.ArgumentParser):
    """It has --device, and raises ValueError where argparse would print its usage and exit."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                          help="cpu, cuda or mps (default: %(default)s)")

    def error(self, message):
        raise ValueError(f"{message}; see --help")


@contextmanager
def about(flag):
    """A ValueError or OSError in here becomes a ValueError that begins with this flag."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag} {error}") from None


def find_device(name):
    """The torch.device of --device. Raises ValueError if this machine has none of that name."""
    try:
        torch.zeros(1, device=name).cpu()
    except Exception:                # torch has many ways to say so
        raise ValueError(f"--device {name}: not to be had here; try --device cpu") from None
    return torch.device(name)


def check_out(folder):
    """Refuse, before any work, a folder for results that can't be written. Nothing is made."""
    nearest = next(filter(os.path.lexists, (folder, *folder.parents)), folder)
    try:
        with suppress(FileNotFoundError):
            os.lstat(folder)                             # its name may be too long
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(f"--out {folder}: can't be written ({error.strerror}); choose another folder"
                      ) from None


def say(text):
    """One line on stderr, whatever characters a prompt or the name of a file may hold."""
    line = " ".join(str(text).split())
    with suppress(OSError):                              # "| tee" may be gone, and nobody listen
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), file=sys.stderr)


def run_command(name, command, argv=None):
    """Call command(argv) → the exit status: what it returns, or 0; 130 if it was stopped; 2 if it
    raised an error that a user can mend. That error is printed in one line."""
    for stream in (sys.stdout, sys.stderr):             # a console may lack a character, and the
        if hasattr(stream, "reconfigure"):              # name of a file may be no text at all
            raw = stream is sys.stdout and stream.encoding.lower() in ("utf-8", "utf8")
            stream.reconfigure(errors="surrogateescape" if raw else "backslashreplace")
    try:
        return command(argv) or 0
    except (ValueError, OSError) as error:
        say(f"{name}: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise                                       # a fault of the code: show where it is
        say(f"{name}: out of memory; ask for less at once, see --help")
    except KeyboardInterrupt:
        return 130
    return 2
