"""Run a graph over batches of text one segment at a time, forward and, by recomputation, backward.

Every segment runs on all batches before the next one starts. Of activations, only what segments hand on is kept: for a
forward pass until it is read, for a backward pass until the segment that reads it has been computed again, this time
with gradients, in reverse order. So memory holds the weights of one segment, the activations of one batch in it, and
the kept values, which may lie in files.

A graph that is small is one segment: what is run is the same, but nothing is kept or computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from mla_compile.disk.mapped import drop_pages
from mla_compile.errors import RefusedError, first_line
from mla_compile.passes.kept import KeptValues, kept_values
from mla_compile.passes.moved import VIEWS
from mla_compile.passes.segments import Mark, Segment, cut_graph, downstream, value_bytes

__all__ = ["Call", "Layerwise", "Observation", "Resources"]

Call = Callable[[Node, tuple[Any, ...], dict[str, Any]], Any]
"""Computes a node from its arguments in place of the node's own operator."""


@dataclass(frozen=True)
class Resources:
    """What running a model over text may take.

    Attributes:
        whole: Bytes of weights, and of what a backward pass needs, up to which a model is one segment.
        kept: Bytes of values between segments that are kept in memory; it decides how many batches run at a time, and
            so how often all weights are read.
        folder: Where values between segments are kept instead; all batches then run at a time.
        device: Where segments run, and where what is observed is. What is kept is on the processor.
    """

    whole: int = 2**30
    kept: int = 2**31
    folder: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Observation:
    """What was seen of one segment on one batch.

    Attributes:
        batch: Number of the batch.
        values: Values of the wanted nodes in the segment, by name, on the device that computed them; empty where a step
            has nothing to show.
        gradients: Derivatives of the loss by the followed nodes among them; empty without gradients.
    """

    batch: int
    values: Mapping[str, Any]
    gradients: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Step:
    segment: int
    batch: int
    backward: bool


class Layerwise:
    """A graph that is run segment by segment.

    Args:
        module: A graph of positional tensors whose weights are attributes. Its parameters are only read.
        tokens: Placeholder of the token ids ``[batch, length]``.
        wanted: Names of nodes to observe.
        marks: Its layers, in order; it is cut between them if it is too large.
        shape: Batch and length of the batches.
        resources: What is too large, and where it runs.
        calls: What computes some nodes, by their names.
        follow: Names of nodes by which the loss is differentiated; none for a forward pass.
        loss: From the value of the last wanted node, and the number of the batch, to a sum; with ``follow`` only.

    Attributes:
        segments: What it is cut into.
        device: Where it runs, and what is observed is.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        tokens: str,
        wanted: Sequence[str],
        marks: Sequence[Mark],
        shape: tuple[int, int],
        resources: Resources,
        *,
        calls: Mapping[str, Call] | None = None,
        follow: Sequence[str] = (),
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self._interpreter = fx.Interpreter(module)
        self._inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
        self._tokens = next(n for n in self._inputs if n.name == tokens)
        self._calls, self._resources, self._result = dict(calls or {}), resources, wanted[-1]
        self._follow, self._loss = frozenset(follow), loss
        self._moving = downstream(module.graph, follow)
        (whole,) = cut_graph(module.graph, tokens, wanted, ())
        fits = self._weight_bytes(whole) + bool(follow) * self._bytes(whole.nodes, shape) <= resources.whole
        self.segments = (whole,) if fits else cut_graph(module.graph, tokens, wanted, marks)
        writes = [segment.writes for segment in self.segments]
        if follow:
            self._handed_on = sum(self._bytes(w, shape) for w in writes)
        else:
            self._handed_on = 2 * max(self._bytes(w, shape) for w in writes)  # what is read, and what is written
        self.device = resources.device
        self._first = next((i for i, s in enumerate(self.segments) if any(n.name in self._follow for n in s.nodes)), 0)
        self._last_reader = self._last_readers()

    def steps(self, batches: int) -> int:
        """How many observations :meth:`run` makes of so many batches."""
        back = len(self.segments) - self._first
        return batches * ((len(self.segments) - 1 + back) if self._follow else len(self.segments))

    def at_a_time(self, batches: int) -> int:
        """How many of so many batches pass a segment before the next one starts."""
        if len(self.segments) == 1:
            return 1
        if self._resources.folder is not None:
            return batches
        return max(1, min(batches, self._resources.kept // max(1, self._handed_on)))

    def run(
        self,
        batches: Sequence[Tensor],
        inputs: Callable[[Tensor], Sequence[Tensor]],
        progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
        tell: Callable[[str], None] | None = None,
    ) -> Iterator[Observation]:
        """Run the graph.

        Args:
            batches: Token ids ``[batch, length]``.
            inputs: Makes the graph's inputs of token ids.
            progress: Wraps the batches of all steps to show progress.
            tell: Is told in a few words which segment begins, where there are several.

        Yields:
            One entry per step. A node is observed once per batch: in the order of segments, and in reverse with
            gradients; batch by batch within a segment.

        Raises:
            RefusedError: Something in the model has no derivative.
            UsageError: Values cannot be written to the folder.
        """
        at_a_time = self.at_a_time(len(batches))
        steps = [s for start in range(0, len(batches), at_a_time) for s in self._plan(start, at_a_time, len(batches))]
        with kept_values(self._resources.folder) as kept, kept_values(self._resources.folder) as gradients:
            loaded, weights = -1, dict[Node, Any]()
            for ids, step in zip(progress([batches[s.batch] for s in steps]), steps, strict=True):
                if step.segment != loaded:
                    drop_pages(w for w in weights.values() if isinstance(w, Tensor))
                    weights = {}  # before the next ones come
                    loaded, weights = step.segment, self._weights(self.segments[step.segment])
                    if tell is not None and len(self.segments) > 1:
                        tell(f"segment {loaded + 1} of {len(self.segments)}{', backward' if step.backward else ''}")
                given = weights | dict(zip(self._inputs, map(self._moved, inputs(ids)), strict=True))
                if step.backward:
                    yield self._backward(step, given, ids, kept, gradients)
                else:
                    yield self._forward(step, given, kept)

    def _plan(self, start: int, count: int, total: int) -> Iterator[_Step]:
        batches = range(start, min(start + count, total))
        last = len(self.segments) - 1
        for segment in range(last if self._follow else last + 1):
            yield from (_Step(segment, batch, backward=False) for batch in batches)
        for segment in range(last, self._first - 1, -1) if self._follow else ():
            yield from (_Step(segment, batch, backward=True) for batch in batches)

    def _forward(self, step: _Step, given: dict[Node, Any], kept: KeptValues) -> Observation:
        segment = self.segments[step.segment]
        with torch.no_grad():  # not inference mode: what is kept may be differentiated later
            values = self._compute(segment, given | self._read(segment, step.batch, kept))
        kept.put(step.batch, {n.name: values[n] for n in segment.writes})
        if self._follow:
            return Observation(step.batch, {}, {})
        self._drop_read(step, kept)
        return Observation(step.batch, {n.name: _seen(values[n]) for n in segment.results}, {})

    def _backward(
        self, step: _Step, given: dict[Node, Any], ids: Tensor, kept: KeptValues, gradients: KeptValues
    ) -> Observation:
        segment, batch = self.segments[step.segment], step.batch
        read = self._read(segment, batch, kept)
        leaves = [n for n in segment.reads if n.name in self._moving and _differentiable(read[n])]
        for node in leaves:
            read[node] = read[node].detach().requires_grad_()
        with torch.enable_grad():
            values = self._compute(segment, given | read)
            followed = [n for n in segment.results if n.name in self._follow]
            if step.segment == len(self.segments) - 1:
                assert self._loss is not None
                ends: list[tuple[Tensor, Tensor | None]] = [
                    (self._loss(_named(values, self._result), self._moved(ids)), None)
                ]
            else:
                wanted = [n for n in segment.writes if gradients.has(batch, n.name) and values[n].requires_grad]
                ends = [(values[n], self._moved(gradients.get(batch, [n.name])[n.name])) for n in wanted]
            found = _gradients_of(ends, [*(values[n] for n in followed), *(read[n] for n in leaves)], len(followed))
        for node, gradient in zip(leaves, found[len(followed) :], strict=True):
            gradients.add(batch, node.name, gradient.cpu())
        gradients.drop(batch, [n.name for n in segment.writes])
        self._drop_read(step, kept)
        by_name = {n.name: gradient.detach() for n, gradient in zip(followed, found, strict=False)}
        return Observation(batch, {n.name: _seen(values[n]) for n in segment.results}, by_name)

    def _last_readers(self) -> dict[str, int]:
        """Which segment is the last to read a value: of a backward pass, the first that reads it and is run again."""
        numbers: dict[str, list[int]] = {}
        for number, segment in enumerate(self.segments):
            for node in segment.reads:
                numbers.setdefault(node.name, []).append(number)
        if not self._follow:
            return {name: max(found) for name, found in numbers.items()}
        return {name: min((n for n in found if n >= self._first), default=-1) for name, found in numbers.items()}

    def _drop_read(self, step: _Step, kept: KeptValues) -> None:
        reads = self.segments[step.segment].reads
        kept.drop(step.batch, [n.name for n in reads if self._last_reader[n.name] == step.segment])

    def _read(self, segment: Segment, batch: int, kept: KeptValues) -> dict[Node, Any]:
        found = kept.get(batch, [n.name for n in segment.reads])
        return {n: self._moved(found[n.name]) for n in segment.reads}

    def _moved(self, value: Any) -> Any:  # noqa: ANN401 - a weight, an input or what a graph hands on
        return value.to(self._resources.device) if isinstance(value, Tensor) else value

    def _compute(self, segment: Segment, values: dict[Node, Any]) -> dict[Node, Any]:
        """Compute a segment from its weights, inputs and what it reads."""
        for node in segment.nodes:
            if node not in values:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                if "device" in kwargs:  # recorded where the graph was exported
                    kwargs = {**kwargs, "device": self._resources.device}
                if node.name in self._calls:
                    values[node] = self._calls[node.name](node, args, kwargs)
                else:
                    target = VIEWS.get(node.target, node.target)
                    values[node] = getattr(self._interpreter, node.op)(target, args, kwargs)
                if node.name in self._follow and torch.is_grad_enabled() and not values[node].requires_grad:
                    values[node] = values[node].detach().requires_grad_()  # nothing before it is asked for
            for dead in segment.frees.get(node, ()):
                del values[dead]
        return values

    def _weights(self, segment: Segment) -> dict[Node, Any]:
        found = {n: self._interpreter.fetch_attr(str(n.target)) for n in segment.weights}
        moved = {n: self._moved(v.detach()) if isinstance(v, Tensor) else v for n, v in found.items()}
        if torch.device(self.device).type != "cpu":  # what they were copied from is not read again
            drop_pages(v for v in found.values() if isinstance(v, Tensor))
        return moved

    def _weight_bytes(self, segment: Segment) -> int:
        found = (self._interpreter.fetch_attr(str(n.target)) for n in segment.weights)
        return sum(v.nbytes for v in found if isinstance(v, Tensor))

    def _bytes(self, nodes: Iterable[Node], shape: tuple[int, int]) -> int:
        return sum(value_bytes(n, self._tokens, *shape) for n in nodes if n.op != "get_attr")


def _named(values: Mapping[Node, Any], name: str) -> Tensor:
    found: Tensor = next(value for node, value in values.items() if node.name == name)
    return found


def _seen(value: Any) -> Any:  # noqa: ANN401 - the value of any node
    return value.detach() if isinstance(value, Tensor) else value


def _differentiable(value: Any) -> bool:  # noqa: ANN401 - what a graph hands on
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _gradients_of(ends: Sequence[tuple[Tensor, Tensor | None]], by: Sequence[Tensor], needed: int) -> Sequence[Tensor]:
    """Derivatives by some tensors, of which the ``needed`` first ones must have one; 0 where another has none.

    Raises:
        RefusedError: Something in the model has no derivative.
    """
    try:
        if not ends:
            raise RuntimeError("the loss does not depend on a layer's outputs")
        found = torch.autograd.grad(
            [value for value, _ in ends], by, [gradient for _, gradient in ends], allow_unused=True
        )
        if any(gradient is None for gradient in found[:needed]):
            raise RuntimeError("the loss does not depend on a layer's outputs")
    except RuntimeError as error:  # NotImplementedError too
        raise RefusedError(
            f"The model cannot be run backward ({first_line(error)}).",
            "Pass --no-gradients (gradients=False in Python).",
        ) from error
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(by, found, strict=True)]
