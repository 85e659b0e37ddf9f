"""``tensorrt`` and ``tensorrt.plugin`` without the libraries that no package index for everyone has.

The registry, the plugin interfaces and the enumerations are those of ``tensorrt-lean``, the runtime alone; the Python
of ``tensorrt.plugin`` is that of the bindings of full TensorRT. Only the expressions of extents are replaced: TensorRT
makes them while it builds an engine.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_FORMATS = "LINEAR CHW2 HWC8 CHW4 CHW16 CHW32 DHWC8 CDHW32 HWC DLA_LINEAR DLA_HWC4 HWC16 DHWC"
_REASON = "TensorRT's registry is not installed: .[tensorrt-test]"


@dataclass
class Extent:
    """An expression whose value is known, and whether TensorRT would know it too when it builds."""

    value: int
    constant: bool

    def is_constant(self):
        return self.constant

    def get_constant_value(self):
        return self.value

    def is_size_tensor(self):
        return False


_OPERATIONS = {
    "SUM": lambda x, y: x + y,
    "PROD": lambda x, y: x * y,
    "MAX": max,
    "MIN": min,
    "SUB": lambda x, y: x - y,
    "EQUAL": lambda x, y: int(x == y),
    "LESS": lambda x, y: int(x < y),
    "FLOOR_DIV": lambda x, y: x // y,
    "CEIL_DIV": lambda x, y: -(-x // y),
}


class Builder:
    """Makes expressions of expressions."""

    def constant(self, value):
        return Extent(int(value), True)

    def operation(self, kind, x, y):
        return Extent(_OPERATIONS[kind.name](x.value, y.value), x.constant and y.constant)


def install():
    """Put the modules where ``import tensorrt`` finds them; skips the test if their packages are missing."""
    lean = pytest.importorskip("tensorrt_lean_bindings", reason=_REASON)
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None:
        pytest.skip(_REASON)
    for name in ("ITensor", "INetworkDefinition"):
        if not hasattr(lean, name):
            setattr(lean, name, type(name, (), {}))
    if not hasattr(lean, "TensorFormat"):
        lean.TensorFormat = enum.IntEnum("TensorFormat", _FORMATS, start=0)
    lean.IDimensionExpr = Extent
    lean.ISymExpr = type("ISymExpr", (), {})
    folder = Path(spec.submodule_search_locations[0]) / "plugin"
    own = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    plugin = importlib.util.module_from_spec(own)
    sys.modules |= {"tensorrt": lean, "tensorrt.plugin": plugin}
    lean.plugin = plugin
    own.loader.exec_module(plugin)
    return lean


@dataclass(frozen=True)
class Launch:
    """What TensorRT would launch."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    integers: tuple[int, ...]


def build(plugin, inputs, attributes):
    """Ask a registered plugin what TensorRT would ask it.

    ``inputs`` are ``(type, [(extent, known when the engine is built), ...])``. Returns outputs as ``(shape, type,
    whether it is an input's memory)``, combinations of types, and a launch per tactic.
    """
    tensors = importlib.import_module("tensorrt.plugin._tensor")
    registry = importlib.import_module("tensorrt.plugin._lib").QDP_REGISTRY
    definition = registry[plugin]
    tensors.SymIntExpr._exprBuilder = Builder()
    try:
        given = [_tensor(tensors, *x) for x in inputs]
        outputs = definition.register_func(*given, **attributes)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        described = [(tuple(e._expr.value for e in o.shape_expr), o.dtype, bool(o.is_aliased)) for o in outputs]
        wanted = [attributes[name] for name in definition.autotune_attr_names or []]
        combinations = definition.autotune_func(*given, *wanted, outputs)
        found = [c for combination in combinations for c in combination._get_combinations()]
        launches = {
            tactic: _launch(*definition.aot_impl_func(*given, *attributes.values(), outputs, tactic))
            for tactic in sorted({t for c in found for t in c.tactics})
        }
        return described, found, launches
    finally:
        tensors.SymIntExpr._exprBuilder = None


def _tensor(tensors, dtype, extents):
    tensor = tensors.TensorDesc()
    tensor.dtype = dtype
    tensor.shape_expr = tensors.ShapeExprs(len(extents))
    for axis, extent in enumerate(extents):
        tensor.shape_expr[axis] = tensors.ShapeExpr(Extent(*extent))
    tensor._immutable = True
    return tensor


def _launch(name, ptx, launch, integers):
    def values(*names):
        return tuple(getattr(launch, n)().expr.value for n in names)

    grid, block = values("grid_x", "grid_y", "grid_z"), values("block_x", "block_y", "block_z")
    return Launch(name, ptx, grid, block, *values("shared_mem"), tuple(e().expr.value for e in integers))
