"""The data sets: shapes, CIFAR-10, COCO, a folder, single pictures; and what may be wrong there."""
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data
import shapes


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


def picture(path, size=(40, 30), colour=(200, 30, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize("wrong, words", [
    (dict(name="dogs"), "'dogs'.*shapes"), (dict(split="test"), "'test'.*validation"),
    (dict(size=4), "4 pixels"), (dict(limit=0), "limit of 0"), (dict(limit=10 ** 12), "72,000 GB")])
def test_a_wrong_argument_is_named_with_its_value_and_a_remedy(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        data.load(**{**dict(name="shapes", split="train"), **wrong})
    assert "\n" not in str(error.value) and "choose" in str(error.value)


# ---- Rendered shapes and the cache --------------------------------------------------------------


def same(a, b):
    return torch.equal(a.images, b.images) and a.captions == b.captions and all(
        torch.equal(a.labels[key], b.labels[key]) for key in a.labels)


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
    data.load("shapes", "train", limit=2, seed=1), data.load("shapes", "train", limit=2, size=8)
    assert len(drawn) == 4    # another seed, another size: other files
    data.load("shapes", "train", limit=1, seed=2, cache=False)
    assert len(list(cache.iterdir())) == 5    # without a cache nothing is written


def test_a_cache_file_that_is_damaged_or_holds_another_thing_is_made_anew(cache):
    root = write_coco(cache.parent / "coco", 2)
    for load in (lambda: data.load("shapes", "train", limit=1),
                 lambda: data.load("coco", "train", data_dir=root)):
        first = load()
        file, = cache.iterdir()
        whole = file.read_bytes()
        for content in (b"", b"damaged", whole[:len(whole) // 2], [1, 2], {"images": 5},
                        {"images": torch.zeros(2, 3, 32, 32)},
                        {"images": torch.zeros(2, 3, 16, 16).byte()},
                        {"images": torch.zeros(1, 3, 32, 32).byte(), "sound": torch.ones(1) > 0}):
            file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
            assert same(load(), first) and list(cache.iterdir()) == [file]
        file.unlink()


@pytest.mark.parametrize("fault", ["a file in the way", "a full disk", "no home"])
def test_a_cache_that_cannot_be_written_is_told_once_and_the_run_goes_on(
        tmp_path, monkeypatch, capfd, fault):
    def fail(*arguments):
        raise RuntimeError(fault)
    monkeypatch.setattr(data, "BLOCK", 1)
    if fault == "a full disk":
        monkeypatch.setattr(torch, "save", fail)
    elif fault == "no home":
        monkeypatch.delenv("UNCLIP_CACHE")
        monkeypatch.setattr(data.Path, "home", fail)
    else:
        (tmp_path / "cache").write_text("not a folder")
    assert len(data.load("shapes", "train", limit=3)) == 3
    told = [line for line in capfd.readouterr().err.splitlines() if "UNCLIP_CACHE" in line]
    assert len(told) == 1 and (fault == "no home" or str(tmp_path / "cache") in told[0])


# ---- CIFAR-10 -----------------------------------------------------------------------------------

BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def batch(i, n=20):
    pixels = np.random.default_rng(i).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": [k % 10 for k in range(n)],
            b"batch_label": b"a batch" if i else b""}        # pickle writes b"" in another way


def archive(change=None):
    """A small archive, as bytes, in which `change` {name: bytes or None} replaces some files."""
    files = {name: pickle.dumps(batch(i), protocol=2) for i, name in enumerate(BATCHES)}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for name, content in {**files, **(change or {})}.items():
            if content is not None:
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def cifar_file(tmp_path, change=None):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(archive(change))
    return path


def test_cifar_is_read_from_its_archive_its_folder_and_unpacked(tmp_path):
    path = cifar_file(tmp_path)
    unpacked = tmp_path / "elsewhere" / "cifar-10-batches-py"
    unpacked.mkdir(parents=True)
    for i, name in enumerate(BATCHES):
        (unpacked / name).write_bytes(pickle.dumps(batch(i), protocol=2))
    for where in (path, tmp_path, unpacked, str(unpacked.parent)):
        train, held = (data.load("cifar10", split, data_dir=where) for split in data.SPLITS)
        assert train.images.shape == (100, 3, 32, 32) and train.images.dtype == torch.uint8
        assert np.array_equal(train.images[:20].view(20, -1), batch(0)[b"data"])
        assert np.array_equal(held.images.view(20, -1), batch(5)[b"data"])
        assert train.labels["class"].bincount().tolist() == [10] * 10 and train.flips
        assert held.classes[6] == "frog" and {"a photo of a frog", "a frog"} <= {*held.captions[6]}


def test_what_python_2_pickled_is_read():
    # As in the official files: numpy's module under its old name, byte strings as strings.
    content = (b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
               b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86"
               b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
               b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
               + bytes(range(256)) * 12 + b"tbU\x06labelsq\x08]q\x09K\x07au.")
    pixels, labels = data.unpickle(content)
    assert labels.tolist() == [7] and pixels.flatten()[:256].tolist() == list(range(256))


def test_a_limit_and_a_size_of_cifar_keep_pictures_and_captions_together(tmp_path):
    path = cifar_file(tmp_path)
    whole = data.load("cifar10", "train", data_dir=path)
    one, same, other = (data.load("cifar10", "train", limit=30, size=16, data_dir=path, seed=seed)
                        for seed in (1, 1, 2))
    assert torch.equal(one.images, same.images) and not torch.equal(one.images, other.images)
    means = torch.nn.functional.avg_pool2d(whole.images.float(), 2)
    for image, captions, k in zip(one.images, one.captions, one.labels["class"], strict=True):
        i = (means - image).abs().flatten(1).amax(1).argmin()
        assert (means[i] - image).abs().max() <= 1 and whole.labels["class"][i] == k
        assert captions == whole.captions[i] and captions[-1].endswith(one.classes[k])


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_here",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = cifar_file(tmp_path, {"data_batch_3": pickle.dumps(Evil())})
    refused(lambda: data.load("cifar10", "train", data_dir=path), path, "refused to load", "system")
    assert not (tmp_path / "was_here").exists()
    for name in ("eval", "getattr", "__import__"):
        with pytest.raises(pickle.UnpicklingError):
            data.unpickle(b"cbuiltins\n" + name.encode() + b"\n.")


@pytest.mark.parametrize("content", [
    None, b"", b"no pickle", pickle.dumps(batch(0))[:-500], [1, 2], {}, batch(0, n=0),
    {**batch(0), b"labels": [1] * 19}, {**batch(0), b"labels": [10] * 20},
    {**batch(0), b"data": np.zeros((20, 3072))}])
def test_a_wrong_batch_or_archive_of_cifar_is_refused(tmp_path, content):
    pickled = pickle.dumps(content) if isinstance(content, (dict, list)) else content
    path = cifar_file(tmp_path, {"test_batch": pickled})
    refused(lambda: data.load("cifar10", "validation", data_dir=path), path, "--data-dir")
    path.write_bytes(pickled or archive()[:2000])
    refused(lambda: data.load("cifar10", "validation", data_dir=path), path, "--data-dir")
    path.unlink()
    refused(lambda: data.load("cifar10", "validation", data_dir=tmp_path), "test_batch")


def test_cifar_is_downloaded_once_and_a_broken_download_leaves_nothing_behind(
        tmp_path, monkeypatch, cache):
    there, good = tmp_path / "there.tar.gz", archive()
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


def write_coco(root, n=6, change=None):
    """n plain pictures of n shades with two captions each; `change` edits the annotations."""
    for part in ("train2017", "val2017"):
        table = {"images": [], "annotations": []}
        for i in range(n):
            name = f"{i:012d}.jpg"
            if not (root / part / name).exists():
                picture(root / part / name, (60 + i, 50), (20 * i, 100, 100))
            table["images"].append({"id": i, "file_name": name})
            table["annotations"] += [{"image_id": i, "caption": f" Thing {i},\n no. {j} "}
                                     for j in range(2)]
        if change:
            change(table)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(table))
    return root


def test_coco_gives_pictures_with_all_their_captions_or_as_many_as_the_limit(tmp_path, capsys):
    root, drawn = write_coco(tmp_path / "coco", 12), []
    for split, limit, seed in (("train", 12, 0), ("validation", 5, 0), ("train", 5, 1)):
        coco = data.load("coco", split, size=16, data_dir=root, limit=limit, seed=seed)
        assert coco.images.shape == (limit, 3, 16, 16) and coco.images.dtype == torch.uint8
        numbers = [round(image[0].float().mean().item() / 20) for image in coco.images]
        assert coco.captions == [[f"Thing {i}, no. 0", f"Thing {i}, no. 1"] for i in numbers]
        assert numbers == sorted(numbers) and coco.flips
        assert f"coco {split}: {limit} images\n" in capsys.readouterr().err
        drawn.append(numbers)
    assert drawn[1] != drawn[2]


def test_a_second_start_decodes_nothing_and_a_changed_picture_is_noticed(tmp_path, monkeypatch):
    root = write_coco(tmp_path / "coco")
    first = data.load("coco", "train", size=16, data_dir=root)
    with monkeypatch.context() as patch:
        patch.delattr(data, "upright")
        assert same(data.load("coco", "train", size=16, data_dir=root), first)
    picture(root / "train2017" / "000000000002.jpg", colour=(255, 255, 255))
    assert data.load("coco", "train", size=16, data_dir=root).images[2].min() > 250


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


def write_metadata(root, n=40, more=b""):
    rows = []
    for i in range(n):
        picture(root / f"{i}.png", colour=(5 * i, 0, 0))
        rows.append(json.dumps({"file_name": f"{i}.png",
                                "text": f"thing {i}" if i % 2 else [f"thing {i}", f"ding {i}"]}))
    (root / "metadata.jsonl").write_bytes("\n".join(rows).encode() + b"\n" + more)
    return root


def both(root, **options):
    return [data.load("folder", split, size=16, data_dir=root, **options) for split in data.SPLITS]


def test_metadata_gives_captions_and_a_split_that_no_seed_and_no_size_changes(tmp_path, capsys):
    root = write_metadata(tmp_path / "mine")
    for options in ({}, {"seed": 1}, {"cache": False}):
        sets = both(root, **options)
        assert "metadata.jsonl: " in capsys.readouterr().err
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


def test_class_folders_give_captions_and_labels(tmp_path, capsys):
    root = tmp_path / "mine"
    for i in range(20):
        picture(root / "old_owl" / f"{i}.jpg", colour=(5 * i, 0, 250))
        picture(root / "zebra" / f"{i}.JPG", colour=(5 * i, 250, 0))
    for other in ("loose.png", "owl/young/0.png", ".thumbnails/0.png", "zebra/._0.jpg"):
        picture(root / other)    # of these four the first two are counted
    (root / "zebra" / "notes.txt").write_text("no picture")
    sets = both(root)
    assert "2 classes: " in (said := capsys.readouterr().err)
    assert said.count("(left out: 2 without captions)") == 2 and sum(map(len, sets)) == 40
    for mine in sets:
        assert mine.classes == ["old owl", "zebra"] and mine.flips
        for image, captions, k in zip(mine.images, mine.captions, mine.labels["class"]):
            assert captions[0] == f"a photo of {['an old owl', 'a zebra'][k]}"
            assert image[2 - k].float().mean() > 200


def test_folders_for_train_and_validation_are_used_as_they_are(tmp_path):
    for name, n in (("train/owl", 5), ("train/ant", 1), ("val/owl", 3)):
        for i in range(n):
            picture(tmp_path / name / f"{i}.jpg")
    train, validation = both(tmp_path)
    assert len(train) == 6 and validation.labels["class"].tolist() == [1, 1, 1]
    assert train.classes == validation.classes == ["ant", "owl"]


def test_decomposed_letters_are_the_same_as_composed_ones(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    root = write_metadata(tmp_path / "mine", 30, json.dumps(
        {"file_name": f"{composed}.png", "text": f"a {decomposed}"}).encode())
    picture(root / f"{decomposed}.png", colour=(0, 0, 99))
    sets = both(root)
    assert [f"a {composed}"] in sets[0].captions + sets[1].captions
    for i in range(30):
        picture(tmp_path / "classes" / decomposed / f"{i}.png", colour=(i, 0, 0))
    mine = both(tmp_path / "classes")[0]
    assert mine.classes == [composed] and mine.captions[0][-1] == f"a {composed}"
    assert data.class_captions("owl")[-1] == "an owl"


def test_a_null_caption_and_a_missing_or_broken_picture_are_counted(tmp_path, capsys):
    more = {"0.png": None, "gone.png": "gone", "1.png": ["\ud800 left", None, ""], "x.png": [],
            "../other.png": "outside", "a\0b": "odd"}
    root = write_metadata(tmp_path / "mine", 30, "\n\n".join(
        json.dumps({"file_name": name, "text": text}) for name, text in more.items()).encode())
    picture(tmp_path / "other.png")
    picture(root / "x.png")
    (root / "2.png").write_bytes(b"no picture")
    sets = both(root)
    assert sum(map(len, sets)) == 29
    assert ["thing 1", "? left"] in sets[0].captions + sets[1].captions
    assert not sets[0].flips and not sets[1].flips    # left would become right
    assert capsys.readouterr().err.count(
        "(left out: 1 without captions, 3 missing, 1 broken, 4 empty captions)") == 2


@pytest.mark.parametrize("content, words", [
    (b"", "not JSON"), (b"[" * 100_000, "not JSON"), (b'{"images":\n\n [}', "line 3"),
    (b'{"images": [],\n "annot\xff": []}', "not JSON in UTF-8"), (b"[]", "not like COCO's"),
    (b'{"images": [{"id": 1}]}', "'file_name'"),
    (b'{"images": [{"id": 1, "file_name": 3}]}', "not like COCO's"),
    (b'{"images": [], "annotations": [{"image_id": []}]}', "not like COCO's"),
    (b'{"images": [], "annotations": []}', "0 images")])
def test_faults_of_cocos_captions_end_in_one_line(tmp_path, content, words):
    file = write_coco(tmp_path, 1) / "annotations" / "captions_train2017.json"
    file.write_bytes(content)
    refused(lambda: data.load("coco", "train", size=16, data_dir=tmp_path), "train2017", words)


@pytest.mark.parametrize("line, words", [
    (b"{broken", "line 3 is not JSON"), (b"[" * 100_000, "line 3 is not JSON"),
    (b'{"text": "\xe9"}', "line 3 is not JSON in UTF-8"), (b"[]", "line 3: write it"),
    (b'{"file_name": "a.jpg"}', "line 3: write it"),
    (b'{"file_name": 5, "text": "a"}', "line 3: write it")])
def test_faults_of_a_folders_metadata_end_in_one_line(tmp_path, line, words):
    write_metadata(tmp_path, 2, line)
    refused(lambda: data.load("folder", "train", data_dir=tmp_path), "metadata.jsonl", words)


@pytest.mark.parametrize("name, where, words", [
    ("coco", None, "--data-dir"), ("folder", None, "--data-dir"),
    ("coco", "nowhere", "no such folder"), ("coco", "empty", "captions_train2017.json"),
    ("folder", "empty", "0 images"), ("folder", "one", "two or more")])
def test_a_folder_without_pictures_is_refused_in_one_line(tmp_path, name, where, words):
    (tmp_path / "empty").mkdir()
    write_metadata(tmp_path / "one", 1)
    refused(lambda: data.load(name, "train", data_dir=where and tmp_path / where), words)


# ---- Single pictures ----------------------------------------------------------------------------


def with_exif(path, *entries):
    """A picture on its side: orientation 6, and these other (tag, type, count, value)."""
    marked = Image.new("RGB", (90, 30), "white")
    marked.paste((255, 0, 0), (30, 0, 60, 15))      # red above blue in the middle third
    marked.paste((0, 0, 255), (30, 15, 60, 30))
    entries = sorted([*entries, (0x0112, 3, 1, struct.pack("<HH", 6, 0))])
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(
        struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)
    options = {"quality": 95} if path.suffix == ".jpg" else {"lossless": True}
    marked.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("odd", [
    [], [(0x011A, 2, 3, b"72\0\0")], [(0x011A, 10, 1, b"\xff\xff\xff\x7f")],
    [(0x0128, 2, 2, b"x\0\0\0")], [(0x0100, 2, 2, b"x\0\0\0")], [(0x0102, 7, 3, b"\1\2\3\0")]])
def test_odd_metadata_neither_refuse_a_picture_nor_hide_its_orientation(tmp_path, kind, odd):
    image = data.read_image(with_exif(tmp_path / f"a.{kind}", *odd), 16)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and image.is_contiguous()
    assert image[0, 2, 8] > 200 > 60 > image[2, 2, 8]      # red is above
    assert image[2, 13, 2] > 200 > 60 > image[0, 13, 2]    # blue is below


def test_a_picture_of_unreadable_orientation_lies_as_it_lies(tmp_path, monkeypatch):
    path = with_exif(tmp_path / "a.png")
    for odd in ("6", (3, 3), 77, b"\6"):
        monkeypatch.setattr(Image.Exif, "get", lambda self, tag: odd)
        image = data.read_image(path, 16)
        assert image[0, 8, 2] > 200 > image[2, 8, 2]    # red is on the left, as in the file
    monkeypatch.setattr(Image.Exif, "get", None)
    assert torch.equal(data.read_image(path, 16), image)


@pytest.mark.parametrize("mode, kind", [
    ("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"),
    ("I;16", "png"), ("I", "tif"), ("F", "tif"), ("LAB", "tif"), ("P", "gif"), ("RGB", "webp")])
def test_white_is_white_in_every_mode(tmp_path, mode, kind):
    for size in ((1, 1), (7, 300), (64, 64)):
        white = Image.new("RGB", size, "white")
        white = Image.fromarray(np.full(size[::-1], 65535, np.uint16)) if mode == "I;16" else \
            Image.new(mode, size, (255, 128, 128)) if mode == "LAB" else white.convert(mode)
        white.save(tmp_path / f"a.{kind}")
        image = data.read_image(str(tmp_path / f"a.{kind}"), 16)
        # In 32-bit pictures white is whatever is brightest, and one shade alone is neither.
        assert image.shape == (3, 16, 16) and (mode in "IF" or image.min() >= 250)


def test_sixteen_bits_keep_their_gradation_and_shrinking_is_an_area_mean(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (256, 1))).save(tmp_path / "a.png")
    means = data.read_image(tmp_path / "a.png", 16)[0].float().mean(0)
    assert torch.allclose(means, torch.arange(16) * 16 + 7.5, atol=1.5)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(data.read_image(tmp_path / "a.png", 32), image)
    mean = torch.nn.functional.avg_pool2d(image.float(), 2)
    assert (data.read_image(tmp_path / "a.png", 16) - mean).abs().max() <= 1


def test_transparency_is_white_and_an_animation_is_its_first_frame(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "keyed.png", transparency=(9, 9, 9))
    for name in ("clear.png", "keyed.png"):
        assert data.read_image(tmp_path / name, 16).min() == 255
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("lime", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert data.read_image(tmp_path / "a.gif", 16)[:, 8, 8].tolist() == [0, 255, 0]


def display_p3():
    """The profile of sRGB with the primaries of Display P3: x, y, z as numbers of 16.16 bits."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
                 b"bXYZ": (0.15710, 0.06657, 0.78407)}
    for tag, xyz in primaries.items():
        at, = struct.unpack_from(">I", profile, profile.index(tag) + 4)
        profile[at + 8:at + 20] = struct.pack(">3i", *(round(v * 65536) for v in xyz))
    return bytes(profile)


def test_colours_are_converted_from_the_pictures_profile_to_srgb(tmp_path):
    p3 = display_p3()
    for mode, profile, expected in (
            ("RGB", p3, (229, 35, 36)), ("RGBA", p3, (229, 35, 36)),
            ("RGB", None, (210, 58, 49)), ("RGB", b"broken", (210, 58, 49)),
            ("RGB", p3[:300], (210, 58, 49)), ("L", p3, (102, 102, 102))):    # no profile for grey
        picture(tmp_path / "a.png", colour=(210, 58, 49), mode=mode, icc_profile=profile)
        colour = data.read_image(tmp_path / "a.png", 16)[:, 8, 8].int()
        assert (colour - torch.tensor(expected)).abs().max() <= 2, (mode, colour)
    Image.new("RGBA", (20, 20), (210, 58, 49, 0)).save(tmp_path / "a.png", icc_profile=p3)
    assert data.read_image(tmp_path / "a.png", 16).min() == 255    # the profile spares transparency


def test_a_very_large_jpeg_is_read_through_draft_and_a_large_png_is_refused(tmp_path, monkeypatch):
    for module, name in (data, "MAX_PIXELS"), (Image, "MAX_IMAGE_PIXELS"):
        monkeypatch.setattr(module, name, 90_000)    # a thousandth of what it is
    image = data.read_image(picture(tmp_path / "large.jpg", (1200, 900)), 16)
    assert (image[:, 8, 8].int() - torch.tensor([200, 30, 30])).abs().max() <= 3
    refused(lambda: data.read_image(picture(tmp_path / "a.png", (1200, 900)), 16),
            "1,200 x 900 pixels are too many")
    assert Image.MAX_IMAGE_PIXELS == 90_000    # Pillow's own bound is as it was


def test_what_is_not_a_picture_is_refused_in_one_line(tmp_path, recwarn):
    good = picture(tmp_path / "good.jpg", (300, 300))
    files = {"empty.png": b"", "text.png": b"no picture", "cut.jpg": good.read_bytes()[:900],
             "head.png": b"\x89PNG\r\n\x1a\n", "zeros.gif": b"GIF89a" + bytes(40)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused(lambda: data.read_image(tmp_path / name, 16), tmp_path / name, "can't be read")
    refused(lambda: data.read_image(tmp_path / "empty.png", 16), "it is empty")
    refused(lambda: data.read_image(tmp_path, 16), tmp_path, "not a file")
    refused(lambda: data.read_image(tmp_path / "gone.png", 16), "gone.png", "does not exist")
    assert not recwarn.list
