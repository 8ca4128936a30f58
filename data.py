"""Pictures with captions: rendered shapes, signs, CIFAR-10, COCO, or a folder of one's own.

A data set is one uint8 tensor (N, 3, H, W) and a list of captions for each picture. It lies in
memory as a whole: a batch is an index, and no loader processes are needed. load() makes it.

Next chapter: judge.py.
"""
import codecs
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
import tarfile
import unicodedata
import urllib.request
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import EpsImagePlugin, Image, ImageCms, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from shapes import RENDERER_VERSION, item, labels_of, render, write_safely


@dataclass
class Dataset:
    """Pictures and what is known about them.

    images    uint8 (N, 3, H, W)
    captions  N lists of one or more captions
    labels    ground truth, a dict of tensors whose first axis is N ({} where none is known)
    classes   the names behind labels["class"] ([] where there are none)
    flips     does a mirrored picture keep its captions? Not where they say "left of", or spell
    """
    images: torch.Tensor
    captions: list
    labels: dict
    classes: list
    flips: bool

    def __len__(self):
        return len(self.images)


SPLITS = ("train", "validation")


def load(name, split, size=32, limit=None, data_dir=None, seed=0):
    """The data set `name`, one of DATASETS → Dataset. What takes long to make is kept in a cache.

    split     "train" or "validation"
    size      height and width of the images, in pixels
    limit     how many images; None: all of them (of shapes 60,000 to train, of signs 30,000)
    data_dir  where the files lie; shapes and signs need none
    seed      of whatever is drawn at random: shapes, signs, or which images a limit keeps
    Raises ValueError or OSError, one line that says what to do.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if size < 8:
        raise ValueError(f"images of {size} pixels are too small: choose a size of 8 or more")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} leaves no images: choose 1 or more")
    return DATASETS[name](split, size, limit, data_dir, seed)


# ---- The cache ----------------------------------------------------------------------------------


def cache_folder():
    """$UNCLIP_CACHE, or else ~/.cache/unclip. Raises OSError if there is no home, either."""
    try:
        return Path(os.environ.get("UNCLIP_CACHE") or Path.home() / ".cache" / "unclip")
    except RuntimeError:
        raise OSError("there is no home folder: set UNCLIP_CACHE to a folder that can be written"
                      ) from None


def read_cache(name, like, axis=0):
    """The dict of tensors kept under this name, or None if there is none with the keys, the dtypes
    and, from this axis on, the shapes of the dict `like`."""
    def kinds(tensors):
        return {key: (x.dtype, x.ndim, x.shape[axis:]) for key, x in tensors.items()}
    try:
        with zipfile.ZipFile(cache_folder() / name) as file:
            assert file.testzip() is None    # torch does not compare the checksums
        kept = torch.load(cache_folder() / name, weights_only=True)
        return kept if kinds(kept) == kinds(like) else None
    except Exception:    # no file, a damaged one, or one that holds another thing
        return None


def write_cache(name, value):
    """Keep the value if that is possible. A full or read-only disk must not end the run."""
    try:
        write_safely(cache_folder() / name, lambda temporary: torch.save(value, temporary))
    except (OSError, RuntimeError) as error:    # torch raises the second for a full disk
        folder = os.environ.get("UNCLIP_CACHE") or "~/.cache/unclip"
        note(f"can't keep data in {folder} ({type(error).__name__}), going on without it: "
             "set UNCLIP_CACHE to a folder that can be written")


@lru_cache    # the same note is printed once
def note(text):
    print(text, file=sys.stderr)


# ---- Rendered shapes ----------------------------------------------------------------------------

BLOCK = 10_000    # pictures in a file of the cache, so that another limit finds them again


def shapes(split, size, limit, data_dir, seed):
    """Rendered shapes: 60,000 to train and 2,000 to validate, or `limit`, which may be more."""
    N, captions, labels = limit or {"train": 60_000, "validation": 2_000}[split], [], []
    try:
        images = torch.empty(N, 3, size, size, dtype=torch.uint8)
    except RuntimeError:
        raise ValueError(f"{N:,} images of {size} pixels need {N * 3 * size ** 2 / 1e9:,.0f} GB of "
                         "memory: choose a smaller limit") from None
    with tqdm(desc=f"rendering {split} shapes, {size} pixels", total=N, delay=0.5) as bar:
        for first in range(0, N, BLOCK):
            name = f"shapes-v{RENDERER_VERSION}-{split}-{size}px-seed{seed}-from{first}.pt"
            block = fill(images[first:first + BLOCK], lambda i: item(split, first + i, seed),
                         name, bar)
            captions += read_json(block.pop("captions"))
            labels.append(block)
    labels = {key: torch.cat([block[key] for block in labels])[:N] for key in labels[0]}
    return Dataset(images, captions[:N], labels, classes=[], flips=False)


def fill(images, draw_item, name, bar):
    """Render a block's items into `images`, but for those that the cache holds under `name`.
    draw_item(i): (scene, captions). Returns the captions, as JSON in a tensor, and the labels."""
    scene, captions = draw_item(0)
    like = {"images": images, "captions": write_json([captions]), **labels_of([scene])}
    block = read_cache(name, like, axis=1) or {key: x[:0] for key, x in like.items()}
    kept = block.pop("images")[:len(images)]
    images[:len(kept)] = kept
    bar.update(len(kept))
    missing = range(len(kept), len(images))
    if missing:
        scenes, captions = zip(*map(draw_item, missing))
        for i in range(0, len(missing), 1000):    # the bar moves every few seconds
            some = render(scenes[i:i + 1000], images.shape[-1])
            images[missing[i]:missing[i] + 1000] = some
            bar.update(len(some))
        block = {"captions": write_json(read_json(block["captions"]) + list(captions)),
                 **{key: torch.cat([block[key], v]) for key, v in labels_of(scenes).items()}}
        # A clone, or torch would save all that `images` is a part of.
        write_cache(name, {"images": images.clone(), **block})
    return block


def write_json(value):
    """Lists of strings → a uint8 tensor, because the cache holds tensors alone."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def read_json(tensor):
    """The inverse of `write_json`; of an empty tensor it is an empty list."""
    return json.loads(tensor.numpy().tobytes() or "[]")


# ---- Signs: does unCLIP spell? ------------------------------------------------------------------
# "A sign that says ..." is what the paper's unCLIP can't draw (sec. 7, Fig. 16).

LETTERS, CONSONANTS, VOWELS = "abcdefghijklmnopqrstuvwxyz", "bcdfghjklmnprstvwz", "aeiou"
font = lru_cache(ImageFont.load_default)    # of a size, made once


def a_word(rng, unseen=False):
    """Two syllables, as "miru": one of 8,100 words of four letters. About one in ten of them is
    unseen: it occurs neither in training nor in validation."""
    while True:
        word = "".join(map(rng.choice, 2 * (CONSONANTS, VOWELS)))
        if (hashlib.md5(word.encode()).digest()[0] < 26) == unseen:
            return word


def draw_sign(word, rng, size):
    """A sign that says this word → uint8 (3, size, size). No caption tells colours and place."""
    tint = lambda low, high: tuple(rng.randint(low, high) for _ in range(3))
    image = Image.new("RGB", (256, 256), tint(170, 255))                  # then shrunk
    draw, ink = ImageDraw.Draw(image), tint(0, 70)
    left, top = rng.randint(0, 32), rng.randint(0, 112)
    draw.rectangle([left + 100, top, left + 124, 256], tint(60, 130))     # the post
    draw.rectangle([left, top, left + 223, top + 111], tint(150, 250))
    for k, letter in enumerate(word):                                     # 7 pixels of 32 for each
        draw.text((left + 28 + 56 * k, top + 56), letter, ink, font(88), anchor="mm")
    return square(image, size)


def signs(split, size, limit, data_dir, seed):
    """Signs with a word on each: 30,000 to train and 2,000 to validate, or `limit`."""
    N = limit or {"train": 30_000, "validation": 2_000}[split]
    rngs = [random.Random(f"signs/{seed}/{split}/{i}") for i in range(N)]
    words, kept_as = list(map(a_word, rngs)), f"signs-v1-{split}-{size}px-seed{seed}-{N}.pt"
    kept = read_cache(kept_as, {"images": torch.empty(N, 3, size, size, dtype=torch.uint8)})
    if kept is None:
        kept = {"images": torch.stack([draw_sign(word, rng, size) for word, rng in zip(
            tqdm(words, f"drawing {split} signs", delay=0.5), rngs)])}
        write_cache(kept_as, kept)
    captions = [[f'a sign that says "{word}"', f'a photo of a sign that says "{word}"']
                for word in words]
    return Dataset(kept["images"], captions, {"letters": letters_of(words)}, [], flips=False)


def letters_of(words):
    """Words of four letters → (N, 4), indices into LETTERS."""
    return torch.tensor([[LETTERS.index(letter) for letter in word] for word in words])


# ---- Pictures in files --------------------------------------------------------------------------

MAX_PIXELS = 90_000_000    # of a decoded picture: a small file must not fill the memory
EpsImagePlugin.gs_binary = False    # a file with EPS in it, of any name, would start Ghostscript


def read_image(path, size):
    """Any picture that Pillow opens → uint8 (3, size, size): upright, its middle square, in sRGB.

    Transparency is laid on white; of an animation the first frame counts.
    Raises ValueError or OSError, one line, if there is no picture in it.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: give the path of one picture")
    try:
        with lenient_pillow():
            return upright(path, size)
    except Exception as error:    # Pillow's decoders raise a dozen kinds
        why = " ".join(str(error).split()) if path.stat().st_size else "it is empty"
        raise ValueError(f"{path} can't be read ({why}): give a PNG or JPEG that opens") from None


@contextmanager
def lenient_pillow():
    """Here Pillow neither warns of odd files nor refuses large ones, which upright() does."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def upright(path, size):
    """What read_image() returns, with any error that Pillow may raise."""
    with Image.open(path) as image:
        image.draft(None, (2 * size, 2 * size))    # a JPEG can shrink while it is decoded
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width:,} x {image.height:,} pixels are too many")
        image.load()
        with suppress(Exception):    # its metadata may be broken, and the picture not
            ImageOps.exif_transpose(image, in_place=True)
        return square(image, size)


def square(image, size):
    """The middle of a Pillow image of any size and mode → uint8 (3, size, size), sRGB."""
    side, profile = min(image.size), image.info.get("icc_profile")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    if image.mode[0] in "IF":    # 16 bits or more, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.float32)
        if not np.isfinite(grey).all():
            raise ValueError("some of its pixels are no finite numbers")
        low, high = (0, 65535) if image.mode.startswith("I;16") else (grey.min(), grey.max())
        image = Image.fromarray(((grey - low) / max(high - low, 1e-9) * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    # Shrunk pixels are area means, as they are in the rendered shapes.
    how = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    image = in_srgb(image.resize((size, size), how), profile)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def in_srgb(image, profile):
    """The image with the colours that its ICC profile means, as a viewer shows them."""
    if not profile:
        return image
    try:
        return ImageCms.profileToProfile(
            image, io.BytesIO(profile), ImageCms.createProfile("sRGB"),
            outputMode="RGBA" if image.mode == "RGBA" else "RGB")
    except Exception:    # a broken profile, or one for another kind of picture
        return image


def read_images(files, names, size, title):
    """The pictures files[name] → names of those that can be read, and uint8 (N, 3, size, size).

    Kept under the names, lengths and dates of all files, so that a changed picture is noticed. A
    change of upright() is not noticed: after one, raise the 2 of "images-v2".
    """
    stats = [(str(files[name]), files[name].stat()) for name in names]
    state = repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    kept_as = f"images-v2-{size}px-{hashlib.sha256(state.encode()).hexdigest()[:20]}.pt"
    made = {"images": torch.zeros(len(names), 3, size, size, dtype=torch.uint8),
            "sound": torch.zeros(len(names), dtype=torch.bool)}
    kept = read_cache(kept_as, made)
    if kept is None:
        kept = made
        if read_all([files[name] for name in names], title, **kept):
            write_cache(kept_as, kept)
    images, sound = kept["images"], kept["sound"]
    return [name for name, good in zip(names, sound) if good], \
        images if sound.all() else images[sound]


def read_all(paths, title, images, sound):
    """Write the pictures into `images`, and into `sound` which of them could be read. Returns False
    if the system failed at some of them: another time they may be read."""
    failures = []

    def read(path):
        try:
            return upright(path, images.shape[-1])
        except Exception as error:    # as in read_image()
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                failures.append(error)    # Pillow's own errors have no number
    with lenient_pillow(), ThreadPool() as pool:
        for i, image in enumerate(tqdm(pool.imap(read, paths), title, len(paths), delay=0.5)):
            if image is not None:
                images[i], sound[i] = image, True
    return not failures


# ---- Files, names and captions ------------------------------------------------------------------


def files_in(folder):
    """{name below the folder: path} of all files in it that are not hidden.

    Links to files are followed, links to folders are not. Names are looked up here alone: one that
    leads out of the folder is the name of a missing file.
    """
    paths = {nfc(path.relative_to(folder).as_posix()): path for path in folder.rglob("*")}
    return {name: path for name, path in paths.items()
            if path.is_file() and not any(part[0] == "." for part in name.split("/"))}


def given_folder(name, data_dir):
    if not data_dir:
        raise ValueError(f"--data {name} needs --data-dir: the folder where the pictures lie")
    if not Path(data_dir).is_dir():
        raise ValueError(f"--data-dir {data_dir}: there is no such folder")
    return Path(data_dir).resolve()


def nfc(text):
    """Letters in composed form. Some systems write é as two characters: e and an accent."""
    return unicodedata.normalize("NFC", text)


def clean(text):
    """A caption in one line with single blanks; "" for what is no text, such as null."""
    return " ".join(nfc(text).encode("utf-8", "replace").decode().split()) \
        if isinstance(text, str) else ""


def gather(pairs):
    """(name, caption) pairs → {name: [caption, ...]}, and how many captions are null or empty."""
    captions, empty = {}, 0
    for name, text in pairs:
        if text := clean(text):
            captions.setdefault(name, []).append(text)
        else:
            empty += 1
    return captions, empty


TEMPLATES = ["a photo of {}", "a picture of {}", "an image of {}", "{}"]


def class_captions(name):
    """"frog" → ["a photo of a frog", ..., "a frog"]."""
    thing = ("an " if name[:1].lower() in "aeiou" else "a ") + name
    return [template.format(thing) for template in TEMPLATES]


def subset(items, limit, seed):
    """All items, or `limit` of them, drawn with the seed and kept in order."""
    drawn = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[:limit]
    return [items[i] for i in drawn.sort().values]


def is_picture(name):
    return Path(name).suffix.lower() in Image.registered_extensions()


def report(title, top, files, captions, N, left_out):
    """One line on stderr: how many pictures there are, and how many were left out, and why. Raises
    ValueError if there is none."""
    others = files.keys() - captions.keys() - {"metadata.jsonl"}
    pictures = sum(map(is_picture, others))
    left_out = {"without captions": pictures, "of another kind": len(others) - pictures,
                "missing": len(captions.keys() - files.keys()), **left_out}
    reasons = ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n)
    line = f"{title}: {N:,} images" + (f" (left out: {reasons})" if reasons else "")
    if not N:
        raise ValueError(f"--data-dir, {line}: put two or more different pictures that have "
                         f"captions into {top}; one of them at least is for validation")
    print(line, file=sys.stderr)


def parse_json(content, where):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error}): mend it") from None


# ---- CIFAR-10 -----------------------------------------------------------------------------------

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "validation": ["test_batch"]}


def cifar10(split, size, limit, data_dir, seed):
    """CIFAR-10: 50,000 images of ten classes to train; its test set, 10,000, to validate.

    data_dir  the official archive, the folder it lies in, or cifar-10-batches-py unpacked from it;
              None: the archive is downloaded into the cache, once
    """
    source = Path(data_dir or cache_folder() / "cifar-10-python.tar.gz")
    if not data_dir and not source.exists():
        download(CIFAR_URL, CIFAR_MD5, source)
    pixels, classes = map(torch.cat, zip(*read_cifar(source, CIFAR_BATCHES[split])))
    chosen = subset(range(len(pixels)), limit, seed)
    images, classes = pixels[chosen].view(-1, 3, 32, 32), classes[chosen]
    if size != 32:
        images = torch.stack([square(Image.fromarray(image.permute(1, 2, 0).numpy()), size)
                              for image in images])
    captions = [class_captions(name) for name in CIFAR_CLASSES]
    return Dataset(images, [captions[k] for k in classes], {"class": classes}, CIFAR_CLASSES,
                   flips=True)


def read_cifar(source, names):
    """These batches of an archive or a folder, each uint8 (10000, 3072) and int64 (10000,)."""
    for inner in ("cifar-10-python.tar.gz", "cifar-10-batches-py"):
        source = source / inner if (source / inner).exists() else source
    try:
        if source.is_dir():
            found = {name: unpickle((source / name).read_bytes()) for name in names}
        else:
            with tarfile.open(source, "r:gz") as tar:
                found = {Path(member.name).name: unpickle(tar.extractfile(member).read())
                         for member in tar if member.isfile() and Path(member.name).name in names}
        return [found[name] for name in names]
    except Exception as error:    # a damaged or a hostile file may raise anything
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"no CIFAR-10 in {source} ({why}): delete it, to download it "
                         "again, or let --data-dir be cifar-10-python.tar.gz or its folder"
                         ) from None


class ArrayUnpickler(pickle.Unpickler):
    """A pickle may name any function, and unpickling calls it. This one calls what makes arrays."""
    make = np.empty(0).__reduce__()[0]
    known = {("numpy.core.multiarray", "_reconstruct"): make,     # its name in the official archive
             ("numpy._core.multiarray", "_reconstruct"): make,    # and since numpy 2
             ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
             ("_codecs", "encode"): codecs.encode,                # how Python 3 pickles bytes,
             ("__builtin__", "bytes"): bytes}                     # and b""

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}, which no image needs")
        return self.known[module, name]


def unpickle(content):
    batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    data, labels = torch.from_numpy(batch[b"data"]), torch.tensor(batch[b"labels"])
    if data.dtype != torch.uint8 or data.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"{len(labels)} labels for {data.dtype} data of shape {list(data.shape)}")
    if labels.dtype != torch.int64 or labels.min() < 0 or labels.max() > 9:
        raise ValueError("labels that are no classes, 0 to 9")
    return data, labels


def download(url, md5, path):
    """Fetch a file and check it. Whatever goes wrong, nothing is left behind."""
    def fetch(temporary):
        with urllib.request.urlopen(url, timeout=60) as answer, open(temporary, "wb") as file:
            length = int(answer.headers["Content-Length"] or 0)
            with tqdm.wrapattr(answer, "read", length, desc=path.name) as body:
                shutil.copyfileobj(body, file)
        if hashlib.md5(temporary.read_bytes()).hexdigest() != md5:
            raise OSError("its MD5 is wrong: it was cut off, or it is another file")
    try:
        write_safely(path, fetch)
    except Exception as error:    # of the network, of the disk, or the one above
        raise OSError(f"no {path.name} from {url} ({error}): try again, or fetch it in another way "
                      "and name the file by --data-dir") from None


# ---- COCO ---------------------------------------------------------------------------------------


def coco(split, size, limit, data_dir, seed):
    """COCO 2017, photographs with five captions each: 118,287 to train, 5,000 to validate.

    data_dir  holds annotations/captions_{train,val}2017.json, train2017/ and val2017/
    All of it, at 64 pixels, is 118,287 * 3 * 64 * 64 bytes = 1.45 GB, in memory and in the cache.
    """
    part = {"train": "train2017", "validation": "val2017"}[split]
    top = given_folder("coco", data_dir) / part
    file = top.parent / "annotations" / f"captions_{part}.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: let --data-dir be a folder with "
                         f"annotations/captions_{part}.json and {part}/")
    content = parse_json(file.read_bytes(), file)
    try:
        names = {image["id"]: nfc(image["file_name"]) for image in content["images"]}
        # A caption of an unknown picture counts as one of a missing file, named by its id.
        captions, empty = gather((names.get(a["image_id"], a["image_id"]), a["caption"])
                                 for a in content["annotations"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not like COCO's ({type(error).__name__}: {error}): "
                         "take the one in annotations_trainval2017.zip") from None
    files = files_in(top)
    chosen = subset(sorted(files.keys() & captions.keys()), limit, seed)
    names, images = read_images(files, chosen, size, f"coco {split}")
    report(f"coco {split}", top, files, captions, len(names),
           {"broken": len(chosen) - len(names), "empty captions": empty})
    # Mirrored pictures keep their captions: we take it that few say left or right.
    return Dataset(images, [captions[name] for name in names], {}, [], flips=True)


# ---- A folder of one's own ----------------------------------------------------------------------


def folder(split, size, limit, data_dir, seed):
    """Pictures of one's own: a folder with metadata.jsonl, or with one sub-folder for each class.

    data_dir  each line of its metadata.jsonl is {"file_name": "a.jpg", "text": "a caption"}, or
              "text": [several]. Without one, if it holds train/ and one of validation/, val/,
              test/, these are two such folders. Else about one picture in twenty is held out.
    """
    tops = halves(given_folder("folder", data_dir))
    files = {top: files_in(top) for top in set(tops.values())}
    found = {top: captions_in(files[top]) for top in files}
    # Both splits number the same classes, though one of them may have no picture of some.
    classes = sorted({kind for _, class_of, _ in found.values() for kind in class_of.values()})
    top, files, (captions, class_of, empty) = tops[split], files[tops[split]], found[tops[split]]
    # In order of their hashes: if sorted, the first pictures would all be of one class.
    hashed = lambda name: hashlib.md5(os.fsencode(name)).digest()
    names, broken = sorted(files.keys() & captions.keys(), key=hashed), 0
    if len(found) == 1:
        sound, at_32 = read_images(files, names, 32, "folder, to split it")
        broken = len(names) - len(sound)
        names = [name for name, held in zip(sound, held_out(at_32)) if held == (split != "train")]
    chosen = subset(names, limit, seed)
    names, images = read_images(files, chosen, size, f"folder {split}")
    how = "metadata.jsonl" if "metadata.jsonl" in files else f"{len(classes)} classes"
    report(f"folder {split}, {how}", top, files, captions, len(names),
           {"broken": broken + len(chosen) - len(names), "empty captions": empty})
    labels = {"class": torch.tensor([classes.index(class_of[k]) for k in names])} \
        if class_of else {}
    sided = any(re.search(r"\b(left|right)\b", text, re.I)
                for texts in captions.values() for text in texts)
    return Dataset(images, [captions[name] for name in names], labels, classes, flips=not sided)


def halves(root):
    """{split: its folder}: train/, and validation/, val/ or test/; or root for both, if one of the
    two is missing, or if root has a metadata.jsonl."""
    held = [root / name for name in ("validation", "val", "test") if (root / name).is_dir()]
    if held and (root / "train").is_dir() and not (root / "metadata.jsonl").exists():
        return {"train": root / "train", "validation": held[0]}
    return {"train": root, "validation": root}


def captions_in(files):
    """A folder's files → {name: [caption, ...]}, {name: class}, and how many captions are empty.

    Without a metadata.jsonl, the sub-folders are the classes; with it, there are none.
    """
    if "metadata.jsonl" in files:
        captions, empty = gather(read_metadata(files["metadata.jsonl"]))
        return captions, {}, empty
    class_of = {name: clean(name.split("/")[0].replace("_", " ")) for name in files
                if name.count("/") == 1 and is_picture(name)}
    return {name: class_captions(kind) for name, kind in class_of.items()}, class_of, 0


def read_metadata(file):
    """Yield the (picture's name, caption) pairs of a metadata.jsonl; a caption may be None."""
    for number, content in enumerate(file.read_bytes().splitlines(), 1):
        if not content.strip():
            continue
        row = parse_json(content, f"{file}, line {number}")
        try:
            name, texts = nfc(Path(row["file_name"]).as_posix()), row["text"]
        except (KeyError, TypeError):
            raise ValueError(f"{file}, line {number}: write it as "
                             '{"file_name": "a.jpg", "text": "a caption"}') from None
        for text in texts if isinstance(texts, list) and texts else [texts]:
            yield name, text


def held_out(images):
    """Which of N pictures are for validation? About one in twenty, and at least one.

    A hash of its pixels decides, so a picture stays in its split if it is renamed, or if the folder
    grows. If no hash is small enough, the picture with the smallest is taken; a new one may take
    its place.
    """
    hashes = [hashlib.md5(image.numpy().tobytes()).hexdigest() for image in images]
    bound = max("0ccc", min(hashes, default=""))    # 0x0ccc is a twentieth of 0xffff
    return [digest <= bound for digest in hashes]


# Of each name: what loads it. It stands here, because the functions must be there first.
DATASETS = {"shapes": shapes, "signs": signs, "cifar10": cifar10, "coco": coco, "folder": folder}
