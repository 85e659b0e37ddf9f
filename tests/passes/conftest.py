"""What the tests of the passes share: hand-written models, captured once per session."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pytest
import zoo
from observed import observe_sites
from torch import Tensor

from mla_compile.passes.activations import SiteActivations
from mla_compile.program import Program
from mla_compile.site import AttentionSite


class ZooPrograms:
    """Tiny models of one attention layer by its class, captured at first use."""

    def __init__(self) -> None:
        self._captured: dict[type[zoo.Attention], Program] = {}

    def __getitem__(self, kind: type[zoo.Attention]) -> Program:
        if kind not in self._captured:
            self._captured[kind] = zoo.program_of(zoo.model(kind))
        return self._captured[kind]


@pytest.fixture(scope="session")
def zoo_programs() -> ZooPrograms:
    """Programs of hand-written models; tests must leave them as they are."""
    return ZooPrograms()


@dataclass(frozen=True)
class Mixed:
    """A model in which every layer is another attention, see ``zoo.MIXED``."""

    program: Program

    @cached_property
    def sites(self) -> tuple[AttentionSite, ...]:
        return zoo.sites_of(self.program)

    def look(self, ids: Tensor) -> list[SiteActivations]:
        """What every layer does on these tokens, and gradients."""
        return observe_sites(self.program, self.sites, gradients=True)(ids)


@pytest.fixture(scope="session")
def mixed() -> Mixed:
    """Captured once; tests must leave it as it is."""
    return Mixed(zoo.program_of(zoo.model(*zoo.MIXED.values())))
