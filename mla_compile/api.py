"""The steps of a conversion in order; reads as the table of contents of the compiler."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mla_compile import frontend, verify
from mla_compile.artifacts import (
    check_cache_layout,
    check_cache_type,
    check_neighbours,
    check_pair,
    check_target,
    read_folder,
    write_folder,
    write_onnx,
)
from mla_compile.calibration import Text, TextWindows, cut_windows, read_text
from mla_compile.checkpoint import require_blocks
from mla_compile.checkpoint_files import require_finite
from mla_compile.checkpoint_folder import DEFAULT_SHARD, check_folder, write_checkpoint
from mla_compile.config import CompileConfig, make_config
from mla_compile.conversion_cost import ConversionCost, conversion_cost
from mla_compile.deepseek import require_expressible, with_preset
from mla_compile.encoders import CompiledEncoder, compile_encoder, is_encoder, require_encoder
from mla_compile.errors import QualityGateError, RefusedError, UsageError
from mla_compile.evaluate import longest_window, original_scorer, streamed_perplexity
from mla_compile.gguf_file import check_gguf, write_gguf
from mla_compile.layer_store import LayerStore
from mla_compile.passes.converted import converted_logits, original_logits
from mla_compile.passes.gauge import balanced
from mla_compile.passes.layer_errors import error_steps, layer_errors
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.methods import METHODS, nothing_left_out
from mla_compile.passes.polish import polish
from mla_compile.passes.quantise_cache import check_quantisable
from mla_compile.passes.query_rank import with_query_rank
from mla_compile.passes.recognise import Recognition, recognise
from mla_compile.passes.retype import NARROW
from mla_compile.passes.task import BATCH, Task
from mla_compile.passes.weights import input_width
from mla_compile.plan import LatentPlan, clamped, plan_layers
from mla_compile.processes import Processes, join_processes
from mla_compile.program import AnyProgram, Assets, OtherProgram, Program
from mla_compile.progress import Display, Stages
from mla_compile.report import LayerError, Quality, Report
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.tensorrt.engine_builder import EngineSettings
from mla_compile.seq2seq import CompiledSeq2Seq, compile_seq2seq, is_seq2seq, plan_seq2seq, undecodable
from mla_compile.site import AttentionSite, Kind, Rejection
from mla_compile.statistics_cache import open_cache
from mla_compile.tensorrt import check_tensorrt, write_compiled
from mla_compile.training.recipe import make_recipe
from mla_compile.training.run import finetune_module, require_accelerate
from mla_compile.weightless import draw, is_weightless

__all__ = [
    "CompiledModel",
    "Planned",
    "compile",
    "convertible",
    "inspect",
    "load",
    "lossless_elements",
    "plan",
    "require_causal",
    "require_known_types",
    "would_be_refused",
]

_log = logging.getLogger(__name__)
_TYPES = (torch.float32, *NARROW)
_RANDOM_LENGTH = 64
"""Random tokens per sequence to verify on without text: half as a prompt, half to continue it by 32 tokens."""
_MUCH_WORSE = 2.0
"""Perplexity ratio from which the user is warned."""
_HURT = 0.1
"""Loss of one layer by itself from which it is named, in nats per token: a tenth more perplexity."""
_NAMED = 3
"""Layers named, at most."""


@dataclass(frozen=True)
class Planned:
    """What a conversion would make of a model.

    Attributes:
        found: Its attention layers.
        plans: Shape of each one's latent.
        widths: Input width of each one's projections; empty where nothing is decoded with a cache of its own.
        source_type: Type of the original's numbers.
        dtype: Type of the result's.
        conversion: What converting the model takes; None where that depends on a text, or nothing is decoded.
        alike: Layers of the model, and how many of them were exported as the others are like them; None for a model
            that was exported whole.
    """

    found: Recognition
    plans: tuple[LatentPlan, ...]
    widths: tuple[int, ...] = ()
    source_type: str = "float32"
    dtype: str = "float32"
    conversion: ConversionCost | None = None
    alike: tuple[int, int] | None = None


@dataclass(frozen=True)
class CompiledModel:
    """A converted model.

    Attributes:
        module: The model in PyTorch: callable and trainable, with an explicit latent cache.
        report: What was done.
        assets: Configuration and tokenizer of the original.
        checks: Token ids the ONNX file is checked on, ``[batch, length]``; None when verification was switched off.
    """

    module: LatentModel
    report: Report
    assets: Assets = field(default_factory=Assets)
    checks: Tensor | None = None

    def to_onnx(self, path: str | Path, *, force: bool = False, display: Display | None = None) -> Report:
        """Write the model as ONNX, with configuration, tokenizer and ``report.json`` beside it.

        The file appears under its name only after ONNX Runtime reproduced the PyTorch module with it.

        Args:
            path: A ``.onnx`` file.
            force: Replace existing files.
            display: Shows progress.

        Returns:
            The report, completed with what was measured on the file.

        Raises:
            UsageError: The path cannot be written, or something exists there.
            VerificationError: ONNX Runtime computes something else.
        """
        return write_onnx(self.module, self.report, self.assets, Path(path), self.checks, force, Stages(display))

    def save(self, folder: str | Path, *, force: bool = False) -> Report:
        """Write the PyTorch module (a ``torch.export`` archive) with configuration, tokenizer and report.

        Read it back with :func:`mla_compile.load`.

        Args:
            folder: A folder that does not exist yet, or an empty one.
            force: Replace existing files.

        Raises:
            UsageError: The folder cannot be written, or is not empty.
        """
        return write_folder(self.module, self.report, self.assets, Path(folder), force)

    def to_tensorrt(
        self,
        path: str | Path,
        settings: EngineSettings | None = None,
        *,
        force: bool = False,
        display: Display | None = None,
    ) -> Report:
        """Write the model for TensorRT: an ONNX file whose caches are fixed memory, or an engine with that file beside.

        The file appears under its name only after ONNX Runtime reproduced the PyTorch module with it, and the engine
        only after it reproduced the file.

        Args:
            path: A ``.onnx`` or ``.plan`` file. For a ``.plan`` TensorRT and a GPU are needed.
            settings: Sizes, and how an engine is built.
            force: Replace existing files.
            display: Shows progress.

        Returns:
            The report, completed with what was measured on the files.

        Raises:
            UsageError: Nothing can be written there, or TensorRT or a GPU is missing.
            RefusedError: A layer has something that this target does not cover, or TensorRT does not build an engine.
            VerificationError: ONNX Runtime or the engine computes something else.
        """
        given = settings or EngineSettings()
        return write_compiled(self.module, self.report, self.assets, Path(path), given, force, Stages(display))

    def to_deepseek(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = DEFAULT_SHARD,
        force: bool = False,
        display: Display | None = None,
    ) -> Report:
        """Write the model as a DeepSeek-V3 checkpoint, which stock transformers loads without any code of ours.

        The model must have been converted with ``layout="deepseek"``. The folder appears under its name only after
        stock transformers reproduced the PyTorch module with it.

        Args:
            folder: A folder that does not exist yet, or an empty one.
            shard_bytes: Size of a file of weights, at most.
            force: Replace existing files.
            display: Shows progress.

        Raises:
            UsageError: The folder cannot be written, or is not empty, or the layout is another.
            LoadError: The model has no configuration.
            RefusedError: The model's blocks are not those of such a checkpoint.
            VerificationError: Stock transformers computes something else.
        """
        return write_checkpoint(
            self.module,
            self.report,
            self.assets,
            Path(folder),
            self.checks,
            shard=shard_bytes,
            force=force,
            stages=Stages(display),
        )

    def to_gguf(self, path: str | Path, *, force: bool = False, display: Display | None = None) -> Report:
        """Write the model as a file for llama.cpp, with ``report.json`` beside it.

        The model must have been converted with ``layout="deepseek"``. The file appears under its name only after stock
        transformers, and llama.cpp where llama-cpp-python is installed, reproduced the PyTorch module with it.

        Args:
            path: A ``.gguf`` file.
            force: Replace an existing file.
            display: Shows progress.

        Raises:
            UsageError: The path cannot be written, something exists there, or the layout is another.
            LoadError: The model has no configuration.
            RefusedError: llama.cpp has no place for something in it, or no such tokenizer.
            VerificationError: Stock transformers or llama.cpp computes something else.
        """
        return write_gguf(
            self.module, self.report, self.assets, Path(path), self.checks, force=force, stages=Stages(display)
        )


def compile(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    calibration: Text | None = None,
    tokenizer: Any = None,  # noqa: ANN401 - a folder or any transformers tokenizer
    config: CompileConfig | None = None,
    statistics_cache: bool | str | Path = True,
    offload: str | Path | None = None,
    share: bool = False,
    check: bool = True,
    max_perplexity_ratio: float | None = None,
    out: Path | None = None,
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

    Weights that the conversion leaves as they are, are shared with the original: copy one of the two before training if
    both are needed.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram``, an archive, a Hugging Face folder or a hub id.
        example_inputs: Inputs to export an ``nn.Module`` with: token ids ``[batch, length]`` first; any for an encoder.
        calibration: Text to choose by and to measure on, for causal language models only: a ``.txt`` or ``.jsonl``
            file, ``hf:NAME[:CONFIG][:SPLIT]`` for a dataset, documents, or token windows ``[windows, length]``.
        tokenizer: Tokenizer for text, or the folder it is in, when the model does not bring one.
        config: All settings at once.
        statistics_cache: Whether to keep what was measured on the text for the next conversion of the same model, or
            the folder to keep it in.
        offload: A folder for activations between layers, where a model is so large that it is run layer by layer; in
            memory by default, in as many rounds as that takes.
        share: Share the calibration with the other processes that a launcher started, which do nothing else.
        check: Verify the conversion against the original.
        max_perplexity_ratio: Fail when perplexity grows by more than this factor; needs calibration text.
        out: Where the result will be written; checked before any work is done.
        engine: What it will be built for, if it will be written for TensorRT; likewise.
        force: Whether ``out`` may replace existing files.
        attn_implementation: How a transformers model given by name spells its attention: auto, sdpa or eager.
        unsafe_load: Allow unpickling a module from a file.
        finetune: Text to fine-tune the result on, towards what the original predicts, by the default
            :class:`~mla_compile.training.recipe.Recipe`; for causal language models only.
        finetune_tokens: Tokens of it to train on; all of it by default.
        store: Where finished layers are kept, from :func:`~mla_compile.layer_store.store_beside`: bounds memory, and a
            conversion that was killed goes on behind the last of them.
        display: Shows progress.
        **settings: Fields of :class:`~mla_compile.config.CompileConfig`, instead of ``config``.

    Returns:
        The converted model. With the setting ``encoders``, and only then, also a
        :class:`~mla_compile.encoders.CompiledEncoder` for a model whose attention is bidirectional, or a
        :class:`~mla_compile.seq2seq.CompiledSeq2Seq` for an encoder-decoder.

    Raises:
        LoadError: The model or text cannot be read.
        RefusedError: Some attention layer is not understood; the message names each with its reason.
        UsageError: Settings do not fit the model.
        VerificationError: The conversion is not correct.
        QualityGateError: The conversion loses more than ``max_perplexity_ratio``.
        ShareDone: With ``share``, in every process but the first, when it has done its part.
    """
    if config is not None and settings:
        raise UsageError("Both config and single settings were given.", "Give one of them.")
    config = config or make_config(**settings)
    _require_text(config, calibration)
    if engine is not None and config.encoders:
        raise UsageError("Only a causal language model is written for TensorRT.", "Leave --encoders out.")
    if max_perplexity_ratio is not None and not max_perplexity_ratio > 0:
        raise UsageError(f"--max-ppl-ratio {max_perplexity_ratio} is not a factor.", "Give a number above 0.")
    if calibration is None and max_perplexity_ratio is not None:
        raise UsageError("A perplexity limit needs text to measure on.", "Give some with --calibration FILE.")
    if finetune is not None:
        require_accelerate()
    if out is not None:
        check_cache_type(out, config.cache_type, tensorrt=engine is not None)
        check_cache_layout(out, config.cache_layout, tensorrt=engine is not None)
        if engine is not None:
            check_tensorrt(out, force)
        else:
            _check_out(out, config.format, force)
    documents = read_text(calibration)
    processes = join_processes() if share else Processes()
    if processes.count > 1 and finetune is not None:
        raise UsageError(
            "Several processes share a calibration, and only the first of them goes on, which cannot train alone.",
            "Convert without --finetune, then train with mla-compile finetune.",
        )
    processes.wait()  # all have checked what is there before anything is written
    if documents is None or config.exact:
        processes.leave_unless_first()
    stages = Stages(display if processes.first else None)
    with stages.stage("load"):
        loaded = _load(
            model,
            example_inputs,
            tokenizer,
            attn_implementation,
            unsafe_load,
            any_kind=config.encoders,
            dtype=wanted_type(config),
        )
    require_known_types(loaded)
    # Of buffers, masks hold infinities by intent.
    require_finite(dict(loaded.exported.named_parameters()), loaded.source)
    wanted = _result_type(loaded, config)
    config = config.model_copy(update={"dtype": str(wanted).removeprefix("torch.")})
    if "dtype" in loaded.assets.config:  # what lies beside the result says what that is in
        stored = {**loaded.assets.config, "dtype": config.dtype}
        loaded = dataclasses.replace(loaded, assets=dataclasses.replace(loaded.assets, config=stored))
    if out is not None:
        check_neighbours(out, loaded.source, loaded.assets, force)
    with stages.stage("recognise"):
        found = recognise(loaded)
    if config.encoders and (is_encoder(found) or not isinstance(loaded, Program)):
        if calibration is not None or finetune is not None:
            raise UsageError("Text cannot be used for an encoder.", "Leave --calibration and --finetune out.")
        if config.cache == "static":
            raise UsageError("Only a causal language model can have a static cache.", "Leave --cache static out.")
        if config.cache_layout == "genai":
            raise UsageError("Only a causal language model is for onnxruntime-genai.", "Leave --cache-layout out.")
        if config.cache_type == "int8":
            raise UsageError("Only a causal language model can have an int8 cache.", "Leave --cache-type int8 out.")
        _require_float32(loaded, loaded.dtype, "An encoder", "converted")
        if is_seq2seq(found):
            if out is not None:
                check_pair(out, force)
            return compile_seq2seq(loaded, found, config, check=check, stages=stages)
        return compile_encoder(loaded, found, config, check=check, stages=stages)
    program = require_causal(loaded, found)
    if finetune is not None:
        _require_float32(program, wanted, "A conversion", "fine-tuned")
    sites, kept = found.sites, found.rejections
    if config.for_stock_code:
        require_expressible(sites, kept)
        require_blocks(program, sites)
        config = with_preset(config, sites[0])
    text = cut_windows(program, documents, tokenizer, config)
    config, notes = _settle(config, text is not None)
    windows = None if text is None else text.calibration
    resources = Resources(folder=None if offload is None else Path(offload), device=processes.device)
    task = Task(
        program,
        sites,
        kept,
        config,
        windows,
        stages,
        open_cache(statistics_cache),
        store,
        resources=resources,
        processes=processes,
    )
    choice = nothing_left_out(task) if config.exact else METHODS[config.method](task)
    polished = polish(task, choice.weights, config.polish_steps) if config.polish_steps else None
    plans = choice.plans
    _tell(plans)
    # Nothing computes another result for it, but the module is to train well.
    weights = choice.weights if polished is None else polished.weights
    weights = weights if choice.balanced else tuple(map(balanced, weights))
    if config.q_rank is not None:
        weights = with_query_rank(task, weights, config.q_rank)
    with stages.stage("rewrite"):
        converted = task.result(weights)
    int8 = config.cache_type == "int8"
    if int8:  # before anything takes long
        check_quantisable(converted.graph, converted.rows)  # type: ignore[arg-type]
    verification = None
    ids = text.held_out[:4, :256] if text is not None else _random_ids(program, config)
    errors: tuple[LayerError, ...] = ()
    if text is not None:
        batches = text.held_out.split(BATCH)
        with stages.stage(
            "layers", error_steps(program, sites, batches, resources, gradients=config.gradients)
        ) as stage:
            errors = layer_errors(
                program,
                sites,
                weights,
                converted,
                text.held_out,
                gradients=config.gradients,
                resources=resources,
                progress=stage.each,
            )
    if check:
        with stages.stage("verify"):
            exact = converted if config.exact and program.dtype == torch.float32 else _exact_twin(task)
            verification = verify.check_module(
                original_scorer(program),
                exact,
                converted,
                ids,
                text is not None,
                wide_original=original_scorer(program, wide=True) if program.dtype in NARROW else None,
            )
    training = None
    if finetune is not None:
        recipe = make_recipe(tokens=finetune_tokens, seed=config.seed)
        training = finetune_module(converted, program, finetune, tokenizer, recipe, stages)
    quality = _measure(task, verify.quantised(converted) if int8 else converted, text, stages)
    report = Report(
        source=program.source,
        config=config.model_dump(),
        sites=tuple(sites),
        kept=kept,
        plans=plans,
        widths=tuple(task.widths),
        bytes_per_element=task.dtype.itemsize,
        source_bytes_per_element=program.dtype.itemsize,
        selection=config.selection if config.method == "mha2mla" else config.method,
        stages=(),
        verification=verification,
        quality=quality,
        forecasts=choice.forecasts,
        deepseek=choice.deepseek,
        layer_errors=errors,
        polish=None if polished is None else polished.report,
        training=training,
        warnings=(
            *notes,
            *choice.notes,
            *(() if polished is None else polished.notes),
            *_warnings(plans, kept, quality, config),
            *_hurt(plans, errors),
        ),
    )
    _gate(report.quality, max_perplexity_ratio)
    report = dataclasses.replace(report, stages=tuple(stages.timings))
    return CompiledModel(converted, report, program.assets, ids if check else None)


def inspect(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    tokenizer: str | None = None,
    attn_implementation: str = "auto",
    unsafe_load: bool = False,
) -> tuple[AnyProgram, Recognition]:
    """Load a model of any kind and describe its attention layers, or say why they are not understood.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram``, an archive, a Hugging Face folder or a hub id. A
            ``config.json``, or a folder without weights, is enough; layers alike are then exported once, so that the
            program has fewer than there are.
        example_inputs: Inputs to export an ``nn.Module`` with; integers are token ids, floats anything else.
        tokenizer: Folder of the tokenizer, if the model does not bring one.
        attn_implementation: How a transformers model given by name spells its attention: auto, sdpa or eager.
        unsafe_load: Allow unpickling a module from a file.

    Returns:
        The exported model, and its attention layers: those recognised, and of each other one why not.

    Raises:
        LoadError: The model cannot be read.
    """
    if isinstance(model, str | Path) and is_weightless(model):
        blueprint = draw(model, attn_implementation)
        return blueprint.program, blueprint.found
    program = _load(model, example_inputs, tokenizer, attn_implementation, unsafe_load, any_kind=True, dtype=None)
    return program, recognise(program)


def plan(
    model: str | Path,
    config: CompileConfig,
    *,
    calibration: Text | None = None,
    tokenizer: str | None = None,
    statistics_cache: bool | str | Path = True,
    attn_implementation: str = "auto",
    unsafe_load: bool = False,
    display: Display | None = None,
) -> Planned:
    """Plan a conversion; only methods that choose sizes by text compute weights for it.

    Args:
        model: An archive, a Hugging Face folder or a hub id; or a ``config.json`` or folder without weights, for
            methods that need no text.
        config: What the user asked for.
        calibration: Text for the methods that need it, as in :func:`compile`.
        tokenizer: Folder of the tokenizer, if the model does not bring one.
        statistics_cache: As in :func:`compile`.
        attn_implementation: How a transformers model given by name spells its attention: auto, sdpa or eager.
        unsafe_load: Allow unpickling a module from a file.
        display: Shows progress.

    Raises:
        UsageError: Sizes are chosen by text, and there is none; or settings do not fit the model.
    """
    if is_weightless(model):
        return _plan_weightless(model, config, calibration, attn_implementation)
    _require_text(config, calibration)
    documents = read_text(calibration)
    dtype = wanted_type(config)
    program = frontend.load_any(model, attention=attn_implementation, unsafe=unsafe_load, dtype=dtype)
    found = recognise(program)
    types = _type_name(program.dtype), _type_name(_result_type(program, config))
    if config.encoders and is_seq2seq(found):
        own, crossed = plan_seq2seq(program, found, config)
        return Planned(found, (*own, *crossed))
    if config.encoders and (is_encoder(found) or not isinstance(program, Program)):
        sites, _ = require_encoder(program, found)
        return Planned(found, plan_layers(sites, [input_width(program, s) for s in sites], config))
    program = require_causal(program, found)
    sites, method = found.sites, config.chosen_method
    widths = tuple(input_width(program, s) for s in sites)
    if config.exact or method == "mha2mla":
        plans = plan_layers(sites, widths, config)
        stored = {v.data_ptr(): v.numel() for v in program.exported.state_dict.values()}  # what is tied counts once
        count = sum(stored.values())
        cost = conversion_cost(
            sites, plans, widths, config, count, _result_type(program, config).itemsize, program.vocabulary
        )
        _tell(plans)
        return Planned(found, plans, widths, *types, cost)
    text = cut_windows(program, documents, tokenizer, config)
    windows = None if text is None else text.calibration
    task = Task(program, sites, found.rejections, config, windows, Stages(display), open_cache(statistics_cache))
    plans = METHODS[method](task).plans
    _tell(plans)
    return Planned(found, plans, widths, *types)


def _tell(plans: Sequence[LatentPlan]) -> None:
    """Log what was decided for each layer."""
    for p in plans:
        _log.info(
            "%s: a latent of %d numbers (%d lose nothing) and %d x %d rotating channels, %d numbers per token of %d.",
            *(p.path, p.kv_rank, p.exact_rank, p.rope_groups, p.rope_dims, p.elements_after, p.elements_before),
        )


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plan_weightless(
    model: str | Path, config: CompileConfig, calibration: Text | None, attn_implementation: str
) -> Planned:
    """Plan from a configuration alone; ``auto`` is then the one method that needs no text.

    Raises:
        UsageError: There is text, or the method needs some, and no weights to run on it.
    """
    if config.method == "auto" and not config.exact:
        config = config.model_copy(update={"method": "mha2mla"})
    if calibration is not None or config.needs_text:
        raise UsageError(
            f"'{model}' has no weights, and text is of use only where the model can be run on it.",
            "Plan with --method mha2mla and without --calibration, or give the whole checkpoint.",
        )
    blueprint = draw(model, attn_implementation)
    found = blueprint.found
    alike = (blueprint.layers, blueprint.exported) if blueprint.exported < blueprint.layers else None
    if config.encoders and (is_encoder(found) or not isinstance(blueprint.program, Program)):
        raise UsageError(
            f"'{model}' has no weights, and only causal language models are planned without.",
            "Give the whole checkpoint, or look at it with 'mla-compile inspect'.",
        )
    program = require_causal(blueprint.program, found)
    widths = tuple(input_width(program, s) for s in found.sites)
    plans = plan_layers(found.sites, widths, config)
    types = _type_name(program.dtype), _type_name(_result_type(program, config))
    itemsize = _result_type(program, config).itemsize
    cost = conversion_cost(found.sites, plans, widths, config, blueprint.parameters, itemsize, program.vocabulary)
    return Planned(found, plans, widths, *types, cost, alike)


def convertible(
    program: AnyProgram, found: Recognition, encoders: bool
) -> tuple[Sequence[AttentionSite], Sequence[Rejection]]:
    """Split what was found into layers that a conversion changes and others."""
    if encoders and is_encoder(found):
        return require_encoder(program, found)
    crossed = [r for r in found.rejections if r.site is not None and r.site.kind == Kind.CROSS]
    if encoders and is_seq2seq(found):
        sites = [*found.sites, *(r.site for r in crossed if r.site is not None)]
        return sites, [r for r in found.rejections if r not in crossed]
    return found.sites, found.rejections


def would_be_refused(program: AnyProgram, found: Recognition, encoders: bool) -> bool:
    """Whether a conversion would refuse the model for its attention."""
    if encoders and is_encoder(found):
        return False
    if encoders and is_seq2seq(found):
        return bool(undecodable(program, found))
    lost = any(r.plain is None for r in found.rejections)
    return not isinstance(program, Program) or not found.sites or lost


def lossless_elements(program: AnyProgram, sites: Sequence[AttentionSite]) -> tuple[int, ...]:
    """Numbers per token and layer that a latent cache needs at most, with every rotation kept and nothing lost."""
    config = make_config(exact=True, selection="uniform")
    plans = plan_layers(sites, [input_width(program, s) for s in sites], config)
    return tuple(p.elements_after for p in plans)


def load(folder: str | Path) -> LatentModel:
    """Read back a model written by :meth:`CompiledModel.save`.

    Args:
        folder: The folder.

    Raises:
        LoadError: The folder holds no such model.
    """
    return read_folder(Path(folder))


def _load(
    model: nn.Module | ExportedProgram | str | Path,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    tokenizer: Any,  # noqa: ANN401
    attention: str,
    unsafe: bool,
    any_kind: bool,
    dtype: torch.dtype | None,
) -> AnyProgram:
    """Read a model from wherever it is; a module whose inputs are given must be ``any_kind`` to take other than ids."""
    folder = str(tokenizer) if isinstance(tokenizer, str | Path) else None
    if isinstance(model, str | Path):
        return frontend.load_any(model, tokenizer=folder, attention=attention, unsafe=unsafe, dtype=dtype)
    if isinstance(model, ExportedProgram):
        return frontend.read_export(model, source="ExportedProgram", assets=Assets(folder=folder))
    program: AnyProgram
    if any_kind or example_inputs is None:
        program = frontend.capture_any(model, example_inputs, tokenizer=folder, dtype=dtype)
    else:
        program = frontend.capture(model, example_inputs, tokenizer=folder, dtype=dtype)
    if folder is None and tokenizer is not None:
        program = dataclasses.replace(program, assets=dataclasses.replace(program.assets, tokenizer=tokenizer))
    return program


def require_causal(program: AnyProgram, found: Recognition) -> Program:
    """Refuse what is no causal language model, or has a layer that is not understood.

    Raises:
        RefusedError: Its attention is of another kind, or a layer is not understood.
        LoadError: It is no causal language model for another reason.
    """
    kinds = sorted({r.site.kind.value for r in found.rejections if r.site is not None})
    if isinstance(program, OtherProgram) and not kinds:
        raise program.why
    if isinstance(program, Program) or is_encoder(found):
        _require_some(program, found)
    if isinstance(program, Program):
        return program
    remedy = "Pass --encoders to convert what its decoder caches." if is_seq2seq(found) else ""
    raise RefusedError(
        f"'{program.source}' is no causal language model: some of its attention is {' and '.join(kinds)}.",
        remedy or "Run 'mla-compile inspect' for the whole table.",
    )


def _check_out(out: Path, format: str, force: bool) -> None:
    """Refuse a place where what is asked for cannot be written.

    Raises:
        UsageError: The name is that of something else, exists already, or cannot be written.
    """
    if format == "gguf":
        check_gguf(out, force)
    elif format == "deepseek":
        check_folder(out, force)
    elif format == "hf" and out.suffix:
        raise UsageError(f"'{out}' names a file, and the format hf is a folder.", "Name a folder without a suffix.")
    else:
        check_target(out, force)


def _require_text(config: CompileConfig, calibration: Text | None) -> None:
    """Refuse what chooses or trains by what the model does on text, without text.

    Raises:
        UsageError: The method or polishing needs text.
    """
    if calibration is not None or not config.needs_text:
        return
    if config.polish_steps:
        raise UsageError("Polishing needs text to train on.", "Give some with --calibration FILE.")
    if config.chosen_method == "mha2mla":
        raise UsageError("The 2-norm selection needs text to measure on.", "Give some with --calibration FILE.")
    raise UsageError(
        f"The method '{config.chosen_method}' chooses by what the model does on text, and none was given.",
        "Give some with --calibration FILE, or choose --method mha2mla, which does without and loses more.",
    )


def require_known_types(program: AnyProgram) -> None:
    """Refuse weights of types that the rewrite, its checks and the cache do not know."""
    for name, value in program.exported.state_dict.items():
        if value.is_floating_point() and value.dtype not in _TYPES:
            kind = str(value.dtype).removeprefix("torch.")
            raise UsageError(
                f"'{name}' of '{program.source}' is {kind}; only float32, float16 and bfloat16 are converted.",
                "Call model.float() before exporting or converting it.",
            )


def wanted_type(config: CompileConfig) -> torch.dtype | None:
    """The type of the result that was asked for, if any."""
    return None if config.dtype == "auto" else getattr(torch, config.dtype)


def _result_type(program: AnyProgram, config: CompileConfig) -> torch.dtype:
    """Type of the result.

    Raises:
        UsageError: The model cannot be had in that type, or its cache not in another.
    """
    # What stock code reads is made of several matrices each: rounded once, by whoever loads it in another type.
    wanted = wanted_type(config) or (torch.float32 if config.for_stock_code else program.dtype)
    own, name = (str(x).removeprefix("torch.") for x in (program.dtype, wanted))
    if wanted not in (program.dtype, torch.float32):
        raise UsageError(
            f"'{program.source}' was exported in {own}, and its graph does not say what {name} must not round.",
            f"Export it in {name} (model.to(torch.{name}) before torch.export.export), or leave --dtype {name} out.",
        )
    if config.for_stock_code and wanted == torch.float16:
        raise UsageError(
            f"The format {config.format} is written in float32 or bfloat16: float16 cannot hold its small latents.",
            "Leave --dtype float16 out.",
        )
    if config.q_rank is not None and wanted != torch.float32:
        raise UsageError(
            f"Rounding queries to {name} gives them more rank than --q-rank {config.q_rank}.",
            f"Leave --dtype {name} or --q-rank out.",
        )
    if config.cache_type != "auto" and wanted != torch.float32:
        raise UsageError(
            f"The cache of a model in {name} holds that type, and {config.cache_type} caches are of float32.",
            f"Leave --cache-type {config.cache_type} out, or pass --dtype float32.",
        )
    return wanted


def _require_float32(program: AnyProgram, dtype: torch.dtype, what: str, done: str) -> None:
    """Refuse another type where only float32 will do.

    Raises:
        UsageError: It is of another type.
    """
    if dtype != torch.float32:
        kind = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"{what} is {done} in float32 only, and '{program.source}' is {kind}.",
            "Pass --dtype float32 (dtype='float32' in Python), or call model.float() before exporting it.",
        )


def _require_some(program: AnyProgram, found: Recognition) -> Recognition:
    """Refuse a model with nothing to convert, or with a layer that cannot even be kept as it is."""
    lost = [r for r in found.rejections if r.plain is None]
    if lost or (found.rejections and not found.sites):
        reasons = "; ".join(f"{r.path}: {r.reason} [{r.code.value}]" for r in lost or found.rejections)
        verb = "decoded with a cache" if lost and found.sites else "converted"
        raise RefusedError(
            f"{len(lost or found.rejections)} of {len(found.rejections) + len(found.sites)} attention layers of "
            f"'{program.source}' cannot be {verb}: {reasons}.",
            "Pass --encoders to make its projections low-rank instead."
            if is_encoder(found)
            else "Run 'mla-compile inspect' for the whole table.",
        )
    if not found.sites:
        raise RefusedError(
            f"No attention was found in '{program.source}'.",
            "Export with run_decompositions({}) at most, so that attention is still a softmax between two products.",
        )
    return found


def _settle(config: CompileConfig, text: bool) -> tuple[CompileConfig, tuple[str, ...]]:
    """Resolve ``auto``, and say so when the choice was made for lack of text."""
    if config.exact:
        return config.model_copy(update={"method": "mha2mla", "selection": "uniform"}), ()  # every component is kept
    notes = () if text else ("without calibration text the quality of the conversion was not measured",)
    config = config.model_copy(update={"method": config.chosen_method})
    if config.method != "mha2mla":
        return config, notes
    if config.selection != "auto":
        return config, notes
    if text:
        return config.model_copy(update={"selection": "2-norm"}), ()
    note = "without calibration text the rotary components were selected uniformly"
    return config.model_copy(update={"selection": "uniform"}), (note, *notes)


def _exact_twin(task: Task) -> LatentModel:
    """The same rewrite with nothing left out."""
    return task.rewrite(nothing_left_out(dataclasses.replace(task, stages=Stages(), wide=True)).weights)


def _random_ids(program: Program, config: CompileConfig) -> Tensor:
    nodes = {n.name: n for n in program.exported.graph.nodes}
    vocabulary = int(nodes[program.logits].meta["val"].shape[-1])
    length = longest_window(original_scorer(program), program.max_positions, _RANDOM_LENGTH)
    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(config.seed))


def _measure(task: Task, converted: LatentModel, text: TextWindows | None, stages: Stages) -> Quality | None:
    if text is None:
        return None
    batches = text.held_out.split(8)
    with stages.stage("evaluate", 2 * len(batches)) as stage:
        original = original_logits(task.program, task.sites, batches, task.resources)
        before = streamed_perplexity(original, batches, stage.each)
        after = streamed_perplexity(converted_logits(converted, batches, task.resources), batches, stage.each)
    return Quality(before.value, after.value, before.tokens, text.separate)


def _warnings(
    plans: Sequence[LatentPlan], kept: Sequence[Rejection], quality: Quality | None, config: CompileConfig
) -> tuple[str, ...]:
    found = []
    if kept:
        reasons = "; ".join(f"{r.path}: {r.reason} [{r.code.value}]" for r in kept)
        found.append(f"{len(kept)} attention layers were not converted and keep an ordinary cache ({reasons})")
    found += clamped(plans, config)
    grown = [p.path for p in plans if p.elements_after >= p.elements_before]
    if grown and not config.exact:
        found.append(f"the cache of {len(grown)} layers does not shrink at this setting")
    if quality is not None and not quality.held_out:
        found.append("the text is too short to hold any back: perplexity was measured on the calibration text itself")
    if quality is not None and quality.ratio > _MUCH_WORSE:
        found.append(
            f"perplexity grows {quality.ratio:.1f} times; keep more cache with --cache-ratio, or "
            "spend it differently with --rope-dims"
        )
    return tuple(found)


def _hurt(plans: Sequence[LatentPlan], errors: Sequence[LayerError]) -> tuple[str, ...]:
    """Name the layers that cost much by themselves, the worst first."""
    worst = sorted(
        ((e.loss or 0.0, plan.path) for plan, e in zip(plans, errors, strict=False) if (e.loss or 0.0) > _HURT),
        reverse=True,
    )
    if not worst:
        return ()
    named = ", ".join(f"{path} ({loss:.2f})" for loss, path in worst[:_NAMED])
    more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return (f"layers that cost more than {_HURT:g} nats per token each, by themselves: {named}{more}",)


def _gate(quality: Quality | None, limit: float | None) -> None:
    if quality is not None and limit is not None and quality.ratio > limit:
        raise QualityGateError(
            f"Perplexity grows {quality.ratio:.3f} times ({quality.original:.3f} to {quality.converted:.3f}), above "
            f"the limit of {limit:g}.",
            "Raise --cache-ratio or --max-ppl-ratio.",
        )
