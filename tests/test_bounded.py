"""Conversions by text with a store: the same weights from disk, tries that are not made twice, and bounded memory."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

from mla_compile.config import make_config
from mla_compile.disk.layer_store import Journal, LayerStore, store_folder
from mla_compile.disk.spill import Shelf, spilled
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.methods import METHODS
from mla_compile.passes.search import Divergence
from mla_compile.passes.task import Task

TEXT = models.tokens(8, 16, seed=3)
LAYER_BY_LAYER = Resources(whole=0, kept=0)


def converted(captured, method: str, store: LayerStore | None, resources: Resources = LAYER_BY_LAYER):
    config = make_config(method=method, cache_ratio=0.4, rope_dims=4 if method == "fisher" else None)
    return METHODS[method](Task(captured.program, captured.sites, (), config, TEXT, store=store, resources=resources))


def tensors(weights) -> dict[str, Tensor]:
    return {f.name: v for f in dataclasses.fields(weights) if isinstance(v := getattr(weights, f.name), Tensor)}


def require_same(first, second) -> None:
    """To a rounding of float64: products of memory that lies otherwise in a page are summed in another order."""
    assert first.plans == second.plans
    for one, other in zip(first.weights, second.weights, strict=True):
        assert tensors(one).keys() == tensors(other).keys()
        for name, value in tensors(one).items():
            torch.testing.assert_close(tensors(other)[name], value, rtol=0, atol=1e-13 * float(value.abs().max()))


@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_what_lies_on_disk_is_the_same(programs, tmp_path, monkeypatch, method):
    """Also where layers are run one at a time, in several rounds, and no factors are kept for a second use."""
    expected = converted(programs["llama-gqa"], method, None)
    monkeypatch.setattr("mla_compile.passes.fisher._KEPT", 0)
    require_same(converted(programs["llama-gqa"], method, LayerStore(tmp_path / "store")), expected)


@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_a_stopped_search_goes_on_behind_its_last_try(programs, tmp_path, monkeypatch, method):
    captured, store = programs["llama-gqa"], LayerStore(tmp_path)
    compare, tries = Divergence.__call__, []

    def counted(self, model):
        if len(tries) == 2:
            raise KeyboardInterrupt
        tries.append(model)
        return compare(self, model)

    monkeypatch.setattr(Divergence, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        converted(captured, method, store)
    expected = []
    monkeypatch.setattr(Divergence, "__call__", lambda self, model: (expected.append(0), compare(self, model))[1])
    whole = converted(captured, method, None)
    count = len(expected)
    require_same(converted(captured, method, store), whole)
    assert len(expected) == 2 * count - 2


def test_numbers_are_found_once(tmp_path):
    journal, made = Journal(tmp_path / "new" / "numbers.json"), []

    def make() -> float:
        made.append(0)
        return 1 / 3

    assert [journal.recall(name, make) for name in "aab"] == [1 / 3] * 3
    assert len(made) == 2
    journal.path.write_text("{")  # of a machine that stopped
    assert journal.recall("a", make) == 1 / 3
    assert len(made) == 3


def test_only_the_layer_that_grows_is_in_memory(tmp_path):
    @dataclasses.dataclass
    class Sums:
        total: Tensor

    shelf = Shelf(lambda number: Sums(torch.full((3,), float(number))), tmp_path / "shelf")
    for number in (0, 1, 0, 1, 1):
        shelf.at(number).total += 1
    assert [shelf.take(number).total.tolist() for number in (0, 1)] == [[2.0] * 3, [4.0] * 3]
    assert not [*(tmp_path / "shelf").iterdir()]


def test_without_a_folder_nothing_is_written():
    record = Journal(Path("x"))
    assert spilled(record, None) is record


SOURCE = Path(__file__).parents[1] / "examples" / "tiny-llama"
_KILLED = """
import os, signal, sys
from mla_compile.cli import main
from mla_compile.passes.search import Divergence
compare, tries = Divergence.__call__, []
def killed(self, model):
    if len(tries) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    tries.append(0)
    return compare(self, model)
Divergence.__call__ = killed
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed as POSIX kills them")
@pytest.mark.parametrize("method", ["fisher", "transmla"])
def test_a_killed_conversion_by_text_gives_the_same_bytes(tmp_path, method):
    text = tmp_path / "text.txt"
    text.write_text("the small grey cat sat on the mat and looked at the moon. " * 40)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(tries: int, name: str) -> int:
        out = tmp_path / name / "model.onnx"
        words = [SOURCE, "--calibration", text, "--method", method, "--no-verify", "--quiet", "--out", out]
        command = [sys.executable, "-c", _KILLED, str(tries), *map(str, words)]
        return subprocess.run(command, check=False, env=environment).returncode

    assert run(3, "resumed") == -signal.SIGKILL
    (journal,) = store_folder(tmp_path / "resumed" / "model.onnx").glob("*.json")
    assert len(json.loads(journal.read_text())) == 3
    assert run(-1, "resumed") == 0
    assert run(-1, "whole") == 0
    resumed, whole = (tmp_path / name / "model.onnx" for name in ("resumed", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not store_folder(resumed).exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("method", ["fisher", pytest.param("transmla", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, method):
    script = Path(__file__).parent / "passes" / "bounded_worker.py"
    # Memory that is freed goes back at once, so that it is not counted.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(script), str(tmp_path), method]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Four layers more take less than one more layer's projections in float64, of which a method holds several kinds.
    assert found["many"] - found["few"] < found["layer"]
