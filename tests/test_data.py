"""The data sets: shapes, CIFAR-10, COCO, a folder, single pictures; and what may be wrong there."""
import hashlib
import json
import os
import pickle
import random
import shutil
import tarfile
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data
import shapes
from conftest import (Surprise, batch, picture, raising, same_bits, write_cifar, write_coco,
                      write_metadata)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    data.note.cache_clear()
    return tmp_path / "cache"


def refused(call, *words):
    """The call ends in one line for the user, and these words are in it."""
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(str(word) in line for word in words), line


def test_a_wrong_argument_is_named_with_its_value_and_a_remedy():
    refused(lambda: data.load("dogs", "train"), "'dogs'", "choose", "shapes")
    refused(lambda: data.load("shapes", "test"), "'test'", "choose", "validation")
    refused(lambda: data.load("shapes", "train", 4), "4 pixels", "choose")
    refused(lambda: data.load("shapes", "train", limit=0), "limit of 0", "choose")
    refused(lambda: data.load("shapes", "train", limit=10 ** 12), "72,000 GB", "choose")


# ---- Rendered shapes and the cache --------------------------------------------------------------

def test_blocks_of_shapes_serve_any_limit_and_only_what_is_missing_is_rendered(cache, monkeypatch):
    (scenes, captions), drawn = zip(*(shapes.item("train", i) for i in range(11))), []
    images, position = shapes.render(scenes), shapes.labels_of(scenes)["position"]
    monkeypatch.setattr(data, "BLOCK", 4)
    monkeypatch.setattr(data, "render", lambda scenes, size: drawn.extend(scenes) or
                        shapes.render(scenes, size))
    for limit, missing in ((6, 6), (3, 0), (11, 5), (7, 0)):
        some = data.load("shapes", "train", limit=limit)
        assert len(drawn) == missing and torch.equal(some.images, images[:limit])
        assert tuple(some.captions) == captions[:limit] and not some.flips
        assert torch.equal(some.labels["position"], position[:limit])
        assert all(len(label) == limit for label in some.labels.values())
        drawn.clear()
    name = f"shapes-v{shapes.RENDERER_VERSION}-train-32px-seed0-from"
    files = [cache / f"{name}{first}.pt" for first in (0, 4, 8)]
    assert sorted(cache.iterdir()) == files
    assert all(file.stat().st_size < 30_000 for file in files)    # each holds its own block alone
    other = data.load("shapes", "validation", limit=2, seed=1)
    assert torch.equal(other.images, shapes.render(
        [shapes.item("validation", i, 1)[0] for i in range(2)]))
    data.load("shapes", "train", limit=2, size=8)
    assert len(drawn) == 4    # another split or seed, another size: other files
    assert len(list(cache.iterdir())) == 5


def test_a_cache_file_that_is_damaged_or_holds_another_thing_is_made_anew(cache):
    root = write_coco(cache.parent / "coco", 2)
    for load in (lambda: data.load("shapes", "train", limit=1),
                 lambda: data.load("signs", "train", limit=1),
                 lambda: data.load("coco", "train", data_dir=root)):
        first = load()
        file, = cache.iterdir()
        pixels, whole = first.images.numpy().tobytes()[:60], file.read_bytes()
        assert pixels in whole
        for content in (b"", whole[:2000], whole.replace(pixels, bytes(60)), [1, 2], {"images": 5},
                        {"images": torch.zeros(2, 3, 16, 16).byte()},
                        {"images": torch.zeros(1, 3, 32, 32).byte(), "sound": torch.ones(1) > 0}):
            file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
            assert same_bits(vars(load()), vars(first)) and list(cache.iterdir()) == [file]
        file.unlink()


def test_a_cache_that_cannot_be_written_is_told_once_and_the_run_goes_on(cache, monkeypatch, capfd):
    monkeypatch.setattr(data, "BLOCK", 1)
    cache.write_text("not a folder")
    assert len(data.load("shapes", "train", limit=3)) == 3
    monkeypatch.delenv("UNCLIP_CACHE")
    monkeypatch.setattr(data.Path, "home", raising(RuntimeError("no home")))
    assert len(data.load("shapes", "train", limit=3)) == 3
    told = [line for line in capfd.readouterr().err.splitlines() if "UNCLIP_CACHE" in line]
    assert len(told) == 2 and str(cache) in told[0]
    refused(lambda: data.load("cifar10", "train"), "no home", "UNCLIP_CACHE")


# ---- Signs --------------------------------------------------------------------------------------

def test_signs_say_their_word_in_dark_letters_on_a_light_board_in_any_size(cache):
    small, large = (data.load("signs", "validation", size, limit=20) for size in (32, 64))
    assert small.captions == large.captions and not small.flips
    for image, texts, letters in zip(small.images, small.captions, small.labels["letters"]):
        word = "".join(data.LETTERS[k] for k in letters)
        assert texts == [f'a sign that says "{word}"', f'a photo of a sign that says "{word}"']
        assert image.float().mean() > 140
    a, b = (data.draw_sign(word, random.Random(3), 32).int() for word in ("baba", "bami"))
    darker, columns = a.amin() < 100, (a - b).abs().amax((0, 1)).nonzero()[:, 0]
    assert darker and 7 < len(columns) <= 16 and columns[-1] - columns[0] < 16      # two letters
    halves = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    assert (halves - small.images.float()).abs().max() <= 1                  # each is rounded


def test_words_are_two_syllables_and_a_tenth_of_them_is_never_on_a_sign_of_the_data_set():
    words = {c + v + d + w for c, d in product(data.CONSONANTS, repeat=2)
             for v, w in product(data.VOWELS, repeat=2)}
    rng = random.Random(0)
    seen = {data.a_word(rng) for _ in range(20_000)}
    unseen = {data.a_word(rng, unseen=True) for _ in range(5_000)}           # next to all there are
    assert seen | unseen <= words and not seen & unseen and 0.08 < len(unseen) / len(words) < 0.12
    sets = [data.load("signs", split, size=8, limit=40, seed=seed).captions
            for split, seed in (("train", 0), ("validation", 0), ("train", 1))]
    assert not {text[-1][-5:-1] for texts in sets for text in texts} & unseen
    assert sets[0] != sets[1] and sets[0] != sets[2]


# ---- CIFAR-10 -----------------------------------------------------------------------------------

def archive(folder):
    """The archive of a folder, beside it."""
    path = folder.parent / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    return path


def test_cifar_is_read_from_its_archive_its_folder_and_unpacked(tmp_path):
    path, unpacked = archive(write_cifar(tmp_path / "a")), write_cifar(tmp_path / "b")
    shutil.rmtree(tmp_path / "a" / "cifar-10-batches-py")
    for where in (path, path.parent, unpacked, str(unpacked.parent)):
        train, held = (data.load("cifar10", split, data_dir=where) for split in data.SPLITS)
        assert train.images.shape == (100, 3, 32, 32) and train.images.dtype == torch.uint8
        assert np.array_equal(train.images[:20].view(20, -1), batch(0)[b"data"])
        assert np.array_equal(held.images.view(20, -1), batch(5)[b"data"])
        assert train.labels["class"].bincount().tolist() == [10] * 10 and train.flips
        assert held.classes[6] == "frog" and {"a photo of a frog", "a frog"} <= {*held.captions[6]}
    some = data.load("cifar10", "train", size=16, limit=30, data_dir=path)
    means = torch.nn.functional.avg_pool2d(train.images.float(), 2)
    i = (some.images[:, None] - means).abs().flatten(2).amax(2).argmin(1)    # which ones they are
    assert (some.images - means[i]).abs().max() <= 1 and len(i.unique()) == 30
    assert some.captions == [train.captions[k] for k in i]
    assert torch.equal(some.labels["class"], train.labels["class"][i])


def test_what_python_2_pickled_is_read():
    # As in the official files: numpy's module under its old name, byte strings as strings.
    content = (b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
               b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86"
               b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
               b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
               + bytes(range(256)) * 12 + b"tbU\x06labelsq\x08]q\x09K\x07au.")
    pixels, labels = data.unpickle(content)
    assert labels.tolist() == [7] and pixels.flatten()[:256].tolist() == list(range(256))


def test_an_archive_of_cifar_that_lacks_a_batch_or_is_cut_short_is_refused(tmp_path):
    (write_cifar(tmp_path) / "test_batch").unlink()
    path = archive(tmp_path / "cifar-10-batches-py")
    for content in (path.read_bytes(), path.read_bytes()[:2000]):
        path.write_bytes(content)
        refused(lambda: data.load("cifar10", "validation", data_dir=path), path, "--data-dir")


def test_cifar_is_downloaded_once_and_a_broken_download_leaves_nothing_behind(
        tmp_path, monkeypatch, cache):
    there = archive(write_cifar(tmp_path))
    good = there.read_bytes()
    there.unlink()
    monkeypatch.setattr(data, "CIFAR_URL", there.as_uri())
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(good).hexdigest())
    refused(lambda: data.load("cifar10", "train"), data.CIFAR_URL, "--data-dir")
    for bad in (good[:-1] + b"?", good[:len(good) // 2]):
        there.write_bytes(bad)
        refused(lambda: data.load("cifar10", "train"), data.CIFAR_URL, "MD5", "--data-dir")
    assert os.listdir(cache) == []
    there.write_bytes(good)
    assert len(data.load("cifar10", "train")) == 100
    there.unlink()
    assert len(data.load("cifar10", "validation")) == 20
    assert os.listdir(cache) == ["cifar-10-python.tar.gz"]


# ---- COCO ---------------------------------------------------------------------------------------

def test_coco_gives_pictures_with_all_their_captions_or_as_many_as_the_limit(tmp_path, capsys):
    root, drawn = write_coco(tmp_path / "coco", 12), []
    for split, limit, seed in (("train", 12, 0), ("validation", 5, 0), ("train", 5, 1)):
        coco = data.load("coco", split, size=16, data_dir=root, limit=limit, seed=seed)
        assert coco.images.shape == (limit, 3, 16, 16) and coco.images.dtype == torch.uint8
        drawn.append([round(image[0].float().mean().item() / 20) for image in coco.images])
        assert coco.captions == [[f"Thing {i}, no. 0", f"Thing {i}, no. 1"] for i in drawn[-1]]
        assert drawn[-1] == sorted(drawn[-1]) and drawn[-1] not in drawn[:-1] and coco.flips
        assert (coco.images[:, 2].float().mean() > 150) == (split == "validation")
        assert f"coco {split}: {limit} images\n" in capsys.readouterr().err


def test_a_second_start_decodes_nothing_and_a_changed_picture_is_noticed(tmp_path, monkeypatch):
    root = write_coco(tmp_path / "coco")
    load = lambda: data.load("coco", "train", size=16, data_dir=root)
    first = load()
    with monkeypatch.context() as patch:
        patch.delattr(data, "upright")
        assert same_bits(vars(load()), vars(first))
    picture(root / "train2017" / "000000000002.jpg", colour=(255, 255, 255))
    assert load().images[2].min() > 250


def test_what_is_wrong_with_single_pictures_and_captions_of_coco_is_counted_in_one_line(
        tmp_path, capsys):
    def change(table):
        table["annotations"] += [{"image_id": 0, "caption": None}, {"image_id": 1, "caption": " "},
                                 {"image_id": 99, "caption": "a picture that is not listed"},
                                 {"image_id": 98, "caption": "another one"}]
        table["annotations"] = [note for note in table["annotations"] if note["image_id"] != 4]
        table["images"][5]["file_name"] = "../val2017/000000000005.jpg"    # leads out of the folder
    root = write_coco(tmp_path / "coco", n=8, change=change)
    folder = root / "train2017"
    (folder / "000000000002.jpg").write_bytes((folder / "000000000003.jpg").read_bytes()[:300])
    (folder / "000000000003.jpg").unlink()
    coco = data.load("coco", "train", size=16, data_dir=root)
    assert [texts[0] for texts in coco.captions] == [f"Thing {i}, no. 0" for i in (0, 1, 6, 7)]
    assert all(len(texts) == 2 for texts in coco.captions)
    said, = [line for line in capsys.readouterr().err.split("\n") if "images" in line]
    assert said == ("coco train: 4 images (left out: 2 without captions, 4 missing, 1 broken, "
                    "2 empty captions)")


# ---- A folder of one's own ----------------------------------------------------------------------

def both(root, **options):
    return [data.load("folder", split, size=16, data_dir=root, **options) for split in data.SPLITS]


def test_metadata_gives_captions_and_a_split_that_no_seed_and_no_size_changes(tmp_path):
    root = write_metadata(tmp_path / "mine")
    for options in ({}, {"seed": 1}):
        sets = both(root, **options)
        numbers = [[int(texts[0].split()[1]) for texts in mine.captions] for mine in sets]
        assert sorted(sum(numbers, [])) == list(range(40)) and 1 <= len(sets[1]) <= 8
        for mine, drawn in zip(sets, numbers):
            assert [5 * i for i in drawn] == mine.images[:, 0, 3, 3].tolist()
            assert all(len(texts) == 2 - i % 2 for i, texts in zip(drawn, mine.captions))
            assert mine.flips and mine.labels == {} and mine.classes == []
    fine = data.load("folder", "validation", size=64, data_dir=root)
    assert fine.captions == sets[1].captions and fine.images.shape[2:] == (64, 64)


def test_a_picture_keeps_its_side_under_any_name_and_when_the_folder_grows(tmp_path):
    def sides(n):
        for i in range(n):
            for name in (f"{i}.png", f"again-{n - i}-{i}.png"):
                picture(tmp_path / "owl" / name, (20, 20), colour=(i, 2 * i, 255 - i))
        return [{tuple(image[:, 8, 8].tolist()) for image in half.images}
                for half in both(tmp_path)]
    train, validation = sides(30)
    assert not train & validation and len(train | validation) == 30 and validation
    more_train, more_validation = sides(60)
    assert not more_train & more_validation and len(more_train | more_validation) == 60
    assert train <= more_train and validation <= more_validation
    images = torch.randint(256, (2000, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    assert 70 < sum(data.held_out(images)) < 130              # one in twenty, and one at least
    assert data.held_out(images[:1]) == [True] and data.held_out(images[:0]) == []


def test_class_folders_give_captions_and_labels_and_folders_of_splits_stay_apart(tmp_path, capsys):
    root = tmp_path / "mine"
    for i in range(20):
        picture(root / "old_owl" / f"{i}.jpg", colour=(5 * i, 0, 250))
        picture(root / "zebra" / f"{i}.JPG", colour=(5 * i, 250, 0))
    for other in ("loose.png", "owl/young/0.png", ".thumbnails/0.png", "zebra/._0.jpg"):
        picture(root / other)    # of these four the first two are counted
    (root / "zebra" / "notes.txt").write_text("no picture")
    sets = both(root)
    assert "2 classes: " in (said := capsys.readouterr().err)
    assert said.count("(left out: 2 without captions, 1 of another kind)") == 2
    assert sum(map(len, sets)) == 40
    first = sets[0].labels["class"][:20]    # in order of names, they would all be owls
    assert 4 <= first.sum() <= 16
    for mine in sets:
        assert mine.classes == ["old owl", "zebra"] and mine.flips
        for image, captions, k in zip(mine.images, mine.captions, mine.labels["class"]):
            assert captions[0] == f"a photo of {['an old owl', 'a zebra'][k]}"
            assert image[2 - k].float().mean() > 200
    for name, n in (("train/owl", 5), ("train/ant", 1), ("validation/owl", 3)):
        for i in range(n):
            picture(tmp_path / "split" / name / f"{i}.jpg")
    train, validation = both(tmp_path / "split")
    assert len(train) == 6 and validation.labels["class"].tolist() == [1, 1, 1]
    assert train.classes == validation.classes == ["ant", "owl"]


def test_decomposed_letters_are_the_same_as_composed_ones(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = write_metadata(tmp_path / "mine", 30, json.dumps(
        {"file_name": f"{composed}.png", "text": f"a {decomposed}"}).encode())
    picture(root / f"{decomposed}.png", colour=(0, 0, 99))
    picture(tmp_path / "classes" / decomposed / "0.png")
    assert [f"a {composed}"] in sum((mine.captions for mine in both(root)), [])
    mine = data.load("folder", "validation", data_dir=tmp_path / "classes")
    assert mine.classes == [composed] and mine.captions[0][-1] == f"a {composed}"


def test_a_null_caption_and_an_odd_name_are_counted_and_what_says_left_is_not_mirrored(
        tmp_path, capsys):
    more = {"0.png": None, "1.png": ["\ud800 left", None, ""], "x.png": [], "../x.png": "outside",
            "a\0b": "odd"}
    sets = both(write_metadata(tmp_path / "mine", 30, "\n\n".join(
        json.dumps({"file_name": name, "text": text}) for name, text in more.items()).encode()))
    assert sum(map(len, sets)) == 30 and not sets[0].flips and not sets[1].flips
    assert ["thing 1", "? left"] in sets[0].captions + sets[1].captions
    assert capsys.readouterr().err.count("(left out: 2 missing, 4 empty captions)") == 2


# ---- Single pictures ----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_picture_is_upright_unless_its_orientation_is_unreadable(tmp_path, monkeypatch, kind):
    marked, exif = Image.new("RGB", (90, 30), "white"), Image.Exif()
    marked.paste((255, 0, 0), (30, 0, 60, 15))      # red above blue in the middle third
    marked.paste((0, 0, 255), (30, 15, 60, 30))
    exif[0x0112] = 6
    marked.transpose(Image.Transpose.ROTATE_90).save(path := tmp_path / f"a.{kind}", exif=exif,
                                                     quality=95)
    image = data.read_image(path, 16)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and image.is_contiguous()
    assert image[0, 2, 8] > 200 > 60 > image[2, 2, 8]      # red is above
    assert image[2, 13, 2] > 200 > 60 > image[0, 13, 2]    # blue is below
    monkeypatch.setattr(Image.Exif, "get", None)           # Pillow fails on broken metadata
    image = data.read_image(path, 16)
    assert image[0, 8, 2] > 200 > 60 > image[2, 8, 2]      # red is on the left, as in the file


def test_postscript_under_the_name_of_a_picture_is_refused_and_starts_no_program(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "gs").write_text(f"#!/bin/sh\n: > {tmp_path}/was_here\n")
    (tmp_path / "gs").chmod(0o755)
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n\n%%EOF\n")
    refused(lambda: data.read_image("a.png", 16), "a.png")
    assert not (tmp_path / "was_here").exists()


@pytest.mark.parametrize("mode, kind", [
    ("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png")])
def test_a_white_picture_is_read_as_white_in_every_mode(tmp_path, mode, kind):
    for size in ((1, 1), (7, 300), (64, 64)):
        Image.new("RGB", size, "white").convert(mode).save(tmp_path / f"a.{kind}")
        image = data.read_image(str(tmp_path / f"a.{kind}"), 16)
        assert image.shape == (3, 16, 16) and image.min() >= 250


def test_sixteen_bits_keep_their_gradation_and_no_pixel_changes_at_its_own_size(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (256, 1))).save(tmp_path / "a.png")
    means = data.read_image(tmp_path / "a.png", 16)[0].float().mean(0)
    assert torch.allclose(means, torch.arange(16) * 16 + 7.5, atol=1.5)
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(tmp_path / "a.tif")
    refused(lambda: data.read_image(tmp_path / "a.tif", 16), "no finite numbers")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(data.read_image(tmp_path / "a.png", 32), image)


def test_transparency_is_white_and_an_animation_is_its_first_frame(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "keyed.png", transparency=(9, 9, 9))
    for name in ("clear.png", "keyed.png"):
        assert data.read_image(tmp_path / name, 16).min() == 255
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("lime", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert data.read_image(tmp_path / "a.gif", 16)[:, 8, 8].tolist() == [0, 255, 0]


def test_colours_are_converted_from_the_pictures_profile_to_srgb(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for a, b in ((b"rXYZ", b"?"), (b"gXYZ", b"rXYZ"), (b"?", b"gXYZ")):    # red and green change
        profile = profile.replace(a, b, 1)                                 # places in its table
    for mode, given, expected in (
            ("RGB", profile, (58, 210, 49)), ("RGBA", profile, (58, 210, 49)),
            ("RGB", None, (210, 58, 49)), ("RGB", b"broken", (210, 58, 49)),
            ("L", profile, (102, 102, 102))):                              # it is none for grey
        picture(tmp_path / "a.png", colour=(210, 58, 49), mode=mode, icc_profile=given)
        colour = data.read_image(tmp_path / "a.png", 16)[:, 8, 8].int()
        assert (colour - torch.tensor(expected)).abs().max() <= 2, (mode, colour)
    Image.new("RGBA", (20, 20), (210, 58, 49, 0)).save(tmp_path / "a.png", icc_profile=profile)
    assert data.read_image(tmp_path / "a.png", 16).min() == 255    # the profile spares transparency


def test_a_very_large_jpeg_is_read_through_draft_and_a_large_png_is_refused(tmp_path, monkeypatch):
    for module, name in (data, "MAX_PIXELS"), (Image, "MAX_IMAGE_PIXELS"):
        monkeypatch.setattr(module, name, 90_000)    # a thousandth of what it is
    image = data.read_image(picture(tmp_path / "large.jpg", (1200, 900)), 16)
    assert (image[:, 8, 8].int() - torch.tensor([200, 30, 30])).abs().max() <= 3
    refused(lambda: data.read_image(picture(tmp_path / "a.png", (1200, 900)), 16),
            "1,200 x 900 pixels are too many")
    assert Image.MAX_IMAGE_PIXELS == 90_000    # Pillow's own bound is as it was


# ---- Damaged files ------------------------------------------------------------------------------

def test_a_picture_at_which_the_system_failed_is_there_again_the_next_time(cache, monkeypatch):
    root = write_metadata(cache.parent / "mine", 30)
    with monkeypatch.context() as patch:
        read = data.upright
        patch.setattr(data, "upright", lambda path, size: raising(OSError(24, "too many files"))()
                      if path.stem == "7" else read(path, size))
        assert sum(map(len, both(root))) == 29
    assert sum(map(len, both(root))) == 30


NOT_JSON = [b"", b"{broken", b"[" * 100_000, b'{"text": "\xe9"}', b"[]"]
BATCHES_WRONG = [b"", b"no pickle", *map(pickle.dumps, (
    [1, 2], {}, Surprise(), batch(0, 0), {**batch(0, 4), b"labels": [1] * 3},
    {**batch(0, 4), b"labels": [10] * 4}, {**batch(0, 4), b"data": np.zeros((4, 3072))})),
    *(b"cbuiltins\n" + name + b"\n." for name in (b"eval", b"getattr", b"__import__"))]


@pytest.mark.parametrize("name, write, file, contents, word", [
    ("folder", write_metadata, "metadata.jsonl",
     [*NOT_JSON[1:], b'{"file_name": "a.jpg"}', b'{"file_name": 5, "text": "a"}'], "line 1"),
    ("coco", write_coco, "annotations/captions_train2017.json",
     [*NOT_JSON, b'{"images": [{"id": 1}]}', b'{"images": [{"id": 1, "file_name": 3}]}',
      b'{"images": [], "annotations": [{"image_id": []}]}'], "captions_train2017.json"),
    ("cifar10", write_cifar, "cifar-10-batches-py/data_batch_3", BATCHES_WRONG, "--data-dir")])
def test_a_damaged_file_of_a_data_set_is_refused(tmp_path, name, write, file, contents, word):
    write(tmp_path, 4)
    for content in contents:
        (tmp_path / file).write_bytes(content)
        refused(lambda: data.load(name, "train", 32, data_dir=tmp_path), word)
