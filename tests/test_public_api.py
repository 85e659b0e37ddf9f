"""What `mla_compile` promises to its users: every public name is there, documented, and means one thing."""

from __future__ import annotations

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


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mla_compile.nonsense
