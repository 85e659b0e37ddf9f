"""The nodes of an ONNX file that a library of plugins is for, as far as their kernels depend on them."""

from __future__ import annotations

from pathlib import Path

import onnx

from mla_compile.errors import LoadError, RefusedError
from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.onnx_variant import DOMAIN
from mla_compile.runtime.tensorrt.cubins import Decode
from mla_compile.runtime.tensorrt.functions import APPEND, DECODE
from mla_compile.runtime.tensorrt.kernels import Append

__all__ = ["read_nodes"]

_TYPES = {
    int(onnx.TensorProto.FLOAT): "fp32",
    int(onnx.TensorProto.FLOAT16): "fp16",
    int(onnx.TensorProto.BFLOAT16): "bf16",
}
_REMEDY = "Write it with: mla-compile tensorrt FOLDER --out FILE.onnx --plugin cpp."


def read_nodes(path: Path) -> frozenset[Append | Decode]:
    """Find what kinds of nodes there are; layers of one kind share kernels.

    Args:
        path: Written by ``mla-compile tensorrt``.

    Raises:
        LoadError: There is no such file, or it is damaged or incomplete.
        RefusedError: It holds no nodes for these plugins.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except FileNotFoundError as error:
        raise LoadError(f"There is no file '{path}'.", _REMEDY) from error
    except Exception as error:  # the parser of protocol buffers has exceptions of its own
        raise LoadError(f"'{path}' cannot be read as ONNX.", _REMEDY) from error
    tensors = {v.name: v.type.tensor_type for v in (*graph.input, *graph.value_info, *graph.output)}
    nodes = [n for n in graph.node if n.domain == DOMAIN and n.op_type.startswith((APPEND, DECODE))]
    if not any(n.op_type.startswith(DECODE) for n in nodes):
        raise RefusedError(f"'{path}' holds no {DECODE} nodes, which the plugins of a library are for.", _REMEDY)
    try:
        return frozenset(_kind(node, tensors) for node in nodes)
    except (KeyError, ValueError) as error:
        raise LoadError(f"'{path}' does not say what shape or type some of its tensors have.", _REMEDY) from error


def _kind(node: onnx.NodeProto, tensors: dict[str, onnx.TypeProto.Tensor]) -> Append | Decode:
    own = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    first = tensors[node.input[0]]
    dtype = _TYPES[first.elem_type]
    if node.op_type == APPEND:
        (width,) = _extents(first)[2:]
        groups, half = _extents(tensors[node.input[1]])[2:]
        scales = width - own["latent_rank"] - groups * 2 * half
        return Append(RowLayout(own["latent_rank"], groups, 2 * half, scales), dtype)
    heads, rank = _extents(first)[2:]
    (rope_dim,) = _extents(tensors[node.input[1]])[3:]
    scales = own["key_scales"], own["value_scales"], bool(own["scaled_rope"])
    layout = RowLayout(rank, own["rope_groups"], rope_dim, *scales)
    features = {"windowed": "window", "chunked": "chunked", "capped": "softcap"}
    features |= {"slopes": "has_slopes", "sinks": "has_sinks"}
    return Decode(layout, heads, dtype, **{feature: own[name] > 0 for feature, name in features.items()})


def _extents(tensor: onnx.TypeProto.Tensor) -> tuple[int, ...]:
    """Extents of a tensor, of which only those of batch and new tokens may be unknown."""
    extents = tensor.shape.dim
    if not all(d.HasField("dim_value") for d in extents[2:]):
        raise ValueError("An extent other than those of batch and new tokens is unknown. Export with fixed sizes.")
    return tuple(d.dim_value for d in extents)
