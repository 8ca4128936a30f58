"""The arrows between the files: imports only ever point down, and nothing imports a leaf."""
import ast
import re
import sys

from conftest import ROOT

MAY_IMPORT = {
    "diffusion": set(), "clip_tiny": set(), "shapes": set(), "data": {"shapes"},
    "prior": {"diffusion", "clip_tiny"}, "decoder": {"diffusion", "clip_tiny"},
    "checkpoints": {"clip_tiny", "prior", "decoder"},
    "unclip": {"checkpoints", "clip_tiny", "prior", "decoder", "diffusion"},
    "judge": {"shapes", "data", "checkpoints"}}
LEAVES = {"train", "sample", "evaluate"}
PACKAGES = {"torch", "numpy", "PIL", "tqdm"}


def imported(path):
    """The top-level names of what a file imports, at whatever depth of its code."""
    nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_a_file_imports_those_below_it_and_four_packages():
    for file in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        below = {"conftest", "pytest"} | LEAVES if "test" in file.stem else set()
        below |= MAY_IMPORT.get(file.stem, MAY_IMPORT.keys())        # a leaf's: all but leaves
        assert imported(file) <= below | PACKAGES | sys.stdlib_module_names, file.name


def test_lines_have_at_most_100_columns_and_the_readme_names_every_file():
    readme = (ROOT / "README.md").read_text("utf-8")
    for file in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]:
        assert all(len(line) <= 100 for line in file.read_text("utf-8").splitlines()), file.name
        assert f"`{file.name}`" in readme or "test" in file.stem, file.name


def test_every_picture_and_page_that_a_page_links_to_is_there():
    for page in ROOT / "README.md", ROOT / "results" / "README.md":
        linked = re.findall(r'(?:\]\(|src=")([\w./-]+)[)"]', page.read_text("utf-8"))
        assert len(linked) > 6 and [x for x in linked if not (page.parent / x).is_file()] == []


def test_the_readme_installs_the_torch_that_the_requirements_pin():
    torch_pin, *_ = (ROOT / "requirements.txt").read_text("utf-8").split()
    assert f"pip install {torch_pin} --index-url" in (ROOT / "README.md").read_text("utf-8")
