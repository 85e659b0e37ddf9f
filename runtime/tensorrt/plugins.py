"""Quickly deployable plugins: the nodes of a file for TensorRT, with kernels compiled ahead of time.

TensorRT asks each of three functions in turn: what shapes come out, which types and tactics there are, and what kernel
to launch, with how many blocks and which integers. What may differ from call to call are expressions of input extents,
so batch, new length and room stay free. There is no Python left when an engine runs.

This file does without ``from __future__ import annotations``: TensorRT reads the annotations themselves.
"""

import importlib
from typing import Any

from mla_compile.errors import UsageError
from mla_compile.runtime.kernels.aot import ARCHITECTURES
from mla_compile.runtime.tensorrt.functions import APPEND, COMBINE, NAMESPACE, PARTIAL
from mla_compile.runtime.tensorrt.kernels import Append, Combine, Kernel, Partial, launchable

__all__ = ["register"]

_ONNX_TYPES = {1: "FP32", 10: "FP16", 16: "BF16"}
_FLOATS = "FP32|FP16|BF16"


def register(architecture: int) -> None:
    """Register the plugins in TensorRT's registry, where its ONNX parser finds them; once per process.

    Args:
        architecture: Compute capability of the GPU that engines are built for, as 90 for 9.0.

    Raises:
        UsageError: TensorRT is not installed, or there are no kernels for this architecture.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"{a / 10}" for a in ARCHITECTURES)
        raise UsageError(f"There are no kernels for compute capability {architecture / 10}.", f"Known are {known}.")
    try:
        trt, trtp = importlib.import_module("tensorrt"), importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise UsageError(
            f"TensorRT cannot be imported ({error}).", "Install it with: pip install 'mla-compile[tensorrt]'."
        ) from error
    _register_append(trt, trtp, architecture)
    _register_partial(trt, trtp, architecture)
    _register_combine(trt, trtp, architecture)


def _register_append(trt: Any, trtp: Any, architecture: int) -> None:  # noqa: ANN401 - modules
    name = f"{NAMESPACE}::{APPEND}"

    @trtp.register(name)  # type: ignore[untyped-decorator]
    def describe(
        row: trtp.TensorDesc,
        cos: trtp.TensorDesc,
        sin: trtp.TensorDesc,
        cache: trtp.TensorDesc,
        lengths: trtp.TensorDesc,
        latent_rank: int,
    ) -> trtp.TensorDesc:
        return cache.aliased()

    @trtp.autotune(name)  # type: ignore[untyped-decorator]
    def choose(
        row: trtp.TensorDesc,
        cos: trtp.TensorDesc,
        sin: trtp.TensorDesc,
        cache: trtp.TensorDesc,
        lengths: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        return [_combination(trtp, {(0, 3, 5): _FLOATS, (1, 2): "FP32", (4,): "INT32"}, 1)]

    @trtp.aot_impl(name)  # type: ignore[untyped-decorator]
    def implement(
        row: trtp.TensorDesc,
        cos: trtp.TensorDesc,
        sin: trtp.TensorDesc,
        cache: trtp.TensorDesc,
        lengths: trtp.TensorDesc,
        latent_rank: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        groups, half = (_static(cos.shape_expr[axis]) for axis in (2, 3))
        made = Append(latent_rank, groups, 2 * half, _triton_type(trt, cache))
        batch, new, _ = row.shape_expr
        blocks = new, batch, 1
        return _answer(trtp, launchable(made, architecture), blocks, (cache.shape_expr[1], new))


def _register_partial(trt: Any, trtp: Any, architecture: int) -> None:  # noqa: ANN401
    name = f"{NAMESPACE}::{PARTIAL}"

    def made(q_latent: Any, q_rope: Any, groups: int, scale: float, window: int, splits: int) -> Partial:  # noqa: ANN401
        _, new, heads, rank = q_latent.shape_expr
        return Partial(
            _static(rank),
            groups,
            _static(q_rope.shape_expr[3]),
            _static(heads),
            _static(new) if new.is_constant else 0,
            _triton_type(trt, q_latent),
            scale,
            window,
            splits,
        )

    @trtp.register(name)  # type: ignore[untyped-decorator]
    def describe(
        q_latent: trtp.TensorDesc,
        q_rope: trtp.TensorDesc,
        rows: trtp.TensorDesc,
        lengths: trtp.TensorDesc,
        rope_groups: int,
        scale: float,
        window: int,
        splits: int,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        batch, new, heads, rank = q_latent.shape_expr
        return (
            trtp.from_shape_expr((batch, new, heads, splits, rank), trt.float32),
            trtp.from_shape_expr((batch, new, heads, splits), trt.float32),
        )

    @trtp.autotune(name)  # type: ignore[untyped-decorator]
    def choose(
        q_latent: trtp.TensorDesc,
        q_rope: trtp.TensorDesc,
        rows: trtp.TensorDesc,
        lengths: trtp.TensorDesc,
        rope_groups: int,
        scale: float,
        window: int,
        splits: int,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        tactics = len(made(q_latent, q_rope, rope_groups, scale, window, splits).tactics(architecture))
        return [_combination(trtp, {(0, 1, 2): _FLOATS, (3,): "INT32", (4, 5): "FP32"}, tactics)]

    @trtp.aot_impl(name)  # type: ignore[untyped-decorator]
    def implement(
        q_latent: trtp.TensorDesc,
        q_rope: trtp.TensorDesc,
        rows: trtp.TensorDesc,
        lengths: trtp.TensorDesc,
        rope_groups: int,
        scale: float,
        window: int,
        splits: int,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        partial = made(q_latent, q_rope, rope_groups, scale, window, splits)
        batch, new, heads, _ = q_latent.shape_expr
        per_block = partial.tactics(architecture)[tactic - 1].rows
        blocks = trtp.cdiv(new * heads, per_block), splits, batch
        return _answer(trtp, launchable(partial, architecture, tactic), blocks, (rows.shape_expr[1], new, heads))


def _register_combine(trt: Any, trtp: Any, architecture: int) -> None:  # noqa: ANN401
    name = f"{NAMESPACE}::{COMBINE}"

    @trtp.register(name)  # type: ignore[untyped-decorator]
    def describe(partial: trtp.TensorDesc, partial_lse: trtp.TensorDesc, to: int) -> trtp.TensorDesc:
        batch, new, heads, _, rank = partial.shape_expr
        dtype = {"FP32": trt.float32, "FP16": trt.float16, "BF16": trt.bfloat16}[_ONNX_TYPES[to]]
        return trtp.from_shape_expr((batch, new, heads, rank), dtype)

    @trtp.autotune(name)  # type: ignore[untyped-decorator]
    def choose(
        partial: trtp.TensorDesc, partial_lse: trtp.TensorDesc, to: int, outputs: tuple[trtp.TensorDesc]
    ) -> list[trtp.AutoTuneCombination]:
        return [_combination(trtp, {(0, 1): "FP32", (2,): _ONNX_TYPES[to]}, 1)]

    @trtp.aot_impl(name)  # type: ignore[untyped-decorator]
    def implement(
        partial: trtp.TensorDesc,
        partial_lse: trtp.TensorDesc,
        to: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]:
        batch, new, heads, splits, rank = partial.shape_expr
        made = Combine(_static(rank), _static(splits), _ONNX_TYPES[to].lower())
        blocks = batch * new * heads, made.blocks_per_row, 1
        return _answer(trtp, launchable(made, architecture), blocks, ())


def _combination(trtp: Any, types: dict[tuple[int, ...], str], tactics: int) -> Any:  # noqa: ANN401
    """Types by places of inputs and outputs, the same for all places of an entry, and so many tactics."""
    combination = trtp.AutoTuneCombination()
    for places, names in types.items():
        combination.pos([*places], names)
    combination.tactics([*range(1, tactics + 1)])
    return combination


def _answer(trtp: Any, kernel: Kernel, blocks: tuple[Any, ...], integers: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ANN401
    """What TensorRT is told of a kernel: name, assembly, geometry, and the integers between inputs and outputs."""
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.grid_z = blocks
    launch.block_x, launch.shared_mem = kernel.threads, kernel.shared_bytes
    return kernel.name, kernel.ptx, launch, trtp.SymIntExprs.from_tuple([trtp.SymInt32(x) for x in integers])


def _static(extent: Any) -> int:  # noqa: ANN401
    """An extent that every converted model knows."""
    if not extent.is_constant:
        raise ValueError("Heads, ranks and rope channels must be known when an engine is built.")
    return int(extent.constant_value())


def _triton_type(trt: Any, tensor: Any) -> str:  # noqa: ANN401
    return {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16"}[tensor.dtype]
