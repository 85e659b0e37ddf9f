"""Run a rewritten graph in pieces and with padding: what still looks at the length or at other sequences shows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mla_compile.disk.mapped import DroppingInterpreter
from mla_compile.errors import RefusedError, first_line
from mla_compile.passes.evaluate import example_inputs
from mla_compile.passes.layout import Sizes
from mla_compile.passes.singled_out import singled_out
from mla_compile.passes.trace import DataFlow
from mla_compile.passes.weights import stored_numbers
from mla_compile.program import DecoderProgram, Program
from mla_compile.text.evaluate import differences, relative_error

__all__ = ["check_incremental"]

_INCREMENTAL = 1e-4
"""Relative difference that is more than float32 rounding, which stays below 1e-5."""
_LENGTH, _PADDING, _ENCODED = 12, 3, 7
_LONG, _LONG_PIECES = 1040, (640, 400)
"""Tokens that show what looks far back, or at lengths of hundreds; as many as a check on text runs."""
_LONG_DIFFERENCE, _ROUNDED = 1e-3, 8
"""What is no rounding among so many tokens, and how many of them may be another expert's because of one."""
_LARGE = 2**29
"""Numbers in the weights of models that so many tokens are too much for."""

_COUNTS = frozenset({torch.ops.aten.cumsum.default, torch.ops.aten.sum.dim_IntList})
"""Operators that add up."""


def check_incremental(module: fx.GraphModule, program: Program, rows: Sequence[int], cross: Sequence[int] = ()) -> None:
    """Refuse a graph in which something outside attention still looks at the length or at other tokens.

    Whatever was overlooked (a convolution, a running sum, positions counted in floats, a mean over the batch) shows as
    a difference between a sequence at once and the same sequence in pieces, or beside another one and padded. Among
    the sequences are some of ids that the graph compares with or looks up (a separator), and of few ids.

    Args:
        module: The rewritten graph, computing in float32.
        program: The original.
        rows: Cache row length per layer.
        cross: Row length per cross attention layer, whose rows are made up.

    Raises:
        RefusedError: There is such a difference.
    """
    ids = _telling_ids(program)
    try:
        context = _made_up(program, cross, len(ids))
        whole = _run_in_pieces(module, ids, [_LENGTH], rows, context)
        pieces = _run_in_pieces(module, ids, [5, 1, 2, 3, 1], rows, context)
        padded = _run_padded(module, ids, rows, context)
        far = _far_error(module, program, rows, context)
    except (RuntimeError, IndexError) as error:
        reason = textwrap.shorten(first_line(error), 120, placeholder=" ...")
        raise RefusedError(
            f"'{program.source}' cannot be run in pieces after the rewrite ({reason}): something outside attention "
            "depends on the length of the sequence.",
            "Compute it from positions instead.",
        ) from error
    beside = relative_error(padded, whole[::2, : _LENGTH - _PADDING])
    counted = _counted_tokens(program)
    for difference, limit, how, what in (
        (relative_error(pieces, whole), _INCREMENTAL, "in pieces", "the length or on other tokens"),
        (beside, _INCREMENTAL, "padded, beside another sequence", "padding or on other sequences"),
        (far, _LONG_DIFFERENCE, "in pieces of hundreds of tokens", "the length or on tokens far back"),
    ):
        if not difference < limit and counted is not None:
            raise RefusedError(
                f"'{program.source}' counts some of the token ids, at '{counted}': what follows, such as positions, "
                "depends on which tokens came before.",
                "Compute positions with torch.arange, or take them as an input position_ids.",
            )
        if not difference < limit:
            raise RefusedError(
                f"Something outside attention in '{program.source}' depends on {what}: {how}, the rewritten model "
                f"differs by {difference:.1e}.",
                "Compute it from positions, or convert a model whose only memory is attention.",
            )


def _counted_tokens(program: Program) -> str | None:
    """A node that adds up, along the sequence, what was computed from token ids without embedding them."""
    flow = DataFlow(program)
    length: Any = Sizes.of(program).length
    for node in program.exported.graph.nodes:
        if node.target in _COUNTS and node in flow.tokens and node not in flow.hidden:
            arguments: Any = node.args
            axes = arguments[1] if isinstance(arguments[1], list | tuple) else [arguments[1]]
            sizes = [arguments[0].meta["val"].shape[axis] for axis in axes]
            if any(not isinstance(size, int) and size.node.expr == length for size in sizes):
                return str(node.name)
    return None


def _far_error(module: fx.GraphModule, program: Program, rows: Sequence[int], context: Sequence[Tensor]) -> float:
    """How far a long sequence in two pieces is from the same at once, over the largest logit.

    It is that of the token behind the few worst ones: a router's choice may turn on a rounding. Large models are not
    tried: they differ from small ones of their kind in sizes, and minutes of work and gigabytes of logits are theirs.
    """
    if stored_numbers(program) > _LARGE:
        return 0.0
    context = [value[:1] for value in context]
    length = min(program.max_positions or _LONG, _LONG)
    while length > _LENGTH:
        ids = example_inputs(program, 1, length, seed=3)[program.tokens]
        try:
            whole = _run_in_pieces(module, ids, [length], rows, context)
        except (RuntimeError, IndexError):  # a table inside the model ends there
            length //= 2
            continue
        first = length * _LONG_PIECES[0] // _LONG
        pieces = _run_in_pieces(module, ids, [first, length - first], rows, context)
        found, largest = differences(pieces, whole)
        errors = found.amax(-1).flatten().nan_to_num(nan=math.inf).sort(descending=True).values
        return float(errors[min(_ROUNDED, len(errors) - 1)] / largest)
    return 0.0


def _telling_ids(program: Program) -> Tensor:
    """Pairs of sequences: of random ids, of few ids, so that neighbours are alike, and of ids that the graph names."""
    random = example_inputs(program, 2, _LENGTH, seed=1)[program.tokens]
    generator = torch.Generator().manual_seed(4)
    pairs, few = [random], random[0, :2]
    for number in (None, *singled_out(program)):
        ids = few if number is None else torch.cat([few, few.new_tensor([number])])
        pair = ids[torch.randint(len(ids), random.shape, generator=generator)]
        if number is not None:  # in the first piece, and in a later one
            pair[0, [2, 6]] = pair[1, [1, 10]] = number
        pairs.append(pair)
    return torch.cat(pairs)


def _made_up(program: Program, cross: Sequence[int], batch: int) -> list[Tensor]:
    """Rows of an encoder for so many sequences, and a mask that hides some of the first one's."""
    generator = torch.Generator().manual_seed(2)
    found = [torch.randn(batch, _ENCODED, width, generator=generator) for width in cross]
    if isinstance(program, DecoderProgram) and program.encoder_mask is not None:
        mask = torch.ones(batch, _ENCODED, dtype=torch.long)
        mask[0, -2:] = 0
        found.append(mask)
    return found


def _run_in_pieces(
    module: fx.GraphModule, ids: Tensor, sizes: Sequence[int], rows: Sequence[int], context: Sequence[Tensor]
) -> Tensor:
    cache = [torch.zeros(len(ids), 0, row) for row in rows]
    parts, done, interpreter = [], 0, DroppingInterpreter(module)
    with torch.no_grad():
        for size in sizes:
            mask = torch.ones(len(ids), done + size, dtype=torch.long)
            positions = torch.arange(done, done + size).expand(len(ids), size)
            logits, *cache = interpreter.run(ids[:, done : done + size], mask, positions, *cache, *context)
            parts.append(logits)
            done += size
    return torch.cat(parts, 1)


def _run_padded(module: fx.GraphModule, ids: Tensor, rows: Sequence[int], context: Sequence[Tensor]) -> Tensor:
    """Logits of every other sequence's first tokens, padded on the left beside the sequences between them."""
    real = _LENGTH - _PADDING
    batch = ids.flip(1)
    batch[::2, _PADDING:] = ids[::2, :real]
    mask = torch.ones_like(batch)
    mask[::2, :_PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = [torch.zeros(len(ids), 0, row) for row in rows]
    with torch.no_grad():
        logits: Tensor = DroppingInterpreter(module).run(batch, mask, positions, *cache, *context)[0]
    return logits[::2, _PADDING:]
