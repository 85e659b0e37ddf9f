"""How likely a model thinks a text is, token by token, however long it is: what evaluation harnesses ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mla_compile.text.evaluate import Scorer

__all__ = ["log_likelihoods", "scored_windows"]

Ids = Sequence[int]


def scored_windows(tokens: Ids, scored: int, longest: int) -> Iterator[tuple[Ids, Ids]]:
    """Cut a sequence so that each of its last tokens is predicted once, with as much before it as fits.

    Args:
        tokens: The sequence.
        scored: How many of its last tokens are to be predicted; the first token never can.
        longest: Tokens the model can be given at once.

    Yields:
        What the model is given, and the tokens that its last predictions are scored on.
    """
    begin = len(tokens) - scored
    while begin < len(tokens):
        end = min(begin + longest, len(tokens))
        yield tokens[max(end - 1 - longest, 0) : end - 1], tokens[begin:end]
        begin = end


def log_likelihoods(
    score: Scorer,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    prefix: int,
    longest: int,
    batch: int,
    last: Callable[[Tensor, int], Tensor] | None = None,
) -> list[tuple[float, bool]]:
    """Score continuations of contexts.

    Args:
        score: The model; causal, so that padding behind a sequence does not matter.
        pairs: Context and continuation; what is too long for the model loses its beginning, but every token of the
            continuation is scored.
        prefix: Token that stands for an empty context.
        longest: Tokens the model can be given at once.
        batch: Sequences run together.
        last: The model where it can compute the logits of so many last tokens alone ``[batch, tokens, vocabulary]``.

    Returns:
        For each pair the log-likelihood of the continuation in nats, and whether each of its tokens is the most likely
        one.
    """
    parts = [
        (pair, given, targets)
        for pair, (context, continuation) in enumerate(pairs)
        for given, targets in scored_windows([*(context or [prefix]), *continuation], len(continuation), longest)
    ]
    parts.sort(key=lambda part: -len(part[1]))  # like lengths together, for the padding's sake
    sums, greedy = [0.0] * len(pairs), [True] * len(pairs)
    with torch.inference_mode():
        for start in range(0, len(parts), batch):
            together = parts[start : start + batch]
            ids = torch.zeros(len(together), len(together[0][1]), dtype=torch.long)
            for row, (_, given, _) in enumerate(together):
                ids[row, : len(given)] = torch.tensor(given)
            unread = 0 if last is None else min(len(given) - len(targets) for _, given, targets in together)
            found = score(ids) if last is None else last(ids, ids.shape[1] - unread)
            for logits, (pair, given, targets) in zip(found, together, strict=True):
                end = len(given) - unread
                value, likely = _of_targets(logits[end - len(targets) : end], torch.tensor(targets))
                sums[pair] += value
                greedy[pair] &= likely
    return list(zip(sums, greedy, strict=True))


def _of_targets(logits: Tensor, targets: Tensor) -> tuple[float, bool]:
    """Log-likelihood of tokens ``[n]`` by logits ``[n, vocabulary]``, and whether they are all the most likely."""
    chosen = logits.double().log_softmax(-1).gather(-1, targets[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())
