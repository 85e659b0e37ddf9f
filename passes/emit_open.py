"""Emit the nodes of a layer that is not causal: latent attention without a cache of its own tokens."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.errors import RefusedError
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.emit import Emitter, layer_parameters
from mla_compile.passes.layout import Sizes
from mla_compile.program import AnyProgram, Role
from mla_compile.site import AttentionSite

__all__ = ["OpenEmitter"]

_aten = torch.ops.aten
_ROW_WEIGHTS = frozenset({"row", "row_bias", "rope_shift"})
"""Weights that make cache rows; all others read them."""


@dataclass(frozen=True, kw_only=True)
class OpenEmitter(Emitter):
    """Where one layer that is not causal is emitted.

    Attributes:
        sizes: The layer's sizes.
        reads: Name of the activations that it reads, of which its sizes can be read too.
    """

    sizes: Sizes
    reads: str

    @property
    def _sizes(self) -> Sizes:
        return self.sizes

    def open(self, site: AttentionSite, weights: LatentWeights) -> None:
        """Emit a layer that reads its own tokens, and redirect the users of the old output to it.

        Args:
            site: The layer.
            weights: Its latent weights.
        """
        path = self._add_weights(site.path, site.index, layer_parameters(site, weights))
        weight = functools.partial(self._weight, path)
        with self.module.graph.inserting_before(self.nodes[site.output]):
            batch, length = self._batch_and_length()
            row = self._row(site, weights, batch, length, weight)
            result = self._attend(site, weights, row, path)
            self._replace(site.output, site.output_axes, result, weight("output_bias"), site.path, site.order)

    def rows(self, site: AttentionSite, weights: LatentWeights) -> Node:
        """Emit what a cross attention layer keeps of every token of the other sequence, ``[B, N, R]``.

        Args:
            site: The layer.
            weights: Its latent weights.
        """
        made = {name: x for name, x in layer_parameters(site, weights).items() if name in _ROW_WEIGHTS}
        weight = functools.partial(self._weight, self._add_weights(site.path, site.index, made))
        keys = dataclasses.replace(self, sizes=self.sizes.of_keys(), reads=site.key.origin)
        with self.module.graph.inserting_before(next(n for n in self.module.graph.nodes if n.op == "output")):
            return keys._row(site, weights, *keys._batch_and_length(), weight)

    def over(self, site: AttentionSite, weights: LatentWeights, row: Node) -> None:
        """Emit a cross attention layer over rows that are given, and redirect the users of the old output to it.

        Args:
            site: The layer.
            weights: Its latent weights.
            row: The rows, from :meth:`rows`.
        """
        made = {name: x for name, x in layer_parameters(site, weights).items() if name not in _ROW_WEIGHTS}
        path = self._add_weights(site.path, site.index, made)
        with self.module.graph.inserting_before(self.nodes[site.output]):
            result = self._attend(site, weights, row, path)
            bias = self._weight(path, "output_bias")
            self._replace(site.output, site.output_axes, result, bias, site.path, site.order)

    def _attend(self, site: AttentionSite, weights: LatentWeights, row: Node, path: str) -> Node:
        """Queries over rows ``[B, N, R]``, all of which are given at once."""
        weight = functools.partial(self._weight, path)
        batch, length = self._batch_and_length()
        past = self._call(_aten.new_zeros.default, row, [batch, 0, weights.row_width(site)])
        if site.padding is None:
            keys = self._call(_aten.sym_size.int, row, 1)
            mask = self._call(_aten.new_ones.default, row, [batch, keys], dtype=torch.long)
        else:
            mask = self.inputs[site.padding]
        cos, sin = self._turns(site, weights.inv_freq, row, batch, length, path)
        return self._call(
            torch.ops.mla.latent_attention.default,
            self._query(site, weights, batch, length, weight),
            row,
            past,
            mask,
            cos,
            sin,
            weight("key_up"),
            weight("value_up"),
            weight("sinks"),
            None,
            float(site.scores.scale),
            0,
            float(site.scores.softcap),
            site.value_scales,
            False,
            weights.scaled_rope,
        )

    def _batch_and_length(self) -> tuple[Any, Any]:
        return self.count(self.sizes.batch), self.count(self.sizes.length)

    def count(self, size: Any) -> Any:  # noqa: ANN401 - int or sympy expression in, int or node out
        """A size as a number or as a node that reads it: from an input, or from activations that were subsampled.

        Raises:
            RefusedError: Neither has it.
        """
        if getattr(size, "is_number", isinstance(size, int)):
            return int(size)
        given = [(self.inputs[n], v) for n, (_, v) in self.program.user_inputs.items() if n in self.inputs]
        read = self.nodes[self.reads]
        for node, value in (*given, (read, read.meta["val"])):
            for axis, found in enumerate(value.shape):
                if not isinstance(found, int) and found.node.expr == size:
                    return self._call(_aten.sym_size.int, node, axis)
        raise RefusedError(
            f"The number of tokens '{size}' of an attention layer is no size of what the layer reads.",
            "Export the model with inputs of a fixed size.",
        )

    def _turns(
        self,
        site: AttentionSite,
        inv_freq: Tensor,
        row: Node,
        batch: Any,  # noqa: ANN401 - node or int
        length: Any,  # noqa: ANN401 - node or int
        path: str,
    ) -> tuple[Node, Node]:
        """Cosines and sines ``[B, S, groups, rope_dim / 2]``, or ``[B, 1, groups, 0]`` without rotation."""
        groups, half = inv_freq.shape
        if not half:
            nothing = self._call(_aten.new_ones.default, row, [batch, 1, groups, 0])
            return nothing, nothing
        self.module.get_submodule(path).register_buffer("inv_freq", inv_freq.float())
        given = _positions_behind(self.program, site)
        if given is None:  # counted from 0, wherever the model is
            counted = self._call(_aten.cumsum.default, self._call(_aten.new_ones.default, row, [batch, length]), 1)
            places = self._call(_aten.sub.Tensor, counted, 1)
        else:
            places = self._call(_aten._to_copy.default, self.inputs[given], dtype=torch.float32)
        column = self._call(_aten.reshape.default, places, [batch, length, 1, 1])
        angle = self._call(_aten.mul.Tensor, column, self.module.graph.get_attr(f"{path}.inv_freq"))
        return self._call(_aten.cos.default, angle), self._call(_aten.sin.default, angle)


def _positions_behind(program: AnyProgram, site: AttentionSite) -> str | None:
    """The input that says where a layer's tokens stand, if its rotation comes from one."""
    nodes = {n.name: n for n in program.exported.graph.nodes}
    known = {nodes[p.activation or p.node] for p in (site.query, site.key, site.value)}
    seen, stack = set(known), [nodes[site.output]]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    found = [name for name, (role, _) in program.user_inputs.items() if role == Role.POSITIONS and nodes[name] in seen]
    return found[0] if len(found) == 1 else None
