"""train.py as it is typed, on tiny models: what a run leaves, how it stops, goes on and refuses.

What the stages learn is tested with the models themselves; here it is the machine around them.
"""

import copy
import csv
import os
import re
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import data
import train
import unclip
from clip_tiny import CLIP, CLIPConfig, Tokenizer
from data import Dataset, to_float
from unclip import UnCLIP, load_part

STAGES = ["clip", "prior", "ar-prior", "decoder", "upsampler"]
OF_CLIP = STAGES[1:4]                                # the stages that learn on a CLIP's embeddings
TINY = {"clip": dict(patch=8, width=64, depth=1, text_width=32, text_depth=1, dim=16),
        "prior": dict(width=32, depth=1, steps=2), "ar-prior": dict(width=32, depth=1),
        "decoder": dict(channels=(8,), blocks=(1,), attention=(False,), emb_width=32,
                        text_width=32, text_depth=1, steps=1, guidance=1.0),
        "upsampler": dict(factor=2, channels=(8,), blocks=(1,), emb_width=16, steps=2)}


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """Tiny models on few pictures, which are rendered once; and no shipped weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(train.SIZES, "small", TINY)
        patch.setattr(train, "UPSAMPLER_IMAGES", 8)
        patch.setattr(train, "VALIDATION_IMAGES", 8)
        for stage in train.STAGES.values():          # 128 for validation would take long
            loss = lambda self, model, pairs, n, generator, whole=stage.loss: \
                whole(self, model, pairs, min(n, 16), generator)
            patch.setattr(stage, "loss", loss)
        nowhere = tmp_path_factory.mktemp("nothing")
        patch.setattr(train, "SHIPPED", nowhere)
        patch.setattr(unclip, "SHIPPED", nowhere)
        yield


def type_in(*argv, limit=48, steps=2):
    options = ["--device", "cpu", "--limit", limit, "--batch-size", 8, "--steps", steps]
    return train.main([str(a) for a in [*options, *argv]])


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call train.py in an empty folder → exit status, lines on stderr without the progress bar."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, **options):
        status = type_in(*argv, **options)
        out, err = capsys.readouterr()
        assert out == ""
        bar = re.compile(r"\d+%\|")
        return status, [line for line in err.splitlines() if line and not bar.search(line)]
    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which every stage ran, for two steps. Read only; see `copied`."""
    folder = tmp_path_factory.mktemp("trained")
    assert type_in("--out", folder) == 0
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "copied")


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def part(stage):
    return stage.replace("-", "_")


def signalled(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal at the end of a step of training."""
    update_ema = train.State.update_ema

    def update(state, decay):
        update_ema(state, decay)
        if state.step == step:
            os.kill(os.getpid(), number)
    monkeypatch.setattr(train.State, "update_ema", update)


def interrupted(call, argv, step, number=signal.SIGINT):
    with pytest.MonkeyPatch.context() as patch:
        signalled(patch, step, number)
        return call(*argv)


def settings(stage, **changes):
    args = ["--stage", stage, "--device", "cpu", "--limit", "48", "--steps", "2"]
    for key, value in changes.items():
        args += [f"--{key}", str(value)]
    return train.Run(stage, train.parse(args))


# ---- A whole run ---------------------------------------------------------------------------------

def test_all_stages_leave_weights_a_log_a_state_and_pictures(trained):
    files = {f"{part(stage)}.{kind}" for stage in STAGES for kind in ("pt", "state.pt", "csv")}
    pictures = {"decoder.png", "upsampler.png"}      # at the priors' turn there was no decoder yet
    assert {path.name for path in trained.iterdir()} == files | pictures
    for path in trained.glob("*.pt"):
        torch.load(path, weights_only=True)
    for stage in STAGES:
        trained_on = load_part(trained / f"{part(stage)}.pt").trained
        assert trained_on["steps"] == 2 and trained_on["data"] == "shapes"
        rows = log(trained / f"{part(stage)}.csv")
        assert [row["step"] for row in rows] == ["1", "2"]
        assert all(float(row[key]) >= 0 for row in rows for key in ("loss", "validation", "lr"))


def test_all_parts_of_a_run_are_of_one_clip_and_draw(trained, capsys):
    model = UnCLIP.load(trained)
    assert model.decoder.clip_id == model.clip.clip_id and len(model.upsamplers) == 1
    for prior in ("diffusion", "ar", "text", "none"):
        assert model.generate("a red cube", 1, prior=prior).shape == (1, 3, 64, 64)
    assert capsys.readouterr() == ("", "")


def test_a_prior_shows_pictures_if_there_is_a_decoder(call, copied):
    for stage in ("prior", "ar-prior"):
        assert call("--stage", stage, "--out", copied, "--restart")[0] == 0
        assert (copied / f"{part(stage)}.png").exists()


def test_a_finished_run_says_so_and_trains_no_more(call, copied, monkeypatch):
    before = {path: path.read_bytes() for path in copied.iterdir()}
    for stage in STAGES:
        monkeypatch.setattr(train.STAGES[stage], "loss", None)
    status, err = call("--out", copied)
    assert status == 0 and sum("finished already" in line for line in err) == len(STAGES)
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


@pytest.mark.parametrize("stage, lr, steps", [("clip", 3e-3, 60), ("decoder", 1e-2, 25)])
def test_the_loss_falls(call, copied, monkeypatch, stage, lr, steps):
    monkeypatch.setattr(train, "validate", lambda *_: 0.0)               # these take long
    monkeypatch.setattr(train.STAGES[stage], "watch", lambda *_: None)
    argv = ["--stage", stage, "--lr", lr, "--batch-size", 16, "--out", copied, "--restart"]
    assert call(*argv, steps=steps)[0] == 0
    losses = [float(row["loss"]) for row in log(copied / f"{stage}.csv")]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert len(losses) == steps and last < 0.8 * first, (first, last)


# ---- Stopping and going on -----------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(call, trained, tmp_path, stage):
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
        shutil.copy(trained / "clip.pt", folder) if stage in OF_CLIP else None
    argv = ["--stage", stage, "--seed", 3, "--steps", 4, "--out"]
    assert call(*argv, "whole")[0] == 0
    number = signal.SIGTERM if stage == "decoder" else signal.SIGINT
    status, err = interrupted(call, [*argv, "parts"], 2, number)
    assert status == 130 and "stopped at step 2" in err[-1]
    assert load_part(f"parts/{part(stage)}.pt").trained["steps"] == 2      # to be used meanwhile
    status, err = call(*argv, "parts")
    assert status == 0 and any("step 2 of 4: going on" in line for line in err)
    whole, parts = (torch.load(f"{folder}/{part(stage)}.state.pt", weights_only=True)
                    for folder in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    for name in ("model", "ema"):
        assert same_bits(whole[name], parts[name])
    for k, moments in whole["optimizer"]["state"].items():
        assert same_bits(moments, parts["optimizer"]["state"][k])
    assert torch.equal(whole["generator"], parts["generator"])
    assert same_bits(*(weights(f"{folder}/{part(stage)}.pt") for folder in ("whole", "parts")))
    rows = log(f"parts/{part(stage)}.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]


def test_a_signal_in_the_last_step_ends_the_command_too(call):
    assert interrupted(call, ["--out", "run"], 2)[0] == 130
    assert os.path.exists("run/clip.pt") and not os.path.exists("run/prior.csv")


def test_a_signal_before_training_ends_it_without_a_traceback(call, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "load", interrupt)
    assert call("--stage", "clip", "--out", "run") == (130, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_heeded_and_their_handlers_put_back(number):
    before = signal.getsignal(number)
    with train.Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)                                     # impatience does no harm
    assert stop.asked and signal.getsignal(number) == before


def test_the_last_step_is_saved_though_the_part_was_saved_before(call, copied):
    """By a save on the way, or by an earlier run: a finished part is that of the last step."""
    before = weights(copied / "decoder.pt")
    assert call("--stage", "decoder", "--out", copied, "--restart", steps=3)[0] == 0
    state = torch.load(copied / "decoder.state.pt", weights_only=True)
    assert state["step"] == 3 and load_part(copied / "decoder.pt").trained["steps"] == 3
    assert same_bits(weights(copied / "decoder.pt"), state["ema"])
    assert not same_bits(weights(copied / "decoder.pt"), before)


def test_a_run_that_is_killed_goes_on_from_the_last_save(call, copied, monkeypatch):
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)                       # at every step
    update_ema, steps = train.State.update_ema, []

    def kill(state, decay):
        update_ema(state, decay)
        steps.append(state.step)
        if len(steps) == 3:
            raise MemoryError
    monkeypatch.setattr(train.State, "update_ema", kill)
    argv = ["--stage", "decoder", "--out", copied, "--seed", 5, "--steps", 4]
    with pytest.raises(MemoryError):
        call(*argv, "--restart")
    assert call(*argv)[0] == 0 and steps == [1, 2, 3, 3, 4]
    assert not list(copied.glob("*.tmp"))


def test_another_configuration_is_refused_and_the_state_stays(call, copied):
    before = {path: path.read_bytes() for path in copied.iterdir()}
    for flag, value, word in (("--lr", 0.5, "lr was 0.001, now 0.5"), ("--seed", 1, "seed"),
                              ("--steps", 3, "steps was 2, now 3"), ("--batch-size", 9, "batch"),
                              ("--limit", 47, "limit was 48, now 47")):
        status, err = call("--stage", "prior", "--out", copied, flag, value)
        assert status == 2 and len(err) == 1, err
        assert "--restart" in err[0] and "prior.state.pt" in err[0] and word in err[0]
    assert {path: path.read_bytes() for path in copied.iterdir()} == before


def of_another_version(state):
    del state["model"][next(iter(state["model"]))]


def of_other_captions(state):
    state["tokenizer"]["merges"].pop()


@pytest.mark.parametrize("spoil", [of_another_version, of_other_captions, dict.clear])
def test_a_state_that_does_not_fit_is_refused(call, copied, spoil):
    path = copied / "clip.state.pt"
    state = torch.load(path, weights_only=True)
    spoil(state)
    torch.save(state, path)
    status, err = call("--stage", "clip", "--out", copied)
    assert status == 2 and len(err) == 1 and "--restart" in err[0] and str(path) in err[0]


def test_restart_begins_anew(call, copied):
    argv = ["--stage", "decoder", "--out", copied, "--seed", 7]
    status, err = call(*argv, "--restart")
    assert status == 0 and not any("going on" in line or "already" in line for line in err)
    assert load_part(copied / "decoder.pt").trained["seed"] == 7
    rows = log(copied / "decoder.csv")
    assert [row["step"] for row in rows] == ["1", "2"]                   # the old log is gone
    assert call(*argv)[0] == 0                                           # and it is finished now


# ---- CLIP and what is learnt on it ---------------------------------------------------------------

def test_a_missing_clip_is_named_with_the_command_that_makes_it(call):
    for stage in OF_CLIP:
        status, err = call("--stage", stage, "--out", "run")
        assert status == 2 and len(err) == 1
        assert "run/clip.pt" in err[0] and "--stage clip" in err[0] and not os.path.exists("run")


def test_a_stage_in_an_empty_folder_takes_the_shipped_clip_and_says_so(
        call, tiny_weights, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_weights, tmp_path / "weights" / "shapes")
    for module in (train, unclip):
        monkeypatch.setattr(module, "SHIPPED", tmp_path / "weights")
    status, err = call("--stage", "prior", "--out", "run")
    assert status == 0 and "no clip.pt in run" in err[0] and "weights/shapes/clip.pt" in err[0]
    assert sorted(os.listdir("run")) == ["prior.csv", "prior.png", "prior.pt", "prior.state.pt"]
    assert load_part("run/prior.pt").clip_id == "tiny"
    model = UnCLIP.load("run")                                           # the rest is shipped
    assert model.priors["diffusion"].config.width == TINY["prior"]["width"]
    assert model.generate("a red cube", 1, upsample=False).shape == (1, 3, 32, 32)


def test_a_clip_for_other_pictures_is_refused(call, copied):
    status, err = call("--stage", "prior", "--size", "base", "--out", copied, "--restart")
    assert status == 2 and len(err) == 1 and "32" in err[0] and "--stage clip" in err[0]


def test_a_retrained_clip_is_another_one(call, copied):
    old = load_part(copied / "clip.pt").clip_id
    assert call("--stage", "clip", "--out", copied, "--restart")[0] == 0
    new = load_part(copied / "clip.pt").clip_id
    assert old != new
    with pytest.raises(ValueError, match=f"belongs to another CLIP.*{old}.*{new}"):
        UnCLIP.load(copied)
    status, err = call("--stage", "decoder", "--out", copied)
    assert status == 2 and "--restart" in err[0] and old in err[0] and new in err[0]


def test_a_clip_that_went_on_learning_is_another_one(call):
    argv = ["--stage", "clip", "--out", "run"]
    interrupted(call, argv, 1)
    early = load_part("run/clip.pt").clip_id
    assert call(*argv)[0] == 0
    final = load_part("run/clip.pt").clip_id
    assert early != final
    os.unlink("run/clip.pt")
    assert call(*argv)[0] == 0 and load_part("run/clip.pt").clip_id == final    # the same weights


@pytest.mark.parametrize("stage", OF_CLIP)
def test_clip_is_frozen(trained, tmp_path, monkeypatch, stage):
    shutil.copy(trained / "clip.pt", tmp_path)
    run = settings(stage, out=tmp_path)
    before, file = copy.deepcopy(run.clip.state_dict()), (tmp_path / "clip.pt").read_bytes()
    assert train.train(run)
    assert same_bits(run.clip.state_dict(), before) and not run.clip.training
    assert all(p.grad is None and not p.requires_grad for p in run.clip.parameters())
    assert (tmp_path / "clip.pt").read_bytes() == file
    state = torch.load(tmp_path / f"{part(stage)}.state.pt", weights_only=True)
    assert not any("clip" in name for name in state["model"])


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_z_i_is_whitened_by_the_training_embeddings(trained, tmp_path, stage):
    shutil.copy(trained / "clip.pt", tmp_path)
    fitted = train.STAGES[stage](settings(stage, out=tmp_path))
    coordinates = fitted.model.whitening(fitted.data[0].z_i[0])
    assert coordinates.mean(dim=0).abs().max() < 1e-4
    assert (coordinates[:, 0].square().mean() * 16).item() == pytest.approx(1, abs=0.05)
    saved = load_part(trained / f"{stage}.pt").whitening
    assert torch.allclose(saved.spread, fitted.model.whitening.spread, atol=1e-5)


def test_the_decoder_begins_to_read_where_clip_ends(trained, tmp_path):
    shutil.copy(trained / "clip.pt", tmp_path)
    run = settings("decoder", out=tmp_path)
    text = train.STAGES["decoder"](run).model.text
    assert same_bits(text.state_dict(), run.clip.text.state_dict())


# ---- --init --------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_init_begins_with_given_weights(call, trained, stage):
    status, err = call("--stage", stage, "--init", trained, "--lr", 1e-30, "--out", "run",
                       steps=1)
    assert status == 0 and any(f"beginning with {trained}" in line for line in err)
    given, now = (load_part(f"{folder}/{part(stage)}.pt") for folder in (trained, "run"))
    for name, value in now.state_dict().items():
        assert torch.allclose(value, given.state_dict()[name], atol=1e-20), name
    assert now.trained["init"] == given.trained and given.trained["init"] is None
    assert (given.clip_id == now.clip_id) == (stage != "clip")
    assert any("no clip.pt in run" in line for line in err) == (stage in OF_CLIP)


def test_init_keeps_the_tokens_that_the_weights_know(call, trained):
    """Another limit, another tokenizer: of as many tokens, but in another order."""
    assert call("--stage", "clip", "--init", trained, "--out", "run", limit=40, steps=1)[0] == 0
    given, now = (load_part(f"{folder}/clip.pt").tokenizer for folder in (trained, "run"))
    assert now.merges == given.merges and now.words >= given.words


def test_init_that_does_not_fit_is_refused(call, trained, tmp_path, monkeypatch):
    wider = dict(TINY, decoder=dict(TINY["decoder"], channels=(16,)))
    monkeypatch.setitem(train.SIZES, "small", wider)
    status, err = call("--stage", "decoder", "--init", trained, "--out", "run")
    assert status == 2 and "do not fit" in err[-1] and f"{trained}/decoder.pt" in err[-1]
    assert "\n" not in err[-1] and not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("spoil, word", [
    ("missing", "no such weights"), ("another's", "another CLIP"), ("misnamed", "not a decoder")])
def test_init_that_is_wrong_is_refused(call, copied, tmp_path, spoil, word):
    path = copied / "decoder.pt"
    if spoil == "missing":
        path.unlink()
    elif spoil == "misnamed":
        shutil.copy(copied / "prior.pt", path)
    else:
        torch.save({**torch.load(path), "clip_id": "another"}, path)
    status, err = call("--stage", "decoder", "--init", copied, "--out", "run")
    assert status == 2 and word in err[-1] and str(path) in err[-1]
    assert not os.path.exists("run")


def test_init_of_all_stages_is_refused_at_once(call, trained):
    status, err = call("--init", trained, "--out", "run")
    assert status == 2 and len(err) == 1 and "--stage" in err[0] and not os.path.exists("run")


# ---- The parts of the machine --------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 2, 10, 100, 2500])
def test_the_learning_rate_warms_up_and_ends_near_zero(steps):
    recipe = train.Recipe(steps, 1, lr=0.1)
    rates = [train.learning_rate(k, recipe) for k in range(steps)]
    peak, warm_up = rates.index(max(rates)), max(1, steps // 50)
    assert max(rates) == pytest.approx(0.1) and abs(peak - warm_up) <= 1
    assert rates[0] == pytest.approx(0.1 / warm_up) and min(rates) > 0
    assert rates[:peak + 1] == sorted(rates[:peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert steps < 10 or rates[-1] < 0.1 * 3 / steps


def state_of(model, recipe=train.Recipe(steps=1, batch_size=1, lr=0.1)):
    return train.State(SimpleNamespace(recipe=recipe, device=torch.device("cpu"),
                                       args=SimpleNamespace(seed=0)), model)


def averaged(steps, decay=0.999):
    """The average of a weight that is 0 at first and 1 after each of these steps."""
    state = state_of(nn.Linear(1, 1))
    nn.init.zeros_(state.ema.weight)
    nn.init.ones_(state.model.weight)
    for state.step in steps:
        state.update_ema(decay)
    return state.ema.weight.item()


def test_the_average_of_a_short_run_is_not_its_initialisation():
    assert averaged(range(1, 6)) > 0.99
    assert 0.999 ** 5 > 0.99                                  # what would be left without warm-up


def test_the_average_of_a_long_run_is_slow():
    assert averaged([20000]) == pytest.approx(0.001, rel=1e-3)


def test_the_average_in_a_checkpoint_is_near_what_was_learnt(copied, call):
    assert call("--stage", "decoder", "--lr", 0.01, "--out", copied, "--restart", steps=6)[0] == 0
    state = torch.load(copied / "decoder.state.pt", weights_only=True)
    name = "unet.out.weight"                                  # begins at zero
    learnt, average = state["model"][name], state["ema"][name]
    assert learnt.norm() > 0 and (average - learnt).norm() < 0.5 * learnt.norm()
    assert same_bits(state["ema"], weights(copied / "decoder.pt"))


def test_weight_decay_is_for_matrices():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    state = state_of(model, train.Recipe(1, 1, lr=0.1, weight_decay=0.05))
    matrices, vectors = state.optimizer.param_groups
    assert matrices["weight_decay"] == 0.05 and [p.dim() for p in matrices["params"]] == [2]
    assert vectors["weight_decay"] == 0 and {p.dim() for p in vectors["params"]} == {1}


def pictures(N=20, flips=True, size=32):
    """N random pictures with one to three captions each, some of them shared."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, size, size), generator=generator, dtype=torch.uint8)
    captions = [["a picture", f"number {i}", f"item {i % 5}"][:1 + i % 3] for i in range(N)]
    return Dataset(images, captions, {}, [], flips)


def a_clip(captions):
    torch.manual_seed(0)
    tokenizer = Tokenizer.learn(captions, vocab=300, context=16)
    clip = CLIP(CLIPConfig(vocab=tokenizer.vocab, context=16, **TINY["clip"]))
    clip.tokenizer = tokenizer
    return clip.eval()


@pytest.fixture(scope="module", params=[True, False], ids=["flips", "no flips"])
def embedded(request):
    """(data set, CLIP, Pairs with embeddings)"""
    d = pictures(flips=request.param)
    clip = a_clip([caption for captions in d.captions for caption in captions])
    return d, clip, train.Pairs(d, clip.tokenizer, "cpu").embed(clip, batch=7)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_cached_embeddings_are_those_of_clip(embedded):
    d, clip, pairs = embedded
    assert pairs.z_i.shape == (1 + d.flips, 20, 16)
    assert torch.allclose(pairs.z_i[0], clip.encode_image(to_float(d.images)), atol=1e-6)
    if d.flips:
        mirrored = clip.encode_image(to_float(d.images.flip(3)))
        assert torch.allclose(pairs.z_i[1], mirrored, atol=1e-6)
        assert not torch.allclose(pairs.z_i[0], mirrored, atol=1e-3)        # control
    for i, row, _ in zip(*pairs.draw(50, generator())):
        caption = pairs.texts[row]
        assert torch.allclose(pairs.z_t[row], clip.encode_text(clip.tokenizer([caption]))[0],
                              atol=1e-6)


@torch.no_grad()
def test_a_mirrored_picture_comes_with_its_own_embedding(embedded):
    d, clip, pairs = embedded
    i, _, mirrored = pairs.draw(100, generator())
    x = pairs.pictures(i, mirrored)
    assert 0 < mirrored.float().mean() < 1 if d.flips else not mirrored.any()
    assert torch.allclose(pairs.z_i[mirrored.long(), i], clip.encode_image(x), atol=1e-6)


def test_a_clip_in_training_is_not_used_for_embeddings():
    d = pictures(2)
    clip = a_clip(d.captions[0]).train()
    with pytest.raises(AssertionError):
        train.Pairs(d, clip.tokenizer, "cpu").embed(clip)


def test_an_item_is_drawn_with_its_own_captions_alike_often(embedded):
    d, _, pairs = embedded
    i, row, mirrored = pairs.draw(20000, generator())
    drawn = Counter(zip(i.tolist(), (pairs.texts[r] for r in row.tolist())))
    assert drawn.keys() == {(k, c) for k, captions in enumerate(d.captions) for c in captions}
    for (k, caption), n in drawn.items():
        assert n / 1000 * len(d.captions[k]) == pytest.approx(1, abs=0.3)
    assert mirrored.float().mean() == pytest.approx(0.5 * d.flips, abs=0.02)


def test_drawing_is_a_function_of_the_generator(embedded):
    pairs = embedded[2]
    a, b, c = (pairs.draw(30, generator(seed)) for seed in (0, 0, 1))
    assert all(map(torch.equal, a, b)) and not torch.equal(a[0], c[0])


def test_shifting_by_nothing_is_the_identity():
    x = torch.randn(5, 3, 12, 10)
    assert torch.equal(train.shifted(x, generator(), most=0), x)


def test_shifting_moves_each_picture_on_its_own_and_repeats_the_border():
    x = torch.arange(12.).view(12, 1) * 100 + torch.arange(10.)          # row and column, readable
    y = train.shifted(x.expand(200, 3, 12, 10), generator(), most=4)
    assert y.shape == (200, 3, 12, 10) and torch.equal(y[:, 0], y[:, 2])
    middle = y[:, 0, 6, 5].long()
    dy, dx = middle // 100 - 6, middle % 100 - 5
    assert dy.unique().tolist() == dx.unique().tolist() == list(range(-4, 5))
    assert len({*zip(dy.tolist(), dx.tolist())}) > 60                    # not along a diagonal
    for k in range(20):
        rows = (torch.arange(12) + dy[k]).clamp(0, 11)
        columns = (torch.arange(10) + dx[k]).clamp(0, 9)
        assert torch.equal(y[k, 0], x[rows][:, columns])


def test_only_clip_sees_shifted_pictures_and_only_in_training(monkeypatch, embedded):
    d, clip, pairs = embedded
    calls = []
    monkeypatch.setattr(train, "shifted", lambda x, _: calls.append(1) or x)
    stage = SimpleNamespace()
    train.ClipStage.loss(stage, clip, pairs, 4, generator())
    assert not calls
    train.ClipStage.loss(stage, copy.deepcopy(clip).train(), pairs, 4, generator())
    assert len(calls) == d.flips


# ---- Data of one's own ---------------------------------------------------------------------------

@pytest.fixture
def own(tmp_path):
    """A folder of 30 pictures, two of them for validation, each with one very long caption."""
    folder = tmp_path / "own"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for i, image in enumerate(pictures(30).images):
            data.write_png(folder / f"{i}.png", image)
            words = " ".join(f"{w}{i}é" for w in "abcdefghijklmnopqrstuvwxyz" * 4)
            file.write(f'{{"file_name": "{i}.png", "text": "{words}"}}\n')
    return folder


def test_few_pictures_with_long_captions_train_every_stage(call, own):
    status, err = call("--data", "folder", "--data-dir", own, "--out", "run", steps=1)
    assert status == 0, err
    argv = ["--data", "folder", "--data-dir", own, "--out", "run", "--restart"]
    assert call(*argv, "--stage", "prior", steps=1)[0] == 0 and os.path.exists("run/prior.png")
    assert load_part("run/clip.pt").config.context == 77


def test_cifar10_has_no_upsampler(call):
    status, err = call("--data", "cifar10", "--stage", "upsampler", "--out", "run")
    assert status == 0 and len(err) == 1 and "left out" in err[0] and not os.path.exists("run")


# ---- Faults --------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, words", [
    (["--steps", "0"], ["--steps 0"]), (["--steps", "1.5"], ["--steps", "1.5"]),
    (["--batch-size", "0"], ["--batch-size 0"]), (["--limit", "-3"], ["--limit -3"]),
    (["--lr", "nan"], ["--lr nan"]), (["--lr", "0"], ["--lr 0"]), (["--lr", "inf"], ["--lr inf"]),
    (["--seed", "-1"], ["--seed -1"]), (["--seed", str(2**64)], [f"--seed {2**64}"]),
    (["--device", "abacus"], ["--device abacus", "cpu"]),
    (["--device", "meta"], ["--device meta", "cpu"]),
    (["--stage", "judge"], ["--stage", "judge", "decoder"]),
    (["--size", "huge"], ["--size", "huge", "base"]), (["--data", "faces"], ["--data", "faces"]),
    (["--colour", "red"], ["--colour"]), (["--data", "coco"], ["--data coco", "--data-dir"]),
    (["--data", "folder"], ["--data folder", "--data-dir"]),
    (["--data", "folder", "--data-dir", "nowhere"], ["--data-dir nowhere"]),
    (["--data", "coco", "--data-dir", "nowhere"], ["--data-dir nowhere"]),
    (["--data", "cifar10", "--data-dir", "nowhere"], ["nowhere"]),
    (["--stage", "decoder", "--init", "nowhere"], ["--init nowhere"]),
    (["--stage", "clip", "--init", "."], ["clip.pt", "--init"]),
    (["--out", "file"], ["--out file"]), (["--out", "file/below"], ["--out file/below"])])
def test_faults(call, argv, words):
    open("file", "w").close()
    status, err = call("--out", "run", *argv)
    assert status == 2 and len(err) == 1, err
    assert all(word in err[0] for word in words), err
    assert not os.path.isdir("run") or not os.listdir("run")


def test_a_damaged_clip_is_refused(call, copied):
    os.truncate(copied / "clip.pt", 5000)
    status, err = call("--stage", "prior", "--out", copied, "--restart")
    assert status == 2 and len(err) == 1 and "clip.pt" in err[0]


def test_a_loss_that_is_no_number_is_told_and_nothing_is_saved(call, copied, monkeypatch):
    nan = lambda *_: torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(train.DecoderStage, "loss", nan)
    before = (copied / "decoder.pt").read_bytes()
    status, err = call("--stage", "decoder", "--out", copied, "--restart")
    assert status == 2 and "nan" in err[-1] and "--lr" in err[-1]
    assert (copied / "decoder.pt").read_bytes() == before


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        train.main(["--help"])
    out, err = capsys.readouterr()
    assert done.value.code == 0 and err == ""
    for flag in ("--stage", "--data", "--data-dir", "--limit", "--size", "--steps", "--batch-size",
                 "--lr", "--seed", "--device", "--out", "--init", "--restart", "default: shapes"):
        assert flag in out, flag
