"""From per-head weights to latent weights: the one interface all methods share, and the MHA2MLA method.

A method decides which rotary components stay and how keys and values become one latent; everything downstream sees only
:class:`LatentWeights`. Tokens are cached as rows ``[latent | rope keys]``. Rope keys may be one per key/value head
(MHA2MLA) or one shared by all heads; the former is the latter with queries zero-padded to their head's slot.

Biases are placed exactly, by two properties of softmax: adding the same number to every logit of a query changes
nothing, so a key bias on channels that do not rotate is dropped; and attention weights sum to one, so a value bias is
added to the output instead. Where these do not hold (soft-caps, sinks, norms) the latent has one entry that is
always 1, which carries the bias.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mla_compile.config import CompileConfig
from mla_compile.devices import on_device
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.calibrate import PairNorms
from mla_compile.passes.low_rank import low_rank_factors
from mla_compile.passes.parallel import parallel_map
from mla_compile.passes.weights import SiteWeights, read_site
from mla_compile.plan import LatentPlan
from mla_compile.program import AnyProgram
from mla_compile.progress import Stages, peak_memory_mib
from mla_compile.site import AttentionSite

__all__ = ["Keep", "factorise_layers", "factorise_mha2mla", "select_pairs"]


def select_pairs(site: AttentionSite, count: int, selection: str, norms: PairNorms | None) -> list[list[int]]:
    """Choose the rotary pairs that keep rotating, per key/value head (MHA2MLA section 3.1).

    Args:
        site: The attention site; its ``P`` pairs are ranked from the highest frequency.
        count: Pairs to keep, ``r`` in the paper.
        selection: ``high`` (the first r), ``low`` (the last r), ``uniform`` (every ``P / r``-th) or ``2-norm`` (the r
            largest ``mean |q| * mean |k|``, summed over the query heads of a group).
        norms: Calibration norms, needed by ``2-norm``.

    Returns:
        For every key/value head, indices into ``site.rope.pairs``, from high to low frequency.

    Raises:
        ValueError: The selection needs norms, and there are none.
    """
    total = len(site.rope.pairs)
    ranked = sorted(range(total), key=lambda i: -site.rope.inv_freq[i])
    if selection == "2-norm":
        if norms is None:
            raise ValueError("The 2-norm selection needs norms that were measured on text. Pass them as norms.")
        group = site.heads // site.kv_heads
        scores = norms.query.reshape(site.kv_heads, group, total).sum(1) * norms.key
        kept = [sorted(range(total), key=lambda i: (-float(row[i]), ranked.index(i)))[:count] for row in scores]
        return [sorted(chosen, key=ranked.index) for chosen in kept]
    if selection == "high":
        chosen = ranked[:count]
    elif selection == "low":
        chosen = ranked[total - count :]
    else:
        chosen = [ranked[k * total // count] for k in range(count)]
    return [chosen] * site.kv_heads


def factorise_mha2mla(
    site: AttentionSite, weights: SiteWeights, plan: LatentPlan, config: CompileConfig, norms: PairNorms | None
) -> LatentWeights:
    """Partial RoPE and weight-only SVD, as published (MHA2MLA, arXiv 2502.14837, sections 3.1 and 3.2).

    ``joint`` factorises ``[W_K,nope; W_V]`` once; ``split`` factorises each with half of the rank. As in the published
    code the down-projection has orthonormal rows and the up-projection carries the singular values.
    """
    kv_heads, group, half = site.kv_heads, site.heads // site.kv_heads, plan.rope_dims // 2
    chosen = select_pairs(site, half, config.selection, norms) if half else [[] for _ in range(kv_heads)]
    orders = [_channel_order(site, pairs) for pairs in chosen]
    nope = site.qk_dim - plan.rope_dims
    width = weights.key.weight.shape[-1]

    query_order = torch.tensor([orders[h // group] for h in range(site.heads)])
    key_order = torch.tensor(orders)
    query = torch.take_along_dim(weights.query.weight, query_order[:, :, None], 1)
    query_bias = torch.take_along_dim(weights.query.bias, query_order, 1)
    key = torch.take_along_dim(weights.key.weight, key_order[:, :, None], 1)
    key_bias = torch.take_along_dim(weights.key.bias, key_order, 1)

    owners = torch.tensor(site.value_owners)
    first = [site.value_owners.index(i) for i in range(int(owners.max()) + 1)]
    keys, values = key[:, :nope].reshape(-1, width), weights.value.weight[first].reshape(-1, width)
    constant = int(site.needs_constant(nope))
    rank = plan.kv_rank - constant
    if config.svd == "joint":
        both = low_rank_factors(torch.cat([keys, values]), rank)
        down, worth = both.down, both.squares
        key_part, value_part = both.up[: keys.shape[0]], both.up[keys.shape[0] :]
    else:
        key_rank, value_rank = _split_rank(rank, min(keys.shape), min(values.shape))
        of_keys, of_values = low_rank_factors(keys, key_rank), low_rank_factors(values, value_rank)
        one, other = of_keys.squares, of_values.squares
        worth = None if one is None or other is None else _alternating(one, other)
        down = torch.cat([of_keys.down, of_values.down])
        key_part = torch.nn.functional.pad(of_keys.up, (0, value_rank))
        value_part = torch.nn.functional.pad(of_values.up, (key_rank, 0))
    value_part = value_part.unflatten(0, (len(first), site.v_dim))[owners].flatten(0, 1)
    if constant:  # the last latent entry is always 1 and carries the biases
        key_column = key_bias[:, :nope].reshape(-1, 1) * site.key_bias_matters
        value_column = weights.value.bias.reshape(-1, 1) * site.value_bias_matters
        key_part, value_part = torch.cat([key_part, key_column], 1), torch.cat([value_part, value_column], 1)
        down = torch.cat([down, down.new_zeros(1, width)])
        worth = None if worth is None else torch.cat([worth[:1], worth])  # as needed as any

    rope_bias = key_bias[:, nope:].reshape(-1)
    row_bias = torch.cat([rope_bias.new_zeros(rank), rope_bias.new_ones(constant), rope_bias])
    outside = weights.value.shift + weights.value.bias * (not site.value_bias_matters)
    output_bias = outside.repeat_interleave(site.heads // site.value.heads, 0)
    rope_shift = torch.take_along_dim(weights.key.shift, key_order, 1)[:, nope:]
    frequencies = torch.tensor(site.rope.inv_freq, dtype=torch.float64)
    return LatentWeights(
        query=query,
        query_bias=query_bias if query_bias.any() else None,
        row=torch.cat([down, key[:, nope:].reshape(-1, width)]),
        row_bias=row_bias if row_bias.any() else None,
        key_up=key_part.reshape(kv_heads, nope, plan.kv_rank),
        value_up=value_part.reshape(-1, site.v_dim, plan.kv_rank).transpose(1, 2).contiguous(),
        output_bias=output_bias if output_bias.any() else None,
        inv_freq=frequencies[torch.tensor(chosen, dtype=torch.long)]
        if half
        else torch.zeros(1, 0, dtype=torch.float64),
        rope_shift=rope_shift if rope_shift.any() else None,
        worth=worth,
    )


class Keep(Protocol):
    """Where finished layers are kept; see :meth:`mla_compile.disk.layer_store.LayerStore.recall`."""

    def __call__(
        self,
        settled: object,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        make: Callable[[], LatentWeights],
    ) -> LatentWeights:
        """Return what was made before of the same things, or make it."""
        ...


def factorise_layers(
    program: AnyProgram,
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    config: CompileConfig,
    stages: Stages,
    norms: Sequence[PairNorms | None] | None = None,
    *,
    finish: Callable[[LatentWeights], LatentWeights] | None = None,
    keep: Keep | None = None,
    dtype: torch.dtype = torch.float32,
    jobs: int = 1,
    device: str = "cpu",
) -> list[LatentWeights]:
    """Factorise every layer by :func:`factorise_mha2mla`, as one stage.

    A layer is computed by one thread, so that the result does not depend on how many there are.

    Args:
        program: The model that holds the weights.
        sites: The layers.
        plans: Shape of every layer's cache.
        config: Settings.
        stages: Times and shows what runs.
        norms: Calibration norms of every layer, needed by the ``2-norm`` selection.
        finish: What is done to every layer next.
        keep: Where finished layers are kept; in memory, in float64, by default.
        dtype: Type they are kept in there.
        jobs: Layers at a time; each takes the memory of one.
        device: Where they are computed.
    """

    def factorised(layer: tuple[AttentionSite, LatentPlan, PairNorms | None]) -> LatentWeights:
        site, plan, norm = layer
        weights = read_site(program, site)

        def make() -> LatentWeights:
            made = on_device(
                device, lambda own, norms: factorise_mha2mla(site, own, plan, config, norms), weights, norm
            )
            return made if finish is None else finish(made)

        if keep is None:
            return make()
        described = replace(site, error=0.0)  # which other numbers of threads may round otherwise
        settled = (described, plan, config.svd, config.selection, getattr(finish, "__name__", None))
        return keep(settled, _tensors(weights, norm), dtype, make)

    layers = [*zip(sites, plans, norms or [None] * len(plans), strict=True)]
    found: list[LatentWeights] = []
    with stages.stage("factorise", len(layers)) as stage, _one_thread():
        stage.note = _note(sites[0])
        for done in parallel_map(factorised, layers, jobs):
            found.append(done)
            stage()
            stage.note = _note(sites[len(found)]) if len(found) < len(sites) else ""
    return found


def _note(site: AttentionSite) -> str:
    return f"{site.path}, peak {peak_memory_mib() / 2**10:.1f} GiB"


def _tensors(weights: SiteWeights, norm: PairNorms | None) -> dict[str, Tensor]:
    """All that a layer is made of."""
    parts = {"query": weights.query, "key": weights.key, "value": weights.value}
    found = {f"{role}.{name}": getattr(part, name) for role, part in parts.items() for name in part.__annotations__}
    return found if norm is None else {**found, "norm.query": norm.query, "norm.key": norm.key}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of products come out the same in their last bits only for the same number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _channel_order(site: AttentionSite, kept: list[int]) -> list[int]:
    """Channels of a head as ``[not rotating | real parts | imaginary parts]`` of the kept pairs."""
    real = [site.rope.pairs[i][0] for i in kept]
    imaginary = [site.rope.pairs[i][1] for i in kept]
    return [c for c in range(site.qk_dim) if c not in {*real, *imaginary}] + real + imaginary


def _split_rank(rank: int, key_limit: int, value_limit: int) -> tuple[int, int]:
    """Half of the rank each; what one side cannot use goes to the other."""
    keys = min(rank // 2, key_limit)
    values = min(rank - keys, value_limit)
    return rank - values, values


def _alternating(keys: Tensor, values: Tensor) -> Tensor:
    """What is worth what where both halves grow by turns, as :func:`_split_rank` shares a rank."""
    ranks = [_split_rank(rank, len(keys), len(values)) for rank in range(len(keys) + len(values) + 1)]
    grown = [(after[0] > before[0], before) for before, after in pairwise(ranks)]
    return torch.stack([keys[k] if of_keys else values[v] for of_keys, (k, v) in grown])
