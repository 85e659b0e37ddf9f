"""All passes in a row, for tests of what comes out at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mla_compile.config import make_config
from mla_compile.latent_weights import LatentWeights
from mla_compile.passes.factorise import factorise_mha2mla
from mla_compile.passes.insert_latent import insert_latent
from mla_compile.passes.weights import input_width, read_site
from mla_compile.plan import plan_layers
from mla_compile.program import Program
from mla_compile.runtime.module import LatentModel
from mla_compile.site import AttentionSite


def latent_weights(program: Program, sites: Sequence[AttentionSite], **settings: object) -> list[LatentWeights]:
    """Latent weights of every site; nothing is left out unless settings say so."""
    config = make_config(**{"exact": True, "selection": "uniform", **settings})
    plans = plan_layers(sites, [input_width(program, s) for s in sites], config)
    return [
        factorise_mha2mla(site, read_site(program, site), plan, config, None)
        for site, plan in zip(sites, plans, strict=True)
    ]


def convert(
    program: Program, sites: Sequence[AttentionSite], dtype: torch.dtype = torch.float32, **settings: object
) -> LatentModel:
    """A converted model that equals the original unless settings say otherwise."""
    weights = latent_weights(program, sites, **settings)
    graph = insert_latent(program, sites, weights, dtype)
    return LatentModel(graph.module, graph.rows)


def in_chunks(model: LatentModel, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logits of whole sequences fed part by part."""
    past, parts, done = None, [], 0
    for part in ids.split(list(sizes), 1):
        done += part.shape[1]
        result = model(part, attention_mask=torch.ones_like(ids[:, :done]), past=past)
        past = result.cache
        parts.append(result.logits)
    return torch.cat(parts, 1)


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected number."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())
