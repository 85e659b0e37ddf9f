"""The user's text as token windows: most to calibrate on, the last part held out to measure on.

Text is read as far as it is needed, so that it may be as long as it likes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mla_compile.config import CompileConfig
from mla_compile.errors import UsageError
from mla_compile.program import Program
from mla_compile.text.amounts import HELD_OUT, used_count
from mla_compile.text.corpus import (
    check_vocabulary,
    load_tokenizer,
    open_documents,
    token_windows,
    tokenize,
)
from mla_compile.text.dataset import is_dataset, stream_documents
from mla_compile.text.evaluate import advised_window, longest_window, original_scorer, require_window

__all__ = [
    "SAMPLED",
    "Text",
    "TextWindows",
    "cut_windows",
    "has_windows",
    "is_sampled",
    "read_text",
    "require_text",
    "writes_text",
]

Text = str | Path | Sequence[str] | Tensor | NDArray[np.integer[Any]]
"""Text: a file, ``hf:`` and a dataset, documents, or token windows ``[windows, length]``; see also ``SAMPLED``."""
SAMPLED = "sampled"
"""The name of a calibration text that the model writes itself. A file of that name is given as ``./sampled``."""
_WHAT_IS_TEXT = "Pass text, or a tensor of token ids [windows, length]."
_QUICKER = "add --method mha2mla for a quick plan of the same cache ratio by weights alone"
_WORSE = "choose --method mha2mla, which does without and loses more"


@dataclass(frozen=True)
class TextWindows:
    """Token windows ``[windows, length]``.

    Attributes:
        calibration: What statistics are measured on.
        held_out: What perplexity is measured on; the same window where there is only one.
        separate: Whether no window is in both.
        sampled: Whether the model wrote them itself.
    """

    calibration: Tensor
    held_out: Tensor
    separate: bool
    sampled: bool = False


def require_text(config: CompileConfig, calibration: Text | None, *, planned: bool = False) -> None:
    """Refuse what chooses or trains by what the model does on text, and settings of how that is read, without text.

    Args:
        config: What the user asked for.
        calibration: Text, if there is any.
        planned: Whether nothing is converted: another method may be taken for its sizes alone, and what a conversion
            with text would take is estimated by those settings.

    Raises:
        UsageError: The method or polishing needs text, or such a setting is given.
    """
    if calibration is not None:
        return
    if not config.needs_text:
        return None if planned else _require_no_settings_of_text(config)
    if config.polish_steps:
        raise UsageError("Polishing needs text to train on.", "Give some with --calibration FILE.")
    if config.chosen_method == "mha2mla":
        raise UsageError("The 2-norm selection needs text to measure on.", "Give some with --calibration FILE.")
    raise UsageError(
        f"The method '{config.chosen_method}' chooses by what the model does on text, and none was given.",
        f"Give some with --calibration FILE, let the model write it with --calibration {SAMPLED}, or "
        f"{_QUICKER if planned else _WORSE}.",
    )


def _require_no_settings_of_text(config: CompileConfig) -> None:
    """Refuse settings that do nothing without text.

    Raises:
        UsageError: There are some.
    """
    usual = type(config).model_fields["calibration_tokens"].default
    given = {
        "--calibration-tokens": config.calibration_tokens != usual,
        "--seq-len": config.seq_len is not None,
        "--no-gradients": not config.gradients,
    }
    if foreign := [flag for flag, there in given.items() if there]:
        raise UsageError(
            f"{' and '.join(foreign)} {'says' if len(foreign) == 1 else 'say'} how calibration text is used, and none "
            "was given.",
            "Leave it out, or give some with --calibration FILE.",
        )


def is_sampled(text: Text | None) -> bool:
    """Whether the model is to write a calibration text itself."""
    return isinstance(text, str) and text == SAMPLED


def writes_text(text: Text | None, config: CompileConfig) -> bool:
    """Whether a causal language model writes its calibration text: by request, or as it needs one and has none.

    Encoders write none, and as long as ``config`` allows them a model may be one.
    """
    return is_sampled(text) or (text is None and config.needs_text and not config.encoders)


def read_text(text: Text | None) -> Iterable[str] | Tensor | None:
    """Open a file or a dataset, whose documents are read when they are asked for; pass on what is neither.

    Token windows of any type of integers are passed on as int64. Documents that are there already are checked at once,
    others when they are read.

    Raises:
        LoadError: The file or dataset is missing or holds no text.
        UsageError: It is neither text nor token windows; or these are not an integer matrix, or hold negative numbers.
    """
    if text is None:
        return None
    if isinstance(text, str | Path) and is_dataset(str(text)):
        return stream_documents(str(text))
    if isinstance(text, str | Path):
        return open_documents(text)
    if isinstance(text, Tensor | np.ndarray) and has_windows(text):
        return _token_ids(text)
    if isinstance(text, Mapping) or not isinstance(text, Iterable):
        raise UsageError(f"A text of type {type(text).__name__} cannot be read.", _WHAT_IS_TEXT)
    return [*_Documents(text)] if isinstance(text, list | tuple) else _Documents(text)


def has_windows(text: object) -> bool:
    """Whether a text is token windows, or numbers that are none, so that it needs no tokenizer."""
    return isinstance(text, Tensor) or (isinstance(text, np.ndarray) and text.dtype.kind in "biufc")


@dataclass(frozen=True)
class _Documents:
    """Documents of the user's own, as often as they can be read.

    Attributes:
        given: Where they come from.
    """

    given: Iterable[object]

    def __iter__(self) -> Iterator[str]:
        """Read them.

        Raises:
            UsageError: One of them is no text.
        """
        for number, document in enumerate(self.given, 1):
            if not isinstance(document, str):
                raise UsageError(
                    f"Document {number} of the text is of type {type(document).__name__}, not a string.", _WHAT_IS_TEXT
                )
            yield document


def _token_ids(ids: Tensor | NDArray[Any]) -> Tensor:
    if isinstance(ids, Tensor):
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    else:
        whole = ids.dtype.kind in "iu"
    if not whole or ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise UsageError(
            f"Calibration ids are {ids.dtype} of shape {tuple(ids.shape)}.",
            "Pass integers [windows, length], at least one window of two tokens.",
        )
    ids = ids.long() if isinstance(ids, Tensor) else torch.from_numpy(ids.astype(np.int64))
    if (least := int(ids.min())) < 0:
        raise UsageError(
            f"Calibration ids go down to {least}, which is no token.",
            "Pass windows of text alone, without padding or what labels leave out.",
        )
    return ids


def cut_windows(
    program: Program,
    text: Iterable[str] | Tensor | None,
    tokenizer: Any,  # noqa: ANN401 - a folder or any transformers tokenizer
    config: CompileConfig,
) -> TextWindows | None:
    """Tokenize documents, cut windows the model can run, and hold the last part back.

    Args:
        program: The model, for its tokenizer and its longest window.
        text: Documents or windows, from :func:`read_text`.
        tokenizer: A tokenizer, if the model does not bring one.
        config: Window length and number of tokens.

    Raises:
        LoadError: There is no tokenizer.
        UsageError: The text is shorter than one window, a window is longer than the model can run, or a token is one
            that the model does not read or predict.
    """
    if text is None:
        return None
    if isinstance(text, Tensor):
        windows = text
    else:
        if tokenizer is None or isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(program.assets.folder)
        score, limit = original_scorer(program), program.max_positions
        length = config.seq_len or longest_window(score, limit)
        if limit is not None:  # else the model is tried below, with windows that there are
            require_window(score, limit, length, program.source)
        enough = (used_count(config, length) + HELD_OUT) * length
        ids = tokenize(text, tokenizer, enough)
        windows = token_windows(ids, length, longest=lambda tokens: advised_window(score, limit, tokens))
    check_vocabulary(int(windows.max()), program.known_tokens, program.source, program.vocabulary)
    length = windows.shape[1]
    require_window(original_scorer(program), program.max_positions, length, program.source)
    held_out = min(HELD_OUT, max(1, len(windows) // 10))
    calibration = windows[: max(1, len(windows) - held_out)][: used_count(config, length)]
    return TextWindows(calibration, windows[-held_out:], len(windows) > 1)
