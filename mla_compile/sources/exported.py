"""What the inputs and outputs of an exported graph mean: a causal language model, or why it is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from mla_compile.errors import LoadError, MlaCompileError, reason_of
from mla_compile.program import AnyProgram, Assets, OtherProgram, Program, Role, input_role, outputs_of, table_shapes
from mla_compile.quiet import quiet_exporter
from mla_compile.sources.ellipses import has_ellipses, spell_ellipses
from mla_compile.sources.patterns import patterns
from mla_compile.sources.products import has_other_products, spell_products
from mla_compile.sources.softmaxes import has_other_softmaxes, spell_softmaxes
from mla_compile.sources.tables import has_other_tables, spell_tables

__all__ = [
    "HOW_TO_EXPORT",
    "assets_of",
    "language_model",
    "read_export",
    "require_integers",
]

_TO = torch.ops.aten._to_copy.default
_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
_RESPELLED = {torch.ops.aten.type_as.default: lambda value, other: value.to(other.dtype)}
"""Operators that read a value for its type only: what attention scores are read for is looked at closely."""
_LOGITS = "logits"
"""Name of the output that is taken for the logits, whatever others there are."""
_NAMED = 4
"""Outputs named in a sentence, at most."""
_EXPORT_ALL = "Export a causal language model that returns the logits of every position."
HOW_TO_EXPORT = (
    "Export it with torch.export.save(torch.export.export(model.eval(), (ids,), dynamic_shapes="
    "({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)), 'model.pt2'), ids being a batch of at least 2 by 3 token ids."
)


def language_model(program: AnyProgram) -> Program:
    """Return the program as a causal language model.

    Raises:
        LoadError: It is none.
    """
    if isinstance(program, OtherProgram):
        raise program.why
    assert isinstance(program, Program)
    return program


def assets_of(tokenizer: str | None, beside: Path | None) -> Assets:
    """Tokenizer and configuration given by the user, or lying beside an archive."""
    if tokenizer is None and beside is not None and (beside / "tokenizer_config.json").is_file():
        tokenizer = str(beside)
    if tokenizer is None:
        return Assets()
    from mla_compile.text.corpus import load_tokenizer, special_tokens

    return Assets(folder=tokenizer, generation=special_tokens(load_tokenizer(tokenizer)))


def require_integers(name: str, value: Tensor, source: str) -> None:
    """Refuse what are no token ids.

    Args:
        name: Name of the input.
        value: What it is.
        source: What to call the model.

    Raises:
        LoadError: It is not ``[batch, length]`` of integers.
    """
    if value.is_floating_point() or value.dim() != 2:
        raise LoadError(
            f"Input '{name}' of '{source}' is {str(value.dtype).removeprefix('torch.')} of rank {value.dim()}.",
            "Give example_inputs, or export a model, of token ids [batch, length], and optionally attention_mask and "
            "position_ids; an encoder, which may read anything, takes encoders=True.",
        )


def read_export(
    exported: ExportedProgram,
    *,
    source: str,
    assets: Assets | None = None,
    max_positions: int | None = None,
    in_memory: bool = False,
) -> AnyProgram:
    """Normalise an exported program and find out what its inputs and outputs mean.

    Arguments are attributes of :class:`~mla_compile.program.AnyProgram`.

    Returns:
        A :class:`Program` where it is a causal language model, else an :class:`OtherProgram` that says why not.

    Raises:
        LoadError: The graph cannot be normalised, or its batch is static.
    """
    if _has_compositions(exported):
        table = {**_RESPELLED, **patterns()}
        try:
            with quiet_exporter():
                exported = exported.run_decompositions(table)
        except MlaCompileError:
            raise
        except Exception as error:
            raise LoadError(
                f"The graph of '{source}' could not be normalised ({reason_of(error)}).", HOW_TO_EXPORT
            ) from error
        _drop_type_assertions(exported)
        spell_products(exported)
        spell_tables(exported)
        spell_softmaxes(exported)
        spell_ellipses(exported)
    common: dict[str, Any] = {
        "exported": exported,
        "source": source,
        "assets": assets or Assets(),
        "in_memory": in_memory,
    }
    try:
        program = _as_language_model(common, max_positions)
    except LoadError as why:
        found = OtherProgram(**common, max_positions=max_positions, why=why)
        inputs = [value for _, value in found.user_inputs.values() if value.dim() >= 2]
        if not inputs or not all(_is_symbolic(value.shape[0]) for value in inputs):
            raise
        return found
    _count_masks(exported)
    return program


def _as_language_model(common: Mapping[str, Any], max_positions: int | None) -> Program:
    exported: ExportedProgram = common["exported"]
    source: str = common["source"]
    signature = exported.graph_signature
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    tensors = {
        name: placeholders[name].meta["val"]
        for name in signature.user_inputs
        if isinstance(name, str) and isinstance(placeholders[name].meta.get("val"), Tensor)
    }
    roles: dict[Role, list[str]] = {role: [] for role in Role}
    for name, value in tensors.items():
        require_integers(name, value, source)
        roles[input_role(name, value)].append(name)
    if len(roles[Role.TOKENS]) != 1 or len(roles[Role.MASK]) > 1 or len(roles[Role.POSITIONS]) > 1:
        raise LoadError(
            f"The inputs of '{source}' are {', '.join(tensors) or 'none'}; which one holds the token ids is unclear.",
            "Export a model whose only other inputs are attention_mask and position_ids.",
        )
    (tokens,) = roles[Role.TOKENS]
    for dim, name in enumerate(("batch", "length")):
        if not _is_symbolic(tensors[tokens].shape[dim]):
            raise LoadError(
                f"'{source}' was exported with a static {name} of {tensors[tokens].shape[dim]}.", HOW_TO_EXPORT
            )
    name, logits = _logits(exported, tokens, source)
    return Program(
        **common,
        tokens=tokens,
        attention_mask=next(iter(roles[Role.MASK]), None),
        position_ids=next(iter(roles[Role.POSITIONS]), None),
        logits=logits,
        notes=_notes(exported, name, logits, tokens),
        max_positions=max_positions or _length_limit(exported, tensors[tokens]),
    )


def _is_symbolic(size: Any) -> bool:  # noqa: ANN401 - int or SymInt
    """Whether a size is a free symbol; a guard may have made a constant of one."""
    return not isinstance(size, int) and not size.node.expr.is_number


def _length_limit(exported: ExportedProgram, tokens: Tensor) -> int | None:
    """Longest sequence the exporting user allowed, if a bound was given."""
    bounds = exported.range_constraints.get(tokens.shape[1].node.expr)  # type: ignore[attr-defined]
    return int(bounds.upper) if bounds is not None and bounds.upper < 2**24 else None  # else it is "no bound"


def _logits(exported: ExportedProgram, tokens: str, source: str) -> tuple[str, str]:
    """Name and graph node of the output ``[batch, length, vocabulary]``.

    The output named ``logits``; else the only one shaped so; else, of several, the only one that is as wide as the
    tokens' table has rows, unless hidden states are that wide too.

    Raises:
        LoadError: There is none, or which of several it is cannot be told.
    """
    outputs, nodes = outputs_of(exported), {n.name: n for n in exported.graph.nodes}
    ids = nodes[tokens].meta["val"]
    shaped = {name: node for name, node in outputs.items() if _is_per_token(nodes[node].meta["val"], ids)}
    if _LOGITS in outputs and _LOGITS not in shaped:
        shape = ", ".join(map(str, nodes[outputs[_LOGITS]].meta["val"].shape))
        raise LoadError(
            f"The output '{_LOGITS}' of '{source}' is shaped [{shape}], not [batch, length, vocabulary].", _EXPORT_ALL
        )
    if not shaped:
        raise LoadError(f"No output of '{source}' is shaped [batch, length, vocabulary].", _EXPORT_ALL)
    widths = {name: int(nodes[node].meta["val"].shape[-1]) for name, node in shaped.items()}
    rows = {rows for rows, width in table_shapes(exported, tokens) if rows != width}
    fitting = [name for name, width in widths.items() if width in rows]
    for names in ([name for name in shaped if name == _LOGITS], [*shaped], fitting):
        if len({shaped[name] for name in names}) == 1:
            return names[0], shaped[names[0]]
    raise LoadError(
        f"Which output of '{source}' is the logits cannot be told: "
        f"{_listed([f'{name} [batch, length, {width}]' for name, width in widths.items()])} are shaped like them.",
        f"Name the one to take '{_LOGITS}', as in a dictionary that the model returns, or export a model that returns "
        "the logits alone.",
    )


def _is_per_token(value: Tensor, tokens: Tensor) -> bool:
    """Whether an output is floats of every token, ``[batch, length, anything]``."""
    return (
        value.is_floating_point()
        and value.dim() == 3
        and [str(d) for d in value.shape[:2]] == [str(d) for d in tokens.shape]
        and isinstance(value.shape[-1], int)
    )


def _notes(exported: ExportedProgram, name: str, logits: str, tokens: str) -> tuple[str, ...]:
    """What a user should know of what was taken for the logits: what is dropped for it, and that it is narrow."""
    dropped = [f"'{other}'" for other, node in outputs_of(exported).items() if node != logits]
    width = int(next(n for n in exported.graph.nodes if n.name == logits).meta["val"].shape[-1])
    rows = min((rows for rows, _ in table_shapes(exported, tokens)), default=width)
    found = []
    if dropped:
        verb = "is" if len(dropped) == 1 else "are"
        found.append(f"the output '{name}' is taken for the logits, and {_listed(dropped)} {verb} dropped")
    if width < rows:
        found.append(f"the output '{name}', taken for the logits, is of {width} tokens, and the model reads {rows}")
    return tuple(found)


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence, the first of them where there are many."""
    shown = [*names[:_NAMED], *([f"{len(names) - _NAMED} more"] if len(names) > _NAMED else [])]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _has_compositions(exported: ExportedProgram) -> bool:
    """Whether a graph was never decomposed, asserts types, or has something that is spelled in another way."""
    unwanted = {_ASSERTION, *_RESPELLED, *patterns()}
    return (
        exported.dialect != "ATEN"
        or any(n.target in unwanted for n in exported.graph.nodes)
        or has_other_products(exported)
        or has_other_tables(exported)
        or has_other_softmaxes(exported)
        or has_ellipses(exported)
        or any(True for _ in _truth_masks(exported))
    )


def _truth_masks(exported: ExportedProgram) -> Iterator[Node]:
    """Padding masks that are given as booleans."""
    given = exported.graph_signature.user_inputs
    for node in exported.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        truths = isinstance(value, Tensor) and value.dtype == torch.bool and node.name in given
        if truths and input_role(node.name, value) == Role.MASK:
            yield node


def _count_masks(exported: ExportedProgram) -> None:
    """Let padding masks be integers, as those of a converted model are, and turn them into booleans in the graph."""
    graph = exported.graph
    for node in [*_truth_masks(exported)]:
        after = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(after):
            truth = graph.call_function(_TO, (node,), {"dtype": torch.bool})
        truth.meta["val"] = node.meta["val"]
        for user in [u for u in node.users if u is not truth]:
            user.replace_input_with(node, truth)
        node.meta["val"] = truth.meta["val"].to(torch.long)
    exported.graph_module.recompile()


def _drop_type_assertions(exported: ExportedProgram) -> None:
    """Take away what torch.export adds to conversions of types: reading a value there is no use of it."""
    for node in [*exported.graph.nodes]:
        if node.target is _ASSERTION:
            exported.graph.erase_node(node)
    exported.graph_module.recompile()
