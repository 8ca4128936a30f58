"""The arrows between the files: imports only ever point down, and nothing imports a leaf."""
import ast
import sys

import pytest

from conftest import ROOT

MAY_IMPORT = {
    "diffusion": set(), "clip_tiny": set(), "shapes": set(), "data": {"shapes"},
    "prior": {"diffusion", "clip_tiny"}, "decoder": {"diffusion", "clip_tiny"},
    "checkpoints": {"clip_tiny", "prior", "decoder"},
    "unclip": {"checkpoints", "clip_tiny", "prior", "decoder", "diffusion"},
    "judge": {"shapes", "data", "checkpoints"}}
LEAVES = {"train", "sample", "evaluate"}
OURS = MAY_IMPORT.keys() | LEAVES
PACKAGES = {"torch", "numpy", "PIL", "tqdm"}


def imported(path):
    """The top-level names of what a file imports, at whatever depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_file_imports_those_below_it_and_four_packages(name):
    found = imported(ROOT / f"{name}.py")
    assert found & OURS <= MAY_IMPORT.get(name, OURS - LEAVES)         # of a leaf: all but leaves
    assert found - OURS <= set(sys.stdlib_module_names) | PACKAGES


def test_there_are_twelve_files_and_the_tests_need_pytest_and_no_other_package_more():
    assert {path.stem for path in ROOT.glob("*.py")} - {"conftest"} == OURS and len(OURS) == 12
    known = set(sys.stdlib_module_names) | OURS | PACKAGES | {"conftest", "pytest"}
    for file in [ROOT / "conftest.py", *(ROOT / "tests").glob("*.py")]:
        assert imported(file) <= known, file.name
