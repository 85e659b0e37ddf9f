"""The steps of converting a causal language model, a function each; :mod:`mla_compile.api` takes them in order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mla_compile.artifacts.checkpoint import require_blocks
from mla_compile.config import CompileConfig
from mla_compile.conversion.admission import as_causal, require_no_kept_layers, require_room_to_polish
from mla_compile.conversion.number_types import require_float32
from mla_compile.conversion.request import Request, Session, require_one_process
from mla_compile.conversion.sampled_text import sample_text
from mla_compile.conversion.verdict import costly_layers, log_sizes, require_smaller, rounded_slopes, warnings_of
from mla_compile.deepseek import require_expressible, with_preset
from mla_compile.disk.statistics_cache import StatisticsCache, open_cache
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.converted import converted_logits, original_logits
from mla_compile.passes.gauge import balanced
from mla_compile.passes.layer_errors import error_steps, layer_errors
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.methods import METHODS, nothing_left_out
from mla_compile.passes.polish import polish
from mla_compile.passes.quantise_cache import check_quantisable
from mla_compile.passes.query_rank import with_query_rank
from mla_compile.passes.recognise import Recognition
from mla_compile.passes.retype import widened
from mla_compile.passes.task import BATCH, Choice, Task
from mla_compile.plan import plan_layers
from mla_compile.program import Program
from mla_compile.progress import Stages
from mla_compile.report import LayerError, Polish, Quality, Report, Training, Verification
from mla_compile.runtime.module import LatentModel
from mla_compile.text.calibration import TextWindows, cut_windows, writes_text
from mla_compile.text.evaluate import longest_window, original_scorer, streamed_perplexity
from mla_compile.training.recipe import make_recipe
from mla_compile.training.run import finetune_module
from mla_compile.verification.module import check_module
from mla_compile.verification.onnx import quantised

__all__ = [
    "Case",
    "FinalWeights",
    "Findings",
    "choose",
    "fine_tune",
    "finish",
    "ids_to_check",
    "make_report",
    "measure",
    "measure_layers",
    "prepare",
    "rewrite",
    "verify_module",
]

_RANDOM_LENGTH = 64
"""Random tokens per sequence to verify on without text: half as a prompt, half to continue it by 32 tokens."""


@dataclass(frozen=True)
class Case:
    """A causal language model to convert.

    Attributes:
        request: What was asked for.
        task: The model, its layers, settings with every ``auto`` resolved, and what the conversion may use.
        text: Text to choose by and to measure on, or None.
        notes: What the user should know of how settings were resolved.
    """

    request: Request
    task: Task
    text: TextWindows | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FinalWeights:
    """Latent weights as they go into the model.

    Attributes:
        weights: Of every site.
        polish: What polishing them did, or None.
        notes: What the user should know of it.
    """

    weights: tuple[LatentWeights, ...]
    polish: Polish | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """What was found out of a converted model.

    Attributes:
        layer_errors: What every layer costs by itself; empty without text.
        verification: How far it is from the original; None where that was not checked.
        training: What fine-tuning did, or None.
        quality: Perplexity before and after; None without text.
    """

    layer_errors: tuple[LayerError, ...]
    verification: Verification | None
    training: Training | None
    quality: Quality | None


def prepare(program: Program, found: Recognition, session: Session) -> Case:
    """Settle what is to be done with a model, and cut the text into windows.

    Args:
        program: The model.
        found: Its attention layers.
        session: What was asked for; its configuration names the type of the result.

    Raises:
        UsageError: Settings do not fit the model, or the text is too short.
        RefusedError: The format cannot express the model.
    """
    request = session.request
    config = as_causal(request.config)
    if request.finetune is not None:
        require_float32(program, getattr(torch, config.dtype), "A conversion", "fine-tuned")
    if config.for_stock_code:
        require_expressible(found.sites, found.rejections)
        require_blocks(program, found.sites)
        config = with_preset(config, found.sites[0])
    if config.cache_layout == "genai":
        require_no_kept_layers(found)
    cache = open_cache(request.statistics_cache)
    text, told = _text(program, config, session, cache)
    config, notes = _settled(config, text is not None)
    notes = (*program.notes, *told, *notes, *rounded_slopes(program, found.sites))
    folder = None if request.offload is None else Path(request.offload)
    task = Task(
        program,
        found.sites,
        found.rejections,
        config,
        None if text is None else text.calibration,
        session.stages,
        cache,
        request.store,
        resources=Resources(folder=folder, device=session.device),
        processes=session.processes,
        jobs=request.jobs,
    )
    require_room_to_polish(task)
    return Case(request, task, text, notes)


def _text(
    program: Program, config: CompileConfig, session: Session, cache: StatisticsCache | None
) -> tuple[TextWindows | None, tuple[str, ...]]:
    """Windows of the text that was given, or that the model writes; and what the user should know of it."""
    request = session.request
    if not writes_text(request.calibration, config):
        return cut_windows(program, session.documents, request.source.tokenizer, config), ()
    require_one_process(session.processes)
    windows, notes = sample_text(program, config, cache, session.stages, session.device)
    if request.calibration is None:
        notes = (
            "no calibration text was given, and the model wrote its own; one like what it will read may serve better",
            *notes,
        )
    text = cut_windows(program, windows, None, config)
    return None if text is None else dataclasses.replace(text, sampled=True), notes


def choose(case: Case) -> Choice:
    """Plan every layer's cache and factorise its weights, by the method that was asked for.

    Raises:
        UsageError: The sizes that were asked for do not fit, or make no cache smaller.
    """
    task = case.task
    if task.config.method == "mha2mla":  # whose sizes are known before any work is done
        require_smaller(plan_layers(task.sites, task.widths, task.config), task.config, task.program.dtype, task.dtype)
    choice = nothing_left_out(task) if task.config.exact else METHODS[task.config.method](task)
    require_smaller(choice.plans, task.config, task.program.dtype, task.dtype)
    log_sizes(choice.plans)
    return choice


def finish(case: Case, choice: Choice) -> FinalWeights:
    """Polish the weights, balance them, and give queries a rank of their own, as far as each was asked for."""
    task, config = case.task, case.task.config
    polished = polish(task, choice.weights, config.polish_steps) if config.polish_steps else None
    # Nothing computes another result for it, but the module is to train well.
    weights = choice.weights if polished is None else polished.weights
    weights = weights if choice.balanced else tuple(map(balanced, weights))
    if config.q_rank is not None:
        weights = with_query_rank(weights, choice.moments, config.q_rank)
    return FinalWeights(weights, *((None, ()) if polished is None else (polished.report, polished.notes)))


def rewrite(case: Case, weights: tuple[LatentWeights, ...]) -> LatentModel:
    """Put latent attention in place of the original's.

    Raises:
        RefusedError: A layer's cache is to be quantised and cannot be.
    """
    with case.task.stages.stage("rewrite"):
        converted = case.task.result(weights)
    if case.task.config.cache_type == "int8":  # before anything takes long
        check_quantisable(converted.graph, converted.rows)
    return converted


def measure_layers(case: Case, weights: tuple[LatentWeights, ...], converted: LatentModel) -> tuple[LayerError, ...]:
    """What every layer costs by itself, on text that was held out; nothing without text."""
    if case.text is None:
        return ()
    task, held_out = case.task, case.text.held_out
    gradients = task.config.gradients
    steps = error_steps(task.program, task.sites, held_out.split(BATCH), task.resources, gradients=gradients)
    with task.stages.stage("layers", steps) as stage:
        return layer_errors(
            task.program,
            task.sites,
            weights,
            converted,
            held_out,
            gradients=gradients,
            resources=task.resources,
            progress=stage.each,
        )


def ids_to_check(case: Case) -> Tensor:
    """Token ids to verify on ``[batch, length]``: of the text, or random ones."""
    if case.text is not None:
        return case.text.held_out[:4, :256]
    program = case.task.program
    length = longest_window(original_scorer(program), program.max_positions, _RANDOM_LENGTH)
    generator = torch.Generator().manual_seed(case.task.config.seed)
    return torch.randint(0, program.known_tokens, (2, length), generator=generator)


def verify_module(case: Case, converted: LatentModel, ids: Tensor) -> Verification | None:
    """Compare the conversion with the original, unless that was switched off.

    Raises:
        VerificationError: The conversion is not correct.
    """
    if not case.request.check:
        return None
    program = case.task.program
    flat = program.flat_module()
    wide = widened(flat)  # the same where nothing in it is narrow, which a part of a float32 model may be
    with case.task.stages.stage("verify"):
        exact = case.task.config.exact and program.dtype == torch.float32
        return check_module(
            original_scorer(program),
            converted if exact else _exact_twin(case.task),
            converted,
            ids,
            case.text is not None,
            wide_original=None if wide is flat else original_scorer(program, wide),
        )


def fine_tune(case: Case, converted: LatentModel) -> Training | None:
    """Train the converted model, in place, towards what the original predicts, if that was asked for."""
    request, task = case.request, case.task
    if request.finetune is None:
        return None
    recipe = make_recipe(tokens=request.finetune_tokens, seed=task.config.seed)
    folder = None if request.store is None else request.store.folder
    return finetune_module(
        converted, task.program, request.finetune, request.source.tokenizer, recipe, task.stages, folder
    )


def measure(case: Case, converted: LatentModel) -> Quality | None:
    """Perplexity before and after, on text that was held out; None without text."""
    if case.text is None:
        return None
    task = case.task
    model = quantised(converted) if task.config.cache_type == "int8" else converted
    batches = case.text.held_out.split(8)
    with task.stages.stage("evaluate", 2 * len(batches)) as stage:
        original = original_logits(task.program, task.sites, batches, task.resources)
        before = streamed_perplexity(original, batches, stage.each)
        after = streamed_perplexity(converted_logits(model, batches, task.resources), batches, stage.each)
    return Quality(before.value, after.value, before.tokens, case.text.separate, case.text.sampled)


def make_report(case: Case, choice: Choice, finished: FinalWeights, findings: Findings) -> Report:
    """Say what was done."""
    task, config = case.task, case.task.config
    return Report(
        source=task.program.source,
        in_memory=task.program.in_memory,
        max_positions=task.program.max_positions,
        config=config.model_dump(),
        sites=tuple(task.sites),
        kept=task.kept,
        plans=choice.plans,
        widths=tuple(task.widths),
        bytes_per_element=task.dtype.itemsize,
        source_bytes_per_element=task.program.dtype.itemsize,
        selection=config.selection if config.method == "mha2mla" else config.method,
        stages=tuple(task.stages.timings),
        verification=findings.verification,
        quality=findings.quality,
        forecasts=choice.forecasts,
        deepseek=choice.deepseek,
        layer_errors=findings.layer_errors,
        polish=finished.polish,
        training=findings.training,
        warnings=(
            *case.notes,
            *choice.notes,
            *finished.notes,
            *(findings.training.warnings if findings.training else ()),
            *warnings_of(choice.plans, task.kept, findings.quality, config),
            *costly_layers(choice.plans, findings.layer_errors),
        ),
    )


def _settled(config: CompileConfig, text: bool) -> tuple[CompileConfig, tuple[str, ...]]:
    """Resolve ``auto``, and say so when the choice was made for lack of text."""
    if config.exact:
        return config.model_copy(update={"method": "mha2mla", "selection": "uniform"}), ()  # every component is kept
    notes = () if text else ("without calibration text the quality of the conversion was not measured",)
    config = config.model_copy(update={"method": config.chosen_method})
    if config.method != "mha2mla" or config.selection != "auto":
        return config, notes
    if text:
        return config.model_copy(update={"selection": "2-norm"}), ()
    note = "without calibration text the rotary components were selected uniformly"
    return config.model_copy(update={"selection": "uniform"}), (note, *notes)


def _exact_twin(task: Task) -> LatentModel:
    """The same rewrite with nothing left out; the graph of the other was checked."""
    weights = nothing_left_out(dataclasses.replace(task, stages=Stages(), wide=True)).weights
    return task.rewrite(weights, check=False)
