"""Text as it is generated: pieces of whole characters, and all of it in the end."""

from __future__ import annotations

import pytest

from mla_compile.errors import UsageError
from mla_compile.evaluation.textgen import _Stream, _warnings, cut_at, generate_text
from mla_compile.runtime.generate import Sampling


class Bytes:
    """A token is a byte."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace")


def streamed(text: bytes, *stop: str) -> list[str]:
    pieces: list[str] = []
    stream = _Stream(Bytes(), list(b"say "), pieces.append, stop)
    for token in text:
        stream([token])
    stream([None])
    stream.finish()
    return pieces


def test_characters_arrive_whole():
    assert streamed("a\N{EURO SIGN}b".encode()) == ["a", "\N{EURO SIGN}", "b"]


def test_half_a_character_in_the_end_is_shown_as_such():
    assert streamed("a\N{EURO SIGN}".encode()[:-1]) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_what_may_be_a_text_to_stop_at_waits():
    assert streamed(b"one. two", "\n\n", ". ") == ["o", "n", "e"]
    assert streamed(b"a\nb", "\n\n") == ["a", "\nb"]
    assert streamed(b"a\n", "\n\n") == ["a", "\n"]


def test_the_first_of_several_texts_to_stop_at_counts():
    assert cut_at("one, two. three", [". ", ", ", "four"]) == "one"
    assert cut_at("one", [", "]) == cut_at("one", []) == "one"


def test_what_may_be_wrong_with_a_text_is_said():
    assert _warnings(words=97, known=100, reached=10, longest=10) == ()
    foreign, far = _warnings(words=70, known=100, reached=11, longest=10)
    assert foreign == "the tokenizer has 70 tokens and the model 100: it may belong to another model"
    assert far == "the model was made for 10 tokens at most, and the text has 11"
    assert _warnings(words=100, known=100, reached=11, longest=None) == ()


def test_a_prompt_that_is_not_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not UTF-8"):
        generate_text(tmp_path, ["caf\udce9"], 1, Sampling())
