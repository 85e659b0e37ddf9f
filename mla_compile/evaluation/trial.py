"""``mla-compile eval --methods``: convert an original in several ways, write nothing, and measure every one."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mla_compile.artifacts.runnable import (
    RunnableModel,
    Runtime,
    decoder_scorer,
    latent_bytes,
    module_scorer,
    open_program,
)
from mla_compile.config import CompileConfig, make_config
from mla_compile.conversion.admission import require_causal
from mla_compile.conversion.number_types import require_known_types
from mla_compile.conversion.sampled_text import sample_windows
from mla_compile.devices import memory_explained, require_device
from mla_compile.disk.statistics_cache import StatisticsCache
from mla_compile.errors import RefusedError, UsageError
from mla_compile.evaluation.measure import Measurement, ModelScore, Sample, run_beside
from mla_compile.passes.layerwise import Resources
from mla_compile.passes.lower_onnx import lower_to_onnx
from mla_compile.passes.methods import METHODS
from mla_compile.passes.recognise import recognise
from mla_compile.passes.task import Task
from mla_compile.progress import Display, Stages
from mla_compile.runtime.module import LatentModel
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.sources import frontend
from mla_compile.text.amounts import used_count
from mla_compile.text.calibration import is_sampled, read_text
from mla_compile.text.corpus import TextFile, load_tokenizer, open_documents, token_windows, tokenize

__all__ = ["measure_conversions", "read_trials"]


def read_trials(methods: str, cache_ratios: str, calibrated: bool, calibration_tokens: int) -> list[CompileConfig]:
    """Read what to try: every method at every ratio.

    Args:
        methods: Names of methods, with commas between.
        cache_ratios: Cache sizes after over before, with commas between.
        calibrated: Whether there is calibration text.
        calibration_tokens: Tokens of it to use.

    Raises:
        UsageError: A name or number is not known, or a method needs text and there is none.
    """
    names, ratios = _listed(methods), [_ratio(word) for word in _listed(cache_ratios)]
    for name in names:
        if name not in METHODS:
            raise UsageError(f"There is no method '{name}'.", f"Choose some of {','.join(METHODS)}.")
    needy = [name for name in names if name != "mha2mla"]
    if needy and not calibrated:
        raise UsageError(
            f"The method '{needy[0]}' chooses by what the model does on text, and none was given.",
            "Give some with --calibration FILE, or let the model write it with --calibration sampled.",
        )
    selection = {"mha2mla": "2-norm" if calibrated else "uniform"}
    return [
        make_config(
            method=name,
            selection=selection.get(name, "auto"),
            cache_ratio=ratio,
            calibration_tokens=calibration_tokens,
        )
        for name in names
        for ratio in ratios
    ]


def _listed(words: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in words.split(",")))


def _ratio(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise UsageError(f"'{word}' is not a cache ratio.", "Give numbers above 0 and up to 1, such as 0.5,0.25.")
    return value


@memory_explained()
def measure_conversions(
    original: str,
    sample: Sample,
    trials: Sequence[CompileConfig],
    *,
    calibration: str | None = None,
    onnxruntime: bool = False,
    cache: StatisticsCache | None = None,
    device: str = "cpu",
    display: Display | None = None,
) -> Measurement:
    """Convert a model in several ways, one at a time, and measure each beside the original.

    The original is read and recognised once. It runs again beside every conversion, for the logits of a whole text are
    too many to keep.

    Args:
        original: An archive, a Hugging Face folder or a hub id.
        sample: What to measure on.
        trials: What to try; one that does not fit the model is left out with a warning.
        calibration: The text to choose by: a file, ``hf:`` and a dataset, or ``sampled``.
        onnxruntime: Measure every conversion in ONNX Runtime as well.
        cache: Where statistics are kept, if anywhere.
        device: Where conversions are computed and models in PyTorch run.
        display: Shows progress.

    Raises:
        LoadError: The model, its tokenizer or a text cannot be read.
        RefusedError: The model cannot be converted, or none of the trials can be done.
        UsageError: A text is shorter than one window, or none of the trials fits the model.
    """
    if onnxruntime and importlib.util.find_spec("onnxruntime") is None:
        raise UsageError("ONNX Runtime is not installed.", "Run: pip install 'mla-compile[cpu]'.")
    require_device(device)
    documents = open_documents(sample.text)
    chosen_by = None if is_sampled(calibration) else read_text(calibration)
    same = isinstance(chosen_by, TextFile) and chosen_by == documents
    warnings = ["the conversions were calibrated on the text they are measured on"] if same else []
    stages = Stages(display)
    with stages.stage("load"):
        loaded = frontend.load_any(original, tokenizer=sample.tokenizer)
    require_known_types(loaded)
    with stages.stage("recognise"):
        found = recognise(loaded)
    program = require_causal(loaded, found)
    base = open_program(original, program, found, device)
    tokenizer = load_tokenizer(base.tokenizer)
    longest = sample.longest([base])
    windows = sample.windows(documents, tokenizer, [base], longest)
    examples = None
    if is_sampled(calibration):
        examples, notes = sample_windows(
            program, used_count(trials[0], longest), longest, trials[0].seed, cache, stages, device
        )
        warnings += notes
    if chosen_by is not None:
        limit = trials[0].calibration_tokens
        stream = tokenize(chosen_by, tokenizer, max(limit, longest))
        examples = token_windows(stream, longest, limit, name="calibration text")
    beside: ModelScore | None = None
    measured: list[ModelScore] = []
    refused: UsageError | RefusedError | None = None
    for trial in trials:
        resources = Resources(device=device)
        task = Task(program, found.sites, found.rejections, trial, examples, stages, cache, resources=resources)
        try:
            choice = METHODS[trial.method](task)
        except (UsageError, RefusedError) as error:
            refused = error
            warnings.append(f"{_name(trial)} was left out: {error.message}")
            continue
        warnings += choice.notes
        with _runnable(task, base, task.result(choice.weights), onnxruntime) as converted:
            beside, *others = run_beside([base, *converted], windows, _name(trial), stages)
        measured += others
    if refused is not None and beside is None:
        raise refused
    return Measurement.of(sample, windows, beside, measured, warnings)


def _name(trial: CompileConfig) -> str:
    return f"{trial.method} {trial.cache_ratio:g}"


@contextmanager
def _runnable(task: Task, base: RunnableModel, model: LatentModel, onnxruntime: bool) -> Iterator[list[RunnableModel]]:
    """A conversion in torch and, if wanted, in ONNX Runtime from a file that is gone afterwards."""
    config = task.config
    asked = replace(base, name=_name(config), method=config.method, cache_ratio=config.cache_ratio)
    converted = replace(asked, score=module_scorer(model, task.resources.device), cache_bytes=latent_bytes(model))
    if not onnxruntime:
        yield [converted]
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with task.stages.stage("lower to ONNX"):
            graph = model.graph
            lower_to_onnx(graph, model.rows, path, opset=config.opset, inline=False, metadata={})
            decoder = OnnxDecoder(path)
        lowered = replace(
            asked,
            runtime=Runtime.ONNX_RUNTIME,
            score=decoder_scorer(decoder),
            cache_bytes=decoder.cache_bytes_per_token,
        )
        yield [converted, lowered]
