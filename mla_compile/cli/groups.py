"""Options that belong together and stand in several commands: declared once, given to a command as one object."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from mla_compile.cli.options import (
    CALIBRATION_TOKENS,
    AttnImplementation,
    CacheKind,
    CacheLayout,
    CacheRatio,
    CacheType,
    Calibration,
    CalibrationTokens,
    Device,
    Dtype,
    Encoders,
    Exact,
    Inline,
    KvRank,
    Layout,
    MaxBatch,
    MaxLength,
    MaxPrompt,
    MethodName,
    NoCache,
    NoGradients,
    NoPlugins,
    Opset,
    Refit,
    RopeDims,
    SeqLen,
    Splits,
    Svd,
    TimingCache,
    Tokenizer,
    UniformRank,
    UnsafeLoad,
    VersionCompatible,
    WeightStreaming,
)

if TYPE_CHECKING:
    from mla_compile.runtime.tensorrt.engine_builder import EngineSettings

__all__ = ["EngineOptions", "FileOptions", "MethodOptions", "SizeOptions", "SourceOptions", "grouped"]


@dataclass(frozen=True)
class SizeOptions:
    """How small a cache is to be."""

    cache_ratio: CacheRatio = None
    kv_rank: KvRank = None
    uniform_rank: UniformRank = False
    exact: Exact = False

    def settings(self) -> dict[str, Any]:
        """As fields of :class:`~mla_compile.config.CompileConfig`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class MethodOptions:
    """How a smaller cache is chosen."""

    method: MethodName = "auto"
    layout: Layout = None
    rope_dims: RopeDims = None
    svd: Svd = "joint"
    no_gradients: NoGradients = False
    calibration_tokens: CalibrationTokens = CALIBRATION_TOKENS
    seq_len: SeqLen = None
    dtype: Dtype = "auto"
    encoders: Encoders = False

    def settings(self) -> dict[str, Any]:
        """As fields of :class:`~mla_compile.config.CompileConfig`."""
        given = dataclasses.asdict(self)
        return given | {"gradients": not given.pop("no_gradients")}


@dataclass(frozen=True)
class SourceOptions:
    """What is read besides the model, and how the model is read."""

    calibration: Calibration = None
    tokenizer: Tokenizer = None
    no_cache: NoCache = False
    device: Device = None
    attn_implementation: AttnImplementation = "auto"
    unsafe_load: UnsafeLoad = False

    def arguments(self) -> dict[str, Any]:
        """As arguments of :func:`mla_compile.compile`."""
        given = dataclasses.asdict(self)
        return given | {"statistics_cache": not given.pop("no_cache")}


@dataclass(frozen=True)
class FileOptions:
    """What an ONNX file is to be."""

    opset: Opset = None
    cache: CacheKind = "dynamic"
    cache_type: CacheType = "auto"
    cache_layout: CacheLayout = "rows"
    inline: Inline = False

    def settings(self) -> dict[str, Any]:
        """As fields of :class:`~mla_compile.config.CompileConfig`."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class EngineOptions:
    """What TensorRT is to build for, and how."""

    max_batch: MaxBatch = 8
    max_length: MaxLength = 4096
    max_prompt: MaxPrompt = 128
    splits: Splits = 16
    timing_cache: TimingCache = None
    version_compatible: VersionCompatible = False
    weight_streaming: WeightStreaming = False
    refit: Refit = False
    no_plugins: NoPlugins = False

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the options that are not as they are by default."""
        return tuple(f"--{f.name.replace('_', '-')}" for f in fields(self) if getattr(self, f.name) != f.default)

    def settings(self) -> EngineSettings:
        """As the builder takes them."""
        from mla_compile.runtime.tensorrt.engine_builder import EngineSettings

        return EngineSettings(
            batch=self.max_batch,
            room=self.max_length,
            prompt=self.max_prompt,
            splits=self.splits,
            plugins=not self.no_plugins,
            version_compatible=self.version_compatible,
            timing_cache=self.timing_cache,
            weight_streaming=self.weight_streaming,
            refit=self.refit,
        )


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Spread out a command's groups: the command line sees an option per field, the command one object per group.

    Args:
        command: A function of keyword arguments, some of which are dataclasses whose fields are options.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        group: type[Any] = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter)
            continue
        groups[name] = group
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            parameter.replace(name=f.name, annotation=hints[f.name], default=f.default) for f in fields(group)
        ]

    def spread(**given: Any) -> None:  # noqa: ANN401 - whatever the options are
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    spread.__doc__, spread.__name__, spread.__module__ = command.__doc__, command.__name__, command.__module__
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread
