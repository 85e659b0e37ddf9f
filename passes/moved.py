"""A graph on another device: the same computation with weights, and what it creates, there.

An exported graph is of the machine it was exported on in two ways: it names a device wherever it creates something, and
its views have the strides that the kernels of that machine gave their results.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mla_compile.passes.retype import attribute
from mla_compile.runtime.module import LatentModel, create_on

__all__ = ["VIEWS", "moved_graph", "moved_model"]

_aten = torch.ops.aten
VIEWS: Mapping[Any, Any] = {
    _aten.view.default: _aten.reshape.default,
    _aten._unsafe_view.default: _aten.reshape.default,
}
"""What takes the place of views: other kernels and other sizes may give strides that need a copy."""


def moved_graph(module: fx.GraphModule, device: str | torch.device) -> fx.GraphModule:
    """The same computation on a device.

    Args:
        module: A graph of ATen operators and ours. Its weights are copied, unless they are there already.
        device: Where to compute.

    Returns:
        A new module; ``module`` itself, if it is to stay on the processor.
    """
    if torch.device(device).type == "cpu":
        return module
    copies: dict[int, Any] = {}  # a weight of two names stays one

    def there(value: Any) -> Any:  # noqa: ANN401 - parameters, buffers and constants
        if id(value) not in copies:
            copies[id(value)] = _there(value, device)
        return copies[id(value)]

    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        node.target = VIEWS.get(node.target, node.target)
    create_on(graph, torch.device(device))
    tensors = {str(n.target): attribute(module, str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    return fx.GraphModule({n: there(v) for n, v in tensors.items()}, graph, class_name=type(module).__name__)


def moved_model(model: LatentModel, device: str | torch.device) -> LatentModel:
    """A model with :func:`moved_graph` of its graph; the model itself, if it is to stay on the processor."""
    graph = moved_graph(model.graph, device)
    return model if graph is model.graph else LatentModel(graph, model.rows, model.windows)


def _there(value: Any, device: str | torch.device) -> Any:  # noqa: ANN401 - parameters, buffers and constants
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to(device), requires_grad=value.requires_grad)
    return value.to(device) if isinstance(value, Tensor) else value
