"""From a file for TensorRT to an engine: strongly typed, caches in place, one profile to decode and one for prompts."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_compile.errors import LoadError, RefusedError
from mla_compile.runtime.tensorrt.functions import SPLITS
from mla_compile.runtime.tensorrt.installed import architecture, messages, start

__all__ = ["DECODE", "PREFILL", "EngineSettings", "build_engine", "use_plugins"]

DECODE, PREFILL = 0, 1
"""Optimisation profiles: one new token, and any number of them."""
_PERCENT = 100


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is built for.

    Attributes:
        batch: Largest batch.
        room: Cache capacity in rows; a constant of the file.
        prompt: Most new tokens in one call, at most ``room``. Longer prompts are processed in chunks.
        splits: Pieces that the kernels split every cache into; a constant of the file. None where plugins choose that.
        plugins: Whether plugins may be used.
        version_compatible: Whether other TensorRT versions can run it too, at some cost.
        timing_cache: File that keeps kernel timings for later builds; None for none.
        weight_streaming: Whether weights may stay in host memory when GPU memory is short.
        refit: Whether weights can be replaced without a rebuild.
    """

    batch: int = 8
    room: int = 4096
    prompt: int = 128
    splits: int | None = SPLITS
    plugins: bool = True
    version_compatible: bool = False
    timing_cache: Path | None = None
    weight_streaming: bool = False
    refit: bool = False


@functools.cache
def use_plugins() -> str:
    """Register the plugins for the GPU in use; once per process, as the registry is the process's.

    Returns:
        Why they cannot be used; empty if they can.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from mla_compile.runtime.kernels.aot import ARCHITECTURES
    from mla_compile.runtime.tensorrt.plugins import register

    if architecture() not in ARCHITECTURES:
        return f"there are no kernels for compute capability {architecture() / 10}"
    register(architecture())
    return ""


def build_engine(
    trt: Any,  # noqa: ANN401
    path: Path,
    settings: EngineSettings,
    *,
    plugins: bool,
    advance: Callable[[], None] = lambda: None,
    target: int | None = None,
) -> tuple[bytes, int]:
    """Build an engine.

    Args:
        trt: TensorRT, or TensorRT for RTX: the module.
        path: A file for TensorRT.
        settings: What the engine is built for.
        plugins: Whether plugins are registered, which write caches in place.
        advance: Called a hundred times.
        target: Compute capability to build for, as 80 for 8.0, which TensorRT for RTX does without a GPU; by default
            that of the GPU in use.

    Returns:
        The engine, and how many of its layers are plugins.

    Raises:
        LoadError: The file of times is another TensorRT's or GPU's.
        RefusedError: TensorRT does not take the file.
        UsageError: TensorRT does not start.
        KeyboardInterrupt: The user interrupted it.
    """
    said = messages(trt)
    builder = start(trt.Builder, said)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, said.logger)
    if not parser.parse_from_file(str(path)):
        reason = " ".join(parser.get_error(0).desc().split())[:300].rstrip(".") if parser.num_errors else said.reason
        raise _refused(path, "read", reason)
    config = builder.create_builder_config()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    room = min(tensor.shape[2] for tensor in inputs if len(tensor.shape) == 4)
    for most in (1, min(settings.prompt, room)):
        config.add_optimization_profile(_profile(builder, inputs, settings.batch, most))
    if plugins:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    for name in ("version_compatible", "weight_streaming", "refit"):
        if getattr(settings, name):
            config.set_flag(getattr(trt.BuilderFlag, name.upper()))
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{target}"], 0)
    times = settings.timing_cache
    if times is not None:
        _take_times(config, times)
    config.progress_monitor = monitor = _monitor(trt, advance)
    built = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if built is None:
        raise _refused(path, "build", said.reason)
    if times is not None:
        times.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".timing-", dir=times.parent) as folder:  # other builds write it too
            new = Path(folder) / times.name
            new.write_bytes(memoryview(config.get_timing_cache().serialize()))
            new.replace(times)
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    return bytes(memoryview(built)), kinds.count(trt.LayerType.PLUGIN_V3)


def _refused(path: Path, verb: str, reason: str) -> RefusedError:
    return RefusedError(
        f"TensorRT cannot {verb} '{path.name}' ({reason}).",
        "Give it less to hold with --max-batch, --max-prompt and --max-length, or use the file in ONNX Runtime.",
    )


def _profile(builder: Any, inputs: Sequence[Any], batch: int, most: int) -> Any:  # noqa: ANN401
    """Shapes from one sequence of one new token to all of ``most``, where they are free."""
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        sizes = {0: batch, 1: most}
        largest = tuple(sizes[axis] if extent < 0 else extent for axis, extent in enumerate(tensor.shape))
        least = tuple(1 if extent < 0 else extent for extent in tensor.shape)
        profile.set_shape(tensor.name, least, largest, largest)
    return profile


def _take_times(config: Any, path: Path) -> None:  # noqa: ANN401
    """Let a build use a file of times, or begin one."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise LoadError(
            f"'{path}' holds no times of this TensorRT on this GPU.", "Remove it, or name another --timing-cache."
        )


def _monitor(trt: Any, advance: Callable[[], None]) -> Any:  # noqa: ANN401
    """Turns nested phases of known numbers of steps into one hundred steps, and an interrupt into a cancelled build.

    A step of a phase is as long as all phases within it; what several of them in a row report never goes backward.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False
            self._phases: dict[str, tuple[str | None, int, int]] = {}
            self._shown = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = (parent_phase, 0, max(1, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                parent, _, steps = self._phases[phase_name]
                self._phases[phase_name] = (parent, step + 1, steps)
                self._show((step + 1) / steps, parent)
            except KeyboardInterrupt:
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            parent, _, _ = self._phases.pop(phase_name)
            if parent is None:
                self._show(1.0, None)

        def _show(self, share: float, parent: str | None) -> None:
            while parent is not None and parent in self._phases:
                parent, done, steps = self._phases[parent]
                share = min(1.0, (done + share) / steps)
            while self._shown < int(share * _PERCENT):
                self._shown += 1
                advance()

    return Monitor()
