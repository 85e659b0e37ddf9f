"""Find attention in a graph by data flow: anchors, and the projections that feed them.

An anchor is where attention cannot hide: a scaled-dot-product operator, or a softmax between two products of
activations. From an anchor the trace walks backwards through whatever the author wrote in between, to the nearest
products of an activation with a weight. Nothing here looks at module classes or operator sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.fx import Node

from mla_compile.passes.einsum import einsum_parts
from mla_compile.passes.mismatch import MismatchError
from mla_compile.program import AnyProgram, Program
from mla_compile.site import RejectCode
from mla_compile.sources.products import transposed

__all__ = [
    "FLEXIBLE",
    "PRODUCTS",
    "SHAPE_ONLY",
    "Anchor",
    "DataFlow",
    "MismatchError",
    "ProjectionNode",
    "beside_scores",
    "blank_activations",
    "find_anchors",
    "module_path",
    "operator_argument",
    "projections_behind",
    "read_projection",
    "upstream",
]

_aten = torch.ops.aten
_SDPA = _aten.scaled_dot_product_attention.default
_SOFTMAX = frozenset({_aten.softmax.int, _aten._softmax.default, _aten._safe_softmax.default})
FLEXIBLE = "flex_attention"
"""The higher-order operator whose mask and scores are functions that a model brings along."""
PRODUCTS = frozenset(
    {
        _aten.matmul.default,
        _aten.bmm.default,
        _aten.mm.default,
        _aten.linear.default,
        _aten.addmm.default,
        _aten.baddbmm.default,
        _aten.einsum.default,
    }
)
"""Products of two tensors."""
_MATRICES = frozenset({_aten.matmul.default, _aten.mm.default})
"""Products of which either factor may be a weight."""


SHAPE_ONLY = frozenset(
    {
        _aten.ones_like.default,
        _aten.zeros_like.default,
        _aten.full_like.default,
        _aten.empty_like.default,
        _aten.new_ones.default,
        _aten.new_zeros.default,
        _aten.new_full.default,
        _aten.new_empty.default,
    }
)
"""Operators that read the shape of their input and not its content."""


def blank_activations(flow: DataFlow, node: Node, bind: Callable[[Sequence[Any]], Sequence[int]]) -> dict[Node, Tensor]:
    """Zeros for the activations behind a node of which it reads sizes only, so that layers are not run for these.

    Args:
        flow: Data flow of the graph.
        node: A node that no activation reaches by its values.
        bind: Makes a symbolic shape one of integers.
    """
    behind = upstream([node], lambda n: n.target is _aten.sym_size.int or n in flow.hidden)
    read = behind | {i for n in behind for i in n.all_input_nodes}
    values = {n: n.meta["val"] for n in read if n in flow.hidden and isinstance(n.meta.get("val"), Tensor)}
    kinds = {n: torch.float64 if v.is_floating_point() else v.dtype for n, v in values.items()}
    return {n: torch.zeros((), dtype=kinds[n]).expand(list(bind(v.shape))) for n, v in values.items()}


def upstream(
    targets: Iterable[Node], stop: Callable[[Node], bool] = lambda _: False, *, among: Container[Node] | None = None
) -> set[Node]:
    """Nodes that some depend on, themselves included, not looking behind ``stop``, nor at others than ``among``."""
    seen: set[Node] = set()
    stack = [*targets]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            if not stop(node):
                stack.extend(i for i in node.all_input_nodes if among is None or i in among)
    return seen


@dataclass(frozen=True)
class ProjectionNode:
    """A product of one activation with one weight expression: ``node = source @ weight (+ bias)``.

    Where ``left``, the weight stands on the left: ``node = weight @ source^T``, with channels before positions. Where
    the weight has more than two axes, the source is without the axes along which it is repeated for the product.
    """

    node: Node
    source: Node
    weight: Node
    bias: Node | None
    left: bool = False


@dataclass(frozen=True)
class Anchor:
    """Where attention happens.

    Attributes:
        query, key, value: Operand nodes of the two products.
        scores: The product of queries and keys; the operator itself when it is fused.
        softmax: The softmax node; the operator itself when it is fused.
        probabilities: The operand of the value product that comes from the softmax; None when fused.
        product: The product with the values; the operator itself when it is fused.
        output: Where attention is complete: the product, or the node at which the last thing computed from the scores
            has joined it (a sink spelled as a factor of the output).
    """

    query: Node
    key: Node
    value: Node
    scores: Node
    softmax: Node
    probabilities: Node | None
    product: Node
    output: Node

    @property
    def fused(self) -> bool:
        """Whether one operator does scores, softmax and weighted sum."""
        return self.probabilities is None


class DataFlow:
    """Which nodes carry activations and which only weights.

    Attributes:
        hidden: Nodes whose value depends on embedded tokens or float inputs.
        static: Nodes computed from parameters, buffers and constants alone.
        weighted: Nodes that depend on at least one parameter.
        parameters: Placeholder node to qualified parameter name.
        tokens: Nodes whose value depends on which tokens were given, not only on how many.
    """

    def __init__(self, program: AnyProgram) -> None:
        exported: ExportedProgram = program.exported
        signature = exported.graph_signature
        self.hidden: set[Node] = set()
        self.static: set[Node] = set()
        self.weighted: set[Node] = set()
        self.parameters: dict[Node, str] = {}
        self.tokens: set[Node] = set()
        user_dependent: set[Node] = set()
        tokens = program.token_inputs
        constants = {*signature.inputs_to_buffers, *signature.inputs_to_lifted_tensor_constants}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                if node.name in signature.inputs_to_parameters:
                    self.parameters[node] = signature.inputs_to_parameters[node.name]
                    self.static.add(node)
                    self.weighted.add(node)
                elif node.name in constants:
                    self.static.add(node)
                else:
                    user_dependent.add(node)
                    if node.name in tokens:
                        self.tokens.add(node)
                    value = node.meta.get("val")
                    if isinstance(value, Tensor) and value.is_floating_point():
                        self.hidden.add(node)
            elif node.op == "get_attr":
                self.static.add(node)
            elif node.op == "call_function" and node.target is not _aten.sym_size.int:
                # A size is a number about a tensor, not its content: it ends the flow.
                inputs = node.all_input_nodes
                if node.target not in SHAPE_ONLY and any(i in self.tokens for i in inputs):
                    self.tokens.add(node)
                if any(i in user_dependent for i in inputs):
                    user_dependent.add(node)
                shape_only = node.target in SHAPE_ONLY
                if (not shape_only and any(i in self.hidden for i in inputs)) or (
                    node.target is _aten.embedding.default
                    and (
                        (node.args[0] in self.weighted and node.args[1] in user_dependent)
                        or (node.args[0] in self.static and _given(node.args[1]).name in tokens)  # a fixed table
                    )
                ):
                    self.hidden.add(node)
                if inputs and all(i in self.static for i in inputs):
                    self.static.add(node)
                if any(i in self.weighted for i in inputs):
                    self.weighted.add(node)

    def reads_tokens(self, node: Node, stop: set[Node]) -> Node | None:
        """Return a node between ``stop`` and ``node`` that depends on the tokens other than through activations."""
        seen: set[Node] = set()
        stack = [node]
        while stack:
            current = stack.pop()
            if current not in seen and current not in stop:
                seen.add(current)
                if current in self.tokens and current not in self.hidden and current.op != "placeholder":
                    return current
                stack.extend(current.all_input_nodes)
        return None

    def behind(self, node: Node, stop: Callable[[Node], bool] = lambda _: False) -> set[Node]:
        """Return the activation-carrying nodes ``node`` depends on, itself included, not looking behind ``stop``."""
        return upstream([node], stop, among=self.hidden)

    def projection(self, node: Node) -> ProjectionNode | None:
        """Return the node as a product of one activation with one weight expression, if it is one."""
        if node.op != "call_function" or node.target not in PRODUCTS or node not in self.hidden:
            return None
        operands, bias = _operands(node)
        if len(operands) != 2:
            return None
        hidden = [o for o in operands if o in self.hidden]
        weights = [o for o in operands if o in self.static and o in self.weighted]
        if len(hidden) != 1 or len(weights) != 1:
            return None
        if node.target in _MATRICES and node.args[0] is weights[0]:
            upright = transposed(hidden[0])
            # A weight on the left of an activation that is not turned mixes positions.
            return None if upright is None else ProjectionNode(node, upright, weights[0], None, left=True)
        if node.target in _MATRICES and weights[0].meta["val"].dim() > 2:
            return ProjectionNode(node, _unrepeated(hidden[0]), weights[0], bias)
        return ProjectionNode(node, hidden[0], weights[0], bias)

    def parameter_name(self, node: Node) -> str:
        """Return the one parameter a weight expression is made of."""
        while node not in self.parameters:
            inputs = [i for i in node.all_input_nodes if i in self.weighted]
            if len(inputs) != 1:
                return f"<{node.name}>"
            node = inputs[0]
        return self.parameters[node]


def _given(ids: Any) -> Node:  # noqa: ANN401 - an operator's argument, which is a node
    """What ids are in another type, or a copy."""
    while ids.target in (_aten._to_copy.default, _aten.clone.default, _aten.alias.default):
        ids = ids.args[0]
    return ids  # type: ignore[no-any-return]


def _unrepeated(node: Node) -> Node:
    """What a node is without the axes that were added to it, and along which it may be repeated."""
    while node.op == "call_function":
        arguments: Any = node.args
        whole = node.target is _aten.slice.Tensor and _same_shape(arguments[0], node)
        if not whole and node.target not in (_aten.unsqueeze.default, _aten.expand.default, _aten.clone.default):
            break
        node = arguments[0]
    return node


def _same_shape(first: Node, second: Node) -> bool:
    """Whether two values have the same sizes; sizes that are symbols are not compared by torch, which would note it."""
    return [str(d) for d in first.meta["val"].shape] == [str(d) for d in second.meta["val"].shape]


def _operands(node: Node) -> tuple[list[Node], Node | None]:
    """Split a product's arguments into its two factors and what is added."""
    arguments: Any = node.args  # a product's arguments are nodes, which fx's argument type does not say
    if node.target in (_aten.addmm.default, _aten.baddbmm.default):
        return list(arguments[1:3]), arguments[0]
    if node.target is _aten.linear.default:
        return list(arguments[:2]), arguments[2] if len(arguments) > 2 else None
    if node.target is _aten.einsum.default:
        return list(arguments[1]), None
    return list(arguments[:2]), None


def find_anchors(flow: DataFlow, program: AnyProgram) -> list[Anchor | tuple[Node, MismatchError]]:
    """List every anchor in graph order, and what looks like attention and is none: softmaxes, and scores without one.

    A softmax that is not over positions (a router, a classifier) is not attention and is not listed.
    """
    found: list[Anchor | tuple[Node, MismatchError]] = []
    for node in program.exported.graph.nodes:
        if node.op != "call_function" or node not in flow.hidden:
            continue
        try:
            _require_softmax(flow, node)
        except MismatchError as mismatch:
            found.append((node, mismatch))
            continue
        if isinstance(node.target, HigherOrderOperator) and str(node.target) == FLEXIBLE:
            reason = f"'{node.name}' is {FLEXIBLE}, whose mask and scores are functions, which are not read"
            found.append((node, MismatchError(RejectCode.ANCHOR, reason)))
        elif node.target is _SDPA:
            operands: Any = node.args
            query, key, value = operands[:3]
            found.append(Anchor(query, key, value, node, node, probabilities=None, product=node, output=node))
        elif node.target in _SOFTMAX:
            arguments: Any = node.args
            static = isinstance(node.meta["val"].shape[arguments[1]], int)
            if static and isinstance(program, Program):
                continue  # over experts, classes or channels: it does not look at other positions
            try:
                anchor = _anchor_of_softmax(flow, node)
            except MismatchError as mismatch:
                # Where lengths are numbers, a softmax over classes looks like one over positions.
                if not static or _multiplies_activations(flow, node):
                    found.append((node, mismatch))
            else:
                found.append(anchor)
    return found


def _is_product(node: Node) -> bool:
    return node.op == "call_function" and node.target in PRODUCTS


def _multiplies(flow: DataFlow, node: Node) -> bool:
    """Whether a node is a product of two activations."""
    return _is_product(node) and all(o in flow.hidden for o in _operands(node)[0])


def _require_softmax(flow: DataFlow, node: Node) -> None:
    """Refuse a product of two activations with one number per pair of positions that no softmax reads.

    Raises:
        MismatchError: None reads it before it is multiplied with another activation.
    """
    if not _multiplies(flow, node) or any(isinstance(d, int) for d in node.meta["val"].shape[-2:]):
        return
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user.target in _SOFTMAX:
                return
            if user not in seen and not _multiplies(flow, user):
                seen.add(user)
                stack.append(user)
    raise MismatchError(
        RejectCode.ANCHOR,
        f"the scores '{node.name}' reach no softmax operator: weights made in any other way are not read",
    )


def _multiplies_activations(flow: DataFlow, softmax: Node) -> bool:
    """Whether the nearest products behind a softmax include one of two activations."""
    entry: Any = softmax.args[0]
    behind = flow.behind(entry, _is_product)
    return any(_multiplies(flow, n) for n in behind)


def _anchor_of_softmax(flow: DataFlow, softmax: Node) -> Anchor:
    arguments: Any = softmax.args
    behind = flow.behind(arguments[0], _is_product)
    products = [n for n in behind if _is_product(n)]
    bilinear = [n for n in products if _multiplies(flow, n)]
    if len(bilinear) != 1 or len(products) != 1:
        raise MismatchError(
            RejectCode.ANCHOR, f"softmax '{softmax.name}' is fed by {len(products)} products instead of one q.k product"
        )
    if any(not any(i in flow.hidden for i in n.all_input_nodes) for n in behind):
        raise MismatchError(RejectCode.SCORES, f"softmax '{softmax.name}' is fed by more than a q.k product")
    queue, seen = [softmax], {softmax}
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            if user.target in PRODUCTS:
                operands = _operands(user)[0]
                if node in operands and all(o in flow.hidden for o in operands):
                    value = next(o for o in operands if o is not node)
                    query, key = _queries_and_keys(bilinear[0])
                    output = _completed(flow, bilinear[0], softmax, user)
                    return Anchor(query, key, value, bilinear[0], softmax, node, user, output)
            else:
                queue.append(user)
    raise MismatchError(RejectCode.ANCHOR, f"softmax '{softmax.name}' is not multiplied with values")


def _completed(flow: DataFlow, scores: Node, softmax: Node, product: Node) -> Node:
    """Where what is computed from the scores beside the softmax (their logsumexp) joins the product with the values.

    That is the product itself when there is nothing, or nothing that joins it.

    Raises:
        MismatchError: It joins only after the outputs were mixed or re-arranged.
    """
    arguments: Any = softmax.args
    way = flow.behind(arguments[0], lambda n: n is scores)
    way = {n for n in way if n is scores or scores in flow.behind(n, lambda m: m is scores)}
    beside = [u for n in way for u in n.users if u in flow.hidden and u not in way and u is not softmax]
    if not beside:
        return product
    aside, main, started = set(beside), {product}, False
    node: Node
    for node in product.graph.nodes:
        started = started or node is scores
        if not started or node.op != "call_function" or node.target in SHAPE_ONLY:
            continue
        from_aside, from_main = (any(i in nodes for i in node.all_input_nodes) for nodes in (aside, main))
        if from_aside and from_main:
            value = node.meta["val"]
            if not isinstance(value, Tensor) or not _same_shape(node, product):  # a list of pieces has no shape
                raise MismatchError(
                    RejectCode.ORPHAN, f"the scores are used besides the weighted sum of values, at '{beside[0].name}'"
                )
            return node
        if from_aside:
            aside.add(node)
        if from_main:
            main.add(node)
    return product


def _queries_and_keys(product: Node) -> list[Node]:
    """Factors of a score product: the one whose positions become the last axis of the scores is the keys."""
    operands = _operands(product)[0]
    if product.target is _aten.einsum.default:
        parts, output = einsum_parts(str(product.args[0]))
        if output[-1:] in parts[0]:
            return operands[::-1]
    return operands


def operator_argument(node: Node, name: str) -> Any:  # noqa: ANN401 - operator arguments have any type
    """Read an argument of the fused attention operator by its name, wherever it was put; None if it was not given."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    return dict(zip(names, node.args, strict=False)).get(name, node.kwargs.get(name))


def beside_scores(anchor: Anchor) -> set[Node]:
    """Nodes between the product of queries and keys and the softmax, and what joins it there: masks, biases, sinks."""
    if anchor.fused:
        mask = operator_argument(anchor.scores, "attn_mask")
        return upstream([mask]) if isinstance(mask, Node) else set()
    starts: Any = [anchor.softmax.args[0]]
    if anchor.scores.target is _aten.baddbmm.default:  # the product adds something of its own
        starts.append(anchor.scores.args[0])
    return upstream(starts, lambda n: n is anchor.scores) - {anchor.scores}


def projections_behind(flow: DataFlow, operand: Node) -> list[ProjectionNode]:
    """The nearest projections on all ways back from an operand."""
    behind = flow.behind(operand, lambda n: flow.projection(n) is not None)
    return [p for p in map(flow.projection, behind) if p is not None]


def read_projection(flow: DataFlow, operand: Node, role: str) -> ProjectionNode:
    """Walk back from an operand to the projection it comes from.

    Args:
        flow: Data flow of the graph.
        operand: Node of queries, keys or values.
        role: ``query``, ``key`` or ``value``, for the message.

    Raises:
        MismatchError: There is not exactly one projection behind the operand.
    """
    behind = flow.behind(operand, lambda n: flow.projection(n) is not None)
    projections = projections_behind(flow, operand)
    leaves = [
        n
        for n in behind
        if flow.projection(n) is None
        and (
            not any(i in flow.hidden for i in n.all_input_nodes)
            or n.target is _SDPA
            or (_is_product(n) and not _turns(flow, n))
        )
    ]
    if leaves:
        raise MismatchError(
            RejectCode.PROJECTION,
            f"the {role} depends on '{_to_blame(flow, operand, leaves).name}', which is not a linear projection",
        )
    names = ", ".join(sorted({flow.parameter_name(p.weight) for p in projections}))
    if any(_chooses(n) for n in behind):
        raise MismatchError(
            RejectCode.PROJECTION, f"the {role} comes from projections chosen by what each token holds ({names})"
        )
    below = {n for p in projections for n in flow.behind(p.source, lambda n: flow.projection(n) is not None)}
    if any(p.node in below for p in projections):
        raise MismatchError(
            RejectCode.LATENT, f"the {role} comes from a latent ({names}): this is latent attention already"
        )
    if len(projections) != 1:
        raise MismatchError(RejectCode.PROJECTION, f"the {role} is made from {len(projections)} projections ({names})")
    return projections[0]


def _to_blame(flow: DataFlow, operand: Node, leaves: Sequence[Node]) -> Node:
    """What an operand is made by instead of a projection.

    A leaf; or else, where leaves are the embedded tokens that everything is made of, the nearest operator with a weight
    (a convolution).
    """
    made = [n for n in leaves if any(i in flow.hidden for i in n.all_input_nodes)]
    if made:
        return made[0]
    queue, seen = [operand], {operand}
    while queue:
        node = queue.pop(0)
        if any(i in flow.weighted and i in flow.static for i in node.all_input_nodes):
            return node
        further = [i for i in node.all_input_nodes if i in flow.hidden and i not in seen]
        queue += further
        seen.update(further)
    return leaves[0]


def _turns(flow: DataFlow, product: Node) -> bool:
    """Whether a product is of one activation with what has no parameters, such as a rotation spelled as a matrix."""
    operands, added = _operands(product)
    others = [o for o in [*operands, added] if o is not None and o not in flow.hidden]
    return sum(o in flow.hidden for o in operands) == 1 and not any(o in flow.weighted for o in others)


def _chooses(node: Node) -> bool:
    """Whether an activation is a choice: integers that were computed from activations, as a router's indices are."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def module_path(node: Node, fallback: str) -> str:
    """Return the author's module path of a node, or ``fallback``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple) and entry[0]]
    return paths[-1] if paths else fallback
