"""sample.py as it is typed: what it draws, what it writes where, and all that can be wrong.

The weights are tiny and untrained, except in the last test.
"""
import math
import os
import re
import shlex
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from checkpoints import SHIPPED
from data import read_image
from shapes import to_float, to_uint8
from unclip import UnCLIP


@pytest.fixture
def type_in(tiny_weights, loaded, tmp_path, monkeypatch, capsys):
    """Type a line for sample.py in an empty folder → exit status, lines on stdout, on stderr."""
    monkeypatch.chdir(tmp_path)
    half_and_half("a.png", (20, 200)), half_and_half("b.png", (60, 48))
    os.symlink(tiny_weights, "tiny")

    def call(line, quick=True):
        argv = ["--weights", "tiny"] * ("--weights" not in line)
        argv += ["--no-upsample"] * quick + ["--steps", "2"] * (quick and "--steps" not in line)
        status = sample.main([*argv, *(shlex.split(line) if isinstance(line, str) else line)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()
    return call


def half_and_half(path, size=(32, 32)):
    """A file with a picture, red above and blue below."""
    image = Image.new("RGB", size, (230, 20, 20))
    image.paste((20, 20, 230), (0, size[1] // 2, *size))
    image.save(path)


def notes(err):
    """The lines that are not of the preview."""
    return [line for line in err if not set(line) <= set(" .:-=+*#%@")]


def array(path):
    return np.asarray(Image.open(path)).astype(int)


def files(paths):
    return [open(path, "rb").read() for path in paths]


# ---- Prompts -------------------------------------------------------------------------------------

def test_each_picture_of_generate_is_a_file_and_the_grid_has_a_row_for_each_prompt(
        type_in, tiny_unclip):
    prompts = ["a large cone on top of a red cube", "a red cube"]
    status, out, err = type_in([*prompts, *"--n 3 --out some/where --seed 5 --steps 1".split()],
                               quick=False)
    assert status == 0
    assert out == [f"some/where/{i:03d}.png" for i in range(6)] + ["some/where/grid.png"]
    assert sorted(os.listdir("some/where")) == sorted(os.path.basename(path) for path in out)
    sheet, drawn = array(out[-1]), to_uint8(tiny_unclip.generate(prompts, n=3, seed=5, steps=1))
    assert sheet.shape == (2 * 130 - 2, 3 * 130 - 2, 3)           # 128 pixels, gaps of 2
    for k, (path, picture) in enumerate(zip(out, drawn)):
        top, left = k // 3 * 130, k % 3 * 130
        assert (array(path) == picture.permute(1, 2, 0).numpy()).all()
        assert (sheet[top:top + 128, left:left + 128] == array(path)).all()
    assert notes(err) == [] and len(err) == 16                    # a preview, and nothing else


def test_the_same_line_draws_the_same_bytes_and_every_option_matters(type_in, monkeypatch):
    monkeypatch.setattr(sample, "BATCH", 1)                       # which is faster, for one
    one, again = (files(type_in(f'"a red cube" --n 2 --out {out}')[1]) for out in "ab")
    assert one == again and len(set(one)) == 3
    drawn = [files(type_in(f'"a red cube" --n 1 {options}')[1])[0] for options in
             ("", "--seed 1", "--guidance 5", "--eta 0", "--steps 3", "--prior ar", "--prior text",
              "--prior none")]
    assert drawn[0] == one[0] and len(set(drawn)) == 8
    assert files(type_in("a\\ red\\ cube --prior diffusion --n 1")[1])[0] == one[0]


@pytest.mark.parametrize("prompt", ["🟥 一个立方体", "e\u0301 \x1b[31m\tné\n", "\udcff\ud800",
                                    "\u200b", " -red %s {} \\ \"'", "--red"])
def test_any_text_draws_and_is_told_in_printable_characters(type_in, prompt):
    status, out, err = type_in(["--n", "1", "--", prompt])
    assert status == 0 and len(out) == 2, err
    assert all(line.isprintable() for line in err) and len(notes(err)) <= 1


# ---- Pictures ------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, n, given", [
    ("--reconstruct a.png", 1, 1), ("--vary a.png", 8, 1),
    ("--interpolate a.png b.png", 7, 2), ("--interpolate a.png b.png --fixed-noise --n 2", 2, 2),
    ('--edit a.png --to "a blue cube"', 7, 1),
    ('--edit a.png --to "a cone" --from "a cube" --n 3', 3, 1)])
def test_a_manipulation_writes_its_pictures_and_a_grid_that_begins_with_the_input(type_in, line, n,
                                                                                  given):
    status, out, err = type_in(line)
    assert status == 0
    assert out == [f"samples/{i:03d}.png" for i in range(n)] + ["samples/grid.png"]
    sheet = array(out[-1])
    assert sheet.shape == (32, (n + given) * 34 - 2, 3)
    for file, left in (("a.png", 0), ("b.png", -32))[:given]:     # the input, and B at the end
        assert (sheet[:, left:][:, :32].transpose(2, 0, 1) == read_image(file, 32).numpy()).all()
    assert (sheet[:, 34:66] == array(out[0])).all()
    assert len(notes(err)) == ("reconstruct" in line)             # its PSNR


def test_a_picture_that_is_written_over_still_begins_the_grid(type_in):
    given = read_image("a.png", 32).numpy()
    shutil.copy("a.png", "000.png")
    _, out, _ = type_in("--vary 000.png --n 2 --out .")
    assert (array(out[-1])[:, :32].transpose(2, 0, 1) == given).all()
    assert (array("000.png").transpose(2, 0, 1) != given).any()


def test_frames_share_the_upsampler_s_noise_and_variations_do_not(type_in):
    for line, different in (("--vary a.png --n 3 --eta 0", 1), ("--vary a.png --n 3", 3),
                            ("--interpolate a.png a.png --n 3", 1)):
        _, out, _ = type_in(f"{line} --steps 2", quick=False)
        assert array(out[0]).shape == (128, 128, 3) and len(set(files(out[:-1]))) == different


def test_the_psnr_is_that_of_the_files_and_pictures_are_unguided_unless_asked(type_in):
    half_and_half("small.png")
    _, out, err = type_in("--reconstruct small.png")
    mse = ((array("small.png") - array(out[0])) ** 2).mean()
    told = re.fullmatch(r"PSNR at 32 pixels: ([\d.]+) dB", notes(err)[0])
    assert abs(float(told[1]) - 10 * math.log10(255 ** 2 / mse)) < 0.06
    plain, one, five, other = (files(type_in(f"--vary a.png --n 2 {options}")[1])[:2] for options in
                               ("", "--guidance 1", "--guidance 5", "--seed 1"))
    assert plain == one and plain[0] not in (plain[1], five[0], other[0])


# ---- Many pictures -------------------------------------------------------------------------------

@pytest.mark.parametrize("line", ['"a red cube" "a cone"', "--interpolate a.png b.png"])
def test_at_most_four_pictures_are_drawn_at_once_however_many_are_asked_for(type_in, tiny_unclip,
                                                                            line):
    decoder, rows = tiny_unclip.part("decoder"), []
    with decoder.register_forward_hook(lambda _, x, v: rows.append(len(v))):
        assert type_in(f"{line} --n 9 --guidance 1")[0] == 0 and max(rows) == 4


def test_pictures_are_written_as_they_come_and_ctrl_c_leaves_them(type_in, monkeypatch):
    draw, calls = UnCLIP.draw_x, []

    def stopped(*args, **how):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return draw(*args, **how)
    monkeypatch.setattr(UnCLIP, "draw_x", stopped)
    status, out, err = type_in('"a red cube" --n 8')
    assert (status, out, err) == (130, [], [])
    assert sorted(os.listdir("samples")) == ["000.png", "001.png", "002.png", "003.png"]


def test_a_grid_holds_the_first_thousand_pictures_and_says_so(type_in, monkeypatch):
    monkeypatch.setattr(sample, "IN_GRID", 5)
    _, out, err = type_in('"a red cube" "a cone" --n 4')
    assert len(out) == 9 and array(out[-1]).shape == (2 * 34 - 2, 4 * 34 - 2, 3)
    assert (array(out[-1])[34:, 34:] == 245).all() and "first 5 of 8" in notes(err)[0]


# ---- What happens on the way, and the terminal ---------------------------------------------------

def test_show_writes_the_way_from_the_nearest_renders_to_the_picture(type_in, tiny_unclip,
                                                                     monkeypatch):
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8)
    monkeypatch.setattr(sample, "load", lambda *args: SimpleNamespace(images=images))
    status, out, _ = type_in('"a red cube" --n 1 --show --steps 8')
    assert status == 0 and out[-1] == "samples/steps.png"
    sheet = array(out[-1])
    assert sheet.shape == (3 * 152 + 313, 800, 3)
    clip = tiny_unclip.clip
    z_i = tiny_unclip.draw_z_i(clip.tokenizer(["a red cube"] * 4), 0, [0] * 4)[0]
    nearest = images[(clip.encode_image(to_float(images)) @ z_i).argmax()]
    corner = sheet[28:28 + 95, 4:4 + 95]                          # 32 pixels drawn on 95
    assert (corner[1::3, 1::3][:31, :31] == nearest.permute(1, 2, 0).numpy()[:31, :31]).all()
    final = sheet[3 * 152 + 28:][:256, 4:4 + 256][4::8, 4::8]
    assert (final == array(out[0])).all()


def test_show_renders_nothing_without_z_i_or_for_other_data_than_shapes(type_in, tiny_unclip,
                                                                        monkeypatch):
    monkeypatch.setattr(sample, "load", None)
    assert type_in("a --n 1 --show --prior none")[1][-1] == "samples/steps.png"
    monkeypatch.setitem(tiny_unclip.clip.trained, "data", "cifar10")
    assert type_in("a --n 1 --show")[1][-1] == "samples/steps.png"


def test_the_preview_is_in_colour_on_a_terminal(type_in, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = type_in('"a red cube"')                           # with a progress bar, too
    rows = [line for line in err if "▀" in line]
    assert len(rows) == 16 and {row.count("▀") for row in rows} == {65}     # two pictures and a gap


@pytest.mark.parametrize("line, words", [
    ("--vary a.png --to x --prior ar --n 1", ["--to", "--prior"]),
    ("--reconstruct a.png --n 5 --eta 0 --fixed-noise", ["--n", "--fixed-noise", "--eta"]),
    ("cube --from x --n 1", ["--from"]), ("--vary a.png --n 1 --show", ["--show"]),
    ("--vary a.png --out . --n 2", ["earlier run, as 009"]),
    ("--vary 000.png --out . --n 10", ["000.png is about to be overwritten"]),
    ('"a zebra and a wombat" --n 1 "a red cube" --seed 3 "a gnu" "a gnu"',
     ["zebra, and, wombat", "gnu"])])
def test_flags_without_a_part_overwritten_inputs_older_pictures_and_unknown_words_are_told(
        type_in, line, words):
    half_and_half("000.png"), half_and_half("009.png")
    status, _, err = type_in(line)
    told = [note for note in notes(err) if "PSNR" not in note]
    assert status == 0 and len(told) == len(words)
    assert all(word in note for word, note in zip(words, told))


# ---- The command ------------------------------------------------------------------------------

def test_the_shipped_weights_draw_red_for_a_red_cube(type_in):
    status, out, err = type_in(f'"a red cube" --weights "{SHIPPED / "shapes"}" --steps 16')
    assert status == 0 and notes(err) == []
    for path in out[:4]:
        r, g, b = array(path).transpose(2, 0, 1)
        red = (r > g + 40) & (r > b + 40)
        strange = (g > r + 40) & (g > b + 20) | (b > r + 40) & (b > g + 20)
        assert 0.03 < red.mean() < 0.7 and strange.mean() < 0.05 * red.mean(), path
