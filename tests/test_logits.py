"""Which of a model's outputs is taken for its logits, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import models
import pytest
import torch
from torch import Tensor, nn

from mla_compile import api
from mla_compile.errors import LoadError, UsageError
from mla_compile.program import Program
from mla_compile.sources.capture import capture, capture_any

WIDTH = 60


class Told(NamedTuple):
    hidden: Tensor
    scores: Tensor


@dataclass
class Kept:
    hidden: Tensor
    scores: Tensor
    loss: Tensor | None = None


class Bundle:
    """Nothing that an exporter knows."""

    def __init__(self, hidden: Tensor, scores: Tensor) -> None:
        self.hidden, self.scores = hidden, scores


class Returning(nn.Module):
    """Hidden states and scores, put together in any way."""

    def __init__(self, put: Callable[[Tensor, Tensor], Any], width: int = WIDTH, predicted: int = 97) -> None:
        super().__init__()
        self.put, self.table, self.head = put, nn.Embedding(models.VOCABULARY, width), nn.Linear(width, predicted)

    def forward(self, ids):
        hidden = self.table(ids).tanh()
        return self.put(hidden, self.head(hidden))


def read(put: Callable[[Tensor, Tensor], Any], **sizes: int) -> Program:
    return capture(Returning(put, **sizes), (models.tokens(2, 5),))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the compiler warned of."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("mla_compile") and r.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("put", "taken", "dropped"),
    [
        (lambda h, s: (h, s), "output_1", "output_0"),
        (lambda h, s: (s, h), "output_0", "output_1"),
        (lambda h, s: {"hidden": h, "scores": s}, "scores", "hidden"),
        (Told, "scores", "hidden"),
        (Kept, "scores", "hidden"),
        (lambda h, s: (h.sum(-1), s), "output_1", "output_0"),  # the only one of its shape
        (lambda h, s: {"first": s.mT, "logits": s, "hidden": h}, "logits", "first' and 'hidden"),
    ],
    ids=["second", "first", "named", "named tuple", "dataclass", "only one", "logits"],
)
def test_logits_are_told_from_other_outputs(put, taken, dropped, caplog):
    program = read(put)
    assert program.vocabulary == models.VOCABULARY
    verb = "are" if " and " in dropped else "is"
    note = f"the output '{taken}' is taken for the logits, and '{dropped}' {verb} dropped"
    assert program.notes == (note,)
    assert not warned(caplog)
    api.inspect(Returning(put), (models.tokens(2, 5),))
    assert warned(caplog) == [f"Returning: {note}."]


def test_an_object_that_holds_the_outputs_is_named():
    with pytest.raises(LoadError, match=r"^Returning returns a Bundle, in which .*\. Make it return the"):
        read(Bundle)


def test_a_module_is_left_as_it_was():
    module = Returning(Kept)
    capture(module, (models.tokens(2, 5),))
    assert isinstance(module(models.tokens(2, 5)), Kept)


def test_logits_by_name_need_not_be_as_many_as_the_table_has_rows():
    program = read(lambda h, s: {"hidden": h, "logits": s}, predicted=128)
    assert (program.vocabulary, len(program.notes)) == (128, 1)


def test_one_output_in_two_places_is_one():
    assert read(lambda h, s: (s, s)).notes == ()


@pytest.mark.parametrize(
    ("put", "sizes", "named"),
    [
        # None is as wide as the table has rows; both are; hidden states happen to be.
        (
            lambda h, s: (h, s),
            {"predicted": 128},
            "output_0 [batch, length, 60] and output_1 [batch, length, 128]",
        ),
        (lambda h, s: {"a": s, "b": s + 1}, {}, "a [batch, length, 97] and b [batch, length, 97]"),
        (
            lambda h, s: (h, s),
            {"width": 97, "predicted": 128},
            "output_0 [batch, length, 97] and output_1 [batch, length, 128]",
        ),
    ],
    ids=["none fits", "two fit", "hidden states fit"],
)
def test_outputs_that_cannot_be_told_apart_are_refused(put, sizes, named):
    with pytest.raises(LoadError) as refused:
        read(put, **sizes)
    told = f"Which output of 'Returning' is the logits cannot be told: {named} are shaped like them."
    assert refused.value.message == told
    assert refused.value.remedy.startswith("Name the one to take 'logits', ")


def test_logits_of_another_shape_are_not_replaced_by_hidden_states():
    with pytest.raises(LoadError, match=r"The output 'logits' of 'Returning' is shaped \[.*, 97\], not \[batch, len"):
        read(lambda h, s: {"hidden": h, "logits": s[:, -1]})


def test_attention_weights_are_no_logits():
    program = read(lambda h, s: (h @ h.mT, s))
    assert (program.vocabulary, len(program.notes)) == (models.VOCABULARY, 1)


def test_many_outputs_are_named_in_part():
    (note,) = read(lambda h, s: ([h[..., :2, None] for _ in range(9)], s)).notes
    assert note.endswith(", 'output_0_3' and 5 more are dropped")


class Both(nn.Module):
    """A model that returns what it computed before its logits, or that alone."""

    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self.inner, self.alone = models.handwritten(models.NanoGPT), alone
        self.inner.head = nn.Identity() if alone else self.inner.head

    def forward(self, ids):
        found = self.inner(ids)
        return found if self.alone else (found[..., :7], found)


def test_the_report_says_what_was_taken_and_what_was_dropped(caplog):
    compiled = api.compile(Both().eval(), (models.tokens(2, 8),), method="mha2mla", check=False)
    assert compiled.report.warnings[0] == "the output 'output_1' is taken for the logits, and 'output_0' is dropped"
    assert not warned(caplog)  # once is enough


def test_text_with_tokens_that_are_not_predicted():
    """Hidden states, of 64 numbers, that were taken for the logits of 97 tokens."""
    module, ids = Both(alone=True).eval(), models.tokens(2, 8)
    (note,) = capture_any(module, (ids,)).notes
    assert note == "the output 'output', taken for the logits, is of 64 tokens, and the model reads 97"
    text = torch.arange(96).reshape(8, 12)
    told = "The text has token 95, and what 'Both' returns for logits is of 64 tokens only."
    with pytest.raises(UsageError, match=told):
        api.compile(module, (ids,), calibration=text)
