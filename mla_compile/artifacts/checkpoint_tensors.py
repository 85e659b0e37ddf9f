"""The tensors of one block of a DeepSeek checkpoint, and what its norms of latents change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mla_compile.artifacts.blueprint import AttentionShape
from mla_compile.deepseek import same_frequency
from mla_compile.errors import RefusedError

__all__ = ["BLOCKS", "BLOCK_PARTS", "OUTPUT", "REMEDY", "Layer", "Stock", "block_tensors", "norm_error"]

_GAIN = 2.0**20
"""Gain of the norms of latents; a power of two, which no type rounds."""
_NORM_TOLERANCE = 1e-3
"""Largest relative error of a norm that is taken for none."""
_RANK_TOLERANCE = 1e-5
"""Largest singular value, over the largest of all, that is taken for rounding of float32."""
BLOCKS, OUTPUT = "model.layers.", "self_attn.o_proj"
"""What names of tensors of blocks begin with, and the output projection in one."""
BLOCK_PARTS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    f"{OUTPUT}.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)
"""Tensors of a block of the original that a checkpoint takes over."""
REMEDY = "Write a .onnx file instead."
"""For a model that such a checkpoint has no place for."""


@dataclass(frozen=True)
class Layer:
    """One block of the converted model.

    Attributes:
        attention: Its attention.
        latent: Its latent weights, named as :func:`~mla_compile.passes.emit.layer_parameters` names them.
        rest: Its other weights, by their names inside it.
    """

    attention: AttentionShape
    latent: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        """Length of the latent."""
        return self.latent["key_up"].shape[2]

    def matrix(self, name: str) -> Tensor:
        """A latent weight in float64."""
        return self.latent[name].double()

    def bias(self, name: str) -> Tensor:
        """The bias of a latent weight in float64; zeros where there is none."""
        found = self.latent.get(f"{name}_bias")
        return torch.zeros(len(self.latent[name]), dtype=torch.float64) if found is None else found.double()


@dataclass(frozen=True)
class Stock:
    """What the stock code computes with by itself.

    Attributes:
        config: Its configuration.
        shapes: Shape of every tensor.
        table: Frequencies of its rope key.
        rope_factor: Factor of its rotations.
        scale: Factor of its logits.
        eps: What norms of latents add to the mean square.
        residual: What everything in the residual stream is scaled by, so that other norms can add the same.
    """

    config: Any
    shapes: Mapping[str, torch.Size]
    table: tuple[float, ...]
    rope_factor: float
    scale: float
    eps: float
    residual: float

    @property
    def small(self) -> float:
        """What latents are scaled by in front of their norm."""
        return math.sqrt(self.eps) / _GAIN


def norm_error(layers: Sequence[Layer], stock: Stock) -> float:
    """Bound of ``mean(c^2) / (2 eps)`` for latents ``c`` of any input ``x``, with ``|x|^2`` at most the width.

    Inputs are behind a norm, whose gain is counted with the projection.

    Raises:
        RefusedError: It is too large to be taken for none.
    """
    squares = []
    for layer in layers:
        gain = layer.rest["input_layernorm.weight"].double()
        length = (layer.matrix("row")[: layer.rank] * gain).norm() * math.sqrt(len(gain))
        length = length + layer.bias("row")[: layer.rank].norm()
        squares.append(float(length) ** 2 / layer.rank)
        if stock.config.q_lora_rank is not None:  # of an input that is turned, and of the entry that is always 1
            squares.append((float(gain.abs().max()) ** 2 * len(gain) + 1) / stock.config.q_lora_rank)
    error = max(squares) * stock.small**2 / (2 * stock.eps)
    if not error <= _NORM_TOLERANCE:
        raise RefusedError(
            f"Latents are so large that the norm of a DeepSeek checkpoint might change them by {error:.1e}.", REMEDY
        )
    return error


def block_tensors(layer: Layer, stock: Stock) -> dict[str, Tensor]:
    """The tensors of one block, by their names inside it."""
    mlp = {name: layer.rest[name] for name in BLOCK_PARTS}
    scaled = {name: layer.rest[name].float() * stock.residual for name in ("mlp.down_proj.weight", f"{OUTPUT}.weight")}
    row = _row(layer, layer.matrix("row"), stock)
    found = {"kv_a_proj_with_mqa.weight": row, "kv_b_proj.weight": _up(layer, stock), **_query(layer, stock)}
    found["kv_a_layernorm.weight"] = torch.full((stock.config.kv_lora_rank,), _GAIN)
    if stock.config.attention_bias:
        found["kv_a_proj_with_mqa.bias"] = _row(layer, layer.bias("row")[:, None], stock)[:, 0]
        found["o_proj.bias"] = _output_bias(layer) * stock.residual
    return mlp | scaled | {f"self_attn.{name}": value for name, value in found.items()}


def _query(layer: Layer, stock: Stock) -> dict[str, Tensor]:
    """Projections of queries: one matrix, or two with a latent between them."""
    weight = layer.matrix("query")
    length = stock.config.q_lora_rank
    if length is None:
        return {"q_proj.weight": _query_rows(weight, layer, stock)}
    constant = int(stock.config.attention_bias and "query_bias" in layer.latent)
    down, up = _query_factors(weight, length - constant, layer)
    made = {
        "q_a_proj.weight": torch.nn.functional.pad(down, (0, 0, 0, length - len(down))) * stock.small,
        "q_a_layernorm.weight": torch.full((length,), _GAIN),
    }
    if stock.config.attention_bias:
        made["q_a_proj.bias"] = torch.zeros(length, dtype=weight.dtype)
    up = torch.nn.functional.pad(up, (0, length - up.shape[1]))
    if constant:
        made["q_a_proj.bias"][-1] = stock.small
        up[:, -1] = layer.bias("query")
    return made | {"q_b_proj.weight": _query_rows(up, layer, stock)}


def _query_factors(weight: Tensor, rank: int, layer: Layer) -> tuple[Tensor, Tensor]:
    """A query matrix in two; rows of the first, which stands in front of the norm, are of length 1.

    Raises:
        RefusedError: It has a higher rank.
    """
    rows, width = weight.shape
    if rank >= width:
        return torch.eye(width, dtype=weight.dtype), weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if rank < rows and values[rank] > _RANK_TOLERANCE * values[0]:
        raise RefusedError(
            f"The queries of {layer.attention.path} are of more than rank {rank}: training gave them more.",
            "Leave --q-rank or the training out.",
        )
    return right[:rank], left[:, :rank] * values[:rank]


def _query_rows(weight: Tensor, layer: Layer, stock: Stock) -> Tensor:
    """Rows of a query matrix in the order of the stock code, with its factor of logits taken out."""
    still = layer.latent["key_up"].shape[1]
    heads = weight.unflatten(0, (layer.attention.heads, -1)) * (layer.attention.scale / stock.scale)
    return torch.cat([heads[:, :still], _arranged(heads[:, still:], layer, stock)], 1).flatten(0, 1)


def _row(layer: Layer, rows: Tensor, stock: Stock) -> Tensor:
    """What is made of rows ``[latent | rope key]``: small latents, zeros up to the stock sizes."""
    latent = rows.new_zeros(stock.config.kv_lora_rank, rows.shape[1])
    latent[: layer.rank] = rows[: layer.rank] * stock.small
    return torch.cat([latent, _arranged(rows[layer.rank :], layer, stock)])


def _up(layer: Layer, stock: Stock) -> Tensor:
    """Keys that do not rotate and values, of every query head, from the latent."""
    heads = layer.attention.heads
    keys, values = layer.matrix("key_up"), layer.matrix("value_up").mT
    parts = [x.repeat_interleave(heads // len(x), 0) for x in (keys, values)]
    missing = stock.config.kv_lora_rank - layer.rank
    return torch.nn.functional.pad(torch.cat(parts, 1), (0, missing)).flatten(0, 1)


def _output_bias(layer: Layer) -> Tensor:
    """The bias of the output projection, with what is added to attention outputs in front of it."""
    projection = layer.rest[f"{OUTPUT}.weight"].double()
    found = layer.rest.get(f"{OUTPUT}.bias", projection.new_zeros(len(projection))).double()
    return found + projection @ layer.matrix("output_bias").flatten() if "output_bias" in layer.latent else found


def _arranged(rows: Tensor, layer: Layer, stock: Stock) -> Tensor:
    """Rotating rows ``[..., real | imaginary, n]`` as the stock code pairs them, side by side in its table's order.

    Raises:
        RefusedError: A frequency is not in its table, or twice.
    """
    places = [
        next((i for i, f in enumerate(stock.table) if same_frequency(f, own)), -1)
        for own in layer.attention.frequencies
    ]
    if -1 in places or len({*places}) < len(places):
        channels = 2 * len(stock.table)
        raise RefusedError(
            f"The frequencies of {layer.attention.path} are not those of a rope key of {channels} channels.",
            f"Give a divisor of {channels} as --rope-dims.",
        )
    half, at = len(places), torch.tensor(places)
    found = rows.new_zeros(*rows.shape[:-2], 2 * len(stock.table), rows.shape[-1])
    found[..., 2 * at, :], found[..., 2 * at + 1, :] = rows[..., :half, :], rows[..., half:, :]
    return found / stock.rope_factor
