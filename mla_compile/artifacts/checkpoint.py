"""A converted model in the tensors and the configuration of a stock DeepSeek-V3 checkpoint.

Nothing is approximated; what stock code does besides is made to cancel:

- The norm of the latent, ``g * c / sqrt(mean(c^2) + eps)``, does nothing to latents far below its epsilon but to scale
  them by ``g / sqrt(eps)``. Latents are made that small, and ``g`` makes up for it.
- transformers gives that norm an epsilon of its own, serving engines give it the model's. The two are made the same: a
  norm ``x / sqrt(mean(x^2) + eps)`` does not change if ``x`` is scaled by ``s`` and ``eps`` by ``s^2``, so everything
  that is added to the residual stream is scaled.
- The scale of logits, and the factor of scaled rotations, go into queries and rope keys.
- Biases of queries are carried by a latent of queries, which is their input and an entry that is always 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mla_compile.artifacts.blueprint import Blueprint
from mla_compile.artifacts.checkpoint_tensors import (
    BLOCK_PARTS,
    BLOCKS,
    OUTPUT,
    REMEDY,
    Layer,
    Stock,
    block_tensors,
    norm_error,
)
from mla_compile.deepseek import FLASHMLA
from mla_compile.errors import LoadError, RefusedError
from mla_compile.program import AnyProgram
from mla_compile.runtime.module import LatentModel
from mla_compile.site import AttentionSite

__all__ = ["Checkpoint", "require_blocks", "stock_checkpoint", "stock_rotation"]

_Any = TypeVar("_Any")

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Scalings that are one table of frequencies, whatever the length of the text."""
_EMBEDDING = "model.embed_tokens.weight"
_TABLES = (_EMBEDDING, "lm_head.weight")
_OUTSIDE = (*_TABLES, "model.norm.weight")


@dataclass(frozen=True)
class Checkpoint:
    """What a stock checkpoint holds.

    Attributes:
        config: Content of ``config.json``.
        shapes: Shape of every tensor, in the order they are written in, which is that of their names.
        outside: Makes a tensor outside the blocks by its name; nothing is made before.
        block: Makes the tensors of a block, by their names inside it.
        norm_error: Bound of the relative error that the norms of latents make, for any text.
        caveats: Why engines other than transformers would compute something else; empty where they should not.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]
    outside: Callable[[str], Tensor]
    block: Callable[[int], Mapping[str, Tensor]]
    norm_error: float
    caveats: tuple[str, ...]

    @property
    def cached_elements(self) -> int:
        """Numbers that a token takes in the cache of all layers."""
        row = int(self.config["kv_lora_rank"]) + int(self.config["qk_rope_head_dim"])
        return row * int(self.config["num_hidden_layers"])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name, float32; those of one block are in memory at a time."""
        at, block = -1, {}
        for name, shape in self.shapes.items():
            if not name.startswith(BLOCKS):
                value = self.outside(name)
            else:
                number, part = name.removeprefix(BLOCKS).split(".", 1)
                if int(number) != at:
                    at = int(number)
                    block = dict(self.block(at))
                value = block.pop(part)
            assert value.shape == shape, name
            yield name, value.float().contiguous()


def require_blocks(program: AnyProgram, sites: Sequence[AttentionSite]) -> None:
    """Refuse a model whose blocks are not those of such a checkpoint, by the names of its weights.

    That they also compute the same is checked when the checkpoint is written.

    Args:
        program: The original.
        sites: Its attention layers.

    Raises:
        LoadError: It has no configuration.
        RefusedError: A weight has no place, or is missing; or rotations change with the length of the text.
    """
    _require_config(program.assets.config, program.source)
    found = {name for name, value in program.exported.state_dict.items() if value.is_floating_point()}
    own = {name for s in sites for p in (s.query, s.key, s.value) for name in p.parameters}
    _require_names(_both_tables(dict.fromkeys(found - own)).keys(), program.source, len(sites))


def stock_checkpoint(module: LatentModel, blueprint: Blueprint, config: Mapping[str, Any]) -> Checkpoint:
    """Say what a stock checkpoint of a converted model holds.

    Args:
        module: The converted model, as it is now.
        blueprint: What its conversion fixed.
        config: The original's configuration.

    Raises:
        LoadError: It has no configuration.
        RefusedError: Its blocks are not those of such a checkpoint, or it is larger than the preset.
    """
    _require_config(config, blueprint.source)
    weights = _both_tables({name.removeprefix("graph."): value for name, value in module.state_dict().items()})
    attentions = blueprint.attentions
    latent = tuple(attention.holder for attention in attentions)
    _require_names({name for name in weights if not name.startswith(latent)}, blueprint.source, len(attentions))
    layers = [
        Layer(attention, _inside(weights, attention.holder), _inside(weights, f"{BLOCKS}{i}."))
        for i, attention in enumerate(attentions)
    ]
    stock = _stock(layers, weights, blueprint, config)
    return Checkpoint(
        config=_written(stock.config),
        shapes=stock.shapes,
        outside=lambda name: weights[name].float() * (stock.residual if name == _EMBEDDING else 1.0),
        block=lambda number: block_tensors(layers[number], stock),
        norm_error=norm_error(layers, stock),
        caveats=_caveats(stock.config),
    )


def _both_tables(weights: dict[str, _Any]) -> dict[str, _Any]:
    """Embedding and head each by its name; a graph names a tied one once."""
    found = [weights[name] for name in _TABLES if name in weights]
    return {name: found[0] for name in _TABLES if found} | weights


def _inside(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _require_config(config: Mapping[str, Any], source: str) -> None:
    missing = [name for name in ("rms_norm_eps", "hidden_act", "max_position_embeddings") if name not in config]
    if missing:
        raise LoadError(
            f"The configuration of '{source}' has no {missing[0]}, which a DeepSeek checkpoint needs.",
            "Give a Hugging Face model with the blocks of Llama.",
        )
    scaling = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if scaling not in _ROPE_TYPES:
        raise RefusedError(
            f"Rotations of '{source}' are scaled by '{scaling}', which follows the length of the text.", REMEDY
        )


def _require_names(found: Set[str], source: str, layers: int) -> None:
    """Refuse weights that are not those of Llama's blocks; attention is told by what it does, and not among them."""
    blocks = {f"{BLOCKS}{i}.{name}" for i in range(layers) for name in BLOCK_PARTS}
    biases = {f"{BLOCKS}{i}.{OUTPUT}.bias" for i in range(layers)}
    missing, foreign = sorted({*blocks, *_OUTSIDE} - found), sorted(found - blocks - biases - {*_OUTSIDE})
    experts = next((name for name in foreign if ".experts." in name), None)
    if experts:
        raise RefusedError(
            f"'{source}' has experts ('{experts}'), and routers of DeepSeek-V3 weigh experts by sigmoids: a softmax, "
            "as Mixtral and Qwen have it, gives other weights, and a router has no bias to make up for it.",
            REMEDY,
        )
    if foreign or missing:
        what = f"no place for '{foreign[0]}'" if foreign else f"a '{missing[0]}', which it lacks"
        raise RefusedError(
            f"The blocks of '{source}' are not those of a DeepSeek checkpoint, which has {what}.", REMEDY
        )


def _stock(
    layers: Sequence[Layer], weights: Mapping[str, Tensor], blueprint: Blueprint, given: Mapping[str, Any]
) -> Stock:
    """Configure the stock code, and read from it what it computes with."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as code

    config = _configure(layers[0], len(layers), weights, blueprint, given)
    biases = ("query_bias", "row_bias", "output_bias")
    own = any(name in layer.latent for layer in layers for name in biases)
    config.attention_bias = own or any(name.endswith(f"{OUTPUT}.bias") for name in weights)
    config.q_lora_rank = _query_latent(layers, blueprint.q_rank)
    with torch.device("meta"):
        model = code.DeepseekV3ForCausalLM(config)
    table, rope_factor, scale = _rotation(config)
    eps = float(model.model.layers[0].self_attn.kv_a_layernorm.variance_epsilon)
    config.rms_norm_eps = eps
    return Stock(
        config=config,
        shapes={name: value.shape for name, value in sorted(model.state_dict().items())},
        table=table,
        rope_factor=rope_factor,
        scale=scale,
        eps=eps,
        residual=math.sqrt(eps / float(given["rms_norm_eps"])),
    )


def _query_latent(layers: Sequence[Layer], asked: int | None) -> int | None:
    """Length of the latent of queries, which carries biases in one entry that is always 1; None where there is none."""
    rows, width = layers[0].latent["query"].shape
    constant = int(any("query_bias" in layer.latent for layer in layers))
    if asked is None:
        return width + 1 if constant else None
    return min(asked, rows, width) + constant


def stock_rotation(config: Mapping[str, Any]) -> tuple[tuple[float, ...], float, float]:
    """Frequencies of the rope key, factor of rotations and factor of logits that stock transformers computes with.

    Args:
        config: Content of ``config.json``.
    """
    from transformers import DeepseekV3Config

    return _rotation(DeepseekV3Config.from_dict(dict(config)))


def _rotation(config: Any) -> tuple[tuple[float, ...], float, float]:  # noqa: ANN401 - transformers' own
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as code

    rotation = code.DeepseekV3RotaryEmbedding(config)
    with torch.device("meta"):
        scale = float(code.DeepseekV3Attention(config, 0).scaling)
    return tuple(rotation.inv_freq.tolist()), float(rotation.attention_scaling), scale


def _configure(
    layer: Layer, layers: int, weights: Mapping[str, Tensor], blueprint: Blueprint, given: Mapping[str, Any]
) -> Any:  # noqa: ANN401 - transformers' own
    from transformers import DeepseekV3Config

    shape = blueprint.shape
    rank, rope = FLASHMLA if blueprint.preset == "flashmla" else (shape.kv_rank, shape.rope_dims)
    if shape.kv_rank > rank or shape.rope_dims > rope:
        raise RefusedError(
            f"FlashMLA reads {rank} latent entries and {rope} rotating channels, and this model has {shape.kv_rank} "
            f"and {shape.rope_dims}.",
            f"Give --kv-rank {rank} and --rope-dims {rope}, or less.",
        )
    if shape.rope_theta is None:
        rotation = {k: v for k, v in given["rope_parameters"].items() if k != "partial_rotary_factor"}
    else:
        rotation = {"rope_type": "default", "rope_theta": shape.rope_theta}
    vocabulary, width = weights[_EMBEDDING].shape
    marks: dict[str, Any] = {name: given.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        dtype="float32",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(layer.rest["mlp.gate_proj.weight"]),
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        routed_scaling_factor=1.0,
        num_mtp_layers=0,
        num_attention_heads=layer.attention.heads,
        num_key_value_heads=layer.attention.heads,
        q_lora_rank=None,
        kv_lora_rank=rank,
        qk_nope_head_dim=layer.latent["key_up"].shape[1],
        qk_rope_head_dim=rope,
        v_head_dim=layer.attention.v_dim,
        hidden_act=given["hidden_act"],
        max_position_embeddings=given["max_position_embeddings"],
        rope_parameters=rotation,
        rope_interleave=True,
        tie_word_embeddings=False,  # serving engines read both tables
        **marks,
    )


def _written(config: Any) -> dict[str, Any]:  # noqa: ANN401 - transformers' own
    """Content of ``config.json``, with the rope where transformers before version 5, and what is built on it, look."""
    rope = config.rope_parameters
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else rope}
    found: dict[str, Any] = config.to_diff_dict()
    return found | older


def _caveats(config: Any) -> tuple[str, ...]:  # noqa: ANN401 - transformers' own
    """Why engines other than transformers would not compute the same."""
    scaling = config.rope_parameters["rope_type"]
    found = {
        "attention has biases, and vLLM and SGLang have no place for them": config.attention_bias,
        f"rotations are scaled by '{scaling}', for which vLLM and SGLang put DeepSeek's YaRN": scaling != "default",
        f"the activation is '{config.hidden_act}', and vLLM and SGLang have silu only": config.hidden_act != "silu",
    }
    return tuple(caveat for caveat, present in found.items() if present)
