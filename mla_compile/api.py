"""The steps of a conversion in order; reads as the table of contents of the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from mla_compile.artifacts.archives import read_folder
from mla_compile.config import CompileConfig, make_config
from mla_compile.conversion.admission import is_beyond_causal, require_causal
from mla_compile.conversion.causal import (
    Findings,
    choose,
    fine_tune,
    finish,
    ids_to_check,
    make_report,
    measure,
    measure_layers,
    prepare,
    rewrite,
    verify_module,
)
from mla_compile.conversion.compiled import CompiledModel
from mla_compile.conversion.encoders import CompiledEncoder
from mla_compile.conversion.loading import load_original, load_source
from mla_compile.conversion.other_kinds import compile_other_kind
from mla_compile.conversion.preview import ConversionPlan, plan
from mla_compile.conversion.request import ModelSource, Request, begin, check_request
from mla_compile.conversion.seq2seq import CompiledSeq2Seq
from mla_compile.conversion.targets import Destination
from mla_compile.conversion.verdict import require_quality
from mla_compile.conversion.weightless import draw, is_weightless
from mla_compile.devices import memory_explained
from mla_compile.disk.layer_store import LayerStore
from mla_compile.errors import UsageError
from mla_compile.passes.recognise import Recognition, recognise
from mla_compile.program import AnyProgram
from mla_compile.progress import Display, Stages
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings
from mla_compile.sources.frontend import tell_notes
from mla_compile.sources.given import require_model
from mla_compile.text.calibration import Text

__all__ = ["CompiledModel", "ConversionPlan", "compile", "inspect", "load", "plan"]


@memory_explained()
def compile(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    calibration: Text | None = None,
    tokenizer: Any = None,  # noqa: ANN401 - a folder or any transformers tokenizer
    config: CompileConfig | Mapping[str, Any] | None = None,
    statistics_cache: bool | str | Path = True,
    offload: str | Path | None = None,
    jobs: int = 1,
    device: str | None = None,
    share: bool = False,
    check: bool = True,
    max_perplexity_ratio: float | None = None,
    out: str | Path | None = None,
    engine: EngineSettings | None = None,
    force: bool = False,
    attn_implementation: str = "auto",
    unsafe_load: bool = False,
    finetune: Text | None = None,
    finetune_tokens: int | None = None,
    store: LayerStore | None = None,
    display: Display | None = None,
    **settings: Any,  # noqa: ANN401 - validated by CompileConfig
) -> CompiledModel | CompiledEncoder | CompiledSeq2Seq:
    """Convert a model's attention to latent attention.

    Weights that the conversion does not change are shared with the original: copy one of the two before training if
    both are needed.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram``, an archive, a Hugging Face folder or a hub id.
        example_inputs: Inputs to export an ``nn.Module`` with: token ids ``[batch, length]`` first; any for an encoder.
        calibration: Text to calibrate and measure on, for causal language models only: a ``.txt`` or ``.jsonl`` file,
            ``hf:NAME[:CONFIG][:SPLIT]`` for a dataset, documents, or token windows ``[windows, length]``. The model
            writes it itself where it is ``"sampled"``, or where the method needs text and none is given.
        tokenizer: Tokenizer for the text, or its folder, if the model has none.
        config: All settings at once, also as a dictionary.
        statistics_cache: Whether to save statistics of the text for the next conversion of the same model, or the
            folder to save them in.
        offload: Folder for activations, when a model is too large to hold them in memory; by default they stay in
            memory, in as many rounds as that takes.
        jobs: Layers to factorise at a time. Each takes the memory of one, and one thread where there are several.
        device: Where the model runs on text, and layers are factorised and polished, such as ``cuda``; by default the
            processor, or with ``share`` what the launcher gave. The result is on the processor, and verified there.
        share: Share the calibration with the other processes that a launcher started, which do nothing else.
        check: Verify the conversion against the original.
        max_perplexity_ratio: Fail if perplexity grows by more than this factor; needs calibration text.
        out: Where the result is meant to be written: that it can be is checked before any work is done. Nothing is
            written there but by :meth:`CompiledModel.to_onnx`, :meth:`CompiledModel.save` and their like.
        engine: Settings of the TensorRT engine, if one will be built there; also checked first.
        force: Whether existing files there may be replaced.
        attn_implementation: Attention implementation of a transformers model given by name: auto, sdpa or eager.
        unsafe_load: Allow unpickling a module from a file.
        finetune: Text to fine-tune the result on, to match the original's predictions, with the default
            :class:`~mla_compile.training.recipe.Recipe`; for causal language models only.
        finetune_tokens: Tokens to fine-tune on; all of the text by default.
        store: Where finished layers are kept, from :func:`~mla_compile.disk.layer_store.store_beside`: bounds memory,
            and lets a killed conversion continue after the last of them. Checkpoints of ``finetune`` lie there too, or
            else in the system's temporary folder.
        display: Shows progress.
        **settings: Fields of :class:`~mla_compile.config.CompileConfig`, instead of ``config``.

    Returns:
        The converted model. With the setting ``encoders``, and only then, also a
        :class:`~mla_compile.conversion.encoders.CompiledEncoder` for a model whose attention is bidirectional, or a
        :class:`~mla_compile.conversion.seq2seq.CompiledSeq2Seq` for an encoder-decoder.

    Raises:
        LoadError: The model or text cannot be read.
        RefusedError: Some attention layer is not understood; the message names each with its reason.
        UsageError: Settings do not fit the model.
        VerificationError: The conversion is not correct.
        QualityGateError: The conversion loses more than ``max_perplexity_ratio``.
        TrainingError: Training with ``finetune`` went wrong.
        ShareDone: With ``share``, in every process but the first, when it has done its part.
    """
    if config is not None and settings:
        raise UsageError("Both config and single settings were given.", "Give one of them.")
    config = make_config(**settings) if config is None else CompileConfig.of(config)
    if out is None and (engine is not None or force):
        raise UsageError(
            "Arguments engine and force are about what is written to out, which was not given.",
            "Give it, or leave them out.",
        )
    if engine is not None and config.encoders:
        raise UsageError("Only a causal language model is written for TensorRT.", "Leave --encoders out.")
    request = Request(
        ModelSource(model, example_inputs, tokenizer, attn_implementation, unsafe_load),
        config,
        calibration=calibration,
        destination=None if out is None else Destination(Path(out), config.format, engine, force=force),
        statistics_cache=statistics_cache,
        offload=offload,
        jobs=jobs,
        device=device,
        store=store,
        share=share,
        check=check,
        max_perplexity_ratio=max_perplexity_ratio,
        finetune=finetune,
        finetune_tokens=finetune_tokens,
    )
    return _compiled(request, display)


def _compiled(request: Request, display: Display | None) -> CompiledModel | CompiledEncoder | CompiledSeq2Seq:
    """The whole way from a request to a model that can be lowered and written; see :func:`compile`."""
    check_request(request)
    session = begin(request, display)
    loaded, session = load_original(session)
    with session.stages.stage("recognise"):
        found = recognise(loaded)
    if is_beyond_causal(loaded, found, session.request.config):
        return compile_other_kind(loaded, found, session)
    case = prepare(require_causal(loaded, found), found, session)
    choice = choose(case)  # plans, and factorises
    finished = finish(case, choice)
    model = rewrite(case, finished.weights)
    ids = ids_to_check(case)
    findings = Findings(
        layer_errors=measure_layers(case, finished.weights, model),
        verification=verify_module(case, model, ids),
        training=fine_tune(case, model),
        quality=measure(case, model),
    )
    report = make_report(case, choice, finished, findings)
    require_quality(report.quality, request.max_perplexity_ratio)
    return CompiledModel(model, report, case.task.program.assets, ids if request.check else None)


def inspect(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    attn_implementation: str = "auto",
    unsafe_load: bool = False,
    display: Display | None = None,
) -> tuple[AnyProgram, Recognition]:
    """Load a model of any kind and describe its attention layers, or say why they are not understood.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram``, an archive, a Hugging Face folder or a hub id. A
            ``config.json``, or a folder without weights, is enough; equal layers are then exported once, so the program
            has fewer layers than the model.
        example_inputs: Inputs to export an ``nn.Module`` with; integers are token ids, floats anything else.
        attn_implementation: Attention implementation of a transformers model given by name: auto, sdpa or eager.
        unsafe_load: Allow unpickling a module from a file.
        display: Shows progress.

    Returns:
        The exported model and its attention layers: those recognised, and why each of the others was not.

    Raises:
        LoadError: The model cannot be read.
    """
    require_model(model)
    stages = Stages(display)
    if isinstance(model, str | Path) and is_weightless(model):
        with stages.stage("load"):
            drawn = draw(model, attn_implementation)
        return drawn.program, drawn.found
    source = ModelSource(model, example_inputs, None, attn_implementation, unsafe_load)
    with stages.stage("load"):
        program = load_source(source, any_kind=True)
    tell_notes(program)
    with stages.stage("recognise"):
        return program, recognise(program)


def load(folder: str | Path) -> LatentModel:
    """Read back a model written by :meth:`CompiledModel.save`.

    Args:
        folder: The folder.

    Raises:
        LoadError: The folder holds no such model.
    """
    return read_folder(Path(folder))
