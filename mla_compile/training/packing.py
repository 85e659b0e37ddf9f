"""Documents packed into windows of one length: the first to train on, the last held out to measure on."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla_compile.disk.content import content_of
from mla_compile.errors import UsageError
from mla_compile.text.corpus import LEAST_WINDOW, tokenized

__all__ = ["PackedText", "order", "pack"]


@dataclass(frozen=True)
class PackedText:
    """Token windows ``[windows, length]``, int32.

    A window begins where the one before ends, wherever that is in a document; every document is led by the begin token
    if the tokenizer has one, and followed by the end token if that is another one. Attention reaches across documents,
    as it did where most models were trained.

    Attributes:
        train: To train on.
        held_out: To measure on.
    """

    train: Tensor
    held_out: Tensor

    @property
    def length(self) -> int:
        """Tokens per window."""
        return self.train.shape[1]

    @property
    def fingerprint(self) -> str:
        """Tells texts apart."""
        return content_of({"train": self.train, "held_out": self.held_out})


def pack(
    text: Iterable[str] | Tensor,
    tokenizer: Any,  # noqa: ANN401 - transformers' tokenizers share no public base
    length: int,
    tokens: int | None,
    held_out: int,
) -> PackedText:
    """Read as much text as is needed, and hold the last windows back.

    Args:
        text: Documents, or token windows as they are.
        tokenizer: A tokenizer, for documents.
        length: Tokens per window, for documents.
        tokens: Tokens to train on; all of the text when None.
        held_out: Windows held back; of a text that ends before there are as many tokens as are wanted, a tenth if that
            is less.

    Raises:
        UsageError: There are fewer than two windows.
    """
    if isinstance(text, Tensor):
        windows, enough = text.int(), False
    else:
        most = None if tokens is None else (math.ceil(tokens / length) + held_out) * length
        stream = array("i")  # four bytes each, for texts may be long
        for ids in tokenized(text, tokenizer, most, end=_end(tokenizer)):
            stream.extend(ids)
        windows = _windows(stream, length)
        enough = most is not None and len(stream) >= most
    if len(windows) < 2:
        raise UsageError(
            f"The text makes one window of {windows.shape[1]} tokens; training takes one, and measuring another.",
            "Give more text.",
        )
    aside = held_out if enough else min(held_out, max(1, len(windows) // 10))
    train = windows[:-aside]
    return PackedText(train if tokens is None else train[: math.ceil(tokens / windows.shape[1])], windows[-aside:])


def order(windows: int, wanted: int, seed: int) -> list[int]:
    """Numbers of windows in random order, all of them once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(windows, generator=generator) for _ in range(math.ceil(wanted / windows))]
    found: list[int] = torch.cat(rounds)[:wanted].tolist()
    return found


def _end(tokenizer: Any) -> list[int]:  # noqa: ANN401 - see pack
    """What a document ends in, where the begin token of the next one does not say so."""
    end = tokenizer.eos_token_id
    return [] if end is None or end == tokenizer.bos_token_id else [end]


def _windows(stream: array[int], length: int) -> Tensor:
    if len(stream) < 2 * length:
        window = len(stream) // 2
        shorter = f", or a shorter window with --seq-len {window}" if window >= LEAST_WINDOW else ""
        raise UsageError(
            f"The text has {len(stream)} tokens, fewer than two windows of {length}; training takes one, and measuring "
            "another.",
            f"Give more text{shorter}.",
        )
    whole = torch.frombuffer(stream, dtype=torch.int32)[: len(stream) // length * length]
    return whole.view(-1, length)
