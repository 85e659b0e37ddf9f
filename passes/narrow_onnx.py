"""What a graph in float16 or bfloat16 needs before it becomes ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mla_compile.passes.emit import PER_HEAD

__all__ = ["with_float32_logits", "without_narrow_einsums"]


def with_float32_logits(module: fx.GraphModule) -> None:
    """Let a graph return its first output in float32, whatever it computes in: what samples tokens need not know it."""
    outputs = module.graph.output_node()
    results: Any = outputs.args[0]
    with module.graph.inserting_before(outputs):
        outputs.args = ((_converted(results[0], torch.float32), *results[1:]),)
    module.recompile()


def without_narrow_einsums(module: fx.GraphModule) -> None:
    """Write ``Einsum``, which bfloat16 does not have in ONNX, otherwise: ours as a product, others in float32."""
    for node in [n for n in module.graph.nodes if n.target is torch.ops.aten.einsum.default]:
        equation, operands = node.args
        if equation == PER_HEAD:
            node.target, node.args = _per_head, tuple(operands)
            continue
        with module.graph.inserting_before(node):
            node.args = (equation, [_converted(operand, torch.float32) for operand in operands])
        with module.graph.inserting_after(node):
            rounded = _converted(node, torch.bfloat16)
        node.replace_all_uses_with(rounded, delete_user_cb=lambda user, own=rounded: user is not own)
    module.recompile()


def _per_head(heads: Tensor, matrices: Tensor) -> Tensor:
    """:data:`PER_HEAD` as one product of matrices per head."""
    products = heads.permute(2, 0, 1, 3) @ matrices.mT.unsqueeze(1)
    return products.permute(1, 2, 0, 3)


def _converted(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": dtype})
