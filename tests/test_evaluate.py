"""The experiments run on tiny weights, and the page holds what they returned."""
import shutil

import pytest
import torch

from evaluate import EXPERIMENTS, main, table
from judge import wilson


@pytest.fixture
def weights(tiny_weights, tmp_path):
    folder = shutil.copytree(tiny_weights, tmp_path / "weights")
    shutil.copy("weights/shapes/judge.pt", folder)
    return folder


@pytest.mark.parametrize("name", ["judge", "clip", "codes"])
def test_an_experiment_writes_its_section_and_its_figures(name, weights, tmp_path):
    out = tmp_path / "results"
    assert main(["--only", name, "--n", "2", "--weights", str(weights), "--out", str(out)]) == 0
    page = (out / "README.md").read_text(encoding="utf-8")
    assert f"## {name}: " in page and f"--only {name} --seed 0 --n 2" in page and "minutes on" in page
    figures = [line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")]
    assert all((out / figure).exists() for figure in figures)


def test_an_experiment_that_runs_again_replaces_its_own_section_alone(weights, tmp_path):
    for name, n in ("clip", 4), ("judge", 4), ("clip", 6):
        assert main(["--only", name, "--n", str(n), "--weights", str(weights),
                     "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.count("## clip: ") == page.count("## judge: ") == 1 and "--n 6" in page
    assert page.index("## judge") < page.index("## clip") if \
        [*EXPERIMENTS].index("judge") < [*EXPERIMENTS].index("clip") else True


def test_a_table_has_shares_with_their_intervals_and_blanks_where_a_row_has_none():
    right = torch.tensor([True, True, False, True])
    low, high = wilson(right)
    lines = table([{"a": "x", "b %": right}, {"a": 1234, "c": 0.5}]).splitlines()
    assert lines[0] == "| a | b % | c |"
    assert lines[2] == f"| x | 75.0 ({100 * low:.1f}–{100 * high:.1f}) |  |"
    assert lines[3] == "| 1,234 |  | 0.5 |"


@pytest.mark.parametrize("line, words", [
    ("--only nothing", ["--only", "nothing"]), ("--only cifar10", ["--only", "cifar10"]),
    ("--n 1", ["--n", "2 or more"]), ("--seed -1", ["--seed", "0 or more"]),
    ("--weights nowhere", ["nowhere", "train.py"])])
def test_a_bad_command_ends_in_one_line_and_status_2(line, words, capsys, tmp_path):
    assert main([*line.split(), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and all(word in err[0] for word in words)
    assert not (tmp_path / "out").exists()
