"""Converting on another device: what is computed there is what the processor computes, and what is refused.

There is no accelerator here. A device that is pretended (pretend_device.py) takes its place: it computes on the
processor, and refuses tensors that were left there. What it cannot tell is what real kernels round, and their speed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from torch import Tensor

import mla_compile
from mla_compile.devices import free_memory, memory_explained, moved, on_device, require_device
from mla_compile.errors import UsageError
from mla_compile.passes.moved import moved_graph
from mla_compile.runtime.module import LatentModel

WORKER = Path(__file__).parent / "pretend_worker.py"
CASES = {
    "fisher, polished": {"_linalg_eigh", "linalg_qr", "latent_attention", "_log_softmax_backward_data"},
    "fisher without gradients, layer by layer": {"_linalg_eigh", "linalg_qr", "latent_attention"},
    "transmla on its own text": {"_linalg_eigh", "cached_attention", "latent_attention"},
    "mha2mla": {"_linalg_eigh", "linalg_qr", "latent_attention", "hypot"},
    "fine-tuned": {"mm", "_log_softmax_backward_data"},
}
"""Conversions, and some of the operators that must have run on the device in each."""
NOWHERE = not torch.accelerator.is_available()


@dataclasses.dataclass(frozen=True)
class _Part:
    numbers: Tensor
    name: str = "part"


@dataclasses.dataclass(frozen=True)
class _Whole:
    parts: tuple[_Part, ...]
    own: Tensor | None = None
    size: int = 3


@pytest.mark.parametrize("case", CASES)
def test_a_conversion_on_another_device_is_the_processors(case, tmp_path):
    out = tmp_path / "found.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MLA_COMPILE_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, str(WORKER), case, str(out)], check=True, env=environment, timeout=900)
    found = json.loads(out.read_text())
    assert found["devices"] == ["cpu"]
    # Kernels of attention are chosen by the device, and round in another order: 4e-7 was seen.
    assert found["logits"] < 1e-5
    assert found["logits there"] < 1e-5
    for key in ("perplexity", "quality", "layers", "polish", "training"):
        here, there = found[key]
        assert _flat(there) == pytest.approx(_flat(here), rel=1e-3, abs=1e-7), key
    assert CASES[case] <= found["seen"].keys()
    assert "Pass the model as model.cpu()" in found["refusal"]


def _flat(values):
    if isinstance(values, list):
        return [number for value in values for number in _flat(value)]
    return [] if values is None else [values]


def test_what_is_there_already_is_not_copied():
    whole = _Whole((_Part(torch.ones(2)), _Part(torch.zeros(3))), size=4)
    assert moved(whole, "cpu") is whole
    assert moved(whole, "cpu").parts[0].numbers is whole.parts[0].numbers


def test_all_tensors_of_a_record_move():
    found = moved(_Whole((_Part(torch.ones(2), "first"),), torch.ones(1)), "meta")
    assert (found.parts[0].numbers.device.type, found.own.device.type) == ("meta", "meta")
    assert (found.parts[0].name, found.size) == ("first", 3)


def test_what_a_function_creates_is_on_the_device():
    devices = []

    def make(given):
        devices.extend([given.device.type, torch.zeros(2).device.type, torch.tensor([1]).device.type])
        return _Part(torch.zeros(1, device="cpu"))

    assert on_device("meta", make, torch.ones(1)).numbers.device.type == "cpu"
    assert devices == ["meta"] * 3
    assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize("name", ["nonsense", "meta", "", "cuda:99"])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(UsageError, match="device"):
        require_device(name)


def test_too_little_memory_is_a_sentence():
    with pytest.raises(UsageError, match=r"too little memory \(CUDA out of memory"), memory_explained():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has less.")
    assert free_memory("meta") is None
    assert (free_memory("cpu") or 1) > 0


def test_the_processor_is_a_device():
    require_device("cpu")
    module = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    assert moved_graph(module, "cpu") is module


def test_what_a_graph_creates_goes_along():
    class Adds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x.view(-1) * self.weight + torch.zeros(3, device="cpu")

    x = torch.ones(3)
    graph = torch.export.export(Adds(), (x,)).run_decompositions({}).module(check_guards=False)
    there = moved_graph(graph, "meta")
    assert there(x.to("meta")).device.type == "meta"
    assert graph(x).tolist() == [1.0, 1.0, 1.0]
    assert graph.weight.device.type == "cpu"
    model = LatentModel(graph, (), ()).to("meta")
    assert model.graph(x.to("meta")).device.type == "meta"


@pytest.mark.skipif(not NOWHERE, reason="there is an accelerator")
def test_an_accelerator_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UsageError, match=r"The device 'cuda' cannot compute in float64.*--device"):
        mla_compile.compile(models.llama(), calibration=models.tokens(4, 16), device="cuda")


def test_an_encoder_is_converted_on_the_processor():
    with pytest.raises(UsageError, match="--device"):
        mla_compile.compile(
            models.handwritten(models.BidirectionalGPT), models.tokens(2, 8), encoders=True, device="cpu"
        )
