"""Real images: CIFAR-10, COCO, a folder of one's own, single files; and all that can be wrong.

Everything is written by the tests; downloads come from a server on this machine.
"""
import hashlib
import http.server
import io
import json
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(call, *words):
    """The call ends in one line for the user, and the line has these words in it."""
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line, line
    for word in words:
        assert str(word) in line, line


def picture(path, size=(40, 30), colour=(200, 30, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


# ---- CIFAR-10 -----------------------------------------------------------------------------------

BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def batch(i, n=20):
    pixels = np.random.default_rng(i).integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": pixels, b"labels": [k % 10 for k in range(n)],
            b"batch_label": b"a batch" if i else b""}        # which is pickled in another way


def archive(change=None, inner="cifar-10-batches-py/"):
    """A small archive, as bytes, in which `change` {name: bytes or None} replaces some files."""
    files = {name: pickle.dumps(batch(i), protocol=2) for i, name in enumerate(BATCHES)}
    files.update(change or {})
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            if content is not None:
                member = tarfile.TarInfo(inner + name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def cifar_file(tmp_path, **options):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(archive(**options))
    return path


def test_cifar_is_read_from_archive_its_folder_and_unpacked(tmp_path):
    path = cifar_file(tmp_path)
    unpacked = tmp_path / "elsewhere" / "cifar-10-batches-py"
    unpacked.mkdir(parents=True)
    for i, name in enumerate(BATCHES):
        (unpacked / name).write_bytes(pickle.dumps(batch(i), protocol=2))
    for where in (path, tmp_path, unpacked, unpacked.parent):
        train = data.load("cifar10", "train", data_dir=where)
        assert train.images.shape == (100, 3, 32, 32) and train.images.dtype == torch.uint8
        assert np.array_equal(train.images[:20].view(20, -1), batch(0)[b"data"])
        assert train.labels["class"].bincount().tolist() == [10] * 10
    validation = data.load("cifar10", "validation", data_dir=str(path))
    assert np.array_equal(validation.images.view(20, -1), batch(5)[b"data"])
    assert validation.flips and len(validation.classes) == 10 and validation.classes[6] == "frog"
    assert {"a photo of a frog", "a frog"} <= set(validation.captions[6])
    assert "a photo of an airplane" in validation.captions[0]
    assert "an automobile" in validation.captions[1]


def test_what_python_2_pickled_is_read():
    # As in the official files: numpy's module under its old name, byte strings as strings.
    content = (b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
               b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86"
               b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNN"
               b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00"
               + bytes(range(256)) * 12 + b"tbU\x06labelsq\x08]q\x09K\x07au.")
    pixels, labels = data.unpickle(content)
    assert labels.tolist() == [7] and pixels.flatten()[:256].tolist() == list(range(256))


def test_a_subset_of_cifar_depends_on_the_seed_alone(tmp_path):
    path = cifar_file(tmp_path)
    one, same, other = (data.load("cifar10", "train", limit=30, data_dir=path, seed=seed)
                        for seed in (1, 1, 2))
    assert len(one) == len(one.captions) == len(one.labels["class"]) == 30
    assert torch.equal(one.images, same.images) and not torch.equal(one.images, other.images)
    for captions, k in zip(one.captions, one.labels["class"]):
        assert captions[-1].endswith(one.classes[k])


def test_cifar_at_another_size_is_the_area_mean(tmp_path):
    path = cifar_file(tmp_path)
    fine = data.load("cifar10", "validation", data_dir=path).images.float()
    coarse = data.load("cifar10", "validation", size=16, data_dir=path).images
    assert (torch.nn.functional.avg_pool2d(fine, 2) - coarse).abs().max() <= 1
    assert data.load("cifar10", "validation", size=64, data_dir=path).images.shape[2:] == (64, 64)


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_here",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = cifar_file(tmp_path, change={"data_batch_3": pickle.dumps(Evil())})
    refused(lambda: data.load("cifar10", "train", data_dir=path), path, "refused to load", "system")
    assert not (tmp_path / "was_here").exists()
    for name in ("eval", "getattr", "__import__"):
        with pytest.raises(pickle.UnpicklingError):
            data.unpickle(b"cbuiltins\n" + name.encode() + b"\n.")


@pytest.mark.parametrize("content", [
    None, b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({}), pickle.dumps(batch(0))[:-500],
    pickle.dumps({b"data": batch(0)[b"data"], b"fine_labels": [1] * 20}, 2),
    pickle.dumps({**batch(0), b"labels": [1] * 19}, 2),
    pickle.dumps({**batch(0), b"labels": [10] * 20}, 2),
    pickle.dumps({**batch(0), b"labels": ["x"] * 20}, 2),
    pickle.dumps({**batch(0), b"labels": [1.0] * 20}, 2),
    pickle.dumps({b"data": batch(0)[b"data"][:0], b"labels": []}, 2),
    pickle.dumps({**batch(0), b"data": batch(0)[b"data"].astype(float)}, 2)])
def test_a_wrong_batch_is_refused(tmp_path, content):
    path = cifar_file(tmp_path, change={"test_batch": content})
    refused(lambda: data.load("cifar10", "validation", data_dir=path), path, "--data-dir")


def test_a_wrong_archive_is_refused(tmp_path):
    good = archive()
    for content in (b"", b"hello", good[:len(good) // 2], b"\x1f\x8b" + b"\0" * 50):
        path = tmp_path / "some.tar.gz"
        path.write_bytes(content)
        refused(lambda: data.load("cifar10", "train", data_dir=path), path, "--data-dir")
    refused(lambda: data.load("cifar10", "train", data_dir=tmp_path / "nowhere"), "nowhere")
    (tmp_path / "empty").mkdir()
    refused(lambda: data.load("cifar10", "train", data_dir=tmp_path / "empty"), "data_batch_1")


@pytest.fixture
def server(monkeypatch):
    """Serves server.content; claims server.length bytes, if that is set, and counts visits."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.visits += 1
            if server.content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(server.length or len(server.content)))
            self.end_headers()
            self.wfile.write(server.content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.length, server.visits = archive(), None, 0
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "CIFAR_URL", f"http://127.0.0.1:{server.server_port}/cifar.tar.gz")
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(server.content).hexdigest())
    yield server
    server.shutdown()
    server.server_close()


def test_cifar_is_downloaded_once(server, cache):
    for split, n in (("train", 100), ("validation", 20)):
        assert len(data.load("cifar10", split)) == n
    assert server.visits == 1 and os.listdir(cache) == ["cifar-10-python.tar.gz"]


@pytest.mark.parametrize("fault, words", [
    ("other bytes", "MD5"), ("cut off", "broke off after"), ("not found", "404")])
def test_a_broken_download_leaves_nothing_behind(server, cache, fault, words):
    good = server.content
    if fault == "other bytes":
        server.content = good[:-1] + b"?"
    elif fault == "cut off":
        server.content, server.length = good[:len(good) // 2], len(good)
    else:
        server.content = None
    refused(lambda: data.load("cifar10", "train"), data.CIFAR_URL, words, "--data-dir")
    assert os.listdir(cache) == []
    server.content, server.length = good, None
    assert len(data.load("cifar10", "train")) == 100    # and the next try is a fresh one


def test_without_network_there_is_one_line(server, cache):
    server.shutdown()
    server.server_close()
    refused(lambda: data.load("cifar10", "train"), data.CIFAR_URL, "--data-dir")
    assert os.listdir(cache) == []


# ---- COCO ---------------------------------------------------------------------------------------


def write_coco(root, n=6, change=None):
    """n plain pictures of n shades with two captions each; `change` edits the annotations."""
    for part in ("train2017", "val2017"):
        table = {"images": [], "annotations": []}
        for i in range(n):
            name = f"{i:012d}.jpg"
            picture(root / part / name, (60 + i, 50), (20 * i, 100, 100))
            table["images"].append({"id": i, "file_name": name})
            table["annotations"] += [{"image_id": i, "caption": f" Thing {i},\n no. {j} "}
                                     for j in range(2)]
        if change:
            change(table)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"captions_{part}.json").write_text(json.dumps(table))
    return root


def test_coco_gives_images_with_all_their_captions(tmp_path, capsys):
    root = write_coco(tmp_path / "coco")
    for split in ("train", "validation"):
        coco = data.load("coco", split, size=16, data_dir=root)
        assert coco.images.shape == (6, 3, 16, 16) and coco.images.dtype == torch.uint8
        for i in range(6):
            assert coco.captions[i] == [f"Thing {i}, no. 0", f"Thing {i}, no. 1"]
            assert abs(int(coco.images[i, 0].float().mean()) - 20 * i) <= 3
        assert f"coco {split}: 6 images\n" in capsys.readouterr().err


def test_a_second_start_decodes_nothing_and_a_changed_picture_is_noticed(
        tmp_path, monkeypatch, cache):
    root = write_coco(tmp_path / "coco")
    first = data.load("coco", "train", size=16, data_dir=root)
    with monkeypatch.context() as patch:
        patch.delattr(data, "decode_all")
        again = data.load("coco", "train", size=16, data_dir=root)
    assert torch.equal(first.images, again.images) and first.captions == again.captions
    picture(root / "train2017" / "000000000002.jpg", colour=(255, 255, 255))
    assert data.load("coco", "train", size=16, data_dir=root).images[2].min() > 250
    for file in list(cache.iterdir()):
        file.unlink()    # not overwritten: it is mapped into memory
        file.write_bytes(b"damaged")
    anew = data.load("coco", "train", size=16, data_dir=root)
    assert torch.equal(anew.images[:2], first.images[:2])


def test_no_cache_writes_nothing(tmp_path, cache):
    data.load("coco", "train", size=16, data_dir=write_coco(tmp_path / "coco"), cache=False)
    assert not cache.exists()


def test_a_subset_of_coco_keeps_pictures_and_captions_together(tmp_path):
    root = write_coco(tmp_path / "coco", n=12)
    subsets = [data.load("coco", "train", size=16, limit=5, data_dir=root, seed=seed)
               for seed in (0, 0, 1)]
    for some in subsets:
        assert len(some) == len(some.captions) == 5
        for image, captions in zip(some.images, some.captions):
            shade = 20 * int(captions[0].split()[1].strip(","))
            assert abs(int(image[0].float().mean()) - shade) <= 3
    assert subsets[0].captions == subsets[1].captions != subsets[2].captions


def test_bad_pictures_of_coco_are_counted_in_one_line(tmp_path, capsys):
    def change(table):
        table["images"].append({"id": 98, "file_name": "uncaptioned.jpg"})
        table["annotations"].append({"image_id": 99, "caption": "a picture that is not there"})
        table["annotations"].append({"image_id": 98, "caption": "  "})
    root = write_coco(tmp_path / "coco", n=8, change=change)
    folder = root / "train2017"
    picture(folder / "000000000000.jpg", mode="L")
    picture(folder / "000000000001.jpg", mode="CMYK")
    (folder / "000000000002.jpg").write_bytes((folder / "000000000003.jpg").read_bytes()[:300])
    (folder / "000000000003.jpg").unlink()
    picture(folder / "000000000004.jpg", size=(1, 1))
    coco = data.load("coco", "train", size=16, data_dir=root)
    assert [texts[0] for texts in coco.captions] == [f"Thing {i}, no. 0" for i in (0, 1, 5, 6, 7)]
    said = [line for line in capsys.readouterr().err.split("\n") if "images" in line]
    assert len(said) == 1 and said[0].startswith("coco train: 5 images (")
    for words in ("1 grey made RGB", "1 CMYK made RGB", "1 broken left out", "1 missing left out",
                  "1 under 8 pixels left out", "1 without captions left out",
                  "1 captioned but not listed left out"):
        assert words in said[0]


def test_faults_of_coco_are_one_line(tmp_path):
    def coco(root, **options):
        return lambda: data.load("coco", "train", size=16, data_dir=root, **options)
    refused(coco(None), "--data-dir")
    refused(coco(tmp_path / "nowhere"), "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(coco(tmp_path / "empty"), "captions_train2017.json", "does not exist")
    root = write_coco(tmp_path / "coco")
    file = root / "annotations" / "captions_train2017.json"
    for content, words in (
            (b"", "line 1: broken JSON"), (b"[" * 100_000, "line 1: broken JSON"),
            (b'{"images": [],\n\n "annotations": [}', "line 3: broken JSON"),
            (b'{"images": [],\n "annot\xff": []}', "line 2: not UTF-8"),
            (b"[]", "not like COCO's"), (b"{}", "'images'"),
            (b'{"images": [{"id": 1}], "annotations": []}', "'file_name'"),
            (b'{"images": [], "annotations": [{"image_id": 1, "caption": 5}]}', "not like COCO's"),
            (b'{"images": [], "annotations": []}', "0 images")):
        file.write_bytes(content)
        refused(coco(root), "train2017", words)
    write_coco(root)
    for picture_file in (root / "train2017").iterdir():
        picture_file.unlink()
    refused(coco(root), "0 images", "6 missing left out")
    for name in ("../val2017/000000000001.jpg", str(root / "val2017" / "000000000001.jpg")):
        write_coco(root, change=lambda table: table["images"][0].update(file_name=name))
        refused(coco(root), name, "leads out of")


# ---- A folder of one's own ----------------------------------------------------------------------


def write_metadata(root, n=40, more=b""):
    rows = []
    for i in range(n):
        picture(root / f"{i}.png", colour=(5 * i, 0, 0))
        rows.append(json.dumps({"file_name": f"{i}.png",
                                "text": f"thing {i}" if i % 2 else [f"thing {i}", f"ding {i}"]}))
    (root / "metadata.jsonl").write_bytes("\n".join(rows).encode() + b"\n" + more)
    return root


def test_metadata_gives_captions_and_a_split_that_no_seed_mixes(tmp_path, capsys):
    root = write_metadata(tmp_path / "mine")
    seen = {}
    for split in ("train", "validation"):
        for seed in (0, 1):
            mine = data.load("folder", split, size=16, data_dir=root, seed=seed)
            assert "metadata.jsonl" in capsys.readouterr().err
            numbers = [int(texts[0].split()[1]) for texts in mine.captions]
            assert [5 * i for i in numbers] == mine.images[:, 0, 3, 3].tolist()
            assert all(len(texts) == 2 - i % 2 for i, texts in zip(numbers, mine.captions))
            assert seen.setdefault(split, numbers) == numbers
            assert mine.flips and mine.labels == {} and mine.classes == []
    assert len(seen["train"]) == 38 and len(seen["validation"]) == 2
    assert sorted(seen["train"] + seen["validation"]) == list(range(40))


def test_left_and_right_in_a_caption_forbid_flips(tmp_path):
    root = write_metadata(tmp_path / "mine", 10, b'{"file_name": "0.png", "text": "to the Left."}')
    flips = [data.load("folder", split, size=16, data_dir=root).flips
             for split in ("train", "validation")]
    assert sorted(flips) == [False, True]


def test_class_folders_give_captions_and_labels(tmp_path, capsys):
    root = tmp_path / "mine"
    for i in range(20):
        picture(root / "old_owl" / f"{i}.jpg", colour=(0, 0, 250))
        picture(root / "zebra" / f"{i}.JPG", colour=(0, 250, 0))
    (root / "zebra" / "notes.txt").write_text("no picture")
    (root / "notes").mkdir()
    mine = data.load("folder", "train", size=16, data_dir=root)
    assert "2 sub-folders as classes: 38 images\n" in capsys.readouterr().err
    assert mine.classes == ["old owl", "zebra"] and mine.flips
    for image, captions, k in zip(mine.images, mine.captions, mine.labels["class"]):
        assert captions[0] == f"a photo of {['an old owl', 'a zebra'][k]}"
        assert image[1].float().mean() > 200 if k else image[2].float().mean() > 200


def test_pictures_of_no_class_are_counted(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "owl" / f"{i}.png")
    picture(tmp_path / "owl" / "young" / "0.png")
    picture(tmp_path / "loose.png")
    assert len(data.load("folder", "train", size=16, data_dir=tmp_path)) == 19
    assert "19 images (2 without captions left out)\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_ready_made_splits_are_kept(tmp_path, name):
    for half, n in (("train", 5), (name, 3)):
        for i in range(n):
            picture(tmp_path / "mine" / half / "owl" / f"{i}.jpg")
    picture(tmp_path / "mine" / "train" / "ant" / "0.jpg")
    train, validation = (data.load("folder", split, size=16, data_dir=tmp_path / "mine")
                         for split in ("train", "validation"))
    assert len(train) == 6 and len(validation) == 3
    assert train.classes == validation.classes == ["ant", "owl"]
    assert validation.labels["class"].tolist() == [1, 1, 1]


def test_faults_of_a_folder_are_one_line_or_counted(tmp_path, capsys):
    def mine(root, split="train"):
        return lambda: data.load("folder", split, size=16, data_dir=root)
    (tmp_path / "empty").mkdir()
    refused(mine(None), "--data-dir")
    refused(mine(tmp_path / "empty"), "empty", "metadata.jsonl", "sub-folder")
    picture(tmp_path / "bare" / "a.jpg")
    refused(mine(tmp_path / "bare"), "bare", "0 sub-folders")
    refused(mine(write_metadata(tmp_path / "one", 1)), "no pictures for train")
    for more, words in (
            (b"{broken", "line 9: broken JSON"), (b"[" * 100_000, "line 9: broken JSON"),
            (b'{"text": "\xe9"}', "line 9: not UTF-8"),
            (b"[]", "line 9: write it"), (b"3", "line 9: write it"),
            (b'{"file_name": "a.jpg"}', "line 9: write it"), (b'{"text": "a"}', "line 9: write it"),
            (b'{"file_name": "a.jpg", "text": [1]}', "line 9: write it"),
            (b'{"file_name": "a.jpg", "text": null}', "line 9: write it"),
            (b'{"file_name": "a.jpg", "text": {"en": "a"}}', "line 9: write it"),
            (b'{"file_name": 5, "text": "a"}', "line 9: write it")):
        refused(mine(write_metadata(tmp_path / "mine", 8, more)), "metadata.jsonl", words)
    root = write_metadata(tmp_path / "mine", 8, b'\n{"file_name": "gone.png", "text": "gone"}\n'
                          b'{"file_name": "0.png", "text": "\\ud800 odd"}\n')
    picture(root / "sub" / "uncaptioned.png")
    picture(root / "1.png", size=(1, 1))
    (root / "2.png").write_bytes(b"no picture")
    sets = [mine(root, split)() for split in ("train", "validation")]
    assert sum(map(len, sets)) == 6
    assert ["thing 0", "ding 0", "? odd"] in sets[0].captions + sets[1].captions
    said = capsys.readouterr().err
    for words in ("1 without captions left out", "1 missing", "1 broken", "1 under 8 pixels"):
        assert words in said


def test_names_of_no_file_are_missing_and_do_not_use_up_the_limit(tmp_path, capsys):
    odd = ["gone.png", "loop.png", "a\0b.png", 300 * "long" + ".png"]
    rows = [json.dumps({"file_name": name, "text": "odd"}) for name in odd * 20]
    root = write_metadata(tmp_path / "mine", 8, "\n".join(rows).encode())
    (root / "loop.png").symlink_to(root / "loop.png")
    for split, most in ("train", 7), ("validation", 1):
        images = data.load("folder", split, size=16, limit=most, data_dir=root)
        assert 1 <= len(images) <= most
    assert " missing left out" in capsys.readouterr().err


def test_hidden_folders_are_no_classes(tmp_path):
    for name in ("owl", "hen", ".thumbnails"):
        for i in range(20):
            picture(tmp_path / name / f"{i}.png")
    assert data.load("folder", "train", size=16, data_dir=tmp_path).classes == ["hen", "owl"]


def test_nothing_outside_the_folder_is_read(tmp_path):
    secret = picture(tmp_path / "secret" / "secret.png")
    for i, name in enumerate(("../secret/secret.png", str(secret), "link.png", "up/secret.png")):
        root = tmp_path / f"mine{i}"
        write_metadata(root, 60, json.dumps({"file_name": name, "text": "secret"}).encode())
        (root / "link.png").symlink_to(secret)
        (root / "up").symlink_to(secret.parent)
        with pytest.raises(ValueError, match="leads out of"):    # in whichever split it falls
            for split in ("train", "validation"):
                data.load("folder", split, size=16, data_dir=root)
    picture(tmp_path / "classes" / "owl" / "0.png")
    (tmp_path / "classes" / "secret").symlink_to(secret.parent)
    with pytest.raises(ValueError, match="leads out of"):
        for split in ("train", "validation"):
            data.load("folder", split, size=16, data_dir=tmp_path / "classes")


# ---- One file -----------------------------------------------------------------------------------


def test_read_image_takes_the_upright_middle_square(tmp_path):
    marked = Image.new("RGB", (90, 30), "white")
    marked.paste((255, 0, 0), (30, 0, 60, 15))      # red above blue in the middle third
    marked.paste((0, 0, 255), (30, 15, 60, 30))
    turns = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90,
             8: Image.Transpose.ROTATE_270}
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        (marked.transpose(turn) if turn is not None else marked).save(tmp_path / "a.png", exif=exif)
        image = data.read_image(tmp_path / "a.png", 16)
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and image.is_contiguous()
        assert image[:, 2, 8].tolist() == [255, 0, 0] and image[:, 13, 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode, kind, options", [
    ("RGB", "jpg", {}), ("L", "jpg", {}), ("CMYK", "jpg", {}), ("YCbCr", "jpg", {}),
    ("1", "png", {}), ("L", "png", {}), ("LA", "png", {}), ("P", "png", {}), ("RGBA", "png", {}),
    ("I;16", "png", {}), ("I", "tif", {}), ("F", "tif", {}), ("CMYK", "tif", {}),
    ("LAB", "tif", {}), ("RGB", "bmp", {}), ("P", "gif", {}), ("RGB", "webp", {"lossless": True})])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64)])
def test_read_image_takes_every_mode(tmp_path, mode, kind, options, size):
    white = Image.new("RGB", size, "white")
    white = Image.fromarray(np.full(size[::-1], 65535, np.uint16)) if mode == "I;16" else \
        Image.new(mode, size, (255, 128, 128)) if mode == "LAB" else white.convert(mode)
    white.save(tmp_path / f"a.{kind}", **options)
    image = data.read_image(str(tmp_path / f"a.{kind}"), 16)
    assert image.shape == (3, 16, 16)
    # In 32-bit images white is whatever is brightest, and one shade alone is neither.
    assert mode in "IF" or image.min() >= 250


def test_sixteen_bits_keep_their_gradation(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (256, 1))).save(tmp_path / "a.png")
    means = data.read_image(tmp_path / "a.png", 16)[0].float().mean(0)
    assert torch.allclose(means, torch.arange(16) * 16 + 7.5, atol=1.5)


def test_transparency_is_white_and_animation_its_first_frame(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert data.read_image(tmp_path / "clear.png", 16).min() == 255
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "keyed.png", transparency=(9, 9, 9))
    assert data.read_image(tmp_path / "keyed.png", 16).min() == 255
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("lime", "red")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert data.read_image(tmp_path / "a.gif", 16)[:, 8, 8].tolist() == [0, 255, 0]


def test_shrinking_is_an_area_mean_and_the_same_size_is_untouched(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(data.read_image(tmp_path / "a.png", 32), image)
    mean = torch.nn.functional.avg_pool2d(image.float(), 2)
    assert (data.read_image(tmp_path / "a.png", 16) - mean).abs().max() <= 1


def test_what_is_no_picture_is_refused_in_one_line(tmp_path, monkeypatch, recwarn):
    good = picture(tmp_path / "good.jpg", (300, 300))
    files = {"empty.png": b"", "text.png": b"no picture", "cut.jpg": good.read_bytes()[:900],
             "head.png": b"\x89PNG\r\n\x1a\n", "zeros.gif": b"GIF89a" + bytes(40)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused(lambda: data.read_image(tmp_path / name, 16), tmp_path / name, "can't be read")
    refused(lambda: data.read_image(tmp_path / "empty.png", 16), "it is empty")
    refused(lambda: data.read_image(tmp_path, 16), tmp_path, "not a file")
    refused(lambda: data.read_image(tmp_path / "gone.png", 16), "gone.png", "does not exist")
    for limit in (80_000, 20_000):    # Pillow itself warns of the first and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused(lambda: data.read_image(good, 16), "decompression bomb")
    assert not recwarn.list
