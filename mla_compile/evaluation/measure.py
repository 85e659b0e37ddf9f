"""``mla-compile eval``: how models of any kind do on the user's text, beside their original."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mla_compile.artifacts.runnable import RunnableModel, open_model, require_there
from mla_compile.devices import memory_explained, require_device
from mla_compile.errors import LoadError, UsageError
from mla_compile.progress import Display, Stages
from mla_compile.text.corpus import (
    check_vocabulary,
    load_tokenizer,
    open_documents,
    token_windows,
    tokenize,
)
from mla_compile.text.evaluate import Comparison, advised_window, compare, longest_window, require_window

__all__ = ["Measurement", "ModelScore", "Sample", "measure", "run_beside"]

_BATCH = 8


@dataclass(frozen=True)
class Sample:
    """What to measure on: a stream of documents, each led by the begin token, cut into consecutive windows.

    Every token of a window but the first is scored once.

    Attributes:
        text: The text file.
        seq_len: Tokens per window; what all of the models can run, at most 512 and ``max_tokens``, by default.
        max_tokens: Use at most this many tokens.
        tokenizer: Folder of the tokenizer, if the models have none.

    Raises:
        UsageError: A window is longer than all tokens together may be.
    """

    text: Path
    seq_len: int | None = None
    max_tokens: int | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.seq_len is not None and self.max_tokens is not None and self.seq_len > self.max_tokens:
            raise UsageError(
                f"One window of --seq-len {self.seq_len} is more than --max-tokens {self.max_tokens}.",
                "Give more tokens, or a shorter window.",
            )

    def longest(self, models: Sequence[RunnableModel]) -> int:
        """Longest window, in tokens, that all models can run, however few tokens are measured."""
        return self.seq_len or min(longest_window(m.score, m.longest) for m in models)

    def windows(
        self,
        documents: Iterable[str],
        tokenizer: Any,  # noqa: ANN401
        models: Sequence[RunnableModel],
        longest: int | None = None,
    ) -> Tensor:
        """Cut documents into windows ``[windows, length]`` that all models can run.

        Args:
            documents: The text, read as far as its tokens are used.
            tokenizer: Its tokenizer.
            models: All models.
            longest: What :meth:`longest` says of them, where that is known.

        Raises:
            UsageError: The text is shorter than one window, or a model cannot run it.
        """
        longest = longest or self.longest(models)
        length = min(longest, self.max_tokens or longest)
        for model in models:
            if model.longest is not None:  # others are tried below, with windows that there are
                require_window(model.score, model.longest, length, model.name)
        ids = tokenize(documents, tokenizer, self.max_tokens)
        windows = token_windows(
            ids, length, self.max_tokens, longest=lambda n: min(advised_window(m.score, m.longest, n) for m in models)
        )
        for model in models:
            _require_room(model, windows)
        return windows


@dataclass(frozen=True)
class ModelScore:
    """A model and what was found; the comparison with the first model counts only where that is the original."""

    model: RunnableModel
    found: Comparison

    def kept(self, original: ModelScore | None) -> float | None:
        """Share of the original's cache that is kept; None where one of them is not known."""
        if original is None or not original.model.cache_bytes or self.model.cache_bytes is None:
            return None
        return self.model.cache_bytes / original.model.cache_bytes

    def ratio(self, original: ModelScore | None) -> float | None:
        """Perplexity over the original's."""
        return None if original is None else self.found.perplexity.value / original.found.perplexity.value

    def to_dict(self) -> dict[str, Any]:
        """What is known without an original, as JSON-able data."""
        return {
            "model": self.model.name,
            "perplexity": self.found.perplexity.value,
            "loss": self.found.perplexity.loss,
            "cache_bytes_per_token": self.model.cache_bytes,
            "runtime": self.model.runtime,
            "seconds": self.found.seconds,
        }


@dataclass(frozen=True)
class Measurement:
    """Models on one text.

    Attributes:
        text: The text file.
        tokens: Scored tokens.
        seq_len: Tokens per window.
        original: The model that the others are compared with, if there is one.
        models: The others.
        warnings: What the user should know.
    """

    text: str
    tokens: int
    seq_len: int
    original: ModelScore | None
    models: tuple[ModelScore, ...]
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        sample: Sample,
        windows: Tensor,
        original: ModelScore | None,
        models: Sequence[ModelScore],
        warnings: Sequence[str] = (),
    ) -> Measurement:
        """A measurement of models on windows ``[windows, length]`` of a sample; each warning appears once."""
        told = tuple(dict.fromkeys(warnings))
        return cls(str(sample.text), windows[:, 1:].numel(), windows.shape[1], original, tuple(models), told)

    def to_dict(self) -> dict[str, Any]:
        """The measurement as JSON-able data; of a single model, its figures stand at the top too."""
        rows = [self._row(model) for model in self.models]
        alone = ("perplexity", "loss", "cache_bytes_per_token") if len(rows) == 1 else ()
        return {
            "text": self.text,
            "tokens": self.tokens,
            "seq_len": self.seq_len,
            **{key: rows[0][key] for key in alone},
            "original": None if self.original is None else self.original.to_dict(),
            "models": rows,
            "warnings": list(self.warnings),
        }

    def _row(self, measured: ModelScore) -> dict[str, Any]:
        compared = self.original is not None
        return {
            **measured.to_dict(),
            "method": measured.model.method,
            "cache_ratio": measured.model.cache_ratio,
            "cache_kept": measured.kept(self.original),
            "perplexity_ratio": measured.ratio(self.original),
            "kl": measured.found.kl if compared else None,
            "top1": measured.found.top1 if compared else None,
        }


@memory_explained()
def measure(
    models: Sequence[str],
    sample: Sample,
    *,
    original: str | None = None,
    device: str = "cpu",
    display: Display | None = None,
) -> Measurement:
    """Measure models on the same windows of a text.

    With an original all models are held in memory, for they run side by side.

    Args:
        models: ONNX files, converted folders, archives, Hugging Face folders or hub ids.
        sample: What to measure on.
        original: The model to compare them with.
        device: Where models in PyTorch run, with room for all of them.
        display: Shows progress.

    Returns:
        Figures of every model, in this order.

    Raises:
        LoadError: A model, the tokenizer or the text cannot be read.
        UsageError: The models have different vocabularies, the text or a model is too short for a window, or there is
            no such device.
    """
    require_device(device)
    stages = Stages(display)
    names = (*models, *([] if original is None else [original]))
    require_there(names)
    documents = open_documents(sample.text)
    opened: list[RunnableModel] = []
    for name in names:
        with stages.stage("load"):
            opened.append(open_model(name, sample.tokenizer, device))
        if len(opened) == 1:  # now, for the others may take minutes to read
            load_tokenizer(sample.tokenizer or opened[0].tokenizer)
    windows = sample.windows(documents, _one_tokenizer(opened, sample.tokenizer), opened)
    if original is None:
        return Measurement.of(sample, windows, None, [run_beside([m], windows, "evaluate", stages)[0] for m in opened])
    base, *others = run_beside([opened[-1], *opened[:-1]], windows, "evaluate", stages)
    return Measurement.of(sample, windows, base, others)


def run_beside(models: Sequence[RunnableModel], windows: Tensor, stage: str, stages: Stages) -> list[ModelScore]:
    """Compare models with the first of them on windows ``[windows, length]``, as a stage with one step per batch."""
    steps = math.ceil(len(windows) / _BATCH)
    found = compare([m.score for m in models], windows, _BATCH, lambda batches: stages.each(stage, batches, steps))
    return [ModelScore(*pair) for pair in zip(models, found, strict=True)]


def _one_tokenizer(opened: Sequence[RunnableModel], given: str | None) -> Any:  # noqa: ANN401 - see load_tokenizer
    """The tokenizer of all models, which must be one: figures per token of different ones cannot be compared.

    Raises:
        LoadError: There is no tokenizer.
        UsageError: Two models have different vocabularies.
    """
    first, *others = opened
    for other in others:
        if other.vocabulary != first.vocabulary:
            raise _different(first, other, f" ({first.vocabulary} and {other.vocabulary} tokens)")
    tokenizer = load_tokenizer(given or first.tokenizer)
    for other in others if given is None else ():
        try:
            same = load_tokenizer(other.tokenizer).get_vocab() == tokenizer.get_vocab()
        except LoadError:  # it brings none to compare
            continue
        if not same:
            raise _different(first, other, "")
    return tokenizer


def _different(one: RunnableModel, other: RunnableModel, sizes: str) -> UsageError:
    return UsageError(
        f"'{one.name}' and '{other.name}' have different vocabularies{sizes}, so that figures per token cannot be "
        "compared.",
        "Measure each by itself.",
    )


def _require_room(model: RunnableModel, windows: Tensor) -> None:
    """Refuse windows that a model cannot be run on.

    Raises:
        UsageError: They hold ids it does not read or predict, or are too long.
    """
    check_vocabulary(int(windows.max()), model.known_tokens, model.name, model.vocabulary)
    require_window(model.score, model.longest, windows.shape[1], model.name)
