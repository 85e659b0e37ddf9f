"""Decoders whose caches are fixed memory: how many rows a sequence has is told by lengths, not by a cache's size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_compile.errors import UsageError
from mla_compile.runtime.generate import SAME_CACHE, Ids, Sampling, checked_step, generate

__all__ = ["FixedCache", "FixedCacheDecoder", "Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a decoder takes.

    Attributes:
        room: Rows that a cache has room for.
        batch: Largest batch; None for any number.
        new: New tokens at most that run together; None for any number. More come one part after another.
    """

    room: int
    batch: int | None = None
    new: int | None = None


@dataclass
class FixedCache:
    """Memory for the rows of all sequences, and how much of it is written.

    Attributes:
        rows: Per layer ``[batch, 1, room, row]``.
        tokens: How many were run, padding among them: the columns of their mask.
    """

    rows: Sequence[Any]
    tokens: int = 0


class FixedCacheDecoder(ABC):
    """A :class:`~mla_compile.runtime.generate.Decoder` of a file for TensorRT, whatever runs it.

    Args:
        name: What the user calls it.
        limits: What it takes.
        rows: Numbers one token takes in the cache, per layer.
        itemsize: Bytes of one of them.
        vocabulary: How many logits a token has.
        metadata: What the compiler stored with it.

    Attributes:
        known_tokens: How many token ids the model reads; by files that do not say, as many as it predicts.
    """

    def __init__(
        self,
        name: str,
        limits: Limits,
        rows: Sequence[int],
        itemsize: int,
        vocabulary: int,
        metadata: Mapping[str, Any],
    ) -> None:
        self._name = name
        self._itemsize = itemsize
        self.limits = limits
        self.rows = tuple(rows)
        self.vocabulary = vocabulary
        self.metadata = metadata
        self.known_tokens = int(metadata.get("known_tokens") or vocabulary)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in the cache."""
        return sum(self.rows) * self._itemsize

    def cache_bytes(self, batch: int, tokens: int) -> int:
        """Bytes that the cache of a batch takes, however many tokens there will be."""
        return batch * self.limits.room * self.cache_bytes_per_token

    def require_length(self, tokens: int) -> None:
        """Refuse sequences with this many cached tokens if that is too many.

        Raises:
            UsageError: There is no room for them.
        """
        if tokens > self.limits.room:
            raise UsageError(
                f"A sequence of {tokens} tokens does not fit into the caches of '{self._name}', which have room for "
                f"{self.limits.room}.",
                "Generate fewer tokens, or build it with a larger --max-length.",
            )

    def empty_cache(self, batch: int, tokens: int | None = None) -> Any:  # noqa: ANN401 - each runtime has its own cache
        """Memory for ``batch`` sequences.

        Args:
            batch: How many.
            tokens: How many each will have, if that is known.

        Raises:
            UsageError: There is no room for so many.
        """
        if tokens is not None:
            self.require_length(tokens)
        return self.memory(batch)

    @abstractmethod
    def memory(self, batch: int) -> FixedCache:
        """Memory for ``batch`` sequences, of zeros."""

    @abstractmethod
    def run(self, ids: Ids, lengths: Ids, positions: Ids, cache: Any) -> NDArray[Any]:  # noqa: ANN401
        """Run new tokens ``[batch, new]`` that are no more than the limits say, and write their rows into the cache.

        Args:
            ids: ``[batch, new]``.
            lengths: ``[batch]``, rows of every sequence, those of the new tokens among them.
            positions: ``[batch, new]``.
            cache: From :meth:`empty_cache`.

        Returns:
            Logits ``[batch, new, vocabulary]``.
        """

    def step(
        self,
        ids: Ids,
        attention_mask: Ids,
        position_ids: Ids,
        cache: Any,  # noqa: ANN401
    ) -> tuple[NDArray[Any], Any]:
        """Run new tokens; see :class:`~mla_compile.runtime.generate.Decoder`. The cache is written in place.

        Raises:
            UsageError: There are more sequences or tokens than the caches have room for, there are none, sizes do not
                fit, a token is unknown, padding stands behind real tokens, or the cache is of others.
        """
        given = (ids, attention_mask, position_ids)
        ids, attention_mask, position_ids = checked_step(f"'{self._name}'", self.known_tokens, *given)
        (batch, new), mask_tokens, limits = ids.shape, attention_mask.shape[1], self.limits
        real = attention_mask != 0
        if (real[:, :-1] & ~real[:, 1:]).any():
            raise UsageError("Padding stands behind earlier tokens.", "Pad prompts on the left.")
        if limits.batch is not None and batch > limits.batch:
            raise UsageError(
                f"'{self._name}' takes {limits.batch} sequences at once, and these are {batch}.",
                "Give fewer, or build it with a larger --max-batch.",
            )
        counts = real.cumsum(1)[:, -new:]
        self.require_length(int(counts.max()))
        # Fewer tokens than the cache has are a way back: rows in front are as they were.
        if (held := len(cache.rows[0])) != batch or cache.tokens < mask_tokens - new:
            raise UsageError(
                f"The cache is of {held} sequences of {cache.tokens} tokens, and these are {batch} whose mask has "
                f"{mask_tokens - new} earlier ones.",
                SAME_CACHE,
            )
        together = limits.new or new
        parts = []
        for begin in range(0, new, together):
            end = min(begin + together, new)
            part = slice(begin, end)
            parts.append(self.run(ids[:, part], counts[:, end - 1], position_ids[:, part], cache))
        cache.tokens = mask_tokens
        return np.concatenate(parts, 1), cache

    def logits(self, ids: Ids) -> NDArray[Any]:
        """Logits ``[batch, length, vocabulary]`` of whole, unpadded sequences."""
        positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
        return self.step(ids, np.ones_like(ids), positions, self.empty_cache(len(ids)))[0]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        on_tokens: Callable[[list[int | None]], None] | None = None,
    ) -> list[list[int]]:
        """Continue prompts; see :func:`mla_compile.runtime.generate.generate`."""
        return generate(self, prompts, max_new_tokens, sampling=sampling, stop=stop, on_tokens=on_tokens)
