"""A pico model that was converted, trained on text that can be learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mla_compile
from mla_compile import Recipe, finetune
from training import MATCHING, SETTINGS, Trained, counting

pytest.importorskip("accelerate")


@pytest.fixture(scope="session")
def data() -> torch.Tensor:
    return counting(44)


@pytest.fixture(scope="session")
def compiled(programs):
    """At a small cache, and by weights alone: there is something to win."""
    exported = programs["llama-gqa"].program.exported
    return mla_compile.compile(exported, method="mha2mla", kv_rank=8, rope_dims=4, check=False)


@pytest.fixture(scope="session")
def converted(compiled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    compiled.save(folder)
    return folder


@pytest.fixture(scope="session")
def archive(programs, tmp_path_factory) -> Path:
    """The original, as a teacher."""
    path = tmp_path_factory.mktemp("original") / "original.pt2"
    torch.export.save(programs["llama-gqa"].program.exported, path)
    return path


@pytest.fixture(scope="session")
def matching(train, archive) -> Trained:
    """The same training towards a teacher."""
    return train(teacher=archive, **MATCHING)


@pytest.fixture(scope="session")
def train(converted, data, tmp_path_factory):
    """Train with settings changed; ``out`` goes on in a folder."""

    def run(out: Path | None = None, resume: bool = False, text: torch.Tensor = data, **changes: object) -> Trained:
        teacher = changes.pop("teacher", None)
        out = out or tmp_path_factory.mktemp("trained") / "model"
        recipe = Recipe(**{**SETTINGS, **changes})
        return Trained(out, finetune(converted, text, out, recipe, teacher=teacher, resume=resume))

    return run


@pytest.fixture(scope="session")
def plain(train) -> Trained:
    """The training that others are compared with."""
    return train()


@pytest.fixture(scope="session")
def worker(converted, data, tmp_path_factory):
    """Arguments of a process that trains as ``plain`` was."""
    text = tmp_path_factory.mktemp("text") / "windows.pt"
    torch.save(data, text)
    script = str(Path(__file__).parent / "worker.py")

    def arguments(out: Path, *options: str, **changes: object) -> list[str]:
        return [script, str(converted), str(out), str(text), json.dumps({**SETTINGS, **changes}), *options]

    return arguments
