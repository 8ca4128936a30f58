"""The arrows between the files: imports only ever point down, and nothing imports a leaf."""
import ast
from pathlib import Path

import pytest

MAY_IMPORT = {
    "diffusion": set(), "clip_tiny": set(), "shapes": set(), "data": {"shapes"},
    "prior": {"diffusion", "clip_tiny"}, "decoder": {"diffusion", "clip_tiny"},
    "checkpoints": {"clip_tiny", "prior", "decoder"},
    "unclip": {"checkpoints", "clip_tiny", "prior", "decoder", "diffusion"},
    "judge": {"shapes", "data", "checkpoints"}}
LEAVES = {"train", "sample", "evaluate"}
ROOT = Path(__file__).parent.parent


def imported(path):
    """The files of ours that one of them imports, at whatever depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & (MAY_IMPORT.keys() | LEAVES)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_file_imports_only_what_is_below_it(name):
    assert imported(ROOT / f"{name}.py") <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_a_leaf_imports_no_other_leaf(name):
    assert not imported(ROOT / f"{name}.py") & LEAVES


def test_there_are_twelve_files_and_no_others():
    files = {path.stem for path in ROOT.glob("*.py")} - {"conftest"}
    assert files == MAY_IMPORT.keys() | LEAVES and len(files) == 12
