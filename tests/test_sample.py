"""sample.py as it is typed: what it draws, what it writes where, and all that can be wrong.

The weights are tiny and untrained, except in the last test.
"""
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import ROOT
from data import CIFAR_CLASSES
from evaluate import Classifier, read_judge
from unclip import SHIPPED, UnCLIP, load_part, save_part


@pytest.fixture
def type_in(tiny_weights, tmp_path, monkeypatch, capsys):
    """Call sample.py in an empty folder → exit status, lines on stdout, lines on stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, weights=tiny_weights, steps=2, upsample=False):
        options = ["--no-upsample"] * (not upsample)
        options += [] if weights is None else ["--weights", str(weights)]
        options += [] if steps is None else ["--steps", str(steps)]
        status = sample.main([*options, *map(str, argv)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()
    return call


def notes(err):
    """The lines that are not of the preview."""
    return [line for line in err if not set(line) <= set(" .:-=+*#%@")]


def array(path):
    return np.asarray(Image.open(path)).astype(int)


def half_and_half(path, mode="RGB", size=(60, 48), **options):
    """A file with a picture, red above and blue below."""
    image = Image.new("RGB", size, (230, 20, 20))
    image.paste((20, 20, 230), (0, size[1] // 2, *size))
    image.convert(mode).save(path, **options)
    return path


# ---- Prompts ------------------------------------------------------------------------------------

def test_files_and_paths(type_in):
    status, out, err = type_in("a red cube", "a blue cone", "--n", 3, "--out", "some/where",
                               upsample=True)
    assert status == 0
    assert out == [f"some/where/{i:03d}.png" for i in range(6)] + ["some/where/grid.png"]
    assert sorted(os.listdir("some/where")) == sorted(os.path.basename(path) for path in out)
    sheet = array(out[-1])
    assert sheet.shape == (2 * 130 - 2, 3 * 130 - 2, 3)           # a row a prompt, gaps of 2 pixels
    for k, path in enumerate(out[:-1]):
        top, left = k // 3 * 130, k % 3 * 130
        assert (sheet[top:top + 128, left:left + 128] == array(path)).all()
    assert notes(err) == [] and len(err) == 16                    # a preview, and nothing else


def test_size(type_in, tiny_weights, tmp_path):
    for part in ("clip", "prior", "decoder"):
        model = load_part(tiny_weights / f"{part}.pt")
        save_part(tmp_path / "w" / f"{part}.pt", part, model, {"data": "never shipped"})
    for weights, upsample, side in ((tiny_weights, True, 128), (tiny_weights, False, 32),
                                    (tmp_path / "w", True, 32)):
        _, out, _ = type_in("a red cube", "--n", 1, weights=weights, upsample=upsample)
        assert array(out[0]).shape == array(out[1]).shape == (side, side, 3)


def files(paths):
    return [open(path, "rb").read() for path in paths]


def test_same_seed_same_bytes(type_in):
    again = [files(type_in("a red cube", "--n", 2, "--eta", eta, "--out", out)[1])
             for eta in (0, 1) for out in ("a", "b")]
    assert again[0] == again[1] and again[2] == again[3]
    assert again[0][0] != again[2][0]                             # eta matters
    for other in (["--seed", 1], ["--guidance", 5], ["--prior", "none"], ["--steps", 3]):
        drawn = files(type_in("a red cube", "--n", 2, "--eta", 0, *other)[1])
        assert drawn[0] != again[0][0], other
    assert again[0][0] != again[0][1]


def test_more_begin_with_the_fewer(type_in):
    for options, upsample in (["--eta", 1], True), (["--prior", "ar"], False):
        argv = ["a red cube", *options, "--out"]
        four = files(type_in(*argv, "four", upsample=upsample)[1])
        eight = files(type_in(*argv, "eight", "--n", 8, upsample=upsample)[1])
        assert eight[:4] == four[:4] and len(set(eight)) == 9


def test_priors(type_in):
    drawn = {prior: files(type_in("a red cube", "--n", 1, "--prior", prior)[1])[0]
             for prior in ("diffusion", "ar", "text", "none")}
    assert len(set(drawn.values())) == 4
    assert files(type_in("a red cube", "--n", 1)[1])[0] == drawn["diffusion"]


@pytest.mark.parametrize("prompt", [
    "🟥🧊", "красный куб", "一个红色的立方体", "e\u0301 \x1b[31m\tné\n", "\udcff\ud800", "!?", "A RED CUBE",
    "\u200b", " -red", "-a red cube", "%s {} \\ \"'"])
def test_any_text_draws(type_in, prompt):
    status, out, err = type_in(prompt, "--n", 1)
    assert status == 0 and len(out) == 2, err
    assert all(line.isprintable() for line in err) and len(notes(err)) <= 1


def test_unknown_words(type_in):
    status, _, err = type_in("a red zebra and a wombat", "a red cube", "a gnu", "a gnu", "--n", 1)
    assert status == 0 and len(notes(err)) == 2
    assert "zebra, and, wombat" in notes(err)[0] and "gnu" in notes(err)[1]


def test_flags_and_prompts_in_any_order(type_in):
    status, out, _ = type_in("a red cube", "--n", 2, "a cone", "--seed", 3, "a sphere")
    assert status == 0 and len(out) == 7


def test_flags_of_no_use_are_told(type_in):
    status, _, err = type_in("a red cube", "--to", "a cone", "--fixed-noise")
    assert status == 0 and len(notes(err)) == 2 and "--to" in err[0] and "--fixed-noise" in err[1]


def test_earlier_pictures_stay_and_are_told(type_in):
    type_in("a red cube", "--n", 6)
    status, out, err = type_in("a red cube", "--n", 2)
    assert status == 0 and len(os.listdir("samples")) == 7
    assert len(notes(err)) == 1 and "002.png" in notes(err)[0]


def test_interrupted(type_in, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(UnCLIP, "generate", interrupt)
    assert type_in("a red cube") == (130, [], []) and not os.path.exists("samples")


def test_preview_in_colour(type_in, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = type_in("a red cube", steps=3)                    # with a progress bar, too
    rows = [line for line in err if "▀" in line]
    assert len(rows) == 16 and {row.count("▀") for row in rows} == {65}     # two pictures and a gap


# ---- Pictures -----------------------------------------------------------------------------------

MANIPULATIONS = [(["--reconstruct", "a.png"], 1, 1), (["--vary", "a.png"], 8, 1),
                 (["--vary", "a.png", "--n", 3, "--eta", 0.5], 3, 1),
                 (["--interpolate", "a.png", "b.png"], 7, 2),
                 (["--interpolate", "a.png", "b.png", "--fixed-noise", "--n", 2], 2, 2),
                 (["--edit", "a.png", "--to", "a blue cube"], 7, 1),
                 (["--edit", "a.png", "--to", "a cone", "--from", "a cube", "--n", 3], 3, 1)]


@pytest.mark.parametrize("argv, n, given", MANIPULATIONS)
def test_manipulations(type_in, argv, n, given):
    half_and_half("a.png")
    half_and_half("b.png", size=(20, 200))
    status, out, err = type_in(*argv, upsample=True)
    assert status == 0
    assert out == [f"samples/{i:03d}.png" for i in range(n)] + ["samples/grid.png"]
    assert all(array(path).shape == (128, 128, 3) for path in out[:-1])
    sheet = array(out[-1])
    assert sheet.shape == (128, (n + given) * 130 - 2, 3)
    above, below = sheet[:60, :128].mean((0, 1)), sheet[68:, :128].mean((0, 1))      # the input
    assert np.allclose(above, [230, 20, 20]) and np.allclose(below, [20, 20, 230])
    assert (sheet[:, 130:258] == array(out[0])).all()
    assert len(notes(err)) == (argv[0] == "--reconstruct")


def test_overwriting_the_input_is_told(type_in):
    half_and_half("000.png")
    for out, told in ("a", 0), (".", 1), ("b", 0):
        assert len(notes(type_in("--vary", "000.png", "--out", out)[2])) == told


def test_psnr(type_in):
    half_and_half("a.png", size=(32, 32))
    _, out, err = type_in("--reconstruct", "a.png")
    mse = ((array("a.png") - array(out[0])) ** 2).mean()
    told = re.fullmatch(r"PSNR at 32 pixels: ([\d.]+) dB", notes(err)[0])
    assert abs(float(told[1]) - 10 * np.log10(255 ** 2 / mse)) < 0.06


def test_only_vary_is_random(type_in):
    half_and_half("a.png")
    a, b, c = (files(type_in("--vary", "a.png", "--seed", seed)[1]) for seed in (0, 1, 0))
    assert len(set(a[:-1])) == 8 and a[0] != b[0] and a == c
    still = files(type_in("--vary", "a.png", "--eta", 0)[1])
    assert len(set(still[:-1])) == 1


def test_guidance_of_manipulations(type_in):
    half_and_half("a.png")
    argv = ["--vary", "a.png", "--n", 1]
    plain, one, five = (files(type_in(*argv, *more)[1])[0]
                        for more in ([], ["--guidance", 1], ["--guidance", 5]))
    assert plain == one != five


@pytest.mark.parametrize("name, mode, options", [
    ("a.jpg", "CMYK", {}), ("a.png", "P", {}), ("a.gif", "P", {}), ("a.png", "L", {}),
    ("a.webp", "RGBA", {}), ("a.bmp", "1", {}), ("ü 🧊.tiff", "RGB", {})])
def test_pictures_of_any_kind(type_in, name, mode, options):
    half_and_half(name, mode, **options)
    status, out, err = type_in("--vary", name, "--n", 1)
    assert status == 0 and array(out[-1]).shape == (32, 66, 3), err


def test_transparency_and_rotation(type_in):
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save("clear.png")
    assert (array(type_in("--vary", "clear.png")[1][-1])[:, :32] == 255).all()
    turned = Image.Exif()
    turned[0x0112] = 3                                                                # upside down
    half_and_half("turned.png", exif=turned)
    above = array(type_in("--vary", "turned.png")[1][-1])[:14, :32]
    assert np.allclose(above.mean((0, 1)), [20, 20, 230])


# ---- Faults -------------------------------------------------------------------------------------

def refused(answer, *words, out="samples"):
    """Status 2, one line that has these words, and nothing written."""
    status, paths, err = answer
    assert status == 2 and paths == [] and len(err) == 1, answer
    for word in words:
        assert str(word) in err[0], (word, err[0])
    assert not os.path.isdir(out)


@pytest.mark.parametrize("argv, words", [
    ([], ['python sample.py "a red cube"']), ([""], ["empty"]), ([" \n\t"], ["empty"]),
    (["a red cube", ""], ["empty"]), (["word " * 100], ["tokens", "shorten"]),
    (["\n\x1b" * 100], ["tokens"]),
    (["a cube", "--n", "0"], ["--n 0"]), (["a cube", "--n", "-1"], ["--n -1"]),
    (["a cube", "--n", "two"], ["--n", "two"]), (["a cube", "--n", "1.5"], ["--n", "1.5"]),
    (["a cube", "--steps", "0"], ["--steps 0", "1000"]),
    (["a cube", "--steps", "1001"], ["--steps 1001", "1000"]),
    (["a cube", "--guidance", "nan"], ["--guidance nan"]),
    (["a cube", "--guidance", "inf"], ["--guidance inf"]),
    (["a cube", "--guidance", "1e39"], ["--guidance 1e+39"]),
    (["a cube", "--eta", "nan"], ["--eta nan"]), (["a cube", "--eta", "-0.1"], ["--eta -0.1"]),
    (["a cube", "--eta", "1.1"], ["--eta 1.1"]),
    (["a cube", "--seed", "-1"], ["--seed -1"]), (["a cube", "--seed", "x"], ["--seed", "x"]),
    (["a cube", "--device", "abacus"], ["--device abacus", "cpu"]),
    (["a cube", "--device", "meta"], ["--device meta"]),
    (["a cube", "--device", "cuda:99"], ["--device cuda:99"]),
    (["a cube", "--prior", "none of them"], ["--prior", "none of them", "diffusion"]),
    (["a cube", "--colour", "red"], ["--colour"]), (["a cube", "--out"], ["--out"]),
    (["a cube", "--vary", "a.png"], ["--vary", "a cube"]),
    (["--vary", "a.png", "--reconstruct", "a.png"], ["--vary", "--reconstruct"]),
    (["--interpolate", "a.png"], ["--interpolate"]),
    (["--interpolate", "a.png", "a.png", "--n", "1"], ["--n 1"]),
    (["--edit", "a.png"], ["--to"]), (["--edit", "a.png", "--to", ""], ["empty"]),
    (["--edit", "a.png", "--to", "a cube", "--from", "A  cube"], ["--to", "a cube"]),
    (["--to", "a cube"], ["python sample.py"]),
    (["--vary", "nowhere.png"], ["nowhere.png"]), (["--vary", "text.png"], ["text.png"]),
    (["--vary", "empty.png"], ["empty.png"]), (["--vary", "short.png"], ["short.png"]),
    (["--vary", "."], ["."]), (["--interpolate", "a.png", "nowhere.png"], ["nowhere.png"]),
    (["--vary", "no\nwhere\udcff"], ["where"])])
def test_faults(type_in, argv, words):
    half_and_half("a.png", size=(300, 300))
    open("text.png", "w").write("not a picture")
    open("empty.png", "w").close()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("short.png")
    os.truncate("short.png", 5000)
    refused(type_in(*argv, steps=None), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_no_gpu(type_in):
    refused(type_in("a cube", "--device", "cuda"), "--device cuda", "cpu")


def test_out_cannot_be_written(type_in):
    open("file", "w").close()
    os.symlink("nowhere", "link")
    for out in ("file", "file/below", "link"):
        refused(type_in("a red cube", "--out", out), f"--out {out}", out=out)
    os.mkdir("locked", 0o500)
    if not os.access("locked", os.W_OK):                          # but root may write anywhere
        refused(type_in("a red cube", "--out", "locked"), "--out locked", out="locked/samples")


class Code:
    """A pickle that runs a command when it is loaded."""
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


def write_with_code(path):
    torch.save({"format": 1, "part": path.stem, "config": Code()}, path)


def write_pickle(path):
    path.write_bytes(pickle.dumps(Code()))


def belongs_to_another(path):
    model = load_part(path)
    model.clip_id = "another"
    save_part(path, path.stem, model, model.trained)


def of_another_shape(path):
    checkpoint = torch.load(path)
    checkpoint["config"]["width" if path.stem != "decoder" else "emb_width"] = 64
    torch.save(checkpoint, path)


def of_the_future(path):
    torch.save({**torch.load(path), "format": 99}, path)


@pytest.mark.parametrize("spoil, word", [
    (write_with_code, "code"), (write_pickle, ""), (of_another_shape, "fit"),
    (of_the_future, "99"), (belongs_to_another, "another CLIP"),
    (lambda path: torch.save({"model": torch.zeros(3)}, path), "not a checkpoint"),
    (lambda path: torch.save(torch.zeros(3), path), "not a checkpoint"),
    (lambda path: path.write_text("hello\n"), ""), (lambda path: path.write_bytes(b""), "")])
@pytest.mark.parametrize("part", ["clip", "decoder"])
def test_weights_that_are_none(type_in, tiny_weights, tmp_path, part, spoil, word):
    if part == "clip" and spoil is belongs_to_another:
        part = "prior"                                            # a CLIP belongs to itself
    shutil.copytree(tiny_weights, tmp_path / "w")
    spoil(tmp_path / "w" / f"{part}.pt")
    refused(type_in("a red cube", weights=tmp_path / "w"), f"{part}.pt", word)
    assert not os.path.exists("it_ran")


def test_weights_cut_short(type_in, tiny_weights, tmp_path):
    shutil.copytree(tiny_weights, tmp_path / "w")
    path = tmp_path / "w" / "decoder.pt"
    size = path.stat().st_size
    for length in (size - 1, size - 100, size * 9 // 10, size // 2, 5000, 100, 1):
        os.truncate(path, length)
        refused(type_in("a red cube", weights=tmp_path / "w"), "decoder.pt")


def test_weights_that_are_missing(type_in, tiny_weights, tmp_path):
    refused(type_in("a red cube", weights="nowhere"), "nowhere")
    (tmp_path / "bare").mkdir()
    refused(type_in("a red cube", weights="bare"), "bare")
    for part, argv in (("prior", []), ("ar_prior", ["--prior", "ar"]), ("decoder", [])):
        shutil.copytree(tiny_weights, tmp_path / f"no {part}")
        (tmp_path / f"no {part}" / f"{part}.pt").unlink()
        refused(type_in("a red cube", *argv, weights=f"no {part}"), part.replace("_p", " p"))
    assert type_in("a red cube", "--prior", "text", weights="no prior")[0] == 0      # needs none


# ---- As a process, and with the shipped weights -------------------------------------------------

def test_help():
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--help"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("PROMPT", "--n", "--seed", "--guidance", "--steps", "--eta", "--no-upsample",
                 "--prior", "--weights", "--device", "--out", "--reconstruct", "--vary",
                 "--interpolate", "--fixed-noise", "--edit", "--to", "--from", "default: samples"):
        assert flag in done.stdout, flag


@pytest.mark.skipif(not all((SHIPPED / "shapes" / f"{part}.pt").exists()
                            for part in ("clip", "prior", "decoder")), reason="no shipped weights")
def test_a_red_cube(type_in):
    status, out, err = type_in("a red cube", weights=None, steps=None)
    assert status == 0 and notes(err) == []
    for path in out[:4]:
        r, g, b = array(path).transpose(2, 0, 1)
        red = (r > g + 40) & (r > b + 40)
        strange = (g > r + 40) & (g > b + 20) | (b > r + 40) & (b > g + 20)
        assert 0.03 < red.mean() < 0.7 and strange.mean() < 0.05 * red.mean(), path


@pytest.mark.skipif(not (SHIPPED / "cifar10" / "decoder.pt").exists(), reason="no shipped weights")
def test_cifar10_s_classes_can_be_told_apart():
    unclip = UnCLIP.load(SHIPPED / "cifar10")
    judge = read_judge(SHIPPED / "cifar10" / "classifier.pt", "classifier", Classifier(), "cpu")
    x = unclip.generate([f"a photo of a {name}" for name in CIFAR_CLASSES], n=2, steps=8)
    right = judge(x).argmax(1) == torch.arange(10).repeat_interleave(2)
    assert x.shape == (20, 3, 32, 32) and right.float().mean() > 0.3            # chance is 0.1
