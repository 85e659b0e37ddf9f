"""Evaluate parts of an exported graph on made-up values, in float64.

Recognition works by asking the graph questions ("if this projection printed these numbers, what would the attention
operand be?"). The evaluator computes only what a question needs, takes any node's value as given (an override), and
promotes every float type to float64, so that answers do not depend on the precision the model was exported in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from mla_compile.disk.mapped import drop_pages
from mla_compile.passes.layout import Sizes
from mla_compile.passes.moved import VIEWS
from mla_compile.program import AnyProgram, Program, Role

__all__ = ["Arguments", "GraphEvaluator", "example_inputs"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a node."""
_aten = torch.ops.aten
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
_CREATION = frozenset(
    {
        _aten.full.default,
        _aten.ones.default,
        _aten.zeros.default,
        _aten.scalar_tensor.default,
        _aten.arange.default,
        _aten.arange.start,
        _aten.arange.start_step,
    }
)


def example_inputs(
    program: AnyProgram, batch: int, length: int, seed: int = 0, sizes: Sizes | None = None
) -> dict[str, Tensor]:
    """Make valid inputs of a given size: random ids and values, all-ones masks, positions from 0.

    Args:
        program: The program whose placeholders are filled.
        batch: Number of sequences.
        length: Queries per sequence of the layer that ``sizes`` describes; tokens of a causal language model.
        seed: Seed of the random numbers.
        sizes: The sizes of a layer; needed unless the program is a causal language model.

    Returns:
        Placeholder name to tensor.
    """
    if sizes is None:
        assert isinstance(program, Program)
        sizes = Sizes.of(program)
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, (role, value) in program.user_inputs.items():
        shape = sizes.bind(value.shape, batch, length)
        if role == Role.TOKENS:
            made = torch.randint(0, _ids(program, name), shape, generator=generator)
        elif role == Role.VALUES:
            made = torch.randn(shape, generator=generator)
        elif role == Role.MASK:
            made = torch.ones(shape)
        else:
            made = torch.arange(shape[-1]).expand(shape).contiguous()
        inputs[name] = made.to(value.dtype)
    return inputs


def _ids(program: AnyProgram, name: str) -> int:
    """How many ids an input may name."""
    return program.known_tokens if isinstance(program, Program) and name == program.tokens else program.id_limits[name]


class GraphEvaluator:
    """Lazy float64 evaluation of a program's graph with overridden nodes.

    Args:
        program: The program; its weights are read only where a question depends on them.
    """

    def __init__(self, program: AnyProgram) -> None:
        self.program = program
        self.graph = program.exported.graph
        self.nodes: dict[str, Node] = {n.name: n for n in self.graph.nodes}
        self._order = {n: i for i, n in enumerate(self.graph.nodes)}
        signature = program.exported.graph_signature
        self.constants = (
            set(signature.inputs_to_parameters)
            | set(signature.inputs_to_buffers)
            | set(signature.inputs_to_lifted_tensor_constants)
        )

    def scalar(self, node: Node) -> float | None:
        """Value of a placeholder that holds one real constant, None for anything else."""
        if node.op != "placeholder" or node.name not in self.constants:
            return None
        value = self.program.constant(node.name).detach()
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            return None
        return float(value) if value.is_floating_point() else int(value)

    def constant(self, node: Node) -> Tensor:
        """Value of a placeholder that holds a parameter, buffer or constant, floats as float64."""
        return _promote(self.program.constant(node.name))

    def run(
        self,
        targets: Sequence[Node],
        overrides: Mapping[Node, Tensor],
        inputs: Mapping[str, Tensor],
        patched: Mapping[Node, Arguments] | None = None,
    ) -> list[Tensor]:
        """Evaluate target nodes.

        Args:
            targets: Nodes whose values are wanted.
            overrides: Values to take as given; what lies behind them is not computed.
            inputs: Values of the user's placeholders.
            patched: Arguments to use in place of a node's own, to ask what a literal does.

        Returns:
            The targets' values, floats as float64.
        """
        needed: set[Node] = set()
        stack = list(targets)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                if node not in overrides:
                    stack.extend(node.all_input_nodes)
        values: dict[Node, Any] = {}
        order = sorted(needed, key=self._order.__getitem__)
        last = {i: n for n in order if n not in overrides for i in n.all_input_nodes}
        with torch.no_grad():
            for node in order:
                values[node] = overrides[node] if node in overrides else self._evaluate(node, values, inputs, patched)
                if node not in overrides:  # free what was read for the last time: probes are long, and layers wide
                    for read in {*node.all_input_nodes}:
                        if last[read] is node and read not in targets:
                            del values[read]
        return [values[t] for t in targets]

    def _evaluate(
        self,
        node: Node,
        values: Mapping[Node, Any],
        inputs: Mapping[str, Tensor],
        patched: Mapping[Node, Arguments] | None,
    ) -> Any:  # noqa: ANN401 - graph values are tensors, sizes and tuples of them
        if node.op == "placeholder":
            return _promote(self.program.constant(node.name) if node.name in self.constants else inputs[node.name])
        if node.op == "get_attr":
            return getattr(self.program.exported.graph_module, str(node.target))
        own = patched[node] if patched and node in patched else (node.args, dict(node.kwargs))
        args, kwargs = torch.fx.node.map_arg(own, values.__getitem__)
        args = tuple(_wide(a) for a in args)
        kwargs = {k: _wide(v) for k, v in kwargs.items()}
        if node.target in _CREATION and "dtype" not in kwargs and _is_narrow_float(node):
            kwargs["dtype"] = torch.float64
        target: Any = node.target
        return VIEWS.get(target, target)(*args, **kwargs)


def _is_narrow_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in _FLOATS


def _wide(argument: Any) -> Any:  # noqa: ANN401 - operator arguments have any type
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _FLOATS else argument


def _promote(value: Tensor) -> Tensor:
    if isinstance(value, FakeTensor) or value.is_meta:
        # A weight without values: the gain of a norm, at most, since products with weights are never evaluated.
        return torch.ones(value.shape, dtype=torch.float64)
    if value.dtype in _FLOATS:
        wide = value.double()
        drop_pages([value])
        return wide
    return value.to(torch.complex128) if value.dtype == torch.complex64 else value
