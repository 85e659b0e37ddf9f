"""Measure a language model on text: perplexity, and how two models differ."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mla_compile.errors import UsageError, VerificationError
from mla_compile.program import Program

__all__ = [
    "DEFAULT_WINDOW",
    "Comparison",
    "Perplexity",
    "Scorer",
    "advised_window",
    "compare",
    "differences",
    "divergence",
    "longest_window",
    "original_scorer",
    "perplexity",
    "relative_error",
    "require_window",
    "streamed_perplexity",
    "worst",
]

DEFAULT_WINDOW = 512
"""Tokens per window unless the user or the model says otherwise."""

_RULED_OUT = 1e3
"""Logits that are this negative, and this far below the row's largest, are of tokens that cannot be: ``-inf``, the
least number of a type, -1e9. The exponential of the distance is zero in float64 too."""

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


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model on text, compared with the first one.

    Attributes:
        perplexity: Its perplexity.
        kl: KL(first || this one) of the predicted distributions, in nats per scored token; 0 for the first.
        top1: Share of scored tokens at which both think the same token the most likely; 1 for the first.
        seconds: Wall-clock time it ran.
    """

    perplexity: Perplexity
    kl: float
    top1: float
    seconds: float


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
    return compare([score], windows, batch, progress)[0].perplexity


def streamed_perplexity(
    logits: Iterable[Tensor],
    batches: Sequence[Tensor],
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Perplexity:
    """Score every token but the first of every window once, by logits that are made as they are read.

    Args:
        logits: Of every batch, ``[batch, length, vocabulary]``; a model may run layer by layer over all of them.
        batches: Token ids ``[batch, length]``.
        progress: Wraps the batches to show progress.

    Raises:
        VerificationError: The logits are not numbers.
    """
    total, count = 0.0, sum(ids[:, 1:].numel() for ids in batches)
    for ids, found in zip(progress(batches), logits, strict=True):
        total += float(_sums(found, ids, None)[0])
    return _perplexity(total / count, count)


def _perplexity(loss: float, count: int) -> Perplexity:
    """What a mean loss over so many tokens says.

    Raises:
        VerificationError: It is not a number.
    """
    if not math.isfinite(loss):
        raise VerificationError(
            "The loss on the text is not a number: weights of the model are damaged, or overflow their type.",
            "Convert the model again, with --dtype float32 if it is in float16.",
        )
    return Perplexity(math.exp(min(loss, 700.0)), loss, count)  # beyond that a float ends


def compare(
    scores: Sequence[Scorer],
    windows: Tensor,
    batch: int = 8,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> list[Comparison]:
    """Run models side by side, batch by batch, so that only one batch's logits are in memory.

    Args:
        scores: The models, of one vocabulary; all are compared with the first.
        windows: ``[windows, length]`` token ids, of which all but the first of every window are scored.
        batch: Windows scored together.
        progress: Wraps the batches to show progress.

    Returns:
        One entry per model.

    Raises:
        VerificationError: A model's logits are not numbers.
    """
    totals = torch.zeros(len(scores), 3, dtype=torch.float64)
    seconds = [0.0] * len(scores)
    with torch.inference_mode():
        for ids in progress(windows.split(batch)):
            first: Tensor | None = None
            for model, score in enumerate(scores):
                begin = time.perf_counter()
                logits = score(ids)
                if logits.device.type != "cpu":
                    logits[:1, :1, :1].cpu()  # a device has only begun: this waits for it
                seconds[model] += time.perf_counter() - begin
                totals[model] += _sums(logits, ids, first)
                first = logits if first is None else first
    count = windows[:, 1:].numel()
    found = []
    for (loss, kl, same), taken in zip((totals / count).tolist(), seconds, strict=True):
        found.append(Comparison(_perplexity(loss, count), kl, same, taken))
    return found


def _sums(logits: Tensor, ids: Tensor, first: Tensor | None) -> Tensor:
    """Loss, divergence from the first model, and agreements with it, summed over the scored tokens of a batch.

    In float64, so that a model that computes the same is at no distance, and window by window for the memory's sake.
    """
    total = torch.zeros(3, dtype=torch.float64)
    for row, targets in enumerate(ids[:, 1:].to(logits.device)):
        got = logits[row, :-1].double().log_softmax(-1)
        total[0] -= got.gather(-1, targets[:, None]).sum().item()
        if first is None:
            total[2] += len(targets)
            continue
        expected = first[row, :-1].to(logits.device).double().log_softmax(-1)
        total[1] += divergence(expected, got).item()
        total[2] += (got.argmax(-1) == expected.argmax(-1)).sum().item()
    return total


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


def advised_window(score: Scorer, limit: int | None, tokens: int) -> int:
    """Longest window that a short text is enough for, and that a model can run.

    Args:
        score: The model.
        limit: What the model says of itself; one that says nothing is tried, with windows of the usual length at most.
        tokens: Tokens of the text.
    """
    return longest_window(score, limit, min(tokens, DEFAULT_WINDOW) if limit is None else tokens)


def require_window(score: Scorer, limit: int | None, length: int, name: str) -> None:
    """Refuse windows that are longer than a model can run.

    Args:
        score: The model.
        limit: What the model says of itself, if anything.
        length: Tokens of a window.
        name: What the user calls the model.

    Raises:
        UsageError: They are.
    """
    longest = longest_window(score, limit, length)
    if longest < length:
        raise UsageError(
            f"Windows of {length} tokens are longer than '{name}' can run.", f"Use --seq-len {longest} or less."
        )


def original_scorer(program: Program, module: nn.Module | None = None) -> Scorer:
    """The unconverted model as a function of whole sequences.

    Args:
        program: The model.
        module: What computes: by default the model as it is, otherwise the same graph in another number type.
    """
    computes = program.flat_module() if module is None else module
    return lambda ids: computes(*program.inputs(ids))


def divergence(expected: Tensor, got: Tensor) -> Tensor:
    """KL(expected || got) in nats, summed over all rows; tokens that the first rules out by ``-inf`` count as nothing.

    Args:
        expected: Log-probabilities ``[..., vocabulary]``.
        got: The same of another model.
    """
    weights = expected.exp()
    return torch.where(weights == 0, 0.0, weights * (expected - got)).sum()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude, of logits that are not ruled out; NaN if one of them is.

    Args:
        got: Logits ``[..., vocabulary]``, or other outputs.
        expected: The same of another model.
    """
    found, largest = differences(got, expected)
    return float(found.max() / largest)


def differences(got: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """How far apart single logits are, and the largest magnitude to compare that with.

    A masked logit is no number to divide by: beside -1e9 any difference is a rounding. One that is ruled out in either
    has to be so in the other, by half of the distance, for the sake of roundings; all others are compared.

    Args:
        got: Logits ``[..., vocabulary]``.
        expected: The same of another model.

    Returns:
        Absolute differences: zero where both are ruled out, infinite where one of them is. And the largest magnitude
        that is expected of logits that are not ruled out.
    """
    out = _ruled_out(expected, _RULED_OUT)
    either = out | _ruled_out(got, _RULED_OUT)
    both = _ruled_out(expected, _RULED_OUT / 2) & _ruled_out(got, _RULED_OUT / 2)
    found = torch.where(either, torch.where(both, 0.0, torch.inf), (got - expected).abs())
    return found, expected.masked_fill(out, 0).abs().max().clamp(min=1e-30)


def _ruled_out(logits: Tensor, distance: float) -> Tensor:
    return (logits <= -distance) & (logits <= logits.amax(-1, keepdim=True) - distance)


def worst(*errors: float) -> float:
    """The largest of some errors; NaN where one is, which ``max`` may leave out."""
    return math.nan if any(map(math.isnan, errors)) else max(errors)
