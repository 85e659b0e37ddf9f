"""The converted model as a PyTorch module: callable, trainable, with an explicit latent cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn

from mla_compile.runtime import ops  # noqa: F401 - registers the operators
from mla_compile.runtime.masks import kept_rows
from mla_compile.token_tables import tables_of

__all__ = [
    "LatentModel",
    "LatentOutput",
    "LatentSeq2Seq",
    "LowRankModel",
    "cache_dtype",
    "cache_windows",
    "create_on",
    "known_tokens",
    "positions_from_mask",
]


@dataclass(frozen=True)
class LatentOutput:
    """What one step returns.

    Attributes:
        logits: ``[batch, new, vocabulary]``.
        cache: One ``[batch, past + new, row]`` tensor per layer, of which a layer with a window keeps the rows that
            later tokens can see; pass it back as ``past``.
    """

    logits: Tensor
    cache: tuple[Tensor, ...]


def positions_from_mask(attention_mask: Tensor, new: int) -> Tensor:
    """Position of each of the last ``new`` tokens: how many real tokens precede it.

    Args:
        attention_mask: ``[batch, total]``, non-zero for real tokens; padding may be on either side.
        new: Number of new tokens.

    Returns:
        ``[batch, new]`` int64; padding gets a harmless position of 0 or more.
    """
    return ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -new:]


def cache_windows(module: fx.GraphModule) -> tuple[int, ...]:
    """The window of every attention layer of a rewritten graph, in the order of their caches; 0 for none."""
    graph = module.graph
    operators = (torch.ops.mla.latent_attention.default, torch.ops.mla.cached_attention.default)
    nodes = [n for n in graph.nodes if n.target in operators]
    arguments = [[a.name for a in n.target._schema.arguments] for n in nodes]
    windows = {n.args[2].name: n.args[names.index("window")] for n, names in zip(nodes, arguments, strict=True)}
    caches = [n.name for n in graph.nodes if n.op == "placeholder"]
    return tuple(windows[name] for name in caches if name in windows)


def known_tokens(module: nn.Module) -> int | None:
    """How many token ids a rewritten graph reads: rows of the smallest table that they index; None where it has none.

    A head may be wider, so that a model can predict ids that it cannot read.
    """
    graph = getattr(module, "graph", None)
    if not isinstance(graph, fx.Graph):
        return None
    ids = next(n for n in graph.nodes if n.op == "placeholder")
    rows = [len(_attribute(module, table)) for table in tables_of(ids) if table.op == "get_attr"]
    return min(rows, default=None)


def _attribute(module: nn.Module, node: fx.Node) -> Tensor:
    found: Any = functools.reduce(getattr, str(node.target).split("."), module)
    return cast(Tensor, found)


def cache_dtype(module: nn.Module) -> torch.dtype:
    """Type of the caches of a rewritten graph: that in which its latent weights are multiplied."""
    graph = getattr(module, "graph", None)
    for node in graph.nodes if isinstance(graph, fx.Graph) else ():
        if node.target is torch.ops.mla.latent_attention.default:
            key_up = node.args[6]
            if key_up.op == "get_attr":
                return _attribute(module, key_up).dtype
            if "dtype" in key_up.kwargs:  # widened where it is read
                return cast(torch.dtype, key_up.kwargs["dtype"])
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def create_on(graph: fx.Graph, device: torch.device) -> bool:
    """Let what a graph creates be on a device; whether it was to be on another before."""
    elsewhere = [n for n in graph.nodes if (n.kwargs.get("device") or device) != device]
    for node in elsewhere:
        node.kwargs = {**node.kwargs, "device": device}
    return bool(elsewhere)


class _GraphModel(nn.Module):
    """What computes by a graph of ATen operators and ours, as it was exported."""

    graph: fx.GraphModule

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """See ``torch.nn.Module.to``: an exported graph names the device of what it creates, which goes along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next((value.device for value in (*self.graph.parameters(), *self.graph.buffers())), None)
        graph = getattr(self.graph, "graph", None)
        if device is not None and isinstance(graph, fx.Graph) and create_on(graph, device):
            self.graph.recompile()
        return self


class LatentModel(_GraphModel):
    """A converted causal language model.

    Args:
        graph: Module ``(input_ids, attention_mask, position_ids, *past) -> (logits, *present)``.
        rows: Numbers one token adds to the cache, per layer.
        windows: How many tokens a layer sees, 0 for all; its cache keeps one less. Read from the graph by default.
    """

    def __init__(self, graph: fx.GraphModule, rows: Sequence[int], windows: Sequence[int] | None = None) -> None:
        super().__init__()
        self.graph = graph
        self.rows = tuple(rows)
        self.windows = tuple(windows) if windows is not None else cache_windows(graph)

    @property
    def vocabulary(self) -> int:
        """How many logits a token has, by the graph."""
        logits = cast(Any, self.graph.graph.output_node().args[0])[0]
        return int(logits.meta["val"].shape[-1])

    @property
    def known_tokens(self) -> int:
        """How many token ids it reads, as :func:`known_tokens` finds them; all that it predicts where none is found."""
        return known_tokens(self.graph) or self.vocabulary

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
        context: Sequence[Tensor] = (),
    ) -> LatentOutput:
        """Run the model on new tokens.

        Args:
            input_ids: ``[batch, new]`` token ids.
            attention_mask: ``[batch, all earlier + new]``, non-zero for real tokens; all real by default. With windows,
                padding belongs to the left.
            position_ids: ``[batch, new]``; counted from the mask by default.
            past: The cache of earlier tokens; empty by default.
            context: What a decoder keeps of its encoder; see :meth:`LatentSeq2Seq.encode`.

        Returns:
            Logits of the new tokens and the grown cache.

        Raises:
            ValueError: There are no new tokens or cached ones of other sizes, no mask is given, and the cache, full to
                its windows, does not tell how many tokens there were; or earlier padding stands behind real tokens,
                where it takes up room in a window's cache.
        """
        batch, new = input_ids.shape
        if new == 0:
            raise ValueError(f"There are no new tokens in input_ids {list(input_ids.shape)}. Pass at least one.")
        if attention_mask is None:
            seen = self._tokens(past) if past is not None else 0
            attention_mask = torch.ones(batch, seen + new, dtype=torch.long, device=input_ids.device)
        past = tuple(past) if past is not None else self.empty_cache(batch)
        earlier = attention_mask[:, :-new] != 0
        if any(self.windows) and bool((earlier[:, :-1] & ~earlier[:, 1:]).any()):
            raise ValueError(
                "Padding of earlier tokens stands behind real ones, and layers have windows. Pad on the left."
            )
        if position_ids is None:
            position_ids = positions_from_mask(attention_mask, new)
        logits, *present = self.graph(input_ids, attention_mask, position_ids, *past, *context)
        return LatentOutput(logits, tuple(present))

    def cached_elements(self, tokens: int) -> int:
        """Numbers that the cache keeps for one sequence of this many tokens."""
        return sum(row * kept_rows(tokens, window) for row, window in zip(self.rows, self.windows, strict=True))

    def _tokens(self, past: Sequence[Tensor]) -> int:
        """How many tokens a cache was made from."""
        for cache, window in zip(past, self.windows, strict=True):
            if not window or cache.shape[1] < window - 1:
                return cache.shape[1]
        raise ValueError("Every layer has a window, and the cache is full. Pass attention_mask over all tokens so far.")

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def empty_cache(self, batch: int) -> tuple[Tensor, ...]:
        """A cache of no tokens."""
        dtype = cache_dtype(self.graph)
        return tuple(torch.empty(batch, 0, row, device=self.device, dtype=dtype) for row in self.rows)


class LowRankModel(_GraphModel):
    """A converted encoder: the original's inputs and outputs, smaller projections, no cache.

    Args:
        graph: Module of positional tensors to a tuple of tensors.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.graph = graph
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Run the model.

        Args:
            *args: Inputs in order.
            **kwargs: Inputs by name.

        Returns:
            Outputs by name.

        Raises:
            TypeError: An input is missing, unknown or given twice.
        """
        given = dict(zip(self.inputs, args, strict=False))
        if len(args) > len(self.inputs) or given.keys() & kwargs.keys() or {*given, *kwargs} != {*self.inputs}:
            names = ", ".join(self.inputs)
            raise TypeError(f"The inputs are {names}. Give each once, in this order or by name.")
        given |= kwargs
        return dict(zip(self.outputs, self.graph(*(given[name] for name in self.inputs)), strict=True))


class LatentSeq2Seq(nn.Module):
    """A converted encoder-decoder: the encoder runs once, the decoder step by step with an explicit latent cache.

    Args:
        encoder: The encoder's inputs to one tensor ``[batch, tokens, row]`` per cross attention layer.
        decoder: The decoder; its ``context`` is what :meth:`encode` returns.
        mask: The encoder input that is the padding mask, if the decoder reads it.
    """

    def __init__(self, encoder: LowRankModel, decoder: LatentModel, mask: str | None) -> None:
        super().__init__()
        self.encoder, self.decoder, self.mask = encoder, decoder, mask

    def encode(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the encoder.

        Args:
            **inputs: Its inputs by name.

        Returns:
            What the decoder reads at every step: the rows of every cross attention layer, and the padding mask if it
            reads one.
        """
        rows = tuple(self.encoder(**inputs).values())
        return rows if self.mask is None else (*rows, inputs[self.mask])

    def forward(
        self,
        input_ids: Tensor,
        context: Sequence[Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: Sequence[Tensor] | None = None,
    ) -> LatentOutput:
        """Run the decoder on new tokens.

        Args:
            input_ids: ``[batch, new]`` token ids of the decoder.
            context: From :meth:`encode`.
            attention_mask: ``[batch, all earlier + new]``, non-zero for real tokens; all real by default.
            position_ids: ``[batch, new]``; counted from the mask by default.
            past: The cache of earlier tokens; empty by default.

        Returns:
            Logits of the new tokens and the grown cache.
        """
        output: LatentOutput = self.decoder(input_ids, attention_mask, position_ids, past, context)
        return output
