"""What a conversion would make of a model, without making it: the sizes of its caches, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mla_compile.config import CompileConfig
from mla_compile.conversion.admission import as_causal, is_beyond_causal, require_causal, require_in_pieces
from mla_compile.conversion.encoders import require_encoder
from mla_compile.conversion.number_types import result_type, wanted_type
from mla_compile.conversion.sampled_text import sample_text
from mla_compile.conversion.seq2seq import is_seq2seq, plan_seq2seq
from mla_compile.conversion.verdict import log_sizes, require_smaller
from mla_compile.conversion.weightless import draw, is_weightless
from mla_compile.conversion_cost import ConversionCost, conversion_cost
from mla_compile.devices import memory_explained, require_device
from mla_compile.disk.statistics_cache import open_cache
from mla_compile.errors import UsageError
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.methods import METHODS
from mla_compile.passes.recognise import Recognition, recognise
from mla_compile.passes.retype import type_name
from mla_compile.passes.task import Task
from mla_compile.passes.weights import input_width, stored_numbers
from mla_compile.plan import LatentPlan, plan_layers
from mla_compile.program import AnyProgram
from mla_compile.progress import Display, Stages
from mla_compile.site import AttentionSite
from mla_compile.sources import frontend
from mla_compile.sources.given import require_model, require_on_hub
from mla_compile.text.calibration import Text, cut_windows, has_windows, is_sampled, read_text, require_text
from mla_compile.text.corpus import require_named_tokenizer, require_tokenizer_of

__all__ = ["ConversionPlan", "lossless_elements", "plan"]


@dataclass(frozen=True)
class ConversionPlan:
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
        max_positions: Longest sequence that the model takes; None if it does not say, or has no cache of its own.
    """

    found: Recognition
    plans: tuple[LatentPlan, ...]
    widths: tuple[int, ...] = ()
    source_type: str = "float32"
    dtype: str = "float32"
    conversion: ConversionCost | None = None
    alike: tuple[int, int] | None = None
    max_positions: int | None = None


@memory_explained()
def plan(
    model: str | Path,
    config: CompileConfig,
    *,
    calibration: Text | None = None,
    tokenizer: str | None = None,
    statistics_cache: bool | str | Path = True,
    device: str | None = None,
    attn_implementation: str = "auto",
    unsafe_load: bool = False,
    display: Display | None = None,
) -> ConversionPlan:
    """Plan a conversion; only methods that choose sizes by text compute weights for it.

    Args:
        model: An archive, a Hugging Face folder or a hub id; or a ``config.json`` or folder without weights, for
            methods that need no text.
        config: What the user asked for.
        calibration: Text for the methods that need it, as in :func:`mla_compile.compile`.
        tokenizer: Folder of the tokenizer, if the model does not bring one.
        statistics_cache: As in :func:`mla_compile.compile`.
        device: Likewise, for methods that choose sizes by text; the processor by default.
        attn_implementation: Attention implementation of a transformers model given by name: auto, sdpa or eager.
        unsafe_load: Allow unpickling a module from a file.
        display: Shows progress.

    Raises:
        LoadError: The model or text cannot be read.
        RefusedError: It would not be converted; the message says why.
        UsageError: Sizes are chosen by text, and there is none; or settings do not fit the model.
    """
    require_model(model)
    device = device or "cpu"
    require_device(device)
    stages = Stages(display)
    if is_weightless(model):
        return _plan_weightless(model, config, calibration, attn_implementation, stages)
    require_on_hub(model)
    require_text(config, calibration, planned=True)
    documents = None if is_sampled(calibration) else read_text(calibration)
    if tokenizer is not None:
        require_named_tokenizer(tokenizer)
    elif documents is not None and not has_windows(documents):
        require_tokenizer_of(model)
    dtype = wanted_type(config)
    with stages.stage("load"):
        program = frontend.load_any(
            model, tokenizer=tokenizer, attention=attn_implementation, unsafe=unsafe_load, dtype=dtype
        )
    with stages.stage("recognise"):
        found = recognise(program)
    types = type_name(program.dtype), type_name(result_type(program, config))
    if is_beyond_causal(program, found, config):
        require_text(config, calibration)  # of these nothing is estimated
    if config.encoders and is_seq2seq(found):
        own, crossed = plan_seq2seq(program, found, config)
        return ConversionPlan(found, (*own, *crossed))
    if is_beyond_causal(program, found, config):
        sites, _ = require_encoder(program, found)
        return ConversionPlan(found, plan_layers(sites, [input_width(program, s) for s in sites], config))
    program = require_causal(program, found)
    config = as_causal(config)
    require_text(config, calibration, planned=True)
    require_in_pieces(program)
    sites, method = found.sites, config.chosen_method
    widths = tuple(input_width(program, s) for s in sites)
    if config.exact or method == "mha2mla":
        plans = plan_layers(sites, widths, config)
        require_smaller(plans, config, program.dtype, result_type(program, config))
        itemsize = result_type(program, config).itemsize
        cost = conversion_cost(sites, plans, widths, config, stored_numbers(program), itemsize, program.vocabulary)
        log_sizes(plans)
        return ConversionPlan(found, plans, widths, *types, cost, max_positions=program.max_positions)
    cache = open_cache(statistics_cache)
    if is_sampled(calibration):
        documents, _ = sample_text(program, config, cache, stages, device)
    text = cut_windows(program, documents, tokenizer, config)
    windows = None if text is None else text.calibration
    task = Task(program, sites, found.rejections, config, windows, stages, cache, resources=Resources(device=device))
    plans = METHODS[method](task).plans
    require_smaller(plans, config, program.dtype, task.dtype)
    log_sizes(plans)
    return ConversionPlan(found, plans, widths, *types, max_positions=program.max_positions)


def _plan_weightless(
    model: str | Path, config: CompileConfig, calibration: Text | None, attn_implementation: str, stages: Stages
) -> ConversionPlan:
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
    with stages.stage("load"):
        drawn = draw(model, attn_implementation)
    found = drawn.found
    alike = (drawn.layers, drawn.exported) if drawn.exported < drawn.layers else None
    if is_beyond_causal(drawn.program, found, config):
        raise UsageError(
            f"'{model}' has no weights, and only causal language models are planned without.",
            "Give the whole checkpoint, or look at it with 'mla-compile inspect'.",
        )
    program = require_causal(drawn.program, found)
    widths = tuple(input_width(program, s) for s in found.sites)
    plans = plan_layers(found.sites, widths, config)
    require_smaller(plans, config, program.dtype, result_type(program, config))
    types = type_name(program.dtype), type_name(result_type(program, config))
    itemsize = result_type(program, config).itemsize
    cost = conversion_cost(found.sites, plans, widths, config, drawn.parameters, itemsize, program.vocabulary)
    return ConversionPlan(found, plans, widths, *types, cost, alike, program.max_positions)


def lossless_elements(program: AnyProgram, sites: Sequence[AttentionSite]) -> tuple[int, ...]:
    """Numbers per token and layer that a latent cache needs at most, with every rotation kept and nothing lost."""
    plans = plan_layers(sites, [input_width(program, s) for s in sites], CompileConfig().lossless())
    return tuple(p.elements_after for p in plans)
