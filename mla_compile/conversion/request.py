"""One conversion, as it was asked for; what cannot be is refused before the model is read, inputs before outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from mla_compile.artifacts.places import check_cache_layout, check_cache_type, check_onnx_options, check_original
from mla_compile.artifacts.tensorrt import check_settings
from mla_compile.config import CompileConfig
from mla_compile.conversion.targets import Destination, target_of
from mla_compile.devices import require_device
from mla_compile.disk.layer_store import LayerStore
from mla_compile.errors import UsageError
from mla_compile.progress import Display, Stages
from mla_compile.sources.given import require_model, require_on_hub
from mla_compile.text.calibration import Text, has_windows, is_sampled, read_text, require_text, writes_text
from mla_compile.text.corpus import require_named_tokenizer, require_tokenizer, require_tokenizer_of
from mla_compile.text.processes import Processes, join_processes
from mla_compile.training.run import require_accelerate

__all__ = ["ModelSource", "Request", "Session", "begin", "check_request", "require_one_process"]


@dataclass(frozen=True)
class ModelSource:
    """A model, and how to read it.

    Attributes:
        model: An ``nn.Module``, an ``ExportedProgram``, an archive, a Hugging Face folder or a hub id.
        example_inputs: Inputs to export an ``nn.Module`` with.
        tokenizer: Tokenizer for text, or the folder it is in, when the model does not bring one.
        attention: Attention implementation of a transformers model given by name: auto, sdpa or eager.
        unsafe: Allow unpickling a module from a file.
    """

    model: nn.Module | ExportedProgram | str | Path
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None
    tokenizer: Any = None
    attention: str = "auto"
    unsafe: bool = False


@dataclass(frozen=True)
class Request:
    """What a user asked for.

    Attributes:
        source: The model, and how to read it.
        config: Settings of the conversion.
        calibration: Text to choose by and to measure on.
        destination: Where the result will be written; None where that is not known yet.
        statistics_cache: Whether to keep what was measured on the text, or the folder to keep it in.
        offload: A folder for activations between layers; None for memory.
        jobs: Layers that are factorised at a time.
        device: Where the model runs on text and layers are factorised; None for the processor, or what a launcher gave.
        store: Where finished layers are kept; None for memory.
        share: Share the calibration with the other processes that a launcher started.
        check: Verify the conversion against the original.
        max_perplexity_ratio: Fail when perplexity grows by more than this factor.
        finetune: Text to fine-tune the result on.
        finetune_tokens: Tokens of it to train on; all of it by default.
    """

    source: ModelSource
    config: CompileConfig
    calibration: Text | None = None
    destination: Destination | None = None
    statistics_cache: bool | str | Path = True
    offload: str | Path | None = None
    jobs: int = 1
    device: str | None = None
    store: LayerStore | None = None
    share: bool = False
    check: bool = True
    max_perplexity_ratio: float | None = None
    finetune: Text | None = None
    finetune_tokens: int | None = None


@dataclass(frozen=True)
class Session:
    """A conversion that has begun.

    Attributes:
        request: What was asked for.
        documents: Its text, as far as it is read: documents or token windows; None where there is none to read.
        processes: Those that share the text.
        stages: Times and shows what runs.
    """

    request: Request
    documents: Iterable[str] | Tensor | None
    processes: Processes
    stages: Stages

    @property
    def device(self) -> str:
        """Where it computes."""
        return self.request.device or self.processes.device


def check_request(request: Request) -> None:
    """Refuse what cannot be done, before anything is read.

    Raises:
        UsageError: Something that is needed was not given.
        LoadError: There is no such model, or training was asked for, and the package that does it is not installed.
    """
    if request.jobs < 1:
        raise UsageError(f"--jobs {request.jobs} is less than one layer at a time.", "Give 1 or more.")
    if request.device is not None:
        require_device(request.device)
    limit = request.max_perplexity_ratio
    if limit is not None and not 0 < limit < math.inf:
        raise UsageError(f"--max-ppl-ratio {limit} is not a factor.", "Give a number above 0.")
    if request.calibration is None and limit is not None and not request.config.needs_text:
        raise UsageError("A perplexity limit needs text to measure on.", "Give some with --calibration FILE.")
    if request.finetune is not None:
        require_accelerate()
    elif request.finetune_tokens is not None:
        raise UsageError("--finetune-tokens counts tokens of --finetune TEXT, and none was given.", "Add --finetune.")
    require_model(request.source.model)


def _check_destination(to: Destination, config: CompileConfig, source: ModelSource) -> None:
    if isinstance(source.model, str | Path):
        check_original(to.path, str(source.model))  # first: nothing may replace that
    for_tensorrt = to.engine is not None
    check_cache_type(to.path, config.cache_type, tensorrt=for_tensorrt)
    check_cache_layout(to.path, config.cache_layout, tensorrt=for_tensorrt)
    check_onnx_options(to.path, config.onnx_options, tensorrt=for_tensorrt)
    if to.engine is not None:
        check_settings(to.path, to.engine)
    target_of(to).check(to.path, to.force)


def _require_tokenizer(request: Request) -> None:
    """Refuse a tokenizer that is not there, and text without one, before the model is read.

    Folders are looked at by the names of their files; a hub id is loaded, for only the hub knows.

    Raises:
        LoadError: There is none where it is to come from.
    """
    source, calibration = request.source, None if is_sampled(request.calibration) else request.calibration
    texts = (calibration, request.finetune)
    if isinstance(source.tokenizer, str | Path):
        require_named_tokenizer(str(source.tokenizer))
    if all(text is None or has_windows(text) for text in texts):
        return
    if isinstance(source.tokenizer, str | Path):
        require_tokenizer(str(source.tokenizer))
    elif source.tokenizer is None:
        require_tokenizer_of(source.model)


def require_one_process(processes: Processes) -> None:
    """Refuse to let a model write the text that several processes are to share.

    Raises:
        UsageError: There are several.
    """
    if processes.count > 1:
        raise UsageError(
            "Several processes share a calibration text, and each of them would write the same one.",
            "Give a text with --calibration FILE, or convert by one process.",
        )


def begin(request: Request, display: Display | None) -> Session:
    """Open the texts, look at where the result will go, and join the processes that share the calibration.

    Raises:
        LoadError: A text or the tokenizer cannot be read, or the hub has no such model.
        UsageError: The result cannot be written where it is to go; there is no text, and something is chosen by it that
            the model cannot write; or one of several processes would have to train or write alone.
        ShareDone: Another process does all there is to do.
    """
    written = writes_text(request.calibration, request.config)
    documents = None if written else read_text(request.calibration)
    read_text(request.finetune)  # it is opened again when it is time to train
    _require_tokenizer(request)
    if request.destination is not None:
        _check_destination(request.destination, request.config, request.source)
    require_on_hub(request.source.model)  # only now: the hub may take long
    if not written:
        require_text(request.config, request.calibration)
    processes = join_processes() if request.share else Processes()
    if processes.count > 1 and request.finetune is not None:
        raise UsageError(
            "Several processes share a calibration, and only the first of them goes on, which cannot train alone.",
            "Convert without --finetune, then train with mla-compile finetune.",
        )
    if processes.count > 1 and request.device is not None:
        raise UsageError(
            f"--device {request.device} is one device, and several processes would share it.",
            "Leave --device out: every process then takes a device of its own.",
        )
    if written:
        require_one_process(processes)
    processes.wait()  # all have checked what is there before anything is written
    if documents is None or request.config.exact:
        processes.leave_unless_first()
    return Session(request, documents, processes, Stages(display if processes.first else None))
