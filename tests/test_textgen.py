"""Text as it is generated: pieces of whole characters, and all of it in the end."""

from __future__ import annotations

import pytest

from mla_compile.errors import UsageError
from mla_compile.evaluation.textgen import _Stream, generate_text
from mla_compile.runtime.generate import Sampling


class Bytes:
    """A token is a byte."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


def streamed(text: bytes) -> list[str]:
    pieces: list[str] = []
    stream = _Stream(Bytes(), list(b"say "), pieces.append)
    for token in text:
        stream([token])
    stream([None])
    stream.finish()
    return pieces


def test_characters_arrive_whole():
    assert streamed("a\N{EURO SIGN}b".encode()) == ["a", "\N{EURO SIGN}", "b"]


def test_half_a_character_in_the_end_is_shown_as_such():
    assert streamed("a\N{EURO SIGN}".encode()[:-1]) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_a_prompt_that_is_not_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not UTF-8"):
        generate_text(tmp_path, ["caf\udce9"], 1, Sampling())
