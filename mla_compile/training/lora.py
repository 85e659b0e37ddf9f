"""Low-rank adapters of matrices (LoRA, Hu et al. 2021), which are peft's; they become part of the weights in the end.

peft wraps the module that holds a matrix, and adds the adapter while that module is called. In a rewritten graph the
modules that hold matrices are never called: the graph takes the matrices from them. So peft makes the adapters for a
model that holds the matrices and does nothing else, and what it adds to a matrix is added wherever a graph takes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Adapter", "adapt", "adapter_groups", "merge"]

_NAME = "default"  # peft's, of an adapter


class Adapter(nn.Module):
    """What is added to one matrix, or to each of several: ``alpha / rank * B A``.

    Args:
        base: The matrix ``[out, in]``, or matrices ``[several, _, _]``.
        wrapper: peft's wrapper of it.
        held: Rows of the matrix that nothing is added to.
    """

    def __init__(self, base: nn.Parameter, wrapper: Any, held: Tensor | None) -> None:  # noqa: ANN401 - peft's
        super().__init__()
        self.down, self.up = wrapper.lora_A[_NAME], wrapper.lora_B[_NAME]
        # In a tuple: the base is a parameter of the model already.
        self._wrapped = (base, wrapper)
        if held is not None:
            self.up.weight.register_hook(lambda gradient: gradient.index_fill(0, held.to(gradient.device), 0))

    @property
    def base(self) -> nn.Parameter:
        """What is added to."""
        return self._wrapped[0]

    @property
    def delta(self) -> Tensor:
        """What is added, in the shape of the base."""
        added: Tensor = self._wrapped[1].get_delta_weight(_NAME)
        return added

    @property
    def scaling(self) -> float:
        """``alpha / rank``."""
        return float(self._wrapped[1].scaling[_NAME])

    @property
    def rank(self) -> int:
        """``rank``."""
        return int(self._wrapped[1].r[_NAME])

    def forward(self, matrix: Tensor) -> Tensor:
        """The matrix with what is added."""
        return matrix + self.delta


def adapt(
    graphs: Iterable[nn.Module],
    names: Iterable[str],
    model: nn.Module,
    held: Mapping[nn.Parameter, Tensor],
    *,
    rank: int,
    alpha: int,
    seed: int,
) -> list[Adapter]:
    """Give matrices adapters, wherever graphs take them, and freeze everything else.

    Args:
        graphs: All modules that take them.
        names: Names of the parameters that would be trained; those that are no matrices are frozen.
        model: Whose names they are.
        held: Rows of matrices that have to stay as they are.
        rank: Of every adapter.
        alpha: Scale of what adapters add, times ``rank``.
        seed: Of their beginning.
    """
    from peft import LoraConfig, inject_adapter_in_model

    named = dict(model.named_parameters(remove_duplicate=False))
    matrices = [*dict.fromkeys(p for name in sorted(names) if (p := named[name]).dim() in (2, 3))]
    mirror = nn.ModuleDict()
    for number, matrix in enumerate(matrices):
        holder = nn.Module()
        holder.weight = matrix
        mirror[f"matrix_{number}"] = holder
    targets = [f"{place}.weight" for place in mirror]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=[], target_parameters=targets)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, mirror)
    made = [Adapter(m, wrapper, held.get(m)) for m, wrapper in zip(matrices, mirror.values(), strict=True)]
    adapters = {adapter.base: adapter for adapter in made}
    for graph in graphs:
        graph.requires_grad_(False)
        for holder in [*graph.modules()]:
            for name, parameter in [*holder.named_parameters(recurse=False)]:
                if parameter in adapters:
                    parametrize.register_parametrization(holder, name, adapters[parameter])
    for adapter in made:
        adapter.requires_grad_(True)
    return made


def merge(graphs: Iterable[nn.Module], adapters: Sequence[Adapter]) -> None:
    """Add to every matrix what its adapter adds, and take the adapters away."""
    with torch.no_grad():
        for adapter in adapters:
            adapter.base.add_(adapter.delta)
    for graph in graphs:
        for holder in [*graph.modules()]:
            if parametrize.is_parametrized(holder):
                for name in [*cast(nn.ModuleDict, holder.parametrizations)]:
                    parametrize.remove_parametrizations(holder, name, leave_parametrized=False)


def adapter_groups(adapters: Sequence[Adapter], rate: float) -> list[dict[str, Any]]:
    """Step sizes of adapters, at which a step moves the matrix by ``rate`` of its root mean square.

    A step moves every number of ``B`` by about as much, and ``alpha / rank * B A`` by that times ``alpha / sqrt(rank)``
    times the root mean square of ``A``, which itself moves by ``rate`` of its own.
    """
    groups = []
    for adapter in adapters:
        down = _size(adapter.down.weight)
        up = _size(adapter.base) / (adapter.scaling * math.sqrt(adapter.rank) * down)
        for weight, size in ((adapter.down.weight, down), (adapter.up.weight, up)):
            groups.append({"params": [weight], "lr": rate * size, "base": rate * size})
    return groups


def _size(weight: Tensor) -> float:
    return float(weight.detach().square().mean().sqrt()) or 1.0
