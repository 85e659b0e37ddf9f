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

from mla_compile.deepseek import FLASHMLA, same_frequency
from mla_compile.errors import LoadError, RefusedError, UsageError
from mla_compile.passes.emit import holder_name
from mla_compile.program import AnyProgram
from mla_compile.report import Report
from mla_compile.runtime.module import LatentModel
from mla_compile.site import AttentionSite

__all__ = ["Checkpoint", "require_blocks", "stock_checkpoint", "stock_rotation"]

_Any = TypeVar("_Any")

_GAIN = 2.0**20
"""Gain of the norms of latents; a power of two, which no type rounds."""
_NORM_TOLERANCE = 1e-3
"""Largest relative error of a norm that is taken for none."""
_RANK_TOLERANCE = 1e-5
"""Largest singular value, over the largest of all, that is taken for rounding of float32."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Scalings that are one table of frequencies, whatever the length of the text."""
_BLOCKS, _OUTPUT = "model.layers.", "self_attn.o_proj"
_EMBEDDING = "model.embed_tokens.weight"
_TABLES = (_EMBEDDING, "lm_head.weight")
_OUTSIDE = (*_TABLES, "model.norm.weight")
_BLOCK = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    f"{_OUTPUT}.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)
_REMEDY = "Write a .onnx file instead."


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
            if not name.startswith(_BLOCKS):
                value = self.outside(name)
            else:
                number, part = name.removeprefix(_BLOCKS).split(".", 1)
                if int(number) != at:
                    at = int(number)
                    block = dict(self.block(at))
                value = block.pop(part)
            assert value.shape == shape, name
            yield name, value.float().contiguous()


@dataclass(frozen=True)
class _Layer:
    """One block of the converted model.

    Attributes:
        site: Its attention.
        latent: Its latent weights, named as :func:`~mla_compile.passes.emit.layer_parameters` names them.
        rest: Its other weights, by their names inside it.
        frequencies: Those of its rope components, in their order.
    """

    site: AttentionSite
    latent: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]
    frequencies: tuple[float, ...]

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
class _Stock:
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
    own = {name for s in sites for p in (s.query, s.key, s.value) for name in (p.weight, p.bias) if name}
    _require_names(_both_tables(dict.fromkeys(found - own)).keys(), program.source, len(sites))


def stock_checkpoint(module: LatentModel, report: Report, config: Mapping[str, Any]) -> Checkpoint:
    """Say what a stock checkpoint of a converted model holds.

    Args:
        module: The converted model, as it is now.
        report: What its conversion did.
        config: The original's configuration.

    Raises:
        UsageError: It was converted with another layout.
        LoadError: It has no configuration.
        RefusedError: Its blocks are not those of such a checkpoint, or it is larger than the preset.
    """
    if report.deepseek is None:
        raise UsageError(
            "The model was converted with the layout free, which a DeepSeek checkpoint cannot express.",
            "Convert it with --layout deepseek.",
        )
    _require_config(config, report.source)
    weights = _both_tables({name.removeprefix("graph."): value for name, value in module.state_dict().items()})
    holders = [f"{holder_name(site.path, site.index)}." for site in report.sites]
    _require_names({n for n in weights if not n.startswith(tuple(holders))}, report.source, len(holders))
    layers = [
        _Layer(site, _inside(weights, holder), _inside(weights, f"{_BLOCKS}{i}."), forecast.rope_frequencies)
        for i, (site, holder, forecast) in enumerate(zip(report.sites, holders, report.forecasts, strict=True))
    ]
    stock = _stock(layers, weights, report, config)
    return Checkpoint(
        config=_written(stock.config),
        shapes=stock.shapes,
        outside=lambda name: weights[name].float() * (stock.residual if name == _EMBEDDING else 1.0),
        block=lambda number: _block(layers[number], stock),
        norm_error=_norm_error(layers, stock),
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
            f"Rotations of '{source}' are scaled by '{scaling}', which follows the length of the text.", _REMEDY
        )


def _require_names(found: Set[str], source: str, layers: int) -> None:
    """Refuse weights that are not those of Llama's blocks; attention is told by what it does, and not among them."""
    blocks = {f"{_BLOCKS}{i}.{name}" for i in range(layers) for name in _BLOCK}
    biases = {f"{_BLOCKS}{i}.{_OUTPUT}.bias" for i in range(layers)}
    missing, foreign = sorted({*blocks, *_OUTSIDE} - found), sorted(found - blocks - biases - {*_OUTSIDE})
    experts = next((name for name in foreign if ".experts." in name), None)
    if experts:
        raise RefusedError(
            f"'{source}' has experts ('{experts}'), and routers of DeepSeek-V3 weigh experts by sigmoids: a softmax, "
            "as Mixtral and Qwen have it, gives other weights, and a router has no bias to make up for it.",
            _REMEDY,
        )
    if foreign or missing:
        what = f"no place for '{foreign[0]}'" if foreign else f"a '{missing[0]}', which it lacks"
        raise RefusedError(
            f"The blocks of '{source}' are not those of a DeepSeek checkpoint, which has {what}.", _REMEDY
        )


def _stock(layers: Sequence[_Layer], weights: Mapping[str, Tensor], report: Report, given: Mapping[str, Any]) -> _Stock:
    """Configure the stock code, and read from it what it computes with."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as code

    assert report.deepseek is not None
    config = _configure(layers[0], len(layers), weights, report, given)
    biases = ("query_bias", "row_bias", "output_bias")
    own = any(name in layer.latent for layer in layers for name in biases)
    config.attention_bias = own or any(name.endswith(f"{_OUTPUT}.bias") for name in weights)
    config.q_lora_rank = _query_latent(layers, report.config.get("q_rank"))
    with torch.device("meta"):
        model = code.DeepseekV3ForCausalLM(config)
    table, rope_factor, scale = _rotation(config)
    eps = float(model.model.layers[0].self_attn.kv_a_layernorm.variance_epsilon)
    config.rms_norm_eps = eps
    return _Stock(
        config=config,
        shapes={name: value.shape for name, value in sorted(model.state_dict().items())},
        table=table,
        rope_factor=rope_factor,
        scale=scale,
        eps=eps,
        residual=math.sqrt(eps / float(given["rms_norm_eps"])),
    )


def _query_latent(layers: Sequence[_Layer], asked: int | None) -> int | None:
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
    layer: _Layer, layers: int, weights: Mapping[str, Tensor], report: Report, given: Mapping[str, Any]
) -> Any:  # noqa: ANN401 - transformers' own
    from transformers import DeepseekV3Config

    shape = report.deepseek
    assert shape is not None
    rank, rope = FLASHMLA if report.config.get("preset") == "flashmla" else (shape.kv_rank, shape.rope_dims)
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
        num_attention_heads=layer.site.heads,
        num_key_value_heads=layer.site.heads,
        q_lora_rank=None,
        kv_lora_rank=rank,
        qk_nope_head_dim=layer.latent["key_up"].shape[1],
        qk_rope_head_dim=rope,
        v_head_dim=layer.site.v_dim,
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


def _norm_error(layers: Sequence[_Layer], stock: _Stock) -> float:
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
            f"Latents are so large that the norm of a DeepSeek checkpoint might change them by {error:.1e}.", _REMEDY
        )
    return error


def _block(layer: _Layer, stock: _Stock) -> dict[str, Tensor]:
    """The tensors of one block, by their names inside it."""
    mlp = {name: layer.rest[name] for name in _BLOCK}
    scaled = {name: layer.rest[name].float() * stock.residual for name in ("mlp.down_proj.weight", f"{_OUTPUT}.weight")}
    row = _row(layer, layer.matrix("row"), stock)
    found = {"kv_a_proj_with_mqa.weight": row, "kv_b_proj.weight": _up(layer, stock), **_query(layer, stock)}
    found["kv_a_layernorm.weight"] = torch.full((stock.config.kv_lora_rank,), _GAIN)
    if stock.config.attention_bias:
        found["kv_a_proj_with_mqa.bias"] = _row(layer, layer.bias("row")[:, None], stock)[:, 0]
        found["o_proj.bias"] = _output_bias(layer) * stock.residual
    return mlp | scaled | {f"self_attn.{name}": value for name, value in found.items()}


def _query(layer: _Layer, stock: _Stock) -> dict[str, Tensor]:
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


def _query_factors(weight: Tensor, rank: int, layer: _Layer) -> tuple[Tensor, Tensor]:
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
            f"The queries of {layer.site.path} are of more than rank {rank}: training gave them more.",
            "Leave --q-rank or the training out.",
        )
    return right[:rank], left[:, :rank] * values[:rank]


def _query_rows(weight: Tensor, layer: _Layer, stock: _Stock) -> Tensor:
    """Rows of a query matrix in the order of the stock code, with its factor of logits taken out."""
    still = layer.latent["key_up"].shape[1]
    heads = weight.unflatten(0, (layer.site.heads, -1)) * (layer.site.scale / stock.scale)
    return torch.cat([heads[:, :still], _arranged(heads[:, still:], layer, stock)], 1).flatten(0, 1)


def _row(layer: _Layer, rows: Tensor, stock: _Stock) -> Tensor:
    """What is made of rows ``[latent | rope key]``: small latents, zeros up to the stock sizes."""
    latent = rows.new_zeros(stock.config.kv_lora_rank, rows.shape[1])
    latent[: layer.rank] = rows[: layer.rank] * stock.small
    return torch.cat([latent, _arranged(rows[layer.rank :], layer, stock)])


def _up(layer: _Layer, stock: _Stock) -> Tensor:
    """Keys that do not rotate and values, of every query head, from the latent."""
    heads = layer.site.heads
    keys, values = layer.matrix("key_up"), layer.matrix("value_up").mT
    parts = [x.repeat_interleave(heads // len(x), 0) for x in (keys, values)]
    missing = stock.config.kv_lora_rank - layer.rank
    return torch.nn.functional.pad(torch.cat(parts, 1), (0, missing)).flatten(0, 1)


def _output_bias(layer: _Layer) -> Tensor:
    """The bias of the output projection, with what is added to attention outputs in front of it."""
    projection = layer.rest[f"{_OUTPUT}.weight"].double()
    found = layer.rest.get(f"{_OUTPUT}.bias", projection.new_zeros(len(projection))).double()
    return found + projection @ layer.matrix("output_bias").flatten() if "output_bias" in layer.latent else found


def _arranged(rows: Tensor, layer: _Layer, stock: _Stock) -> Tensor:
    """Rotating rows ``[..., real | imaginary, n]`` as the stock code pairs them, side by side in its table's order.

    Raises:
        RefusedError: A frequency is not in its table, or twice.
    """
    places = [next((i for i, f in enumerate(stock.table) if same_frequency(f, own)), -1) for own in layer.frequencies]
    if -1 in places or len({*places}) < len(places):
        raise RefusedError(
            f"The frequencies of {layer.site.path} are not those of a rope key of {2 * len(stock.table)} channels.",
            f"Give a divisor of {2 * len(stock.table)} as --rope-dims.",
        )
    half, at = len(places), torch.tensor(places)
    found = rows.new_zeros(*rows.shape[:-2], 2 * len(stock.table), rows.shape[-1])
    found[..., 2 * at, :], found[..., 2 * at + 1, :] = rows[..., :half, :], rows[..., half:, :]
    return found / stock.rope_factor
