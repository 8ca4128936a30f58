"""train.py on tiny models: what a run learns and leaves, how it goes on, and what it refuses."""
import copy
import math
import os
import re
import shutil
import signal
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from checkpoints import ALL_PARTS, load_part, load_parts, read_torch, write_torch
from clip_tiny import CLIPConfig
from conftest import (at_step, bytes_in, interrupt, log, raising, same_bits, seeded, shake,
                      tiny_parts, type_train, write_metadata)
from data import Dataset
from shapes import to_float, to_uint8
from unclip import UnCLIP

pytestmark = pytest.mark.usefixtures("tiny_training")
STAGES = list(train.STAGES)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call train.py in an empty folder → exit status, lines on stderr without the progress bar."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, **options):
        status = type_train(*argv, **options)
        out, err = capsys.readouterr()
        assert out == ""
        return status, [line for line in err.splitlines() if line and not re.search(r"\d%\|", line)]
    return call


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copied")


@pytest.fixture
def unseen(monkeypatch):
    """For tests that look at no pictures: to draw them takes long."""
    monkeypatch.setattr(train, "picture_to_watch", lambda *_: None)


def part(stage):
    return stage.replace("-", "_")


def run_of(stage, *argv):
    argv = ["--stage", stage, "--device", "cpu", "--limit", "24", "--batch-size", "8", *argv]
    return train.Run(stage, train.parse([str(a) for a in argv]))


# ---- A whole run ---------------------------------------------------------------------------------

def test_all_stages_leave_a_log_a_state_pictures_and_weights_that_draw(trained, capsys):
    files = {f"{part(stage)}.{kind}" for stage in STAGES for kind in ("pt", "state.pt", "csv")}
    pictures = {"decoder.png", "upsampler.png"}      # at the priors' turn there was no decoder yet
    assert {path.name for path in trained.iterdir()} == files | pictures
    for stage in STAGES:
        made = load_part(trained / f"{part(stage)}.pt").trained
        assert made["steps"] == 2 and made["data"] == "shapes" and made["limit"] == 24
        first, last = log(trained / f"{part(stage)}.csv")
        assert (first["step"], last["step"]) == ("1", "2") and float(last["validation"]) > 0
        assert list(first)[:5] == ["step", "minutes", "lr", "loss", "validation"]
    model = UnCLIP(**load_parts(trained))
    for prior in ("diffusion", "ar"):
        x = model.generate("a red cube", 1, prior=prior, steps=1)
        assert x.shape == (1, 3, 128, 128) and x.isfinite().all()


def test_a_finished_run_trains_no_more_and_another_configuration_is_refused_before_any_work(
        call, copied, monkeypatch):
    before = bytes_in(copied)
    shutil.copytree(copied, "again")
    monkeypatch.setattr(train.data, "load", None)
    status, err = call("--out", copied)
    assert status == 0 and sum("finished already" in line for line in err) == len(err) == 5
    for flag, value, was in (("--lr", 0.5, "0.001"), ("--seed", 1, "0"), ("--batch-size", 9, "8"),
                             ("--limit", 9, "24"), ("--steps", 3, "2"), ("--init", "again", "None"),
                             ("--data", "signs", "shapes")):
        status, err = call("--stage", "prior", "--out", copied, flag, value)
        changed = f"{part(flag[2:])} was {was}, now {value}"
        assert status == 2 and len(err) == 1, err
        assert all(w in err[0] for w in ("--restart", "prior.state.pt", changed)), err
    assert bytes_in(copied) == before


# ---- Learning ------------------------------------------------------------------------------------

COLOURS = {"red": (230, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 230), "gray": (128,) * 3}


def coloured(N, seed):
    """N noisy pictures of one colour each, and captions that name it."""
    g = seeded(seed)
    colour = torch.randint(4, (N,), generator=g)
    plain = torch.tensor(list(COLOURS.values()))[colour].view(N, 3, 1, 1)
    images = (plain + 40 * torch.randn(N, 3, 32, 32, generator=g)).clamp(0, 255).to(torch.uint8)
    return Dataset(images, [[f"a {list(COLOURS)[k]}"] for k in colour], {}, [], flips=False)


def test_train_py_teaches_clip_the_captions_of_new_pictures(call, monkeypatch):
    sets = {"train": coloured(128, 0), "validation": coloured(64, 1)}
    monkeypatch.setattr(train.data, "load", lambda name, split, *_: sets[split])
    argv = ["--stage", "clip", "--out", "run", "--batch-size", 16, "--lr", 2e-3]
    assert call(*argv, steps=18)[0] == 0
    last, chance = log("run/clip.csv")[-1], math.log(16)     # chance: all pairs are alike to it
    assert float(last["validation"]) < 0.75 * chance
    assert 0.4 * chance < float(last["loss"]) < 1.5 * chance # a mean over steps; 0.5: all is known


def test_x_0_errors_are_those_of_the_closed_form_for_a_network_that_answers_zero(trained):
    """Then x_0 is guessed as cos φ · x_t, which is off by sin² φ · x_0 − cos φ sin φ · eps."""
    run = run_of("decoder", "--out", trained, "--restart")
    pairs, validation = train.load_pairs(run)
    model = train.build(run, pairs).eval()           # its last layer starts at zero
    columns = dict(train.validate(run, model, validation))
    assert len(columns) == 13 and set(validation.groups) == {"one", "two"}
    for name, i in validation.groups.items():
        assert columns[f"{name}_sketch"] > 0
        for t in (100, 300, 500, 700, 900):
            cos2, x = model.diffusion.alphas_bar[t].item(), to_float(validation.images[i])
            error = (1 - cos2) ** 2 * x.square().mean().item() + cos2 * (1 - cos2)
            assert columns[f"{name}_{t}"] == pytest.approx(1000 * error, rel=0.05)


# ---- Stopping and going on -----------------------------------------------------------------------

def test_a_signal_ends_the_whole_command_in_the_last_step_of_a_stage_and_before_the_first(
        call, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert call("--out", "run")[0] == 130
    assert os.path.exists("run/clip.pt") and not os.path.exists("run/prior.csv")
    signal.signal(signal.SIGINT, signal.default_int_handler)     # a shell's & has it ignored
    monkeypatch.setattr(train.data, "load", interrupt)
    assert call("--out", "other") == (130, []) and not os.path.exists("other")


def test_restart_begins_anew_and_what_it_leaves_is_not_taken_for_finished(call, copied, unseen,
                                                                          monkeypatch):
    argv = ["--stage", "prior", "--out", copied, "--seed", 7]
    with monkeypatch.context() as patch:             # as if it died between its two files
        patch.setattr(train, "write_torch", raising(KeyboardInterrupt))
        assert call(*argv[:-2], "--restart")[0] == 130
    status, err = call(*argv[:-2])
    assert status == 0 and "from step 0" in err[0] and "prior.pt will be replaced" in err[1]
    assert call(*argv, "--restart")[0] == 0
    assert load_part(copied / "prior.pt").trained["seed"] == 7
    assert [row["step"] for row in log(copied / "prior.csv")] == ["1", "2"]  # the old log is gone
    whole = (copied / "prior.pt").read_bytes()
    (copied / "prior.pt").write_bytes(whole[:-9])                            # … then it was damaged
    for told in "finished at step 2", "finished already":
        status, err = call(*argv)
        assert status == 0 and told in err[-1]
        assert load_part(copied / "prior.pt").trained["seed"] == 7


# ---- What could be lost --------------------------------------------------------------------------

SPOILT = [
    dict.clear, lambda s: s.pop("optimizer"), lambda s: s["optimizer"].pop(1),
    lambda s: s["optimizer"][0].pop("exp_avg"), lambda s: s.update(step=torch.zeros(2)),
    lambda s: s.update(step=-5), lambda s: s.update(step=True), lambda s: s.update(step=4),
    lambda s: s.update(seconds=None), lambda s: s.update(rows=[{"step": torch.ones(2)}]),
    lambda s: next(iter(s["model"].values())).fill_(math.nan), lambda s: s.update(clip_id=3),
    lambda s: next(iter(s["ema"].values())).fill_(math.inf), lambda s: s.update(identity=None),
    lambda s: s["optimizer"][0]["exp_avg_sq"].fill_(math.nan), lambda s: s["sums"].fill_(math.nan),
    lambda s: s.update(generator=torch.zeros(3)), lambda s: s.update(sums=torch.zeros(5)),
    lambda s: s["identity"].update(lr=torch.zeros(2)), lambda s: s["tokenizer"]["merges"].pop()]


def test_a_damaged_state_is_refused_in_one_line_and_nothing_is_written(call, monkeypatch):
    argv, path = ["--stage", "clip", "--out", "run"], Path("run/clip.state.pt")
    with monkeypatch.context() as patch:
        at_step(patch, 2, interrupt)
        assert call(*argv, steps=3)[0] == 130
    whole = read_torch(path)
    for spoil in SPOILT:
        spoil(state := copy.deepcopy(whole))
        torch.save(state, path)
        before = bytes_in(path.parent)
        status, err = call(*argv, steps=3)
        assert status == 2 and len(err) == 1 and "--restart" in err[0] and str(path) in err[0], err
        assert bytes_in(path.parent) == before


@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_what_is_no_number_never_overwrites_good_weights(call, copied, monkeypatch, unseen, of):
    """Every step is saved here, and a row of the log comes only after every second one."""
    class Bad(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * (math.nan if of == "loss" else 1))
        backward = staticmethod(lambda ctx, g: g * math.nan)

    def loss_of(model, b, g):
        steps.append(1) if model.training and len(b.x) == 8 else None    # check_memory, and steps
        return Bad.apply(loss(model, b, g)) if len(steps) == 5 else loss(model, b, g)
    steps, loss = [], train.STAGES["prior"]
    monkeypatch.setitem(train.STAGES, "prior", loss_of)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    status, err = call("--stage", "prior", "--out", copied, "--restart", steps=6)
    assert status == 2 and all(w in err[-1] for w in ("prior", "step 4", "--lr", "0.001")), err
    state = read_torch(copied / "prior.state.pt")
    assert state["step"] == load_part(copied / "prior.pt").trained["steps"] == 3
    assert all(value.isfinite().all() for value in state["model"].values())


def test_validation_has_batches_of_the_training_s_size_and_one_beyond_memory_is_refused(
        call, monkeypatch):
    sizes, loss = set(), train.STAGES["clip"]        # a contrastive loss depends on its batch
    monkeypatch.setitem(train.STAGES, "clip", lambda model, b, g: (
        sizes.add((model.training, len(b.x))), loss(model, b, g))[1])
    seen, validate = [], train.validate
    monkeypatch.setattr(train, "validate", lambda run, ema, pairs: (
        seen.append(len(pairs.images)), validate(run, ema, pairs))[1])
    assert call("--stage", "clip", "--out", "run", "--batch-size", 12, steps=1)[0] == 0
    assert seen == [train.VALIDATION_PICTURES]                           # not the 24 of training
    assert sizes == {(True, 8), (True, 16), (True, 12), (False, 12)}     # 8, 16: see check_memory
    monkeypatch.setattr(train, "MEMORY", 1e6)
    status, err = call("--stage", "upsampler", "--out", "other")
    assert status == 2 and len(err) == 1 and not os.path.exists("other"), err
    assert re.search(r"size 8: .* GB .* choose [1-7] or", err[0])


def test_a_second_run_of_a_part_in_a_folder_is_refused_while_the_first_runs(call, copied):
    argv = ["--stage", "prior", "--out", copied, "--restart"]
    with train.open_log(run_of("prior", "--out", copied, "--restart")):
        before = (copied / "prior.csv").read_bytes()
        status, err = call(*argv)
        assert status == 2 and len(err) == 1 and "another run" in err[0] and "prior.csv" in err[0]
        assert (copied / "prior.csv").read_bytes() == before
        assert call(*argv, "--stage", "ar-prior", steps=1)[0] == 0       # another part may train
    assert not (copied / "prior.png").exists() and call(*argv, steps=1)[0] == 0
    assert (copied / "prior.png").exists()           # for now there is a decoder that draws


@pytest.mark.parametrize("write, error", [
    ("write_torch", RuntimeError("unexpected pos")), ("write_log", OSError(28, "No space left")),
    ("write_png", OSError(28, "No space left"))])
def test_a_disk_that_is_full_ends_the_run_in_one_line_and_leaves_the_last_checkpoint(
        call, copied, monkeypatch, write, error):
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train, "picture_to_watch", lambda *_: torch.zeros(3, 8, 8).byte())
    at_step(monkeypatch, 3, lambda _: monkeypatch.setattr(train, write, raising(error)))
    status, err = call("--stage", "prior", "--out", copied, "--restart", steps=3)
    assert status == 2 and "copied" in err[-1] and re.search("No space|full?", err[-1]), err
    assert read_torch(copied / "prior.state.pt")["step"] == 2
    load_part(copied / "prior.pt")


# ---- CLIP and what is learnt on it ---------------------------------------------------------------

def test_clip_pt_is_the_average_turned_to_the_axes_and_the_ar_prior_s_codes_are_of_whitened_z_i(
        trained):
    run, clip = run_of("clip", "--out", trained, "--steps", 2), load_part(trained / "clip.pt")
    pairs, _ = train.load_pairs(run)
    ema = train.build(run, pairs).eval()
    ema.load_state_dict(read_torch(trained / "clip.state.pt")["ema"])    # trains on, and not turned
    assert not ema.mean.any()
    ema.fit_axes(train.embed_images(ema, pairs.images))
    for name, value in ema.state_dict().items():
        assert torch.allclose(value, clip.state_dict()[name], atol=1e-5), name
    z_i = clip.whiten(train.embed_images(clip, pairs.images))
    ar = load_part(trained / "ar_prior.pt")
    assert ar.config.components == train.components_needed(z_i.var(0))
    codes = ar.codes.encode(z_i[:, :ar.config.components])               # 24 pictures, 8 buckets
    assert all((code.bincount() == 3).all() for code in codes.T)


def test_a_clip_that_went_on_learning_or_learnt_anew_is_another_one(call, copied, monkeypatch):
    argv, ids = ["--stage", "clip", "--out", copied], [load_part(copied / "clip.pt").clip_id]
    with monkeypatch.context() as patch:
        at_step(patch, 1, interrupt)
        assert call(*argv, "--restart")[0] == 130
    for _ in range(2):
        ids.append(load_part(copied / "clip.pt").clip_id)
        os.unlink(copied / "clip.pt")
        assert call(*argv)[0] == 0
    assert len(set(ids)) == 3 and load_part(copied / "clip.pt").clip_id == ids[2]  # same weights
    status, err = call("--stage", "decoder", "--out", copied)
    assert status == 2 and all(word in err[0] for word in ("--restart", ids[0], ids[2]))


def test_all_stages_after_a_new_clip_begin_anew_though_their_states_are_of_the_old_one(
        call, copied, unseen, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 1, interrupt)
        status, err = call("--out", copied, "--restart")
        assert status == 130 and "without --restart, this command goes on" in err[-1]
    status, err = call("--out", copied)
    assert status == 0 and sum("will be replaced" in line for line in err) == 4, err
    assert load_parts(copied)["decoder"].clip_id == load_part(copied / "clip.pt").clip_id


def test_a_first_clip_beside_parts_of_another_is_refused_before_any_work(
        call, copied, unseen, monkeypatch):
    os.unlink(copied / "clip.state.pt")              # a folder of shipped weights has none
    before = bytes_in(copied)
    with monkeypatch.context() as patch:
        patch.setattr(train.data, "load", None)
        for stage in ("all", "clip"):
            status, err = call("--stage", stage, "--out", copied)
            assert status == 2 and len(err) == 1 and "prior.pt would belong to another" in err[0]
    assert bytes_in(copied) == before
    assert call("--stage", "clip", "--out", copied, "--restart")[0] == 0


def test_a_stage_takes_the_shipped_clip_if_the_folder_has_none_and_says_so(
        call, tiny_weights, tmp_path, monkeypatch, unseen):
    shutil.copytree(tiny_weights, tmp_path / "weights" / "shapes")
    monkeypatch.setattr(train, "SHIPPED", tmp_path / "weights")
    status, err = call("--stage", "prior", "--out", "run")
    assert status == 0 and re.search("no clip.pt in run.*weights/shapes/clip.pt", err[0])
    assert sorted(os.listdir("run")) == ["prior.csv", "prior.pt", "prior.state.pt"]
    assert load_part("run/prior.pt").clip_id == "tiny"


@pytest.mark.parametrize("stage", ["prior", "ar-prior", "clip"])
def test_init_begins_with_given_weights_unless_they_are_of_another_clip(
        call, copied, stage, unseen, monkeypatch):
    monkeypatch.setattr(train, "components_needed", lambda *_: 1)        # as by other pictures
    argv = ["--stage", stage, "--init", copied, "--out", "run", "--restart", "--lr", 1e-9]
    assert call(*argv)[0] == 0
    given, now = (load_part(f"{folder}/{part(stage)}.pt") for folder in (copied, "run"))
    for name, value in given.named_parameters():
        assert torch.allclose(value, dict(now.named_parameters())[name], atol=1e-4) or \
            "projection" in name                     # turned, as CLIP is whenever it is written
    assert (now.clip_id == given.clip_id) == (stage != "clip")
    assert now.trained["init"]["steps"] == 2
    path, wrong = copied / f"{part(stage)}.pt", {"part": "gan"} if stage == "clip" else \
        {"clip_id": "other"}
    write_torch(path, {**read_torch(path), **wrong})
    status, err = call(*argv)
    assert status == 2 and ("'gan'" if stage == "clip" else "another CLIP (other") in err[-1], err


# ---- The parts of the machine --------------------------------------------------------------------

def test_the_learning_rate_warms_up_and_ends_near_zero():
    for steps in (1, 2, 10, 100, 2500):
        rates = [train.learning_rate(k, train.Recipe(steps, 1, lr=0.1)) for k in range(steps)]
        peak, warm_up = rates.index(max(rates)), max(1, steps // 50)
        assert max(rates) == pytest.approx(0.1) and abs(peak - warm_up) <= 1
        assert rates[0] == pytest.approx(0.1 / warm_up) and min(rates) > 0
        assert rates[:peak + 1] == sorted(rates[:peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert steps < 10 or rates[-1] < 0.1 * 3 / steps


def state_of(model, recipe=train.Recipe(steps=1, batch_size=1, lr=0.1)):
    return train.State(SimpleNamespace(recipe=recipe, device=torch.device("cpu"), saved=None,
                                       args=SimpleNamespace(seed=0)), model)


def test_the_average_is_over_the_last_ninth_of_a_run_and_weight_decay_is_for_matrices():
    state = state_of(nn.Linear(1, 1))
    for state.step in range(1, 1001):
        nn.init.constant_(state.model.weight, state.step / 1000)
        state.update_ema()
    assert state.ema.weight.item() == pytest.approx(0.9, abs=0.002)      # ∫ s · 9 s⁸ ds
    state = state_of(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), train.Recipe(1, 1, 0.1, 0.05))
    assert [(group["weight_decay"], {p.dim() for p in group["params"]})
            for group in state.optimizer.param_groups] == [(0.05, {2}), (0, {1})]


class NoWaits(TorchDispatchMode):
    """What makes the CPU wait for a GPU is an error: .item(), and what depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not re.search("_local_scalar_dense|nonzero|masked_select|unique", str(function))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_the_device_and_all_weights_learn_but_those_of_clip(trained, stage):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = run_of(stage, "--out", trained, "--device", device, "--restart", "--steps", 9)
    pairs, _ = train.load_pairs(run)
    state = train.State(run, train.build(run, pairs))
    start, clip = copy.deepcopy((state.model.state_dict(), run.clip and run.clip.state_dict()))
    torch.cuda.set_sync_debug_mode("error") if device == "cuda" else None
    try:
        with NoWaits():
            for _ in range(3):                       # some layers learn when others did
                train.take_step(run, state, pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default") if device == "cuda" else None
    assert not state.sums.requires_grad              # or it would keep the graph of every step
    same = [name for name, p in state.model.named_parameters() if torch.equal(p, start[name])]
    assert not same and (clip is None or same_bits(run.clip.state_dict(), clip)), same


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_in_bf16_as_on_a_gpu_is_near_that_in_float32(trained, stage):
    run = run_of(stage, "--out", trained, "--restart")
    pairs, _ = train.load_pairs(run)
    model, losses = train.build(run, pairs), []
    for p in model.parameters():                     # what begins at zero must compute as well
        p.data += 0.02 * torch.randn(p.shape, generator=seeded())
    for bf16 in False, True:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses.append(train.STAGES[stage](model, pairs.draw(8, g := seeded()), g))
    assert losses[0].dtype == losses[1].dtype == torch.float32
    assert torch.isclose(*losses, rtol=0.02) and losses[0] != losses[1]


@pytest.mark.parametrize("image_size", [32, 64])
def test_the_models_of_size_base_fit_together(monkeypatch, image_size):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())       # not for meta
    dim = CLIPConfig(9, 9, **train.SIZES["base"]["clip"]).dim
    own = dict(dim=dim, vocab=400, context=77, image_size=image_size, components=dim)
    for stage, options in train.SIZES["base"].items():
        kind, config = ALL_PARTS[stage.replace("-", "_")]
        needed = {field.name for field in fields(config)} & own.keys() - options.keys()
        with torch.device("meta"):                                       # shapes without numbers
            model = kind(config(**options, **{name: own[name] for name in needed}))
            tokens, x = torch.zeros(2, 7).long(), torch.zeros(2, 3, image_size, image_size)
            z = torch.zeros(2, dim)
            b = SimpleNamespace(x=x, tokens=tokens, z_i=z, z_t=z, dot=z[:, 0], low=x[..., ::4, ::4])
            assert train.STAGES[stage](model, b, None).shape == ()


# ---- Pairs ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=[True, False], ids=["flips", "no flips"])
def pairs(request):
    """Random pictures with one to three captions each, some of them shared, and a CLIP."""
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    captions = [["a picture", f"number {i}", f"item {i % 5}"][:1 + i % 3] for i in range(20)]
    clip = tiny_parts()["clip"]
    d = Dataset(images, captions, {}, [], flips=request.param)
    return d, clip, train.Pairs(d, clip.tokenizer, clip, "cpu")


def each(images):
    return {image.numpy().tobytes() for image in images}


@torch.no_grad()
def test_a_batch_is_what_clip_says_of_its_pictures_and_captions(pairs):
    d, clip, pairs = pairs
    b, again, other = (pairs.draw(60, seeded(seed)) for seed in (0, 0, 1))
    z_i, z_t = clip.encode_image(b.x), clip.encode_text(b.tokens)
    assert torch.allclose(b.z_i, clip.whiten(z_i), atol=1e-4)
    assert torch.allclose(b.z_t, z_t, atol=1e-5)
    assert torch.allclose(b.dot, (z_i * z_t).sum(1), atol=1e-5)
    assert same_bits(vars(b), vars(again)) and not torch.equal(b.x, other.x)
    plain, mirrored = each(to_float(d.images)), each(to_float(d.images.flip(3)))
    assert each(b.x) <= plain | mirrored and bool(each(b.x) & mirrored) == d.flips


def test_embeddings_are_kept_for_the_same_weights_pictures_and_captions_alone(
        pairs, monkeypatch, tmp_path):
    (d, clip, _), counted, encode = pairs, [], train.embed_images
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path))
    monkeypatch.setattr(train, "embed_images", lambda *a: counted.append(1) or encode(*a))
    make = lambda d, clip: train.Pairs(d, clip.tokenizer, clip, "cpu")
    first, again, views = make(d, clip), make(d, clip), 1 + d.flips
    assert len(counted) == views
    assert all(torch.equal(getattr(first, key), getattr(again, key))
               for key in ("tokens", "z_i", "z_t"))
    make(replace(d, images=255 - d.images), clip)
    make(replace(d, captions=[["other words"]] * len(d)), clip)
    make(d, shake(copy.deepcopy(clip)))
    assert len(counted) == 4 * views


def test_a_picture_is_drawn_with_its_own_captions_alike_often(pairs):
    d, clip, _ = pairs
    images = d.images[:, :, :1, :1].clone()
    images[:, 0, 0, 0] = torch.arange(20)                                # so that one pixel tells
    pairs = train.Pairs(replace(d, images=images), clip.tokenizer, None, "cpu")
    b = pairs.draw(20_000, seeded())
    told = {tuple(row.tolist()): text for text, row in zip(pairs.texts, pairs.tokens)}
    drawn = Counter(zip(((b.x[:, 0, 0, 0] + 1) * 127.5).round().long().tolist(),
                        (told[tuple(row)] for row in b.tokens.tolist())))
    assert drawn.keys() == {(i, y) for i, ys in enumerate(d.captions) for y in ys}
    for (i, _), n in drawn.items():
        assert n / 1000 * len(d.captions[i]) == pytest.approx(1, abs=0.3)


def test_shifting_moves_each_picture_on_its_own_and_repeats_the_border():
    x = torch.arange(12.).view(12, 1) * 100 + torch.arange(10.)          # row and column, readable
    y = train.shifted(x.expand(200, 3, 12, 10), seeded(), most=4)
    dy, dx = y[:, 0, 6, 5].long() // 100 - 6, y[:, 0, 6, 5].long() % 100 - 5
    assert dy.unique().tolist() == dx.unique().tolist() == list(range(-4, 5))
    assert len({*zip(dy.tolist(), dx.tolist())}) > 60                    # not along a diagonal
    for k in range(20):
        rows = (torch.arange(12) + dy[k]).clamp(0, 11)
        columns = (torch.arange(10) + dx[k]).clamp(0, 9)
        assert torch.equal(y[k], x[rows][:, columns].expand(3, 12, 10))


def test_only_clip_learns_on_shifted_pictures_and_only_where_these_may_be_mirrored(monkeypatch):
    for flips in (True, False):
        monkeypatch.setattr(train.data, "load", lambda *_: replace(coloured(20, 0), flips=flips))
        for stage, shift in (("clip", flips), ("upsampler", False)):
            sets = train.load_pairs(run_of(stage, "--out", "nowhere"))
            assert [pairs.shift for pairs in sets] == [shift, False]
            known = {bytes(x) for images in (sets[0].images, sets[0].images.flip(3))
                     for x in images.flatten(1).numpy()}
            drawn = to_uint8(sets[0].draw(40, seeded()).x).flatten(1).numpy()
            assert ({bytes(x) for x in drawn} <= known) != shift


def test_the_upsampler_gets_each_picture_in_two_sizes_mirrored_alike(monkeypatch):
    large = torch.randint(256, (20, 3, 128, 128), generator=seeded()).float()
    monkeypatch.setattr(train.data, "load", lambda name, split, size, *_: Dataset(
        nn.functional.avg_pool2d(large, 128 // size).round().byte(), [["a"]] * 20, {}, [], True))
    pairs = train.load_pairs(run_of("upsampler", "--out", "nowhere"))[0]
    b = pairs.draw(40, seeded())
    assert b.x.shape == (40, 3, 128, 128) and b.low.shape == (40, 3, 32, 32)
    assert torch.allclose(nn.functional.avg_pool2d(b.x, 4), b.low, atol=0.5 / 127.5 + 1e-5)
    monkeypatch.setattr(train.data, "load", lambda name, split, size, *_: Dataset(
        large[size // 128:, :, :size, :size].byte(), [["a"]] * (20 - size // 128), {}, [], True))
    with pytest.raises(ValueError, match="one of two sizes"):       # one of the large is broken
        train.load_pairs(run_of("upsampler", "--out", "nowhere"))


# ---- What a user types ---------------------------------------------------------------------------

def test_few_pictures_of_one_s_own_with_long_captions_train_every_stage(call, tmp_path, unseen):
    write_metadata(tmp_path / "own", 12, words=lambda i: " ".join(
        f"{letter}{i}é" for letter in "abcdefghijklmnopqrstuvwxyz" * 3))
    assert call("--data", "folder", "--data-dir", tmp_path / "own", "--out", "run", steps=1)[0] == 0
    assert load_part("run/clip.pt").config.context == 77 and len(os.listdir("run")) == 15


def test_a_profile_tells_the_speed_of_a_stage_and_saves_nothing(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "PROFILE_SECONDS", 0)
    assert type_train("--stage", "clip", "--profile", "--out", tmp_path / "run") == 0
    head, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    row = dict(zip(head, row))
    assert row["stage"] == "clip" and float(row["pictures/s"].replace(",", "")) > 1
    shares = [int(row[name].strip("%"))
              for name in ("data", "forward", "backward", "optimizer", "EMA")]
    assert 97 <= sum(shares) <= 103 and shares[2] == max(shares)         # each is rounded
    assert not list(tmp_path.iterdir())


def test_a_text_only_decoder_is_a_part_of_its_own_beside_the_decoder(call, copied, unseen):
    before = (copied / "decoder.pt").read_bytes()
    assert call("--stage", "decoder", "--text-only", "--out", copied)[0] == 0
    model = load_part(copied / "text_decoder.pt")
    assert (model.config.drop_z_i, model.config.drop_text) == (1, 0.1)
    assert model.clip_id == load_part(copied / "clip.pt").clip_id
    assert (copied / "decoder.pt").read_bytes() == before


def test_cifar10_has_no_upsampler_and_seven_pictures_fill_seven_buckets(call, copied):
    status, err = call("--data", "cifar10", "--stage", "upsampler", "--out", "run")
    assert status == 0 and len(err) == 1 and "left out" in err[0] and not os.path.exists("run")
    assert call("--stage", "ar-prior", "--out", copied, "--restart", limit=7)[0] == 0
    assert load_part(copied / "ar_prior.pt").config.buckets == 7
