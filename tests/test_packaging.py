"""Distributions hold what the tree holds: an editable install would hide a package that `pyproject.toml` forgot."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"mla_compile": "mla_compile", "passes": "mla_compile/passes", "runtime": "mla_compile/runtime"}
SHIPPED = {".py", ".typed", ".cu", ".cpp", ".h", ".html"}


DOCUMENTS = ("benchmarks", "docs", "examples", "tests")
ALONE = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt")


def build(kind, tree, dist):
    """Build a distribution of a tree without an environment of its own, and return the file."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(dist), str(tree)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = dist.iterdir()
    return made


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree, where no stale `build/` folder can add files."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "MANIFEST.in", *ALONE):
        shutil.copy(ROOT / name, tree)
    for folder in (*FOLDERS, *DOCUMENTS):  # links stay links: those of `make dev` must not put anything in twice
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def wheel_names(tree, tmp_path_factory):
    return names_in(build("wheel", tree, tmp_path_factory.mktemp("dist")))


@pytest.fixture(scope="module")
def unpacked(tree, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(build("sdist", tree, tmp_path_factory.mktemp("dist"))) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def test_wheel_from_the_source_distribution_holds_the_same(unpacked, wheel_names, tmp_path_factory):
    assert sorted(names_in(build("wheel", unpacked, tmp_path_factory.mktemp("dist")))) == sorted(wheel_names)


def test_source_distribution_holds_documents_examples_and_tests(unpacked, tree):
    kept = [tree / name for name in ALONE] + [p for folder in DOCUMENTS for p in (tree / folder).rglob("*")]
    expected = {path.relative_to(tree) for path in kept if path.is_file()}
    held = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert expected <= held
    assert not {path for path in held if path.suffix == ".pyc" or "__pycache__" in path.parts}


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
