"""The gradient of an operator that is computed again on the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

__all__ = ["register_gradient"]


def register_gradient(op: CustomOpDef, compute: Callable[..., tuple[Tensor, Tensor]], tensors: int) -> None:
    """Give an operator whose first ``tensors`` arguments are tensors or None the gradient of ``compute``.

    The forward pass is recomputed with gradients on: no intermediate of size ``S x T`` is kept between passes.
    """

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's
        ctx.save_for_backward(*inputs[:tensors])
        ctx.settings = inputs[tensors:]

    def backward(ctx: Any, grad_output: Tensor, grad_present: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        wanted = ctx.needs_input_grad[:tensors]
        with torch.enable_grad():
            pairs = zip(ctx.saved_tensors, wanted, strict=True)
            inputs = [None if x is None else x.detach().requires_grad_(w) for x, w in pairs]
            outputs = compute(*inputs, *ctx.settings)
        chosen = [x for x, w in zip(inputs, wanted, strict=True) if x is not None and w]
        # An output that no wanted input leads to (the cache, for queries alone) has no gradient to send back.
        sent = [(o, g) for o, g in zip(outputs, (grad_output, grad_present), strict=True) if o.requires_grad]
        results, gradients = zip(*sent, strict=True)
        found = iter(torch.autograd.grad(results, chosen, gradients, allow_unused=True))
        return (*(next(found) if w else None for w in wanted), *(None for _ in ctx.settings))

    op.register_autograd(backward, setup_context=remember)
