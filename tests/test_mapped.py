"""Pages of mapped files are dropped where nothing is lost, and a conversion's resident memory stays that of a layer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import fx, nn

from mla_compile.disk.mapped import DroppingInterpreter, Passing, drop_pages

pytestmark = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="pages are told by Linux")
SIZE = 2**21
"""Numbers of a tensor: 8 MiB."""


def of_files() -> float:
    """Resident pages of files, in MiB."""
    return int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.fixture
def mapped(tmp_path):
    made = {str(number): torch.full((SIZE,), float(number)) for number in range(4)}
    save_file(made, tmp_path / "tensors")
    with safe_open(tmp_path / "tensors", "pt") as file:
        return [file.get_tensor(name) for name in made]


def test_what_is_dropped_reads_the_same(mapped):
    before = of_files()
    assert [float(value[:: 2**8].mean()) for value in mapped] == [0, 1, 2, 3]
    assert of_files() - before > 30
    drop_pages(mapped)
    assert of_files() - before < 8  # of what else is read for the first time
    assert [float(value[:: 2**8].mean()) for value in mapped] == [0, 1, 2, 3]


def test_what_was_written_to_and_what_is_in_memory_stay(mapped):
    mapped[1][SIZE // 2] = 7
    own, array = torch.arange(SIZE), np.arange(SIZE)
    drop_pages([*mapped, own, array, own[::2], torch.empty(4, device="meta"), torch.empty(0)])
    assert mapped[1][SIZE // 2] == 7
    assert torch.equal(own, torch.arange(SIZE))
    assert np.array_equal(array, np.arange(SIZE))


@pytest.mark.parametrize("view", [np.asarray, np.transpose, torch.from_numpy, lambda x: torch.from_numpy(x).mT])
def test_arrays_and_views_that_are_mapped_are_dropped_too(tmp_path, view):
    np.ones(SIZE).tofile(tmp_path / "numbers")
    numbers = view(np.memmap(tmp_path / "numbers", np.float64, "c", shape=(1024, SIZE // 1024)))
    before = of_files()
    assert numbers.sum() == SIZE
    drop_pages([numbers])
    assert of_files() - before < 8  # of what else is read for the first time


def test_values_go_when_the_next_one_comes(mapped):
    passing, before, highest = Passing(), of_files(), 0.0
    for value in mapped:
        assert passing(value) is value
        value.sum()
        highest = max(highest, of_files() - before)
    assert highest < 16


def test_a_graph_is_run_with_one_weight_at_a_time(mapped):
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList(nn.Parameter(value, requires_grad=False) for value in mapped)

        def forward(self, x):
            for part in self.parts:
                x = x + part.sum()
            return x

    graph = fx.symbolic_trace(Sums())
    before = of_files()
    assert DroppingInterpreter(graph).run(torch.zeros(())) == 6 * SIZE
    assert of_files() - before < 8  # of what else is read for the first time


def test_resident_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    script = Path(__file__).parent / "passes" / "resident_worker.py"
    command = [sys.executable, str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Four layers more add less than one of them.
    assert found["many"] - found["few"] < (found["many weights"] - found["few weights"]) / 4
