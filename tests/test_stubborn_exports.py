"""Models that torch cannot export: one sentence with the line at fault and what to do, and inputs beyond token ids."""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.export import Dim

import mla_compile
from mla_compile.errors import LoadError

HERE = Path(__file__).name
LONGEST_MESSAGE = 600  # characters, remedy included: what a terminal shows in a few lines
TORCH_ADVICE = ("TORCH_LOGS", "Unhinted", "unhinted", "u0", "Size-like symbols", "L['", "mark_dynamic", "draft_export")
"""Words of torch's own messages, which tell a user nothing."""


class Base(zoo.TinyLM):
    """An ordinary model of one layer; what is stubborn comes before it."""

    def __init__(self) -> None:
        super().__init__(zoo.Attention)
        self.place = nn.Parameter(torch.randn(5, zoo.WIDTH))


class Branching(Base):
    """Control flow that depends on values."""

    def embed(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        if x.sum() > 0:  # stubborn
            x = x * 2
        return x


class BranchingDeepInside(Base):
    """The same in a module of the model, behind torch's own frames."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if bool((x > 3).any()) else x  # stubborn

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), self.Inner())

    def embed(self, ids: Tensor) -> Tensor:
        return self.inner(self.tokens(ids))


class Counting(Base):
    """A Python number is made of a tensor, and decides about a size."""

    def embed(self, ids: Tensor) -> Tensor:
        count = int(ids.max())  # stubborn
        return self.tokens(ids) + self.place[:count].sum(0)


class Scaling(Base):
    """A Python number is made of a tensor, and multiplies."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) * float(ids.max())  # stubborn


class Listing(Base):
    """Tokens become a Python list."""

    def embed(self, ids: Tensor) -> Tensor:
        rows = ids.tolist()  # stubborn
        return self.tokens(torch.tensor(rows))


class LeavingTorch(Base):
    """A tensor becomes an array."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(torch.from_numpy(ids.numpy()))  # stubborn


class FixedLength(Base):
    """A table of positions has the length of the example."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.place  # stubborn


class FixedShape(Base):
    """The shape of the example is written down."""

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids).view(2, 5, zoo.WIDTH)  # stubborn


class FixedByCheck(Base):
    """The length is compared with a number."""

    def embed(self, ids: Tensor) -> Tensor:
        if ids.shape[1] != 5:  # stubborn
            raise ValueError("only five tokens")
        return self.tokens(ids)


DATA_DEPENDENT = (Branching, BranchingDeepInside, Counting, Scaling, Listing, LeavingTorch)
STATIC = {FixedLength: ("length",), FixedShape: ("batch", "length"), FixedByCheck: ("length",)}


def stubborn(kind: type) -> tuple[int, str]:
    """Number and text of the line at fault."""
    lines, first = inspect.getsourcelines(kind)
    (place,) = (i for i, line in enumerate(lines) if "# stubborn" in line)
    return first + place, lines[place].split("#")[0].strip()


def tokens() -> Tensor:
    return torch.randint(0, zoo.VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))


def refusal(convert: Callable[[], object]) -> LoadError:
    """The error a conversion ends with: one sentence in plain words, and a remedy."""
    with pytest.raises(LoadError) as caught:
        convert()
    error = caught.value
    assert "\n" not in str(error)
    assert len(str(error)) <= LONGEST_MESSAGE
    assert error.remedy.endswith(".")
    assert not [w for w in TORCH_ADVICE if w in str(error)]
    return error


def assert_names_the_line(error: LoadError, file: str, number: int, code: str) -> None:
    assert f"{file}:{number}" in error.message
    assert code in error.message


@pytest.mark.parametrize("kind", DATA_DEPENDENT, ids=lambda k: k.__name__)
def test_a_line_that_depends_on_values_is_named(kind):
    error = refusal(lambda: mla_compile.compile(zoo.model(kind=lambda *_: kind()), (tokens(),), exact=True))
    assert kind.__name__ in error.message
    assert_names_the_line(error, HERE, *stubborn(kind))


@pytest.mark.parametrize("kind", STATIC, ids=lambda k: k.__name__)
def test_a_line_that_fixes_a_size_is_named(kind):
    error = refusal(lambda: mla_compile.compile(zoo.model(kind=lambda *_: kind()), (tokens(),), exact=True))
    for size in STATIC[kind]:
        assert size in error.message
    assert "5" in error.message
    assert_names_the_line(error, HERE, *stubborn(kind))


def test_a_number_that_became_a_constant_is_named():
    """The exporter puts a float that is computed from a size into the graph as it is for the example."""

    class Warmer(zoo.HalfRope):
        def attend(self, q, k, v, x, ids):
            scale = (q.shape[2] + 1) / 7.0
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    with pytest.raises(LoadError, match=r"became a constant \(.*1 \+ ids\.size\(\)\[1\].* == 0\.857"):
        zoo.program_of(zoo.model(Warmer))


def test_a_length_at_the_end_of_a_table_is_no_constant():
    longest = 6  # the example is 5 long

    class Short(zoo.Masked):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(longest, longest, dtype=torch.bool).tril())

        def seen(self, length, ids):
            return self.table[:length, :length]

    assert zoo.program_of(zoo.model(Short)).max_positions in (longest, None)


def test_an_archive_with_a_fixed_length_says_which():
    exported = torch.export.export(zoo.model(zoo.Attention), (tokens(),), dynamic_shapes=({0: Dim.DYNAMIC},))
    error = refusal(lambda: mla_compile.compile(exported, exact=True))
    assert "length of 5" in error.message
    assert "Dim.DYNAMIC" in error.remedy


def test_rope_that_grows_with_the_longest_position():
    """transformers decides by a value whether to compute new frequencies: the line lies in its own file."""
    module = models.llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0})
    error = refusal(lambda: mla_compile.compile(module, exact=True))
    assert "LlamaForCausalLM" in error.message
    import transformers.modeling_rope_utils as where

    lines = linecache.getlines(where.__file__)
    (number,) = (i for i, line in enumerate(lines, 1) if "if seq_len > max_seq_len_cached" in line)
    assert_names_the_line(error, "modeling_rope_utils.py", number, lines[number - 1].split("#")[0].strip())


def test_a_module_that_fails_by_itself_is_not_blamed_on_the_exporter():
    class Broken(Base):
        def embed(self, ids: Tensor) -> Tensor:
            raise ValueError("there is no such checkpoint")

    error = refusal(lambda: mla_compile.compile(zoo.model(kind=lambda *_: Broken()), (tokens(),), exact=True))
    assert "there is no such checkpoint" in error.message


# ---- inputs beyond token ids


class WithTypes(Base):
    """A second table for kinds of tokens (BERT, GPT-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.types = nn.Embedding(2, zoo.WIDTH)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        self.given = self.types(token_type_ids)
        return super().forward(input_ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.given


class WithOptionalTypes(WithTypes):
    """The same, if they are given."""

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        return super().forward(input_ids, token_type_ids)


class FromEmbeddings(Base):
    """Embeddings instead of token ids."""

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), x[..., 0])
        return self.head(x)


class WithEmbeddings(Base):
    """Something continuous beside the tokens."""

    def forward(self, input_ids: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.given = prompt_embeds
        return super().forward(input_ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.given


class WithFullMask(Base):
    """The whole mask is an input, ``[batch, 1, length, length]``, added to the scores."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            q, k, v = (layer.split(z, zoo.HEADS) for z in layer.project(y))
            attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=zoo.SCALE)
            x = x + layer.out(attended.transpose(1, 2).reshape(*x.shape[:2], -1))
        return self.head(x)


class WithBooleanMask(WithFullMask):
    """The same, of truth values."""


def causal(dtype: torch.dtype) -> Tensor:
    seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5).contiguous()
    return seen if dtype is torch.bool else torch.zeros(2, 1, 5, 5).masked_fill(~seen, -torch.inf)


INPUTS: dict[type, dict[str, Callable[[], Tensor]]] = {
    WithTypes: {"token_type_ids": lambda: torch.zeros(2, 5, dtype=torch.long)},
    WithOptionalTypes: {"token_type_ids": lambda: torch.zeros(2, 5, dtype=torch.long)},
    FromEmbeddings: {"inputs_embeds": lambda: torch.randn(2, 5, zoo.WIDTH)},
    WithEmbeddings: {"prompt_embeds": lambda: torch.randn(2, 5, zoo.WIDTH)},
    WithFullMask: {"attention_mask": lambda: causal(torch.float32)},
    WithBooleanMask: {"attention_mask": lambda: causal(torch.bool)},
}


@pytest.mark.parametrize("positional", [True, False], ids=["positional", "by name"])
@pytest.mark.parametrize("kind", INPUTS, ids=lambda k: k.__name__)
def test_an_input_beyond_token_ids_is_refused_by_name(kind, positional):
    """None of them has a neutral value that is known of it alone: not a type of 0, nor a mask of another rank."""
    module = zoo.model(kind=lambda *_: kind())
    given = {n: make() for n, make in INPUTS[kind].items()}
    if kind is not FromEmbeddings:
        given = {"input_ids": tokens(), **given}
    inputs = tuple(given.values()) if positional else given
    error = refusal(lambda: mla_compile.compile(module, inputs, exact=True))
    (name,) = INPUTS[kind]
    if kind in (WithTypes, WithOptionalTypes):
        said = f"The inputs of '{kind.__name__}' are input_ids, {name}; which one holds the token ids is unclear."
    else:
        dtype = str(given[name].dtype).removeprefix("torch.")
        said = f"Input '{name}' of '{kind.__name__}' is {dtype} of rank {given[name].dim()}."
    assert error.message == said


def test_an_optional_input_that_is_not_given_is_no_input():
    module = zoo.model(kind=lambda *_: WithOptionalTypes())
    compiled = mla_compile.compile(module, (tokens(),), exact=True)
    with torch.no_grad():
        expected = module(tokens())
        assert (compiled.module(tokens()).logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_mask_and_positions_by_their_usual_names_are_understood():
    class Usual(Base):
        def __init__(self) -> None:
            super().__init__()
            self.wpe = nn.Embedding(64, zoo.WIDTH)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
            self.given, length = self.wpe(position_ids), input_ids.shape[1]
            real = attention_mask.bool()[:, None, None] | torch.eye(length, dtype=torch.bool)
            mask = torch.ones(length, length, dtype=torch.bool).tril() & real
            return WithFullMask.forward(self, input_ids, mask)

        def embed(self, ids: Tensor) -> Tensor:
            return self.tokens(ids) + self.given

    module, ids = zoo.model(kind=lambda *_: Usual()), tokens()
    mask, positions = torch.ones_like(ids), torch.arange(5).expand(2, 5).contiguous()
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    compiled = mla_compile.compile(module, given, exact=True)
    with torch.no_grad():
        expected = module(**given)
        assert (compiled.module(ids).logits - expected).abs().max() <= 1e-4 * expected.abs().max()
