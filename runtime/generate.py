"""Generate text with any decoder: padding, positions, sampling and stopping in one place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mla_compile.errors import UsageError, VerificationError, first_line

__all__ = [
    "SAME_CACHE",
    "Decoder",
    "Ids",
    "PruningDecoder",
    "Sampling",
    "as_ids",
    "check_length",
    "checked_step",
    "generate",
]

Ids = NDArray[np.int64]
SAME_CACHE = "Give a mask over all tokens so far, and the cache that the last step returned."
"""What to do where a cache is not of the sequences of a step."""
_ARRAYS = "Give whole numbers [sequences, tokens], as many in every sequence."
_LOGITS = 2**28
"""Logits of a step at most, a gigabyte of float32, by a decoder that computes all, of which only the last token's are
wanted."""
_SCORES = 2**22
"""Pairs of a step's tokens and all that they attend to, by one that does not: half a gigabyte of float32 for 32 heads,
several times. More run together only where as many did before. All 4096 tokens of a prompt at once took more memory for
scores than was saved on logits."""
_TOGETHER = 64
"""Tokens of a prompt that run together at least."""


class Decoder(Protocol):
    """A model with a cache, one step at a time."""

    @property
    def known_tokens(self) -> int:
        """How many token ids it reads; where its head is wider, it predicts more."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        ...

    def empty_cache(self, batch: int, tokens: int) -> Any:  # noqa: ANN401 - each runtime has its own cache
        """An empty cache for ``batch`` sequences of at most ``tokens`` tokens each."""
        ...

    def step(self, ids: Ids, attention_mask: Ids, position_ids: Ids, cache: Any) -> tuple[NDArray[Any], Any]:  # noqa: ANN401
        """Run new tokens ``[batch, new]``.

        Returns:
            Logits ``[batch, new, vocabulary]`` and the grown cache.
        """
        ...


@runtime_checkable
class PruningDecoder(Decoder, Protocol):
    """A decoder that may compute fewer logits than there are new tokens."""

    @property
    def prunes_logits(self) -> bool:
        """Whether it does."""
        ...

    def step(
        self,
        ids: Ids,
        attention_mask: Ids,
        position_ids: Ids,
        cache: Any,  # noqa: ANN401
        logits_to_keep: int = 0,
    ) -> tuple[NDArray[Any], Any]:
        """Run new tokens, and return logits of so many of the last ones; of all, if that is 0."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; higher flattens the distribution.
        top_k: Choose among the k most likely; 0 for all.
        top_p: Choose among the fewest tokens whose probabilities sum to at least p.
        seed: Seed of the random choices.

    Raises:
        UsageError: One of them is out of range, or not a number.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:  # true of NaN too
            raise UsageError(f"The temperature is {self.temperature}.", "Give 0, or a larger number.")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}.", "Give 0 for all tokens, or how many to choose among.")
        if not 0 <= self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}.", "Give a number from 0 to 1.")
        if self.seed < 0:
            raise UsageError(f"The seed is {self.seed}.", "Give 0, or a larger number.")


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    attention_mask: Ids | None = None,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    until: Callable[[int, list[int]], bool] | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths together.

    A token that the model predicts but does not read, as of a head that is wider than its table, is never chosen,
    unless it ends the sequence.

    Args:
        decoder: The model.
        prompts: Token ids per sequence, at least one each; shorter ones are padded on the left.
        max_new_tokens: Most tokens to generate per sequence.
        attention_mask: ``[batch, length]`` where prompts are an array that is padded already, on whichever side:
            non-zero for real tokens.
        sampling: How tokens are chosen; greedily by default.
        stop: Token ids that end a sequence; they are not part of the result.
        until: Asked after every token of a sequence, with its place and its new tokens, whether it ends there.
        on_tokens: Called after every step with each sequence's new token, None for those that have ended.

    Returns:
        New token ids per sequence.

    Raises:
        UsageError: There is no prompt, or an empty one, or one that is no row of token ids; the mask is of other sizes;
            or ``stop`` or ``max_new_tokens`` cannot be.
    """
    rows = _prompts(prompts, attention_mask)
    ends = _row([*stop] if isinstance(stop, Set) else stop)
    if ends is None:
        raise UsageError(f"The tokens to stop at are {stop!r}.", "Give a list of token ids.")
    stop = ends.tolist()
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is {max_new_tokens!r}.", "Give 0, or a larger whole number.")
    sampling = sampling or Sampling()
    random = np.random.default_rng(sampling.seed)
    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, prompt in enumerate(rows):
        ids[place, longest - len(prompt) :] = prompt
        mask[place, longest - len(prompt) :] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    cache = decoder.empty_cache(len(rows), longest + max(max_new_tokens - 1, 0))  # the last new token is not run
    results: list[list[int]] = [[] for _ in rows]
    running = [True] * len(rows)
    for _ in range(max_new_tokens):
        logits, cache = _last_logits(decoder, ids, mask, positions, cache)
        chosen = _choose(_readable(logits, decoder.known_tokens, stop), sampling, random)
        emitted: list[int | None] = [None] * len(rows)
        for row, token in enumerate(chosen.tolist()):
            running[row] = running[row] and token not in stop
            if running[row]:
                results[row].append(token)
                emitted[row] = token
                running[row] = until is None or not until(row, results[row])
        if on_tokens:
            on_tokens(emitted)
        if not any(running):
            break
        ids = np.where(chosen < decoder.known_tokens, chosen, 0)[:, None]  # others have ended their sequences
        mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], 1)
        positions = positions[:, -1:] + 1
    return results


def _prompts(prompts: Sequence[Sequence[int]], attention_mask: Ids | None) -> list[Ids]:
    """The tokens of every prompt ``[tokens]``, of padded ones those that a mask calls real.

    Raises:
        UsageError: There is none, or an empty one, or one that is no row of token ids; or the mask is of other sizes.
    """
    rows: list[Ids] = []
    for place, prompt in enumerate(prompts if isinstance(prompts, Iterable) else ()):
        if (row := _row(prompt)) is None:
            raise UsageError(
                f"Prompt {place} is no list of token ids.",
                "Give a list of token ids for every sequence, such as [[1, 2, 3]].",
            )
        rows.append(row)
    if attention_mask is not None:
        real = [np.asarray(row) for row in (attention_mask if isinstance(attention_mask, Iterable) else ())]
        if [row.shape for row in rows] != [row.shape for row in real]:
            raise UsageError(
                f"The mask is not of the {len(rows)} prompts: they have other lengths, or it has other rows.",
                "Give a mask [sequences, tokens] of the same shape as the prompts.",
            )
        rows = [row[mask != 0] for row, mask in zip(rows, real, strict=True)]
    if not rows or any(not len(row) for row in rows):
        raise UsageError("There is no prompt, or one of them is empty.", "Give every prompt at least one token.")
    return rows


def _row(tokens: Any) -> Ids | None:  # noqa: ANN401 - whatever a caller took for token ids
    """Token ids ``[tokens]``; None of what is none."""
    try:
        found = np.asarray(tokens)
    except (TypeError, ValueError):  # a ragged list, or a tensor of another device
        return None
    whole = found.ndim == 1 and (not found.size or found.dtype.kind in "iu")
    return found.astype(np.int64) if whole else None


def _last_logits(
    decoder: Decoder,
    ids: Ids,
    mask: Ids,
    positions: Ids,
    cache: Any,  # noqa: ANN401 - each runtime has its own cache
) -> tuple[NDArray[Any], Any]:
    """Logits of the last token of every sequence, ``[batch, vocabulary]``: padding is on the left.

    A prompt runs in as many parts as memory takes: for logits, or where no more than the last token's are computed, for
    scores of attention.
    """
    batch, new = ids.shape
    earlier = mask.shape[1] - new
    together = max(_TOGETHER, _LOGITS // (batch * decoder.vocabulary))
    step = decoder.step
    if isinstance(decoder, PruningDecoder) and decoder.prunes_logits and new > 1:
        together = max(together, _SCORES // (batch * mask.shape[1]))
        step = functools.partial(decoder.step, logits_to_keep=1)
    for begin in range(0, new, together):
        part = slice(begin, begin + together)
        logits, cache = step(ids[:, part], mask[:, : earlier + part.stop], positions[:, part], cache)
    return logits[:, -1], cache


def check_length(tokens: int, most: int | None) -> None:
    """Refuse sequences with this many cached tokens if that is too many.

    Args:
        tokens: Tokens of a sequence, prompt and continuation.
        most: Of the longest sequence that is allowed; None for any.

    Raises:
        UsageError: These are more.
    """
    if most is not None and tokens > most:
        raise UsageError(
            f"A prompt and its continuation take {tokens} tokens of cache, but the longest sequence allowed has "
            f"{most}.",
            "Raise --max-length, or ask for fewer tokens.",
        )


def as_ids(name: str, ids: Any) -> Ids:  # noqa: ANN401 - an array, or lists like one
    """Take token ids as an array ``[batch, new]``, at least one of each.

    Args:
        name: What runs them.
        ids: Integers ``[batch, new]``.

    Raises:
        UsageError: They are no such array.
    """
    found = _integers(name, _array(name, ids))
    if found.ndim != 2 or not found.size:
        raise UsageError(
            f"Ids of shape {list(found.shape)} hold no new tokens for {name}.",
            "Give ids [sequences, tokens], at least one of each.",
        )
    return found


def checked_step(
    name: str,
    known: int,
    ids: Any,  # noqa: ANN401 - an array, or lists like one
    attention_mask: Any,  # noqa: ANN401
    position_ids: Any,  # noqa: ANN401
) -> tuple[Ids, Ids, Ids]:
    """Take a step's inputs as arrays, and refuse what a runtime would not.

    One reads before a table, and stretches one row over all sequences.

    Args:
        name: What runs it.
        known: How many token ids that reads.
        ids: ``[batch, new]``.
        attention_mask: ``[batch, past + new]``, non-zero for real tokens.
        position_ids: ``[batch, new]``.

    Returns:
        All three as int64, the mask of zeros and ones.

    Raises:
        UsageError: There are no new tokens, they are no integers, sizes do not fit, or a token is unknown.
    """
    ids = as_ids(name, ids)
    mask = (_array(name, attention_mask) != 0).astype(np.int64)
    positions = _integers(name, _array(name, position_ids))
    batch, new = ids.shape
    fits = mask.ndim == 2 and len(mask) == batch and mask.shape[1] >= new
    if not fits or positions.shape != ids.shape:
        raise UsageError(
            f"For {name} there are {batch} sequences of {new} new tokens with a mask of shape "
            f"{list(mask.shape)} and positions of shape {list(positions.shape)}.",
            "Give a mask [sequences, earlier and new tokens] and positions [sequences, new tokens].",
        )
    unknown = ids[(ids < 0) | (ids >= known)]
    if unknown.size:
        raise UsageError(f"Token {unknown[0]} is none of the {known} that {name} knows.", "Use its own tokenizer.")
    return ids, mask, positions


def _array(name: str, given: Any) -> NDArray[Any]:  # noqa: ANN401
    try:
        return np.asarray(given)
    except (TypeError, ValueError) as error:  # a ragged list, or a tensor of another device
        raise UsageError(f"What is given to {name} is no array ({first_line(error)}).", _ARRAYS) from error


def _integers(name: str, given: NDArray[Any]) -> Ids:
    if given.size and given.dtype.kind not in "iu":
        raise UsageError(f"Ids and positions for {name} are integers, and some are {given.dtype}.", _ARRAYS)
    return given.astype(np.int64, copy=False)


def _readable(logits: NDArray[Any], known: int, stop: Sequence[int]) -> NDArray[Any]:
    """Logits ``[batch, vocabulary]`` without the tokens that could not be read in the next step."""
    width = logits.shape[-1]
    if known >= width:
        return logits
    kept = np.arange(width) < known
    kept[[token for token in stop if known <= token < width]] = True
    return np.where(kept, logits, -np.inf)


def _choose(logits: NDArray[Any], sampling: Sampling, random: np.random.Generator) -> Ids:
    """Pick one token per row of ``[batch, vocabulary]``.

    Raises:
        VerificationError: A logit is not a number.
    """
    if not np.isfinite(logits.max(-1)).all():
        raise VerificationError(
            "The model's logits are not numbers: its weights are damaged, or overflow their type.",
            "Convert the model again, with --dtype float32 if it is in float16.",
        )
    if sampling.temperature <= 0:
        return np.asarray(logits.argmax(-1), dtype=np.int64)
    exact = logits.astype(np.float64)
    # A temperature next to 0 sends all but the most likely to minus infinity; of what is ruled out, which stays so, an
    # infinite one makes no number.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (exact - exact.max(-1, keepdims=True)) / sampling.temperature
    scaled[exact == -np.inf] = -np.inf
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = np.partition(scaled, -sampling.top_k, -1)[:, -sampling.top_k, None]
        scaled = np.where(scaled < least, -np.inf, scaled)
    weights = np.exp(scaled)
    weights /= weights.sum(-1, keepdims=True)
    if sampling.top_p < 1:
        order = np.argsort(-weights, -1, kind="stable")
        ordered = np.take_along_axis(weights, order, -1)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        beyond[:, 0] = False  # the most likely token stays, whatever mass was asked for
        np.put_along_axis(weights, order, np.where(beyond, 0.0, ordered), -1)
        weights /= weights.sum(-1, keepdims=True)
    return np.array([random.choice(len(row), p=row) for row in weights], dtype=np.int64)
