"""Step sizes, objectives by name, and text as windows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import mla_compile
from mla_compile.errors import LoadError, UsageError
from mla_compile.runtime.module import LatentModel
from mla_compile.training.packing import order, pack
from mla_compile.training.recipe import make_recipe
from mla_compile.training.trained import (
    constant_rows,
    hold_constants,
    own_copies,
    parameter_groups,
    restore_constants,
)


def test_step_sizes_grow_stay_and_fall():
    recipe = make_recipe(warm_up=0.2, decay=0.3)
    shares = [recipe.share(step, 20) for step in range(20)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[4:14] == [1.0] * 10
    # 1 - sqrt(progress), six steps long.
    assert shares[14:] == pytest.approx([1 - math.sqrt(i / 6) for i in range(6)])
    assert make_recipe(warm_up=0.0, decay=0.0).share(0, 1) == 1.0


def test_objectives_are_mixed_by_name():
    recipe = make_recipe(objective="kl=0.9, next-token=0.1,attention", match_steps=3)
    assert recipe.weights == {"kl": 0.9, "next-token": 0.1, "attention": 1.0}
    assert recipe.weights_at(2) == {"attention": 1.0}
    assert recipe.weights_at(3) == recipe.weights
    assert recipe.learns_from_another
    assert not make_recipe(objective="next-token=2").learns_from_another


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"objective": "loss"}, "'loss' is not one of"),
        ({"objective": "kl=x"}, "not spelled"),
        ({"objective": "kl=1=2"}, "not spelled"),
        ({"objective": "kl=0"}, "not a number above 0"),
        ({"objective": "kl=0.9,kl=0.1"}, "names a part twice"),
        ({"seed": 2**63}, "seed"),
        ({"batch": 5, "accumulate": 2}, "cannot be cut"),
        ({"warm_up": 0.6, "decay": 0.5}, "more than all"),
        ({"train": "some"}, "train='some'"),
        ({"steps": 3}, "no setting 'steps'"),
    ],
)
def test_settings_that_cannot_be(settings, problem):
    with pytest.raises(UsageError, match=problem):
        make_recipe(**settings)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"objective": "kl=x"}, "Give next-token, kl, attention, or a mixture such as kl=0.9,next-token=0.1."),
        ({"objective": "loss"}, "Give next-token, kl, attention, or a mixture such as kl=0.9,next-token=0.1."),
        ({"objective": "kl,kl"}, "Name every part once."),
        ({"objective": "kl=0"}, "Give every part a weight above 0, or leave the part out."),
        ({"lora_alpha": 8}, "Give lora_rank too, or leave lora_alpha out."),
        ({"batch": 5, "accumulate": 2}, "Make batch a multiple of accumulate."),
        ({"warm_up": 0.6, "decay": 0.5}, "Make their sum 1 at most."),
    ],
    ids=str,
)
def test_a_remedy_is_of_the_contradiction(settings, remedy):
    with pytest.raises(UsageError) as caught:
        mla_compile.Recipe(**settings)
    assert caught.value.remedy == remedy


def test_the_public_name_refuses_in_a_sentence_and_takes_a_dictionary(tmp_path):
    with pytest.raises(UsageError, match="tokens=-1"):
        mla_compile.Recipe(tokens=-1)
    with pytest.raises(UsageError, match="tokens=-1"):
        mla_compile.finetune(tmp_path, ["text"], tmp_path / "out", {"tokens": -1})
    with pytest.raises(UsageError, match="of type list"):
        mla_compile.finetune(tmp_path, ["text"], tmp_path / "out", [1])
    with pytest.raises(LoadError, match=r"no converted model|mla-compile\[train\]"):  # what the next step finds
        mla_compile.finetune(tmp_path, ["text"], tmp_path / "out", {"tokens": 8})


def test_every_window_comes_before_any_comes_again():
    numbers = order(5, 12, seed=1)
    assert [sorted(numbers[i : i + 5]) for i in (0, 5)] == [[0, 1, 2, 3, 4]] * 2
    assert numbers == order(5, 12, seed=1) != order(5, 12, seed=2)


class Letters:
    """A tokenizer of letters, led by 0."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) - 96 for letter in text]}


def test_documents_are_packed_and_read_no_further_than_needed():
    read = []

    def documents():
        for text in ("abc", "de", "fghij", "klm"):
            read.append(text)
            yield text

    packed = pack(documents(), Letters(), length=3, tokens=4, held_out=1)
    assert packed.train.tolist() == [[0, 1, 2], [3, 0, 4]]
    assert packed.held_out.tolist() == [[7, 8, 9]]
    assert read == ["abc", "de", "fghij"]


@pytest.mark.parametrize(
    ("begin", "end", "stream"),
    [(0, 0, [0, 1, 0, 2, 3, 0, 4]), (0, 30, [0, 1, 30, 0, 2, 3, 30, 0]), (None, 30, [1, 30, 2, 3, 30, 4]),
     (None, None, [1, 2, 3, 4, 5, 6])],
)  # fmt: skip
def test_documents_end_where_the_next_one_does_not_say_that_it_begins(begin, end, stream):
    letters = Letters()
    letters.bos_token_id, letters.eos_token_id = begin, end
    packed = pack(["a", "bc", "def"], letters, length=2, tokens=None, held_out=1)
    assert torch.cat([packed.train, packed.held_out]).flatten().tolist()[: len(stream)] == stream[: len(stream)]


@pytest.mark.parametrize("letters", [20, 5000])
def test_part_of_a_document_has_no_end(letters):
    """One that is cut off ends beyond the last window."""
    tokenizer = Letters()
    tokenizer.bos_token_id, tokenizer.eos_token_id = None, 30
    packed = pack(["a" * letters], tokenizer, length=4, tokens=4, held_out=1)
    assert (packed.train == 1).all()
    assert (packed.held_out == 1).all()


@pytest.mark.parametrize(("tokens", "held_out"), [(20, 6), (200, 3), (None, 3)])
def test_a_tenth_is_held_out_only_where_the_text_ends_first(tokens, held_out):
    packed = pack(["abcd"] * 30, Letters(), length=5, tokens=tokens, held_out=6)
    assert len(packed.held_out) == held_out
    assert len(packed.train) == (4 if tokens == 20 else 27)


@pytest.mark.parametrize("texts", [["ab"], ["abc"]])
def test_text_of_less_than_two_windows_is_refused(texts):
    with pytest.raises(UsageError, match="Give more text"):
        pack(texts, Letters(), length=4, tokens=None, held_out=4)


@pytest.mark.parametrize(("letters", "advice"), [(62, "Give more text."), (64, "shorter window with --seq-len 32.")])
def test_a_shorter_window_is_advised_only_where_it_is_of_use(letters, advice):
    with pytest.raises(UsageError) as caught:
        pack(["a" * (letters - 1)], Letters(), length=64, tokens=None, held_out=4)
    assert caught.value.remedy.endswith(advice)


class _Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.row = nn.Parameter(torch.tensor([[3.0, -3.0], [0.0, 0.0]]))
        self.row_bias = nn.Parameter(torch.tensor([0.5, 1.0]))
        self.key_up = nn.Parameter(torch.full((1, 1, 2), 0.5))


def _model() -> LatentModel:
    graph = nn.Module()
    graph.attention = nn.Module()
    graph.attention.latent_0 = _Holder()
    graph.tied = graph.attention.latent_0.key_up
    return LatentModel(graph, [2], [0])


def test_steps_are_in_proportion_to_each_weight():
    groups = parameter_groups(_model(), 0.01)
    # Root mean squares: of a matrix, of the bias's matrix, of the up-projection.
    size = 3 / math.sqrt(2)
    assert sorted(g["base"] for g in groups) == pytest.approx(sorted([0.01 * size, 0.01 * size, 0.005]))


def test_the_constant_entry_gets_no_gradient_and_tied_weights_stay_one():
    model = _model()
    before = model.graph.attention.latent_0.row
    names = {name for name, _ in model.named_parameters()}
    own_copies(model, names)
    hold_constants(model)
    holder = model.graph.attention.latent_0
    assert holder.row is not before
    assert model.graph.tied is holder.key_up
    (holder.row.sum() + holder.row_bias.sum()).backward()
    assert holder.row.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert holder.row_bias.grad.tolist() == [1.0, 0.0]


def test_weight_decay_leaves_the_constant_entry():
    model = _model()
    found = constant_rows(model)
    holder = model.graph.attention.latent_0
    hold_constants(model)
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.01), weight_decay=0.5)
    for _ in range(3):
        (holder.row.sum() + holder.row_bias.sum()).backward()
        optimiser.step()
        restore_constants(found)
        optimiser.zero_grad()
    assert holder.row[1].tolist() == [0.0, 0.0]
    moved, constant = holder.row_bias.tolist()
    assert moved < 0.5
    assert constant == 1.0
    assert constant_rows(model).keys() == found.keys()
