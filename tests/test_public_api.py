"""What `mla_compile` promises to its users: every public name is there, documented, and means one thing."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import mla_compile
from mla_compile import runtime


@pytest.mark.parametrize("name", mla_compile.__all__)
def test_public_name_resolves_and_is_documented(name):
    value = getattr(mla_compile, name)
    assert value.__name__ == name
    assert value.__module__.startswith("mla_compile.")
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}("), "that is the text a dataclass writes by itself"


@pytest.mark.parametrize("name", mla_compile.__all__)
def test_public_name_is_no_submodule(name):
    # Importing such a submodule would set the package's attribute and hide the public name behind the module.
    package = Path(mla_compile.__file__).parent
    assert not (package / f"{name}.py").exists()
    assert not (package / name).exists()


def test_version_is_the_installed_one():
    assert mla_compile.__version__ == version("mla-compile")


def test_dir_lists_names_before_their_first_use():
    assert {*mla_compile.__all__, "__version__"} <= set(dir(mla_compile))


def test_runtime_has_the_kernels_without_importing_them():
    """A part of the runtime costs what it costs by itself: the kernels import torch."""
    source = (
        "import sys, mla_compile.runtime as r; assert 'torch' not in sys.modules; print(r.latent_attention.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout == "mla_compile.runtime.kernels.op\n", done.stderr
    assert {*runtime.__all__} <= {*dir(runtime)}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = runtime.nonsense


@pytest.mark.parametrize("name", runtime.__all__)
def test_public_name_of_the_runtime_resolves_and_is_documented(name):
    value = getattr(runtime, name)
    assert value.__module__.startswith("mla_compile.runtime.")
    assert value.__doc__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mla_compile.nonsense


def modules():
    """Every module of ours by name, as a tree of syntax."""
    root = Path(__file__).parents[1]
    for folder, package in (
        ("mla_compile", "mla_compile"),
        ("passes", "mla_compile.passes"),
        ("runtime", "mla_compile.runtime"),
    ):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if parts[0] in ("passes", "runtime") and folder == "mla_compile":
                continue  # links that type checkers need
            name = ".".join((package, *(part for part in parts if part != "__init__")))
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def defined(tree):
    """Names that a module makes, and those that it says are for others; None if it says nothing."""
    names, shared = set(), None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)}
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            shared = set(ast.literal_eval(node.value))
    return names, shared


def test_modules_take_of_each_other_what_is_offered_from_where_it_is_made():
    trees = dict(modules())
    homes = {name: defined(tree) for name, tree in trees.items()}
    wrong = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module not in homes:
                continue
            made, shared = homes[node.module]
            for taken in (alias.name for alias in node.names):
                if taken in made and shared is not None and taken not in shared:
                    wrong.append(f"{name} takes {taken} of {node.module}, which does not offer it")
                if taken not in made and f"{node.module}.{taken}" not in homes and taken not in (shared or ()):
                    wrong.append(f"{name} takes {taken} of {node.module}, where it is not made")
    assert not wrong
