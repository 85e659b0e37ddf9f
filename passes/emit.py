"""Emit the nodes of one attention layer into a graph: a latent one, or an ordinary one with a cache.

Every new node records which layer it was made for in ``meta["mla_compile"]``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.layout import Layout, Sizes, token_axes
from mla_compile.passes.retype import NARROW
from mla_compile.program import AnyProgram, Program
from mla_compile.runtime import ops  # noqa: F401 - registers mla::latent_attention and mla::cached_attention
from mla_compile.site import AttentionSite, Norm, PlainSite, Projection, Scores

__all__ = ["PER_HEAD", "Emitter", "holder_name", "last_placeholder", "layer_parameters"]

_aten = torch.ops.aten
PER_HEAD = "bshd,hed->bshe"
"""Channels of every head times its own matrix."""
_Weights = Callable[[str], Node | None]
"""Emits the node of a weight by its name; None for one the layer does not have."""


@dataclass(frozen=True)
class Emitter:
    """Where layers are emitted.

    Attributes:
        program: The original.
        module: The graph module that is being rewritten.
        nodes: Its nodes by their original names.
        inputs: The new inputs by name.
        dtype: Type of new weights and of caches.
        rotations: Cosines and sines emitted so far, by their frequencies.
    """

    program: AnyProgram
    module: fx.GraphModule
    nodes: Mapping[str, Node]
    inputs: Mapping[str, Node]
    dtype: torch.dtype
    rotations: dict[tuple[float, ...], tuple[Node, Node]] = field(default_factory=dict)

    @property
    def _sizes(self) -> Sizes:
        assert isinstance(self.program, Program)
        return Sizes.of(self.program)

    @property
    def _narrow(self) -> bool:
        """Whether activations have fewer bits than sums of them, or angles, need."""
        return self.program.dtype in NARROW

    def _typed(self, node: Node, name: str) -> Node:
        """An activation, in the type of the weights that it meets, if the original has it in another."""
        if not self._narrow or self.nodes[name].meta["val"].dtype == self.program.dtype:
            return node
        return self._call(_aten._to_copy.default, node, dtype=self.dtype)

    def _rounded(self, node: Node) -> Node:
        """What was computed in float32, in the type of caches."""
        return self._call(_aten._to_copy.default, node, dtype=self.dtype) if self._narrow else node

    def _shape(self, name: str) -> Sequence[Any]:
        """The original node's symbolic shape."""
        value: Tensor = self.nodes[name].meta["val"]
        return value.shape

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:  # noqa: ANN401 - operators and their arguments
        return self.module.graph.call_function(target, args, kwargs)

    def latent(self, site: AttentionSite, weights: LatentWeights, past: Node) -> Node:
        """Emit latent attention, redirect the users of the old output to it, and return the new cache.

        Args:
            site: The layer.
            weights: Its latent weights.
            past: Placeholder of its cache.
        """
        path = self._add_weights(site.path, site.index, layer_parameters(site, weights))

        weight = functools.partial(self._weight, path)
        with self.module.graph.inserting_before(self.nodes[site.output]):
            batch, length = self._batch_and_length()
            query = self._query(site, weights, batch, length, weight)
            row = self._row(site, weights, batch, length, weight)
            cos, sin = self._rotation(weights.inv_freq, path)
            result = self._call(
                torch.ops.mla.latent_attention.default,
                query,
                row,
                past,
                self.inputs["attention_mask"],
                cos,
                sin,
                weight("key_up"),
                weight("value_up"),
                weight("sinks"),
                weight("slopes"),
                float(site.scores.scale),
                site.scores.mask.window or 0,
                float(site.scores.softcap),
                site.value_scales,
                True,
                weights.scaled_rope,
                site.scores.mask.chunked,
            )
            return self._replace(site.output, site.output_axes, result, weight("output_bias"), site.path, site.order)

    def plain(self, site: PlainSite, index: int, path: str, past: Node) -> Node:
        """Emit ordinary attention with a cache, redirect the users of the old output, and return the new cache.

        Args:
            site: The layer.
            index: Its place among the attention layers.
            path: Its module path.
            past: Placeholder of its cache.
        """
        made = _score_parameters(site.scores)
        if site.scores.factors is not None:
            made["factors"] = torch.tensor(site.scores.factors, dtype=torch.float64)
        holder = self._add_weights(path, index, made)

        weight = functools.partial(self._weight, holder)
        with self.module.graph.inserting_before(self.nodes[site.output]):
            batch, length = self._batch_and_length()
            query, key, value = (
                self._arranged(name, axes, heads, batch, length)
                for name, axes, heads in zip(
                    (site.query, site.key, site.value),
                    site.axes,
                    (site.heads, site.kv_heads * site.repeats, site.kv_heads * site.repeats),
                    strict=False,
                )
            )
            if site.scores.factors is not None:
                factors = self._call(_aten.unsqueeze.default, weight("factors"), -1)
                query = self._call(_aten.mul.Tensor, query, factors)
            if site.repeats > 1:
                every = (2, 0, site.kv_heads * site.repeats, site.repeats)
                key, value = (self._call(_aten.slice.Tensor, x, *every) for x in (key, value))
            flat = [
                self._call(_aten.reshape.default, x, [batch, length, site.kv_heads * width])
                for x, width in ((key, site.qk_dim), (value, site.v_dim))
            ]
            result = self._call(
                torch.ops.mla.cached_attention.default,
                query,
                self._call(_aten.cat.default, flat, -1),
                past,
                self.inputs["attention_mask"],
                weight("sinks"),
                weight("slopes"),
                site.kv_heads,
                float(site.scores.scale),
                site.scores.mask.window or 0,
                float(site.scores.softcap),
                site.scores.mask.chunked,
            )
            return self._replace(site.output, site.axes[3], result, None, path)

    def _weight(self, path: str, name: str) -> Node | None:
        present = hasattr(self.module.get_submodule(path), name)
        return self.module.graph.get_attr(f"{path}.{name}") if present else None

    def _batch_and_length(self) -> tuple[Any, Any]:
        """Nodes, or numbers, of the batch size and the number of new tokens."""
        tokens = self.inputs["input_ids"]
        return self._call(_aten.sym_size.int, tokens, 0), self._call(_aten.sym_size.int, tokens, 1)

    def _query(self, site: AttentionSite, weights: LatentWeights, batch: Node, length: Node, weight: _Weights) -> Node:
        heads, head_dim, _ = weights.query.shape
        if site.query.activation is None:
            flat = self._call(
                _aten.linear.default, self._tokens(site.query.source), weight("query"), weight("query_bias")
            )
            return self._call(_aten.reshape.default, flat, [batch, length, heads, head_dim])
        entries = self._entries(site.query.activation, batch, length)
        chosen = self._chosen(entries, site.query.rows, self._shape(site.query.activation), batch, length)
        if site.query.turned is not None:
            chosen = self._turned_back(chosen, site, weight)
        query = self._call(_aten.einsum.default, PER_HEAD, [chosen, weight("query")])
        bias = weight("query_bias")
        return query if bias is None else self._call(_aten.add.Tensor, query, bias)

    def _turned_back(self, query: Node, site: AttentionSite, weight: _Weights) -> Node:
        """Undo the keys' rotation of queries ``[B, S, H, D]`` that were read behind it, times their gains."""
        gain = weight("query_gain")
        query = query if gain is None else self._call(_aten.mul.Tensor, query, gain)
        if not site.rope.pairs:
            return query
        frequencies = torch.tensor([site.rope.inv_freq], dtype=torch.float64)
        cos, sin = self._rotation(frequencies, holder_name(site.path, site.index))
        real, imaginary = ([pair[i] for pair in site.rope.pairs] for i in (0, 1))
        still = [c for c in range(site.qk_dim) if c not in {*real, *imaginary}]
        a, b, rest = (
            self._call(_aten.index_select.default, query, 3, self._constant(torch.tensor(c, dtype=torch.long)))
            for c in (real, imaginary, still)
        )
        products = [self._call(_aten.mul.Tensor, x, y) for x, y in ((a, cos), (b, sin), (b, cos), (a, sin))]
        turned = [
            self._call(_aten.add.Tensor, products[0], products[1]),
            self._call(_aten.sub.Tensor, products[2], products[3]),
        ]
        # Angles are float32, whatever the type of the activations.
        turned = [self._call(_aten._to_copy.default, x, dtype=self.dtype) for x in turned]
        order = [*real, *imaginary, *still]
        back = self._constant(torch.tensor([order.index(c) for c in range(site.qk_dim)]))
        parts = [*turned, rest] if still else turned
        return self._call(_aten.index_select.default, self._call(_aten.cat.default, parts, -1), 3, back)

    def _row(self, site: AttentionSite, weights: LatentWeights, batch: Node, length: Node, weight: _Weights) -> Node:
        """What a token writes to the cache: the latent, its rope keys, and the scales of keys and values.

        Rope keys are normed, unless the scales that are cached belong to them too.
        """
        row = self._call(_aten.linear.default, self._tokens(site.key.origin), weight("row"), weight("row_bias"))
        width = weights.row.shape[0]
        row = self._call(_aten.reshape.default, row, [batch, length, width])
        parts = [row]
        if site.key.norm is not None:
            scale = self._norm_scale(site.key, site.key.norm, batch, length)
            if not weights.scaled_rope:
                parts = self._normed(row, scale, weights, batch, length, weight)
            if weights.scaled_rope or weights.key_up.shape[1]:
                parts.append(self._rounded(scale))
        if site.value.norm is not None:
            parts.append(self._rounded(self._norm_scale(site.value, site.value.norm, batch, length)))
        return row if len(parts) == 1 else self._call(_aten.cat.default, parts, -1)

    def _normed(
        self, row: Node, scale: Node, weights: LatentWeights, batch: Node, length: Node, weight: _Weights
    ) -> list[Node]:
        """Latent and rope keys of a row ``[B, S, r + groups * rope_dim]``, the latter behind their norm."""
        rank = weights.key_up.shape[2]
        groups, half = weights.inv_freq.shape
        parts = [self._call(_aten.slice.Tensor, row, 2, 0, rank)]
        if half:
            rope = self._call(_aten.slice.Tensor, row, 2, rank, weights.row.shape[0])
            rope = self._call(_aten.reshape.default, rope, [batch, length, groups, 2 * half])
            rope = self._call(_aten.mul.Tensor, rope, self._call(_aten.unsqueeze.default, scale, -1))
            shift = weight("rope_shift")
            rope = rope if shift is None else self._call(_aten.add.Tensor, rope, shift)
            rope = self._call(_aten.reshape.default, rope, [batch, length, groups * 2 * half])
            parts.append(self._rounded(rope))
        return parts

    def _norm_scale(self, projection: Projection, norm: Norm, batch: Node, length: Node) -> Node:
        """``1 / sqrt(mean(y^2) + eps)`` of every group of a projection's outputs, ``[B, S, groups]``, in float32."""
        outputs = self._entries(projection.node, batch, length)
        if self._narrow:
            outputs = self._call(_aten._to_copy.default, outputs, dtype=torch.float32)
        groups = self._chosen(outputs, norm.groups, self._shape(projection.node), batch, length)
        if norm.kind == "layer":
            groups = self._call(_aten.sub.Tensor, groups, self._call(_aten.mean.dim, groups, [-1], True))
        squares = self._call(_aten.mean.dim, self._call(_aten.mul.Tensor, groups, groups), [-1])
        return self._call(_aten.rsqrt.default, self._call(_aten.add.Scalar, squares, norm.eps))

    def _chosen(
        self, entries: Node, rows: Sequence[Sequence[int]], shape: Sequence[Any], batch: Node, length: Node
    ) -> Node:
        """Pick entries ``[B, S, N]`` as ``[B, S, groups, members]``."""
        flat = [i for group in rows for i in group]
        if flat != list(range(_entry_count(self._sizes, shape))):
            if flat == list(range(flat[0], flat[0] + len(flat))):
                entries = self._call(_aten.slice.Tensor, entries, 2, flat[0], flat[0] + len(flat))
            else:
                entries = self._call(_aten.index_select.default, entries, 2, self._constant(torch.tensor(flat)))
        return self._call(_aten.reshape.default, entries, [batch, length, len(rows), len(rows[0])])

    def _constant(self, value: Tensor) -> Node:
        names = [n for n, _ in self.module.named_buffers(recurse=False) if n.startswith("mla_rows_")]
        for name in names:
            if torch.equal(getattr(self.module, name), value):
                return self.module.graph.get_attr(name)
        name = f"mla_rows_{len(names)}"
        self.module.register_buffer(name, value)
        return self.module.graph.get_attr(name)

    def _tokens(self, name: str) -> Node:
        """An activation with the batch before the positions; merged ones stay merged."""
        axes = token_axes(self._sizes, self._shape(name))
        node = self._typed(self.nodes[name], name)
        return self._call(_aten.transpose.int, node, 0, 1) if axes[:2] == ("s", "b") else node

    def _entries(self, name: str, batch: Node, length: Node) -> Node:
        """Everything a node holds per token, ``[B, S, N]``."""
        shape = self._shape(name)
        axes = token_axes(self._sizes, shape)
        node = self._typed(self.nodes[name], name)
        if axes[0] != "bs":
            order = [axes.index("b"), axes.index("s"), *(i for i, a in enumerate(axes) if a == "d")]
            if order != sorted(order):
                node = self._call(_aten.permute.default, node, order)
        return self._call(_aten.reshape.default, node, [batch, length, _entry_count(self._sizes, shape)])

    def _arranged(self, name: str, axes: Sequence[str], heads: int, batch: Node, length: Node) -> Node:
        """An operand as ``[B, S, H, D]``, whatever its own order of axes."""
        order = "bthd" if "t" in axes else "bshd"
        shape = self._shape(name)
        sizes = {"b": batch, "s": length, "t": length, "bh": -1}
        node = self._typed(self.nodes[name], name)
        if "bh" in axes:
            split: list[Any] = []
            for size, axis in zip(shape, axes, strict=True):
                split += [batch, heads] if axis == "bh" else [sizes.get(axis, size)]
            node = self._call(_aten.reshape.default, node, split)
        plain = [letter for axis in axes for letter in axis]
        places = [i for letter in order for i, a in enumerate(plain) if a == letter]
        if places != sorted(places):
            node = self._call(_aten.permute.default, node, places)
        return self._call(_aten.reshape.default, node, [batch, length, heads, int(shape[list(axes).index("d")])])

    def _replace(
        self,
        name: str,
        axes: tuple[str, ...],
        result: Node,
        bias: Node | None,
        path: str,
        order: tuple[int, ...] | None = None,
    ) -> Node:
        """Arrange an output ``[B, S, H, D]`` as the old one, take its place, and return the cache."""
        batch, length = self._batch_and_length()
        attended = self._call(operator.getitem, result, 0)
        if bias is not None:
            attended = self._call(_aten.add.Tensor, attended, bias)
        if order is not None:
            back = self._constant(torch.tensor([order.index(h) for h in range(len(order))]))
            attended = self._call(_aten.index_select.default, attended, 2, back)
        shape = self._shape(name)
        sizes = {"b": batch, "s": length, "bh": -1}
        heads = [int(size) for size, axis in zip(shape, axes, strict=True) if axis == "h"]
        if len(heads) != 1 and "bh" not in axes:
            attended = self._call(_aten.reshape.default, attended, [batch, length, *heads, int(shape[axes.index("d")])])
        places = Layout(axes).permutation("bshd")
        if places != sorted(places):
            attended = self._call(_aten.permute.default, attended, places)
        if "bh" in axes:
            final = [sizes.get(axis, size) for size, axis in zip(shape, axes, strict=True)]
            attended = self._call(_aten.reshape.default, attended, final)
        wanted = self.nodes[name].meta["val"].dtype
        if self._narrow and wanted != self.program.dtype:
            attended = self._call(_aten._to_copy.default, attended, dtype=wanted)
        present = self._call(operator.getitem, result, 1)
        for node in (result, attended, present):
            node.meta["mla_compile"] = {"pass": "insert-latent", "site": path}
        self.nodes[name].replace_all_uses_with(attended)
        return present

    def _add_weights(self, path: str, index: int, values: Mapping[str, Tensor]) -> str:
        """Register weights as parameters of a sub-module beside the layer's own, and return its path."""
        holder = nn.Module()
        for name, value in values.items():
            if name == "slopes":  # a constant of the architecture, not to be trained; distances are far apart
                holder.register_buffer(name, value.float())
            else:
                holder.register_parameter(name, nn.Parameter(value.to(self.dtype).contiguous()))
        path = holder_name(path, index)
        self.module.add_submodule(path, holder)
        return path

    def _rotation(self, inv_freq: Tensor, path: str) -> tuple[Node, Node]:
        """Cosines and sines ``[B, S, groups, rope_dim / 2]`` at the new tokens' positions, shared by equal layers.

        Angles are float32, as in every RoPE implementation: half precision cannot hold a position.
        """
        key = (inv_freq.shape[0], *inv_freq.flatten().tolist())
        if key not in self.rotations:
            graph = self.module.graph
            holder = self.module.get_submodule(path)
            name = "key_inv_freq" if hasattr(holder, "inv_freq") else "inv_freq"  # of queries that are turned back
            holder.register_buffer(name, inv_freq.float())
            first = last_placeholder(graph)
            with graph.inserting_after(first):
                end = graph.get_attr(f"{path}.{name}")  # what follows goes behind it, in order
            with graph.inserting_before(end.next):
                position = self._call(_aten._to_copy.default, self.inputs["position_ids"], dtype=torch.float32)
                column = self._call(_aten.unsqueeze.default, self._call(_aten.unsqueeze.default, position, -1), -1)
                angle = self._call(_aten.mul.Tensor, column, end)
                self.rotations[key] = (self._call(_aten.cos.default, angle), self._call(_aten.sin.default, angle))
        return self.rotations[key]


def holder_name(path: str, index: int) -> str:
    """Sub-module that holds a layer's latent weights."""
    return f"{path.removeprefix('L__self___')}.latent_{index}"


def _entry_count(sizes: Sizes, shape: Sequence[Any]) -> int:
    count = 1
    for size, axis in zip(shape, token_axes(sizes, shape), strict=True):
        count *= int(size) if axis == "d" else 1
    return count


def layer_parameters(site: AttentionSite, weights: LatentWeights) -> dict[str, Tensor]:
    """Weights of a layer as they are stored; queries read from behind a norm keep one matrix per head."""
    heads, head_dim, _ = weights.query.shape
    local = site.query.activation is not None
    found = {
        "query": weights.query if local else weights.query.reshape(heads * head_dim, -1),
        "query_gain": _turned_gain(site),
        "query_bias": weights.query_bias if local or weights.query_bias is None else weights.query_bias.flatten(),
        "row": weights.row,
        "row_bias": weights.row_bias,
        "rope_shift": weights.rope_shift,
        "key_up": weights.key_up,
        "value_up": weights.value_up,
        "output_bias": weights.output_bias,
        **_score_parameters(site.scores),
    }
    return {name: value for name, value in found.items() if value is not None}


def _turned_gain(site: AttentionSite) -> Tensor | None:
    """Gains ``[H, D]`` of queries that are turned back, if there are any."""
    gain = torch.tensor(site.query.turned or 1.0, dtype=torch.float64)
    return None if bool((gain == 1).all()) else gain


def _score_parameters(scores: Scores) -> dict[str, Tensor]:
    found = {"sinks": scores.sinks, "slopes": scores.slopes}
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items() if value is not None}


def last_placeholder(graph: fx.Graph) -> Node:
    """The last input of a graph."""
    placeholders: list[Node] = [n for n in graph.nodes if n.op == "placeholder"]
    return placeholders[-1]
