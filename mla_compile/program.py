"""A loaded model in the one form every pass reads: an exported graph plus what its inputs and outputs mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.export import ExportedProgram

from mla_compile.errors import LoadError
from mla_compile.quiet import quiet_exporter
from mla_compile.token_tables import tables_of

__all__ = [
    "AnyProgram",
    "Assets",
    "DecoderProgram",
    "OtherProgram",
    "Program",
    "Role",
    "input_role",
    "outputs_of",
    "table_shapes",
]


@dataclass(frozen=True)
class Assets:
    """What travels beside a model: configuration, generation settings and the tokenizer's folder.

    Attributes:
        folder: Folder (or hub id) the tokenizer is loaded from, if any.
        config: The model's ``config.json`` as a mapping; empty when the model has none.
        generation: The model's ``generation_config.json`` as a mapping.
        tokenizer: A tokenizer in memory, where there is no folder.
    """

    folder: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Any = None

    @property
    def longest(self) -> int | None:
        """Longest sequence the model was built for, if its configuration says; older families name it otherwise."""
        said = (self.config.get(name) for name in ("max_position_embeddings", "n_positions"))
        return next((number for number in said if isinstance(number, int) and number > 0), None)

    @property
    def local_folder(self) -> Path | None:
        """The asset folder when it is on this machine."""
        return Path(self.folder) if self.folder and Path(self.folder).is_dir() else None


class Role(StrEnum):
    """What a user gives with an input."""

    TOKENS = "tokens"
    """Integers that name something: token ids, segment ids."""
    MASK = "mask"
    """Which tokens are real: 1, or 0 for padding."""
    POSITIONS = "positions"
    """Places of tokens."""
    VALUES = "values"
    """Numbers: pixels, spectra, embeddings."""


def input_role(name: str, value: Tensor) -> Role:
    """Tell what an input is from its name and type."""
    if "mask" in name:
        return Role.MASK
    if value.is_floating_point():
        return Role.VALUES
    return Role.POSITIONS if "pos" in name else Role.TOKENS


def outputs_of(exported: ExportedProgram) -> dict[str, str]:
    """Graph node of every tensor that an exported model returns, by the name it has there."""
    spec, found = exported.call_spec.out_spec, list(exported.graph_signature.user_outputs)
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten(range(len(found)), spec))[0]]
    names = ["_".join(map(_key_name, path)) for path in paths]
    tensors = {n.name for n in exported.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    return {
        (name if name and not name[0].isdigit() else f"output_{name}".rstrip("_")): str(node)
        for name, node in zip(names, found, strict=True)
        if node in tensors
    }


def _key_name(key: Any) -> str:  # noqa: ANN401 - any of the kinds of keys that pytree has
    """Key of a mapping, place in a sequence, or field of a named tuple."""
    return str(next((value for kind in ("key", "idx", "name") if (value := getattr(key, kind, None)) is not None), ""))


def table_shapes(exported: ExportedProgram, tokens: str) -> list[tuple[int, int]]:
    """Rows and width of every embedding table that token ids index.

    Args:
        exported: The graph.
        tokens: Placeholder of the token ids.
    """
    given = next(n for n in exported.graph.nodes if n.name == tokens)
    shapes = [table.meta["val"].shape for table in tables_of(given)]
    return [(int(rows), int(width)) for rows, width in shapes]


@dataclass(frozen=True, kw_only=True)
class AnyProgram:
    """An exported model, whatever it maps to what.

    The graph is functional ATen after ``run_decompositions({})``: linear and scaled-dot-product attention survive. What
    there is of it is either a :class:`Program` or an :class:`OtherProgram`.

    Attributes:
        exported: The graph, its signature and its weights.
        source: What the user named it: a path, a hub id or a class name.
        assets: Configuration and tokenizer that travel with it.
        max_positions: Longest sequence the model was built for, if known.
        in_memory: Whether it was handed over in Python, so that ``source`` is no name that it can be read by.
    """

    exported: ExportedProgram
    source: str
    assets: Assets = field(default_factory=Assets)
    max_positions: int | None = None
    in_memory: bool = False

    @cached_property
    def user_inputs(self) -> dict[str, tuple[Role, Tensor]]:
        """Role and symbolic value of every tensor the user gives, by placeholder."""
        values = {n.name: n.meta.get("val") for n in self.exported.graph.nodes if n.op == "placeholder"}
        found = {str(name): values.get(name) for name in self.exported.graph_signature.user_inputs}
        return {name: (input_role(name, v), v) for name, v in found.items() if isinstance(v, Tensor)}

    @property
    def token_inputs(self) -> frozenset[str]:
        """Placeholders whose content is data, as opposed to padding masks and positions."""
        return frozenset(name for name, (role, _) in self.user_inputs.items() if role == Role.TOKENS)

    @property
    def id_limits(self) -> dict[str, int]:
        """How many ids each token input may name: rows of the smallest table it indexes on any way; 2 without one."""
        return {name: min(rows, default=2) for name, rows in self._table_rows.items()}

    @property
    def looks_up(self) -> bool:
        """Whether some token input indexes a table, so that there are activations of tokens."""
        return any(self._table_rows.values())

    @cached_property
    def _table_rows(self) -> dict[str, list[int]]:
        """Rows of every table that each token input indexes on any way."""
        embedding = torch.ops.aten.embedding.default
        found = {}
        for start in [n for n in self.exported.graph.nodes if n.name in self.token_inputs]:
            seen, stack, rows = {start}, [start], []
            while stack:
                node = stack.pop()
                for user in node.users:
                    if user.target is embedding and user.args[1] is node:
                        rows.append(int(user.args[0].meta["val"].shape[0]))
                        continue
                    value = user.meta.get("val")
                    if user not in seen and isinstance(value, Tensor) and not value.is_floating_point():
                        seen.add(user)
                        stack.append(user)
            found[start.name] = rows
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of most weights' numbers; float32 where there are none."""
        counts: dict[torch.dtype, int] = {}
        for value in self.exported.state_dict.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
        return max(counts, key=counts.__getitem__, default=torch.float32)

    def constant(self, placeholder: str) -> Tensor:
        """Return the parameter, buffer or lifted constant behind a placeholder.

        Raises:
            KeyError: The placeholder is a user input.
        """
        signature = self.exported.graph_signature
        for table in (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        ):
            if placeholder in table:
                name = table[placeholder]
                found = self.exported.state_dict.get(name, self.exported.constants.get(name))
                if isinstance(found, Tensor):
                    return found
        raise KeyError(placeholder)

    @property
    def outputs(self) -> dict[str, str]:
        """Graph node of every tensor the model returns, by the name it has there."""
        return outputs_of(self.exported)

    def whole_module(self) -> fx.GraphModule:
        """Return the graph as a module of positional tensors, in placeholder order, to a tuple of :attr:`outputs`."""
        module = self._positional_module()
        nodes = {n.name: n for n in module.graph.nodes}
        nodes["output"].args = (tuple(nodes[name] for name in self.outputs.values()),)
        for node in [n for n in module.graph.nodes if n.op == "placeholder" and n.name not in self.user_inputs]:
            module.graph.erase_node(node)  # an argument that was None or a number
        module.recompile()
        return module

    def _positional_module(self) -> fx.GraphModule:
        with quiet_exporter():
            original = self.exported.module(check_guards=False)
        module = fx.GraphModule(original, original.graph)
        module.graph.set_codegen(fx.graph.CodeGen())
        return module


@dataclass(frozen=True, kw_only=True)
class OtherProgram(AnyProgram):
    """An exported model that is no causal language model: an encoder, an encoder-decoder, a vision model.

    Attributes:
        why: What keeps it from being a :class:`Program`.
    """

    why: LoadError


@dataclass(frozen=True, kw_only=True)
class Program(AnyProgram):
    """An exported causal language model without a cache: token ids in, logits of every position out.

    Attributes:
        tokens: Placeholder of the token ids ``[batch, length]``.
        attention_mask: Placeholder of the padding mask ``[batch, length]``, if the graph takes one.
        position_ids: Placeholder of the positions ``[batch, length]``, if the graph takes them.
        logits: Graph node of the logits ``[batch, length, vocabulary]``.
        notes: What the user should know of how the model was read.
    """

    tokens: str
    attention_mask: str | None
    position_ids: str | None
    logits: str
    notes: tuple[str, ...] = ()

    @property
    def reads_another(self) -> bool:
        """Whether it also reads another sequence (a decoder), and so has inputs besides its own tokens'."""
        return False

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        logits = next(n for n in self.exported.graph.nodes if n.name == self.logits)
        return int(logits.meta["val"].shape[-1])

    @property
    def known_tokens(self) -> int:
        """How many token ids the model reads: the rows of the smallest table its tokens index.

        All that it predicts where there is none.
        """
        rows = [rows for rows, _ in table_shapes(self.exported, self.tokens)]
        return min(rows, default=self.vocabulary)

    def flat_module(self) -> fx.GraphModule:
        """Return the graph as a module of positional tensors in placeholder order, with weights shared."""
        module = self._positional_module()
        output = next(n for n in module.graph.nodes if n.op == "output")
        output.args = (next(n for n in module.graph.nodes if n.name == self.logits),)
        module.recompile()
        return module

    def inputs(self, ids: Tensor) -> list[Tensor]:
        """Arguments of :meth:`flat_module` for whole, unpadded sequences ``[batch, length]``."""
        given = {self.tokens: ids}
        if self.attention_mask:
            given[self.attention_mask] = torch.ones_like(ids)
        if self.position_ids:
            given[self.position_ids] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return [given[str(name)] for name in self.exported.graph_signature.user_inputs if name in given]


@dataclass(frozen=True, kw_only=True)
class DecoderProgram(Program):
    """The decoder of an encoder-decoder: a causal language model that reads an encoder's states as well.

    Attributes:
        states: Placeholder of the encoder's states, one per token of its own.
        encoder_mask: Placeholder of the padding mask over them, if the decoder reads one.
    """

    states: str
    encoder_mask: str | None

    @property
    def reads_another(self) -> bool:
        """Always."""
        return True
