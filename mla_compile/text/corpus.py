"""Text to token windows: one definition for calibration, perplexity and verification."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_compile.errors import LoadError, UsageError, first_line

__all__ = [
    "DOCUMENT_END",
    "check_vocabulary",
    "load_tokenizer",
    "read_documents",
    "special_tokens",
    "token_windows",
    "tokenize",
]

DOCUMENT_END = "<|endoftext|>"
"""Separates documents in plain text files."""


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: str | None) -> Any:  # noqa: ANN401 - transformers' tokenizers share no public base
    """Load a tokenizer from a folder or hub id.

    Raises:
        LoadError: There is none.
    """
    if folder is None:
        raise LoadError("The model comes without a tokenizer.", "Give one with --tokenizer FOLDER.")
    from transformers import AutoTokenizer

    path = Path(folder)
    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise LoadError(f"There is no tokenizer in the folder '{folder}'.", "Give one with --tokenizer FOLDER.")
    if not path.exists() and (path.is_absolute() or folder.startswith(".") or folder.count("/") > 1):
        raise LoadError(f"There is no tokenizer folder '{folder}'.", "Give one with --tokenizer FOLDER.")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = first_line(error)
        raise LoadError(
            f"No tokenizer could be loaded from '{folder}' ({reason}).", "Give one with --tokenizer FOLDER."
        ) from error


def special_tokens(folder: str) -> dict[str, Any]:
    """Begin and end tokens of a tokenizer, in the form of a generation config."""
    tokenizer = load_tokenizer(folder)
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


def read_documents(path: str | Path) -> list[str]:
    """Read a text file (documents separated by ``<|endoftext|>``) or a ``.jsonl`` file with a ``text`` field.

    Args:
        path: The file.

    Raises:
        LoadError: The file is missing, not UTF-8 text, or has no documents.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"There is no text file '{path}'.", "Give a .txt or .jsonl file.")
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except OSError as error:
        raise LoadError(f"'{path}' cannot be read ({error.strerror}).", "Give a .txt or .jsonl file.") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"'{path}' is not UTF-8 text ({error}).", "Give a .txt or .jsonl file.") from error
    if path.suffix == ".jsonl":
        documents = []
        for number, line in enumerate(content.split("\n"), 1):
            try:
                documents += [json.loads(line)["text"] + ""] if line.strip() else []
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise LoadError(
                    f"Line {number} of '{path}' is not a JSON object with a 'text' field.",
                    "Correct or remove the line.",
                ) from error
            if line.strip() and not is_text(documents[-1]):
                raise LoadError(
                    f"Line {number} of '{path}' holds half a character (a lone surrogate).",
                    "Correct or remove the line.",
                )
    else:
        documents = content.split(DOCUMENT_END)
    documents = [d.strip() for d in documents if d.strip()]
    if not documents:
        raise LoadError(f"'{path}' holds no text.", "Give a file with at least one document.")
    return documents


def is_text(string: str) -> bool:
    """Whether a string is whole characters: escapes in JSON, and words of a command line, may be halves of some."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def tokenize(documents: Iterable[str], tokenizer: Any, most: int | None = None) -> list[int]:  # noqa: ANN401 - see load_tokenizer
    """Join documents into one stream of ids, each led by the begin token if the tokenizer has one.

    Args:
        documents: Read until there are enough tokens.
        tokenizer: A tokenizer.
        most: How many tokens are enough; the last document is not cut.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    stream: list[int] = []
    for document in documents:
        stream += begin + list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
        if most is not None and len(stream) >= most:
            break
    return stream


def check_vocabulary(largest: int, vocabulary: int, source: str) -> None:
    """Refuse token ids a model does not know: the tokenizer belongs to another one.

    Args:
        largest: The largest id.
        vocabulary: How many ids the model knows.
        source: The model's name.

    Raises:
        UsageError: The id is out of range.
    """
    if largest >= vocabulary:
        raise UsageError(
            f"The tokenizer gives token {largest}, but '{source}' knows only {vocabulary}.",
            "Give the model's own tokenizer with --tokenizer FOLDER.",
        )


def token_windows(ids: Sequence[int], length: int, limit: int | None = None, name: str = "text") -> Tensor:
    """Cut a stream into consecutive windows.

    Args:
        ids: Token ids.
        length: Tokens per window.
        limit: Use at most this many tokens, but at least one window.
        name: What to call the text in an error.

    Returns:
        ``[windows, length]`` int64.

    Raises:
        UsageError: The text is shorter than one window.
    """
    if len(ids) < length:
        shorter = f", or a shorter window with --seq-len {len(ids)}" if len(ids) > 1 else ""
        raise UsageError(
            f"The {name} has {len(ids)} tokens, fewer than one window of {length}.", f"Give more text{shorter}."
        )
    count = len(ids) // length
    if limit is not None:
        count = max(1, min(count, limit // length))
    return torch.tensor(list(ids[: count * length]), dtype=torch.long).view(count, length)
