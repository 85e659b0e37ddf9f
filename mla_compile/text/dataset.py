"""Text of a dataset, from the hub or a folder, read document by document as far as it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from mla_compile.errors import LoadError, UsageError, first_line

__all__ = ["TextDataset", "is_dataset", "stream_documents"]

_PREFIX, _PARQUET = "hf:", ".parquet"

Row = Mapping[str, Any]


def is_dataset(text: str) -> bool:
    """Whether a source of text is read by the library of datasets: a name, or a parquet file."""
    return text.startswith(_PREFIX) or text.endswith(_PARQUET)


class TextDataset:
    """The documents of a dataset, none of them blank.

    They are read when they are asked for, one at a time; asked for again, from the beginning. The first row is read at
    once, and not again for those who ask first.

    Args:
        source: What the user calls it.
        load: Opens it, at its first row.

    Raises:
        LoadError: It cannot be read, is empty or has no column of text.
    """

    def __init__(self, source: str, load: Callable[[], Iterable[Row]]) -> None:
        self._source, self._load = source, load
        rows = _rows(source, load)
        first = next(rows, None)
        if first is None:
            raise LoadError(f"'{source}' holds no text.", "Give a dataset with at least one document.")
        self._column = _text_column(source, first)
        self._begun: Iterator[Row] | None = chain([first], rows)

    def __iter__(self) -> Iterator[str]:
        """Read documents.

        Raises:
            LoadError: The dataset cannot be read any further.
        """
        rows, self._begun = self._begun or _rows(self._source, self._load), None
        return (text for row in rows if isinstance(text := row.get(self._column), str) and text.strip())


def stream_documents(source: str) -> TextDataset:
    """Open a dataset and read its first row; the others are read when they are asked for.

    Args:
        source: ``hf:NAME[:CONFIG][:SPLIT]``, the split ``train`` by default; a folder of data files is a name too. Or a
            ``.parquet`` file.

    Raises:
        LoadError: ``datasets`` is not installed, or the dataset cannot be read, is empty or has no column of text.
        UsageError: The source is not spelled like one.
    """
    files = {"data_files": source} if not source.startswith(_PREFIX) else {}
    name, *rest = ["parquet"] if files else source.removeprefix(_PREFIX).split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise UsageError(
            f"'{source}' does not name a dataset.", "Write hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT."
        )
    *config, split = rest or ["train"]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise LoadError(
            f"Reading '{source}' takes the package datasets, which is not installed.",
            "Run pip install 'mla-compile[data]', or give a .txt or .jsonl file.",
        ) from error
    return TextDataset(source, lambda: load_dataset(name, *config, split=split, streaming=True, **files))


def _rows(source: str, load: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """Iterate over a dataset; its library fails in as many ways as there are formats and networks."""
    try:
        yield from load()
    except Exception as error:
        reason = first_line(error)
        raise LoadError(
            f"'{source}' cannot be read ({reason}).",
            "Check its name, configuration and split (hf:NAME:CONFIG:SPLIT), or give a .txt or .jsonl file.",
        ) from error


def _text_column(source: str, row: Row) -> str:
    """The column named ``text``, or else the one that holds strings."""
    strings = ["text"] if "text" in row else [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) != 1:
        raise LoadError(
            f"Which column of '{source}' is the text is not clear; there are {', '.join(sorted(row))}.",
            "Give a dataset with a column 'text', or a .jsonl file with a 'text' field.",
        )
    return strings[0]
