"""The wheel holds what the tree holds: an editable install would hide a package that `pyproject.toml` forgot."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"mla_compile": "mla_compile", "passes": "mla_compile/passes", "runtime": "mla_compile/runtime"}
SHIPPED = {".py", ".typed", ".cu", ".cpp", ".h", ".html"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """Build the wheel from a copy of the tree, where no stale `build/` folder can add files, and list it."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in FOLDERS:  # links stay links: those of `make dev` must not put anything into the wheel twice
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    dist = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_every_file_of_the_tree(wheel_names):
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SHIPPED and not in_linked_folder(path)
    }
    assert {name for name in wheel_names if name.startswith("mla_compile/")} == expected


def in_linked_folder(path):
    """Whether a file is seen through one of `make dev`'s links (`rglob` follows links before Python 3.13)."""
    return any((ROOT / parent).is_symlink() for parent in path.relative_to(ROOT).parents)


def test_wheel_top_level_is_one_package(wheel_names):
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"mla_compile"}
    assert len(top) == 2


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_folder_is_not_importable_as_a_package_of_its_own(name):
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"import mla_compile.{name} instead" in done.stderr
