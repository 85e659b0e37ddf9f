"""Quickly deployable plugins: the nodes of a file for TensorRT, with kernels compiled ahead of time.

TensorRT asks each of three functions in turn: what shapes come out, which types and tactics there are, and what kernel
to launch, with how many blocks and which integers. What may differ from call to call are expressions of input extents,
so batch and new length stay free. There is no Python left when an engine runs.

The three functions of a plugin have its inputs and attributes for parameters, which TensorRT reads from their
signatures; :class:`_Plugin` says them once, and the functions that answer get them as two mappings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

from mla_compile.errors import UsageError
from mla_compile.runtime.kernels.aot import ARCHITECTURES
from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.onnx_variant import Variant
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, NAMESPACE, PARTIAL, variants
from mla_compile.runtime.tensorrt.installed import require_tensorrt
from mla_compile.runtime.tensorrt.kernels import Append, Combine, Kernel, Partial, launchable

__all__ = ["register"]

_ONNX_TYPES = {1: "FP32", 10: "FP16", 16: "BF16"}
_FLOATS = "FP32|FP16|BF16"
_Inputs = Mapping[str, Any]
_Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What TensorRT is told to launch.

    Attributes:
        kernel: Name, assembly, threads and shared memory.
        blocks: Along three axes; numbers or expressions of extents.
        integers: What the kernel gets between inputs and outputs, likewise.
    """

    kernel: Kernel
    blocks: tuple[Any, Any, Any]
    integers: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Plugin:
    """A plugin's parameters, and what it answers.

    Attributes:
        inputs: Names, in order.
        outputs: How many there are.
        attributes: Types by name, in order.
        describe: Descriptions of the outputs.
        types: Names of types by places of inputs and outputs, the same for all places of an entry.
        tactics: How many tactics there are.
        launch: What a tactic launches.
    """

    inputs: Sequence[str]
    outputs: int
    attributes: Mapping[str, type]
    describe: Callable[[_Inputs, _Settings], tuple[Any, ...]]
    types: Callable[[_Settings], Mapping[tuple[int, ...], str]]
    tactics: Callable[[_Inputs, _Settings], int]
    launch: Callable[[_Inputs, _Settings, int], _Answer]


def register(architecture: int) -> None:
    """Register the plugins in TensorRT's registry, where its ONNX parser finds them; once per process.

    Args:
        architecture: Compute capability of the GPU that engines are built for, as 90 for 9.0.

    Raises:
        UsageError: TensorRT is not installed, or there are no kernels for this architecture.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"{a / 10}" for a in ARCHITECTURES)
        raise UsageError(
            f"There are no kernels for compute capability {architecture / 10}.", f"Use a GPU of one of {known}."
        )
    trt, trtp = require_tensorrt(), require_tensorrt("tensorrt.plugin")
    make = {APPEND: _append, PARTIAL: _partial, COMBINE: _combine}
    for op_type, variant in variants():
        _declare(trtp, f"{NAMESPACE}::{variant.named(op_type)}", make[op_type](trt, trtp, architecture, variant))


def _append(trt: Any, trtp: Any, architecture: int, variant: Variant) -> _Plugin:  # noqa: ANN401 - modules
    def launch(given: _Inputs, own: _Settings, tactic: int) -> _Answer:
        groups, half = (_static(given["cos"].shape_expr[axis]) for axis in (2, 3))
        batch, new, width = given["row"].shape_expr
        scales = _static(width) - own["latent_rank"] - groups * 2 * half
        made = Append(RowLayout(own["latent_rank"], groups, 2 * half, scales), _triton_type(trt, given["cache"]))
        return _Answer(launchable(made, architecture), (new, batch, 1), (given["cache"].shape_expr[2], new))

    return _Plugin(
        inputs=("row", "cos", "sin", "cache", "lengths"),
        outputs=1,
        attributes={"latent_rank": int},
        describe=lambda given, own: (given["cache"].aliased(),),
        types=lambda own: {(0, 3, 5): _FLOATS, (1, 2): "FP32", (4,): "INT32"},
        tactics=lambda given, own: 1,
        launch=launch,
    )


def _partial(trt: Any, trtp: Any, architecture: int, variant: Variant) -> _Plugin:  # noqa: ANN401
    def made(given: _Inputs, own: _Settings) -> Partial:
        _, new, heads, rank = given["q_latent"].shape_expr
        rope_dim = _static(given["q_rope"].shape_expr[3])
        scales = own["key_scales"], own["value_scales"], bool(own["scaled_rope"])
        return Partial(
            RowLayout(_static(rank), own["rope_groups"], rope_dim, *scales),
            _static(heads),
            _static(new) if new.is_constant else 0,
            _triton_type(trt, given["q_latent"]),
            own["scale"],
            own["splits"],
            own["window"],
            own["softcap"],
            variant.slopes,
            variant.chunked,
        )

    def describe(given: _Inputs, own: _Settings) -> tuple[Any, ...]:
        batch, new, heads, rank = given["q_latent"].shape_expr
        shapes = (batch, new, heads, own["splits"], rank), (batch, new, heads, own["splits"])
        return tuple(trtp.from_shape_expr(shape, trt.float32) for shape in shapes)

    def launch(given: _Inputs, own: _Settings, tactic: int) -> _Answer:
        partial = made(given, own)
        batch, new, heads, _ = given["q_latent"].shape_expr
        per_block = partial.tactics(architecture)[tactic - 1].rows
        blocks = trtp.cdiv(new * heads, per_block), own["splits"], batch
        return _Answer(launchable(partial, architecture, tactic), blocks, (given["rows"].shape_expr[2], new, heads))

    inputs = ("q_latent", "q_rope", "rows", "lengths", *("slopes",) * variant.slopes)
    types = {(0, 1, 2): _FLOATS, (3,): "INT32", (*range(4, len(inputs) + 2),): "FP32"}
    numbers = dict.fromkeys(("window", "chunked", "key_scales", "value_scales", "scaled_rope", "splits"), int)
    return _Plugin(
        inputs=inputs,
        outputs=2,
        attributes={"rope_groups": int, "scale": float, "softcap": float, **numbers},
        describe=describe,
        types=lambda own: types,
        tactics=lambda given, own: len(made(given, own).tactics(architecture)),
        launch=launch,
    )


def _combine(trt: Any, trtp: Any, architecture: int, variant: Variant) -> _Plugin:  # noqa: ANN401
    dtypes = {"FP32": trt.float32, "FP16": trt.float16, "BF16": trt.bfloat16}

    def describe(given: _Inputs, own: _Settings) -> tuple[Any, ...]:
        batch, new, heads, _, rank = given["partial"].shape_expr
        return (trtp.from_shape_expr((batch, new, heads, rank), dtypes[_ONNX_TYPES[own["to"]]]),)

    def launch(given: _Inputs, own: _Settings, tactic: int) -> _Answer:
        batch, new, heads, splits, rank = given["partial"].shape_expr
        made = Combine(_static(rank), _static(splits), _ONNX_TYPES[own["to"]].lower(), variant.sinks)
        return _Answer(launchable(made, architecture), (batch * new * heads, made.blocks_per_row, 1), (heads,))

    inputs = ("partial", "partial_lse", *("sinks",) * variant.sinks)
    return _Plugin(
        inputs=inputs,
        outputs=1,
        attributes={"to": int},
        describe=describe,
        types=lambda own: {(*range(len(inputs)),): "FP32", (len(inputs),): _ONNX_TYPES[own["to"]]},
        tactics=lambda given, own: 1,
        launch=launch,
    )


def _declare(trtp: Any, name: str, plugin: _Plugin) -> None:  # noqa: ANN401
    """Give TensorRT three functions of the plugin's own parameters."""
    tensor, count = trtp.TensorDesc, len(plugin.inputs)
    several = GenericAlias(tuple, (tensor,) * plugin.outputs)
    launched = GenericAlias(tuple, (str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs))
    parameters = {**dict.fromkeys(plugin.inputs, tensor), **plugin.attributes}

    def split(arguments: tuple[Any, ...], settings: _Settings) -> tuple[_Inputs, _Settings]:
        own = dict(zip(plugin.attributes, arguments[count:], strict=False))
        return dict(zip(plugin.inputs, arguments, strict=False)), {**own, **settings}

    def describe(*arguments: Any, **settings: Any) -> Any:  # noqa: ANN401
        found = plugin.describe(*split(arguments, settings))
        return found if plugin.outputs > 1 else found[0]

    def choose(*arguments: Any) -> list[Any]:  # noqa: ANN401
        given, own = split(arguments, {})
        combination = trtp.AutoTuneCombination()
        for places, names in plugin.types(own).items():
            combination.pos([*places], names)
        combination.tactics([*range(1, plugin.tactics(given, own) + 1)])
        return [combination]

    def implement(*arguments: Any) -> tuple[Any, ...]:  # noqa: ANN401
        *rest, _, tactic = arguments
        answer = plugin.launch(*split(tuple(rest), {}), tactic)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = answer.blocks
        launch.block_x, launch.shared_mem = answer.kernel.threads, answer.kernel.shared_bytes
        integers = trtp.SymIntExprs.from_tuple([trtp.SymInt32(x) for x in answer.integers])
        return answer.kernel.name, answer.kernel.ptx, launch, integers

    results = {"outputs": several}
    _sign(describe, parameters, several if plugin.outputs > 1 else tensor)
    _sign(choose, parameters | results, GenericAlias(list, (trtp.AutoTuneCombination,)))
    _sign(implement, parameters | results | {"tactic": int}, launched)
    trtp.register(name)(describe)
    trtp.autotune(name)(choose)
    trtp.aot_impl(name)(implement)


def _sign(function: Any, parameters: Mapping[str, Any], result: Any) -> None:  # noqa: ANN401
    """Say what a function's parameters are, to who asks :func:`inspect.signature`."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = [inspect.Parameter(name, kind, annotation=type_) for name, type_ in parameters.items()]
    function.__signature__ = inspect.Signature(named, return_annotation=result)


def _static(extent: Any) -> int:  # noqa: ANN401
    """An extent that every converted model knows."""
    if not extent.is_constant:
        raise ValueError(
            "Heads, ranks and rope channels are unknown in a network. Build of a file made by mla-compile."
        )
    return int(extent.constant_value())


def _triton_type(trt: Any, tensor: Any) -> str:  # noqa: ANN401
    return {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}[tensor.dtype]
