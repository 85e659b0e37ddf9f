"""What all tests share: pico models captured once per session, golden files, and reproducible property tests."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hypothesis
import models
import permissions
import pytest
import torch
from converted import Conversions
from torch import nn

from mla_compile.passes.recognise import Recognition, recognise
from mla_compile.program import Program
from mla_compile.site import AttentionSite
from mla_compile.sources import frontend
from mla_compile.sources.capture import capture

GOLDEN = Path(__file__).parent / "golden"

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
# The same examples on every run, and no claim about how long one takes.
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True)
hypothesis.settings.load_profile("reproducible")


@dataclass(frozen=True)
class Captured:
    """A model, and what the compiler makes of it."""

    module: nn.Module
    program: Program

    @cached_property
    def recognition(self) -> Recognition:
        return recognise(self.program)

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """The attention layers of a model that must convert."""
        assert not self.recognition.rejections
        assert self.recognition.sites
        return self.recognition.sites


class Programs:
    """Models by name, captured at first use: an export takes seconds."""

    def __init__(self, factories: dict[str, Callable[[], nn.Module]]) -> None:
        self._factories = factories
        self._captured: dict[str, Captured] = {}

    def __getitem__(self, name: str) -> Captured:
        if name not in self._captured:
            module = self._factories[name]()
            self._captured[name] = Captured(module, capture(module, models.example(module)))
        return self._captured[name]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics are kept away from the user's own, in subprocesses too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLA_COMPILE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def binding_permissions() -> Iterator[None]:
    """Who may read and write what is as for an ordinary user, even for root."""
    with permissions.binding():
        yield


@pytest.fixture(scope="module")
def read_once() -> Iterator[None]:
    """Every model is read once for all commands of a module that are given it with the same options."""
    read, signature = functools.cache(frontend.load_any), inspect.signature(frontend.load_any)

    @functools.wraps(frontend.load_any)
    def load_any(*positional: Any, **named: Any) -> frontend.AnyProgram:
        given = signature.bind(*positional, **named)
        given.apply_defaults()
        given.arguments["source"] = str(given.arguments["source"])
        return read(*given.args, **given.kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontend, "load_any", load_any)
        yield


@pytest.fixture(scope="session")
def programs() -> Programs:
    """Every pico model; tests must leave the models and programs as they are."""
    others = {
        "qwen3": models.qwen3,
        "gemma2": models.gemma2,
        "bidirectional": lambda: models.handwritten(models.BidirectionalGPT),
        "chunks": lambda: models.handwritten(models.ChunkedGPT),
    }
    return Programs({**models.CONVERTIBLE, **others})


@pytest.fixture(scope="session")
def conversions(programs: Programs) -> Conversions:
    """Pico models converted for stock DeepSeek code; tests must leave them as they are."""
    return Conversions(programs)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from the present output")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with a file in tests/golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.is_file(), "run pytest with --update-golden to write it"
        assert text == path.read_text()

    return compare
