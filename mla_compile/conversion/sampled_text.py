"""Calibration text that a model writes itself, where there is none: windows sampled from its own predictions."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from mla_compile.config import CompileConfig
from mla_compile.devices import free_memory
from mla_compile.disk.statistics_cache import StatisticsCache, sampling_key
from mla_compile.passes.moved import moved_model
from mla_compile.passes.plain_caches import with_plain_caches
from mla_compile.program import Program
from mla_compile.progress import Stage, Stages
from mla_compile.runtime.generate import Sampling, generate
from mla_compile.runtime.module import LatentModel, cache_dtype
from mla_compile.runtime.torch_decoder import TorchDecoder
from mla_compile.text.amounts import sampled_count
from mla_compile.text.evaluate import longest_window, original_scorer, require_window

__all__ = ["sample_text", "sample_windows"]

_TOGETHER = 128
"""Windows that are sampled together, at most."""
_SHARE = 8
"""One part of so many of the machine's memory, or of what is free on a device, is for their caches."""
_MEMORY = 16 * 2**30
"""Bytes of memory where nobody says how much there is."""
_COPIES = 2
"""While a step grows a cache, the old one is still there."""
_FIRST = 2.0
"""Temperature of the first token of a text. At 1 a model of several kinds of text wrote too little of the rarer ones; a
token drawn evenly from all leads models of one kind to texts unlike any. docs/method.md has what each of them lost."""


def sample_text(
    program: Program, config: CompileConfig, cache: StatisticsCache | None, stages: Stages, device: str = "cpu"
) -> tuple[Tensor, tuple[str, ...]]:
    """As much of a model's own text as a conversion calibrates and measures on; see :func:`sample_windows`.

    Args:
        program: The model.
        config: Length and number of the windows, and the seed.
        cache: Where they are kept for the next conversion, if anywhere.
        stages: Times and shows what runs.
        device: Where the model runs.

    Returns:
        Token ids ``[windows, length]``, and what the user should know.

    Raises:
        RefusedError: A layer is not understood.
        UsageError: A window is longer than the model can run.
    """
    score, limit = original_scorer(program), program.max_positions
    length = config.seq_len
    if length is None:
        length = longest_window(score, limit)
    else:
        require_window(score, limit, length, program.source)
    return sample_windows(program, sampled_count(config, length), length, config.seed, cache, stages, device)


def sample_windows(
    program: Program,
    count: int,
    length: int,
    seed: int,
    cache: StatisticsCache | None,
    stages: Stages,
    device: str = "cpu",
) -> tuple[Tensor, tuple[str, ...]]:
    """Let a model write text: every next token is drawn from its own probabilities, as they are.

    A window begins with the token that begins a text, or, if the model names none, with one drawn evenly from all that
    it reads. What follows the former is drawn at a higher temperature, so that rare kinds of text are begun more often.
    Nothing ends a window: a token that ends a text is followed by another text. The unconverted model writes, with
    ordinary caches.

    Args:
        program: The model.
        count: Windows.
        length: Tokens of each.
        seed: Of all that is drawn.
        cache: Where windows are kept, if anywhere.
        stages: Times and shows what runs.
        device: Where the model runs; all that is drawn is drawn on the processor.

    Returns:
        Token ids ``[windows, length]``, and what the user should know.

    Raises:
        RefusedError: A layer is not understood.
    """
    starts = _starts(program, count, seed)
    with stages.stage("sample text", length - 1) as stage:

        def write() -> Tensor:
            return _continued(program, starts, length, seed, stage, device)

        if cache is None:
            return write(), ()
        found = cache.recall_windows(sampling_key(program, starts, length, seed), write)
        stage.noted(f"{found.value.numel()} tokens, {found.origin}")
    return found.value, found.warnings


def _begin(program: Program) -> int | None:
    """The token that begins a text, if the model names one."""
    named = program.assets.generation.get("bos_token_id")
    return named if isinstance(named, int) and 0 <= named < program.known_tokens else None


def _starts(program: Program, count: int, seed: int) -> Tensor:
    """First token of every window ``[windows, 1]``."""
    if (begin := _begin(program)) is not None:
        return torch.full((count, 1), begin)
    return torch.randint(0, program.known_tokens, (count, 1), generator=torch.Generator().manual_seed(seed))


def _continued(program: Program, starts: Tensor, length: int, seed: int, stage: Stage, device: str) -> Tensor:
    """Sample what follows ``[windows, length]``, of as many windows together as there is memory for their caches."""
    plain = with_plain_caches(program)
    model = moved_model(LatentModel(plain.module, plain.rows), device)
    decoder = TorchDecoder(model, program.source)
    each = _COPIES * model.cached_elements(length) * cache_dtype(model.graph).itemsize
    together = max(1, min(_TOGETHER, (free_memory(device) or _MEMORY) // _SHARE // each))
    batches = starts.split(together)
    drawn = itertools.count(1)

    def step(_: object) -> None:
        if next(drawn) % len(batches) == 0:  # a step of the stage is a token of every window
            stage()

    def grown(windows: Tensor, new: int, temperature: float, number: int) -> Tensor:
        how = Sampling(temperature=temperature, seed=number)
        found = generate(decoder, windows.tolist(), new, sampling=how, on_tokens=step)
        return torch.cat([windows, torch.tensor(found, dtype=torch.long).reshape(len(windows), new)], 1)

    written = []
    for place, windows in enumerate(batches):
        number = 2 * (seed + place)
        if _begin(program) is not None:
            windows = grown(windows, 1, _FIRST, number)
        written.append(grown(windows, length - windows.shape[1], 1.0, number + 1))
    return torch.cat(written)
