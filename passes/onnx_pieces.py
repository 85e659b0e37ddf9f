"""Run an ONNX file piece by piece in ONNX Runtime, with the weights of one piece in memory at a time.

ONNX Runtime holds all weights of a file, and packs them once more for its own products: a file larger than memory
cannot be run, and one in bfloat16 not even loaded, as its CPU provider has no kernels for that type. Here the file's
nodes, in their order, are cut into pieces, each of which ONNX Runtime runs as a graph of its own. Weights are read from
the file when their piece runs and given to it as inputs, in float32 if asked for. What is computed is what the whole
file computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mla_compile.disk.mapped import drop_pages
from mla_compile.passes.retype_onnx import widened_file

__all__ = ["PIECE_BYTES", "PiecewiseSession"]

PIECE_BYTES = 2**30
"""Weights of a piece, at most, unless a single one is larger."""
_SMALL = 1024
"""Bytes up to which a constant stays in its piece: sizes, axes and numbers, which shapes are inferred from."""


@dataclass(frozen=True)
class _Piece:
    """A part of a file.

    Attributes:
        session: ONNX Runtime's of it.
        weights: What it is given from the file.
        inputs: Names of what else it is given: inputs of the file, and what earlier pieces made.
        outputs: Names of what it makes for later ones, or the file returns.
        frees: Names of what no later piece reads.
    """

    session: Any
    weights: tuple[ir.Value, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    frees: tuple[str, ...]


class _Binding:
    """What is bound to a file's inputs and outputs, as the binding of a whole session would take it."""

    def __init__(self) -> None:
        self.bound: dict[str, Callable[[Any], None]] = {}
        self.outputs: dict[str, Any] = {}

    def bind_cpu_input(self, name: str, value: NDArray[Any]) -> None:
        """See ``onnxruntime.IOBinding``, here and below."""
        self.bound[name] = lambda own: own.bind_cpu_input(name, value)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:  # noqa: ANN401 - onnxruntime has no types
        self.bound[name] = lambda own: own.bind_ortvalue_input(name, value)

    def bind_input(self, name: str, *where: Any) -> None:  # noqa: ANN401
        self.bound[name] = lambda own: own.bind_input(name, *where)

    def bind_output(self, name: str, *where: Any) -> None:  # noqa: ANN401
        self.bound[name] = lambda own: own.bind_output(name, *where)
        self.outputs[name] = None

    def get_outputs(self) -> list[Any]:
        return [*self.outputs.values()]


class PiecewiseSession:
    """What :class:`~mla_compile.runtime.onnx_session.OnnxDecoder` uses of a session of ONNX Runtime on the processor.

    Args:
        path: The ``.onnx`` file.
        wide: Whether to compute in float32 what the file computes in float16 or bfloat16.
        piece_bytes: Bytes of a piece's weights, as they are computed with.
    """

    def __init__(self, path: Path, *, wide: bool = False, piece_bytes: int = PIECE_BYTES) -> None:
        model = widened_file(path) if wide else ir.load(path)
        self._metadata = dict(model.metadata_props)
        inputs = [v for v in model.graph.inputs if not v.is_initializer()]
        self._names = [[str(v.name) for v in values] for values in (inputs, model.graph.outputs)]
        self._pieces = _cut(model, piece_bytes)

    @property
    def pieces(self) -> int:
        """How many there are."""
        return len(self._pieces)

    def get_inputs(self) -> list[Any]:
        """As ONNX Runtime describes them."""
        found = {value.name: value for piece in self._pieces for value in piece.session.get_inputs()}
        return [found[name] for name in self._names[0]]

    def get_overridable_initializers(self) -> list[Any]:
        """None: inputs with a default have that."""
        return []

    def get_outputs(self) -> list[Any]:
        """As ONNX Runtime describes them."""
        found = {value.name: value for piece in self._pieces for value in piece.session.get_outputs()}
        return [found[name] for name in self._names[1]]

    def get_modelmeta(self) -> Any:  # noqa: ANN401
        """What the compiler stored in the file."""
        return SimpleNamespace(custom_metadata_map=self._metadata)

    def get_providers(self) -> list[str]:
        """The processor's alone."""
        return ["CPUExecutionProvider"]

    def io_binding(self) -> _Binding:
        """A binding of nothing yet."""
        return _Binding()

    def run_with_iobinding(self, binding: _Binding) -> None:
        """Run all pieces, one after the other."""
        values: dict[str, Any] = {}
        for piece in self._pieces:
            values |= _run(piece, binding, values)
            binding.outputs |= {name: values[name] for name in piece.outputs if name in binding.outputs}
            for name in piece.frees:
                values.pop(name, None)


def _run(piece: _Piece, binding: _Binding, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a piece makes; its weights are gone when it has."""
    own = piece.session.io_binding()
    weights = [np.ascontiguousarray(_numbers(w)) for w in piece.weights]  # the binding has their addresses only
    for weight, numbers in zip(piece.weights, weights, strict=True):
        own.bind_input(weight.name, "cpu", 0, numbers.dtype.type, numbers.shape, numbers.ctypes.data)
    for name in piece.inputs:
        if name in values:
            own.bind_ortvalue_input(name, values[name])
        else:
            binding.bound[name](own)
    for name in piece.outputs:
        if name in binding.outputs:
            binding.bound[name](own)
        else:
            own.bind_output(name, "cpu")
    piece.session.run_with_iobinding(own)
    drop_pages(weights)
    return dict(zip(piece.outputs, own.get_outputs(), strict=True))


def _numbers(weight: ir.Value) -> NDArray[Any]:
    assert weight.const_value is not None
    numbers: NDArray[Any] = weight.const_value.numpy()
    return numbers


def _cut(model: ir.Model, piece_bytes: int) -> list[_Piece]:
    """Cut a file's nodes, in their order, so that the weights that each piece reads are not too large."""
    parts: list[list[ir.Node]] = [[]]
    held: dict[ir.Value, int] = {}
    for node in model.graph:
        weights = {v: v.const_value.nbytes for v in _read(node) if _is_weight(v) and v.const_value is not None}
        if held and sum((held | weights).values()) > piece_bytes:
            parts.append([])
            held = {}
        parts[-1].append(node)
        held |= weights
    reads = [_outer(part) for part in parts]
    everything = {v for values in reads for v in values}
    reads[0] += [v for v in model.graph.inputs if v not in everything]  # what is not read is still an input
    returned = {*model.graph.outputs}
    last = {value: place for place, values in enumerate(reads) for value in values}
    pieces = []
    for place, (part, values) in enumerate(zip(parts, reads, strict=True)):
        outputs = [v for node in part for v in node.outputs if last.get(v, -1) > place or v in returned]
        weights_of = [v for v in values if _is_weight(v)]
        inputs = [v for v in values if not v.is_initializer()]
        constants = [v for v in values if v.is_initializer() and not _is_weight(v)]
        for value in constants:  # what lies beside the file is not found from a session that has no file
            value.const_value = ir.tensor(_numbers(value), name=value.name)
        frees = [v for v in inputs if last[v] == place]
        view = ir.GraphView(
            [*weights_of, *inputs],
            outputs,
            nodes=part,
            initializers=constants,
            opset_imports=model.graph.opset_imports,
            name=f"piece_{place}",
        )
        session = _open(ir.Model(view, ir_version=model.ir_version, functions=[*model.functions.values()]))  # type: ignore[arg-type]
        pieces.append(_Piece(session, tuple(weights_of), _named(inputs), _named(outputs), _named(frees)))
    return pieces


def _open(model: ir.Model) -> Any:  # noqa: ANN401
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and told once
    options.enable_cpu_mem_arena = False  # which keeps for every piece what only one needs at a time
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])


def _named(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(str(v.name) for v in values)


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and value.const_value.nbytes > _SMALL


def _outer(part: Sequence[ir.Node]) -> list[ir.Value]:
    """What a part reads and does not make, each once."""
    made = {v for node in part for v in node.outputs}
    return [*dict.fromkeys(v for node in part for v in _read(node) if v not in made)]


def _read(node: ir.Node) -> list[ir.Value]:
    """What a node reads of the graph it is in, inside its branches and bodies too."""
    bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH and not a.is_ref()]
    inner = [n for body in bodies for n in ir.traversal.RecursiveGraphIterator(body)]
    inside = {v for n in inner for v in n.outputs} | {
        v for body in bodies for v in (*body.inputs, *body.initializers.values())
    }
    found = [v for n in (node, *inner) for v in n.inputs] + [v for body in bodies for v in body.outputs]
    return [v for v in found if v is not None and v not in inside]
