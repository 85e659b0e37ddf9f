"""Measure a language model on text: perplexity, and how two models differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mla_compile.errors import UsageError
from mla_compile.program import Program

__all__ = [
    "DEFAULT_WINDOW",
    "Perplexity",
    "Scorer",
    "longest_window",
    "original_scorer",
    "perplexity",
    "relative_error",
]

DEFAULT_WINDOW = 512
"""Tokens per window unless the user or the model says otherwise."""

Scorer = Callable[[Tensor], Tensor]
"""Token ids ``[batch, length]`` to logits ``[batch, length, vocabulary]``."""


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity over scored tokens.

    Attributes:
        value: ``exp`` of the mean negative log-likelihood.
        loss: That mean, in nats per token.
        tokens: Scored tokens: all but the first of every window.
    """

    value: float
    loss: float
    tokens: int


def perplexity(
    score: Scorer, windows: Tensor, batch: int = 8, progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
) -> Perplexity:
    """Score every token but the first of every window once.

    Args:
        score: The model.
        windows: ``[windows, length]`` token ids.
        batch: Windows scored together.
        progress: Wraps the batches to show progress.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in progress(windows.split(batch)):
            logits = score(ids)[:, :-1].float()
            target = ids[:, 1:].reshape(-1)
            total += F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target, reduction="sum").item()
            count += target.numel()
    loss = total / count
    return Perplexity(math.exp(min(loss, 700.0)), loss, count)


def longest_window(score: Scorer, limit: int | None, wanted: int = DEFAULT_WINDOW) -> int:
    """Longest window, at most ``wanted`` tokens, that a model can run.

    Args:
        score: The model.
        limit: What the model says of itself; None where it says nothing, and is tried instead (a table of positions
            ends somewhere).
        wanted: Upper end.
    """
    if limit is not None:
        return min(limit, wanted)
    runs, fails = 1, wanted + 1
    length = wanted
    with torch.inference_mode():
        while fails - runs > 1:
            try:
                score(torch.zeros(1, length, dtype=torch.long))
            except (RuntimeError, IndexError, UsageError):
                fails = length
            else:
                runs = length
            length = (runs + fails) // 2
    return runs


def original_scorer(program: Program) -> Scorer:
    """The unconverted model as a function of whole sequences."""
    module = program.flat_module()
    return lambda ids: module(*program.inputs(ids))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
