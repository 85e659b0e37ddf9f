"""What an error of an attention output does to the residual stream, where the loss is not differentiated.

Behind attention stands a linear map in nearly every model: the output projection, found as the first product with a
weight and read by asking the graph what it makes of single channels. With ``y = sum_h W_h o_h + b`` an error ``e`` of
head ``h`` moves the residual stream by ``|W_h e|^2``, so that ``W_h^T W_h`` weighs errors as ``E (dL/do)(dL/do)^T``
would if the loss cared alike for every direction of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from mla_compile.passes.evaluate import GraphEvaluator, example_inputs
from mla_compile.passes.layout import SHORT, Layout, Sizes, per_token, token_axes
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.trace import DataFlow
from mla_compile.program import Program
from mla_compile.site import AttentionSite

__all__ = ["output_metrics"]

_LINEAR = 1e-9
"""How exactly the map has to be one matrix for all tokens, relative to what it makes of random outputs."""


def output_metrics(program: Program, sites: Sequence[AttentionSite]) -> tuple[Tensor | None, ...]:
    """Measure what follows every site's attention.

    Args:
        program: The original model.
        sites: Its attention sites.

    Returns:
        ``[H, Dv, Dv]`` in float64 per site, heads in the site's order; None where something other than one linear map
        of the outputs alone comes next (a gate, a norm, experts).
    """
    flow, evaluator = DataFlow(program), GraphEvaluator(program)
    return tuple(_metric(evaluator, flow, Sizes.of(program), site) for site in sites)


def _metric(evaluator: GraphEvaluator, flow: DataFlow, sizes: Sizes, site: AttentionSite) -> Tensor | None:
    output = evaluator.nodes[site.output]
    product = _next_product(flow, output)
    if product is None:
        return None
    try:
        axes = token_axes(sizes, product.meta["val"].shape)
    except MismatchError:
        return None
    program, layout = evaluator.program, Layout(site.output_axes)
    assert isinstance(program, Program)

    def follow(heads: Tensor) -> Tensor:
        """``[B, S, H, Dv]`` to ``[B, S, N]``."""
        batch, length = heads.shape[:2]
        if site.order is not None:
            heads = heads[:, :, torch.tensor(site.order).argsort()]
        placed = layout.place(heads, "bshd", sizes.bind(output.meta["val"].shape, batch, length))
        (result,) = evaluator.run([product], {output: placed}, example_inputs(program, batch, length))
        return per_token(axes, result, batch, length)

    shape, dim = (site.heads, site.v_dim), site.v_dim
    nothing = follow(torch.zeros(1, 1, *shape, dtype=torch.float64))
    columns = []
    for head in range(site.heads):  # the channels of a head stand at different positions of one sequence
        channels = torch.zeros(1, dim, *shape, dtype=torch.float64)
        channels[0, :, head] = torch.eye(dim, dtype=torch.float64)
        columns.append((follow(channels) - nothing)[0])
    matrix = torch.stack(columns)
    random = torch.randn(2, SHORT, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got, expected = follow(random), torch.einsum("bshd,hdn->bsn", random, matrix) + nothing
    if not (got - expected).abs().max() <= _LINEAR * got.abs().max():
        return None
    return matrix @ matrix.mT


def _next_product(flow: DataFlow, output: Node) -> Node | None:
    """The product with a weight that reads the outputs, if it is the only one and reads no other activation."""
    found: list[Node] = []
    queue, seen = [output], {output}
    while queue:
        for user in queue.pop().users:
            if user in flow.hidden and user not in seen:
                seen.add(user)
                (queue if flow.projection(user) is None else found).append(user)
    if len(found) != 1:
        return None
    (product,) = found
    between = flow.behind(product, lambda n: n is output) - {output}
    alone = all(any(i in flow.hidden for i in n.all_input_nodes) for n in between)
    return product if alone else None
