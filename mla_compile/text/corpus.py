"""Text to token windows: one definition for calibration, perplexity and verification.

Files are read piece by piece, and documents are tokenized as far as their tokens are needed.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mla_compile.disk.writing import require_possible
from mla_compile.errors import LoadError, UsageError, first_line
from mla_compile.hub import hub_answers
from mla_compile.text.tokenizer_files import holds_tokenizer

__all__ = [
    "DOCUMENT_END",
    "LEAST_WINDOW",
    "TextFile",
    "check_vocabulary",
    "is_text",
    "load_tokenizer",
    "open_documents",
    "read_documents",
    "require_named_tokenizer",
    "require_tokenizer",
    "require_tokenizer_of",
    "special_tokens",
    "token_windows",
    "tokenize",
    "tokenized",
]

DOCUMENT_END = "<|endoftext|>"
"""Separates documents in plain text files."""
LEAST_WINDOW = 32
"""Tokens of the shortest window that is advised where a text is too short. In less, most tokens have hardly any text
before them to attend to, and a model that was chosen or measured by so few is of no use."""
_PIECE = 2**20
"""Bytes of a file that are read at once."""
_LETTERS = 8
"""Letters that are taken to make a token, at most, before anything is known of a text; about four do."""
_UNSURE = 64
"""Tokens in front of a cut that are left out, for the whole document might have others there. A cut at a blank changes
none where words are tokenized by themselves, and else few: of six kinds of tokenizers 15 at most, wherever it was.
"""


def load_tokenizer(folder: str | None) -> Any:  # noqa: ANN401 - transformers' tokenizers share no public base
    """Load a tokenizer from a folder or hub id.

    Raises:
        LoadError: There is none.
    """
    if folder is None:
        raise LoadError("The model comes without a tokenizer.", "Give one with --tokenizer FOLDER.")
    require_tokenizer(folder)
    from transformers import AutoTokenizer

    path = Path(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=not (path.exists() or hub_answers(folder)))
    except Exception as error:
        reason = first_line(error)
        raise LoadError(
            f"No tokenizer could be loaded from '{folder}' ({reason}).", "Give one with --tokenizer FOLDER."
        ) from error


def require_tokenizer(folder: str) -> None:
    """Refuse a folder without a tokenizer, by the names of the files in it.

    Raises:
        LoadError: There is none in it, or no such folder; a hub id is taken for what it is.
    """
    require_possible(folder)
    path = Path(folder)
    if path.is_dir() and not holds_tokenizer(path):
        raise LoadError(f"There is no tokenizer in the folder '{folder}'.", "Give one with --tokenizer FOLDER.")
    if not path.exists() and (path.is_absolute() or folder.startswith(".") or folder.count("/") > 1):
        raise LoadError(f"There is no tokenizer folder '{folder}'.", "Give one with --tokenizer FOLDER.")


def require_tokenizer_of(model: object) -> None:
    """Refuse text for a model that comes without a tokenizer, before it is read, as far as that can be told.

    Args:
        model: A model, or its name: a folder's has to be in it, and an archive's beside it.

    Raises:
        LoadError: There is none there.
    """
    if not isinstance(model, str | Path):
        return
    path = Path(model)
    if path.is_dir():
        require_tokenizer(str(model))
    elif path.suffix == ".pt2" and path.is_file() and not holds_tokenizer(path.parent):
        load_tokenizer(None)


def require_named_tokenizer(name: str) -> None:
    """Refuse a name of no tokenizer, before anything takes long; a folder that exists is not looked into.

    A hub id is loaded, for only the hub knows whether there is one.

    Raises:
        LoadError: There is no such folder, and none of that name came from the hub.
    """
    require_possible(name)
    if not Path(name).exists():
        load_tokenizer(name)


def special_tokens(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401 - see load_tokenizer
    """Begin and end tokens of a tokenizer, in the form of a generation config."""
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}


@dataclass(frozen=True, eq=False)
class TextFile:
    """A text file (documents separated by ``<|endoftext|>``) or a ``.jsonl`` file with a ``text`` field.

    Its documents are read when they are asked for, one at a time; asked for again, from its beginning. It equals
    another file that holds the same ones.

    Attributes:
        path: The file.
    """

    path: Path

    def __iter__(self) -> Iterator[str]:
        """Read documents, none of them blank.

        Raises:
            LoadError: The file is missing, or it is not UTF-8 text, or a line is not JSON, as far as it was read; or it
                was read to its end, and has no documents.
        """
        found = False
        for document in map(str.strip, self._lines() if self.path.suffix == ".jsonl" else self._parts(DOCUMENT_END)):
            if document:
                found = True
                yield document
        if not found:
            raise LoadError(f"'{self.path}' holds no text.", "Give a file with at least one document.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TextFile):  # what is no file may be there to be read once
            return NotImplemented
        return all(one == another for one, another in zip_longest(self, other))

    __hash__ = None  # type: ignore[assignment]

    def _lines(self) -> Iterator[str]:
        """Texts of JSON objects."""
        for number, line in enumerate(self._parts("\n"), 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"] + ""
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise LoadError(
                    f"Line {number} of '{self.path}' is not a JSON object with a 'text' field.",
                    "Correct or remove the line.",
                ) from error
            if not is_text(text):
                raise LoadError(
                    f"Line {number} of '{self.path}' holds half a character (a lone surrogate).",
                    "Correct or remove the line.",
                )
            yield text

    def _parts(self, separator: str) -> Iterator[str]:
        """What stands between separators, which may begin in one piece and end in the next."""
        begun: list[str] = []
        rest = ""
        for piece in self._pieces():
            *ended, rest = (rest + piece).split(separator)
            for part in ended:
                yield "".join((*begun, part))
                begun.clear()
            sure = max(0, len(rest) - len(separator) + 1)
            begun.append(rest[:sure])
            rest = rest[sure:]
        yield "".join((*begun, rest))

    def _pieces(self) -> Iterator[str]:
        """Its text as ``open`` would give it, with the place of what is no text."""
        if self.path.is_dir():
            raise LoadError(f"'{self.path}' is a folder, not a text file.", "Give a .txt or .jsonl file.")
        if not self.path.exists():
            raise LoadError(f"There is no text file '{self.path}'.", "Give a .txt or .jsonl file.")
        if not self.path.is_file():
            raise LoadError(
                f"'{self.path}' is no regular file but a pipe or a device, and text is read more than once.",
                "Save the text as a .txt or .jsonl file, and give that.",
            )
        signed = codecs.getincrementaldecoder("utf-8-sig")()  # some editors put a byte order mark in front
        decoder = io.IncrementalNewlineDecoder(signed, translate=True)
        try:
            with self.path.open("rb") as file:
                content = None
                while content != b"":
                    content = file.read(_PIECE)
                    try:
                        yield decoder.decode(content, final=not content)
                    except UnicodeDecodeError as error:
                        place = file.tell() - len(error.object) + error.start
                        raise LoadError(
                            f"'{self.path}' is not UTF-8 text ({error.reason} at byte {place}).",
                            "Save it as UTF-8, or give another file.",
                        ) from error
        except OSError as error:
            raise LoadError(
                f"'{self.path}' cannot be read ({error.strerror}).", "Give yourself access to it."
            ) from error


def open_documents(path: str | Path) -> TextFile:
    """Open a text file and read its first document; the others are read when they are asked for.

    Args:
        path: The file.

    Raises:
        LoadError: The file is missing, or has no documents, or it is not UTF-8 text as far as it was read.
    """
    require_possible(path)
    file = TextFile(Path(path))
    next(iter(file))
    return file


def read_documents(path: str | Path) -> list[str]:
    """Read all of a text file (documents separated by ``<|endoftext|>``) or a ``.jsonl`` file with a ``text`` field.

    Args:
        path: The file.

    Raises:
        LoadError: The file is missing, not UTF-8 text, or has no documents.
    """
    return [*TextFile(Path(path))]


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
        most: How many tokens are enough. The last document is used whole, unless it is several times longer than
            needed: then it is tokenized only that far and gives just the missing tokens.
    """
    return [*chain.from_iterable(tokenized(documents, tokenizer, most))]


def tokenized(
    documents: Iterable[str],
    tokenizer: Any,  # noqa: ANN401 - see load_tokenizer
    most: int | None = None,
    end: Sequence[int] = (),
) -> Iterator[list[int]]:
    """The ids of one document after another, as :func:`tokenize` joins them.

    Args:
        documents: Read until there are enough tokens.
        tokenizer: A tokenizer.
        most: How many tokens are enough; see :func:`tokenize`.
        end: Put behind every document; what stands behind the first part of one is beyond ``most``.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = 0
    for document in documents:
        missing = None if most is None else most - found - len(begin)
        yield (part := [*begin, *(ids(document) if missing is None else _first(document, missing, ids)), *end])
        found += len(part)
        if most is not None and found >= most:
            return


def _first(document: str, most: int, ids: Callable[[str], list[int]]) -> list[int]:
    """All tokens of a document, or of one that is much longer than that takes, the first ``most``."""
    length = _LETTERS * (max(0, most) + _UNSURE)
    while 4 * length < len(document):
        blank = next((i for i in reversed(range(length)) if document[i].isspace()), length)
        found = ids(document[:blank])[:-_UNSURE]
        if len(found) >= most:
            return found[: max(0, most)]
        length *= 4
    return ids(document)


def check_vocabulary(largest: int, known: int, source: str, predicted: int | None = None) -> None:
    """Refuse token ids that a model cannot be given, or be scored on.

    Args:
        largest: The largest id.
        known: How many ids the model reads; a tokenizer that gives others belongs to another one.
        source: The model's name.
        predicted: How many logits a token has, where the text is to be scored.

    Raises:
        UsageError: The id is out of range.
    """
    if largest >= known:
        raise UsageError(
            f"The tokenizer gives token {largest}, but '{source}' knows only {known}.",
            "Give the model's own tokenizer with --tokenizer FOLDER.",
        )
    if predicted is not None and largest >= predicted:
        raise UsageError(
            f"The text has token {largest}, and what '{source}' returns for logits is of {predicted} tokens only.",
            "Check that it returns logits and not hidden states, or give text without such tokens.",
        )


def token_windows(
    ids: Sequence[int],
    length: int,
    limit: int | None = None,
    name: str = "text",
    longest: Callable[[int], int] | None = None,
) -> Tensor:
    """Cut a stream into consecutive windows.

    Args:
        ids: Token ids.
        length: Tokens per window.
        limit: Use at most this many tokens, but at least one window.
        name: What to call the text in an error.
        longest: The longest window, at most this long, that the model can run: no other is advised.

    Returns:
        ``[windows, length]`` int64.

    Raises:
        UsageError: The text is shorter than one window.
    """
    if len(ids) < length:
        window = len(ids) if longest is None or len(ids) < LEAST_WINDOW else longest(len(ids))
        shorter = f", or a shorter window with --seq-len {window}" if window >= LEAST_WINDOW else ""
        raise UsageError(
            f"The {name} has {len(ids)} tokens, fewer than one window of {length}.", f"Give more text{shorter}."
        )
    count = len(ids) // length
    if limit is not None:
        count = max(1, min(count, limit // length))
    return torch.tensor(list(ids[: count * length]), dtype=torch.long).view(count, length)
