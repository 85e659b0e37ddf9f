"""What tests of doors have in common: damaged files, a hostile pickle, and the command line to show them to."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mla_compile.cli import main

__all__ = ["CODES", "EXAMPLES", "Hostile", "damages", "entrance", "few", "fuzzed", "knock"]

EXAMPLES = int(os.environ.get("MLA_COMPILE_FUZZ", "12"))
fuzzed = settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(fuzzed, max_examples=max(EXAMPLES // 3, 4))
"""Of what takes long."""
CODES = {0, 2, 3}
"""Done, cannot be read, refused: what may become of a file."""


@contextlib.contextmanager
def entrance(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, for one example."""
    folder = tmp_path / "example"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder


def knock(*words: object, codes: set[int] = CODES) -> str:
    """Run the command line in this process; an exception that escapes fails the test."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main([str(w) for w in words])
    told = [line for line in err.getvalue().splitlines() if line.startswith("mla-compile: ")]
    assert code in codes, err.getvalue()
    assert "Traceback" not in err.getvalue()
    assert (code == 0) == (not told)
    return told[0] if told else ""


def damages(whole: bytes) -> st.SearchStrategy[bytes]:
    """A file cut short, overwritten in one place, or of something else."""
    size = len(whole)
    cut = st.integers(0, size - 1).map(lambda n: whole[:n])
    place = st.integers(0, size - 1)
    struck = st.builds(
        lambda at, new: whole[:at] + new + whole[at + len(new) :], place, st.binary(min_size=1, max_size=40)
    )
    return st.one_of(cut, struck, st.binary(max_size=200))


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)
