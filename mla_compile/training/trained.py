"""Which weights are trained, and how far a step moves each of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from mla_compile.runtime.module import LatentModel
from mla_compile.training.graphs import latent_nodes, output_products

__all__ = [
    "constant_rows",
    "hold_constants",
    "own_copies",
    "parameter_groups",
    "restore_constants",
    "trained_names",
]

_LATENT = re.compile(r"\.latent_\d+\.(query|query_bias|row|row_bias|key_up|value_up|output_bias)$")
_VIEWS = (torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default)


def trained_names(model: LatentModel, train: str) -> set[str]:
    """Names of the parameters that are trained; see :attr:`~mla_compile.training.recipe.Recipe.train`.

    Raises:
        RefusedError: The output projections cannot be found.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point() and p.numel()}
    if train == "all":
        return {*parameters}
    found = {name for name in parameters if _LATENT.search(name)}
    if train == "latent":
        return found
    graph = model.graph.graph
    products = output_products(latent_nodes(graph))
    weights = {n for p in products for n in map(_stored, p.all_input_nodes) if n is not None}
    # Norms are vectors that are not added: the bias of a product is its argument.
    weights |= {n for n in graph.nodes if n.op == "get_attr" and _is_gain(n, parameters)}
    return found | {f"graph.{n.target}" for n in weights} & {*parameters}


def _stored(node: Node) -> Node | None:
    """The weight a node is a view of, if it is one."""
    while node.target in _VIEWS:
        (node,) = node.all_input_nodes
    return node if node.op == "get_attr" else None


def _is_gain(node: Node, parameters: Mapping[str, Tensor]) -> bool:
    value = parameters.get(f"graph.{node.target}")
    products = (torch.ops.aten.linear.default, torch.ops.aten.addmm.default)
    inside = ".latent_" in str(node.target)
    return value is not None and value.dim() == 1 and not inside and all(u.target not in products for u in node.users)


def own_copies(model: LatentModel, names: set[str]) -> None:
    """Give a model its own copies of the parameters that are trained, and freeze the others.

    A converted model shares what it did not change with its original, which may be the teacher. Parameters that are one
    in several places (tied tables) stay one.
    """
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in [*model.named_parameters(remove_duplicate=False)]:
        if parameter not in copies:
            wanted = name in names
            kept = parameter.detach().clone() if wanted else parameter.detach()
            copies[parameter] = nn.Parameter(kept, requires_grad=wanted)
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, copies[parameter])


def constant_rows(model: LatentModel) -> dict[nn.Parameter, Tensor]:
    """Rows of latent weights that make the constant entry, which is no weight: zeros and a bias of one."""
    found: dict[nn.Parameter, Tensor] = {}
    named = dict(model.named_parameters())
    for name, bias in named.items():
        if name.endswith(".row_bias") and _LATENT.search(name):
            row = named[name.removesuffix("_bias")]
            places = ((row.detach() == 0).all(1) & (bias.detach() == 1)).nonzero().flatten()
            found |= {p: places for p in (row, bias) if len(places)}
    return found


def hold_constants(model: LatentModel) -> None:
    """Keep the gradient from constant entries of latents."""
    for parameter, places in constant_rows(model).items():
        if parameter.requires_grad:
            parameter.register_hook(lambda g, places=places: g.index_fill(0, places.to(g.device), 0))


def restore_constants(found: Mapping[nn.Parameter, Tensor]) -> None:
    """Put constant entries back, which weight decay moves without any gradient.

    Args:
        found: From :func:`constant_rows`, before the first step.
    """
    with torch.no_grad():
        for parameter, places in found.items():
            parameter.index_fill_(0, places.to(parameter.device), 1.0 if parameter.dim() == 1 else 0.0)


def parameter_groups(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Every parameter that is trained with its own full step size, ``base``: relative to its root mean square.

    Adam moves every number of a parameter by about as much. A bias counts as a weight of an input that is always 1, so
    that its size is that of its matrix, where it has one.
    """
    named = dict(model.named_parameters())
    groups = []
    for name, parameter in named.items():
        if parameter.requires_grad:
            matrix = named.get(name.removesuffix("_bias"), named.get(re.sub(r"\.bias$", ".weight", name), parameter))
            size = float(matrix.detach().square().mean().sqrt()) or 1.0
            groups.append({"params": [parameter], "lr": rate * size, "base": rate * size})
    return groups
