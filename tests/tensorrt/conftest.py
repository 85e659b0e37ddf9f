"""Converted models lowered for TensorRT, once per session, and a TensorRT parser that needs no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
import torch
from conversion import convert

from mla_compile.passes.lower_onnx import export_rewritten
from mla_compile.passes.lower_tensorrt import lower_to_tensorrt_onnx
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.tensorrt.functions import SPLITS

# Triton's interpreter must be chosen before Triton is imported.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


ROOM = 32


class Lowered:
    """A converted model, and the file for TensorRT it was lowered to."""

    def __init__(self, model: LatentModel, path: Path, splits: int | None) -> None:
        self.path, self.model = path, model
        lower_to_tensorrt_onnx(model.graph, model.rows, path, room=ROOM, metadata={"format": 1}, splits=splits)
        self.proto = onnx.load(path)


@pytest.fixture(scope="session")
def lowered(programs, tmp_path_factory):
    """By name of the model, and number of splits: None for nodes whose plugin chooses that itself."""
    converted, written = {}, {}

    def get(name: str, splits: int | None = SPLITS) -> Lowered:
        if name not in converted:
            converted[name] = convert(programs[name].program, programs[name].sites, exact=False, cache_ratio=0.5)
        if (name, splits) not in written:
            path = tmp_path_factory.mktemp("tensorrt") / "model.onnx"
            written[name, splits] = Lowered(converted[name], path, splits)
        return written[name, splits]

    return get


@pytest.fixture(scope="session")
def folder(lowered, tmp_path_factory):
    """A converted model, as ``convert`` writes it, with a configuration."""
    model, place = lowered("llama-gqa").model, tmp_path_factory.mktemp("converted")
    torch.export.save(export_rewritten(model.graph, model.rows), place / "model.pt2")
    (place / "mla_config.yaml").write_text("method: mha2mla\n")
    (place / "generation_config.json").write_text('{"eos_token_id": 7}')
    return place


class Parser:
    """The ONNX parser and the builder of TensorRT for RTX, which do without a GPU."""

    def __init__(self, rtx) -> None:
        self._rtx = rtx
        self._log = rtx.Logger(rtx.Logger.ERROR)
        self._builder = rtx.Builder(self._log)

    def parse(self, path: Path):
        """The network of a file that must parse."""
        network = self._builder.create_network(0)
        parser = self._rtx.OnnxParser(network, self._log)
        parsed = parser.parse_from_file(str(path))
        assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
        self._parser = parser  # the network refers to weights that the parser owns
        return network

    def build(self, network, extents) -> int:
        """Bytes of the engine; ``extents`` gives every input's least, usual and largest shape."""
        profile = self._builder.create_optimization_profile()
        for i in range(network.num_inputs):
            profile.set_shape(network.get_input(i).name, *extents(network.get_input(i)))
        config = self._builder.create_builder_config()
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(self._rtx.ComputeCapability.SM80, 0)
        engine = self._builder.build_serialized_network(network, config)
        assert engine is not None
        return int(engine.nbytes)


@pytest.fixture(scope="session")
def parser():
    return Parser(pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: .[tensorrt-test]"))
