"""What the tests of the passes share: hand-written models, captured once per session."""

from __future__ import annotations

import pytest
import zoo

from mla_compile.program import Program


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
