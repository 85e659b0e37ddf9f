"""Tiny random models of every causal language model architecture in transformers, made without the hub.

A config class brings its own defaults; they are shrunk by field name (:data:`TINY`), lists with one entry per layer are
reduced to the first layer of every kind, sub-configs are shrunk alike, and what cannot be derived from names stands in
one table (:data:`OVERRIDES`). Weights are random enough that nothing hides: no gain is one, no bias is zero.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "LENGTH",
    "OVERRIDES",
    "TINY",
    "VOCABULARY",
    "TinyModel",
    "architectures",
    "build",
    "random_ids",
    "tiny_config",
]

VOCABULARY = 97
"""A prime, so that no other size equals it."""
LENGTH = 13
"""Length of the sequences models are tried on; no shrunk size equals it, so it marks axes of positions."""
MAX_PARAMETERS = 5_000_000
"""A model above this was not shrunk."""

_SIZES: Mapping[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size shape_vocab_size "
    "pronunciation_vocab_size classifier_proj_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    64: "hidden_size d_model n_embd embedding_size emb_dim embedding_dim word_embed_proj_dim hidden_size_global "
    "backbone_hidden_size lru_width attention_hidden_size input_embedding_size output_embedding_size lm_head_dim "
    "cross_attention_hidden_size projection_dim ple_embed_dim prompt_mid_dim",
    96: "intermediate_size ffn_dim d_ff dff dim_ff d_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "intermediate_size_mlp mlp_hidden_size feed_forward_size dense_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size router_hidden_size block_multiple_of "
    "image_size pronunciation_embed_dim shape_embed_dim attention_head_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_experts_per_tok num_experts_per_token moe_topk moe_k n_group num_expert_group "
    "num_layers_per_stack num_blocks type_vocab_size linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads num_attention_heads_per_layer "
    "num_local_experts num_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_heads "
    "index_n_heads zero_expert_num index_block_size audio_chunk_size num_mel_bins",
    1: "topk_group n_shared_experts num_shared_experts moe_num_shared_experts first_k_dense_replace n_mamba_heads "
    "mamba_n_groups mamba_ngroups n_groups num_dense_layers num_global_layers",
    16: "head_dim global_head_dim swa_head_dim d_head kv_channels attention_head_size dim_head d_kv kv_lora_rank "
    "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_head mamba_head_dim mamba_headdim "
    "index_head_dim hidden_size_per_layer_input o_lora_rank patch_size qk_head_dim adapter_rank laurel_rank hc_lowrank",
    24: "q_lora_rank",
    12: "v_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim state_size ssm_state_size mamba_d_state mamba_dt_rank "
    "mamba_n_heads mamba_num_heads time_step_rank mamba_chunk_size chunk_size gated_norm_rank d_rel num_buckets "
    "prompt_length",
    6: "sliding_window sliding_window_size attention_chunk_size window_size attention_window_size local_attention "
    "local_attention_window_len index_topk keep_window_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
    "model_max_length original_max_position_embeddings mamba_d_ssm rel_extent position_bias_max_distance",
}
TINY: Mapping[str, int] = {name: size for size, names in _SIZES.items() for name in names.split()}
"""Field name to tiny value; applied where a config has such a field and its default is a number (or numbers)."""
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 3}
_LAYER_INDICES = frozenset({"full_attn_idxs", "moe_layers", "hybrid_layer_ids", "cross_attention_layers"})
"""Lists that name layers by number: derived again from the shrunk config."""
_KEY_VALUE_HEADS = frozenset({"num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"})
_SWITCHES = {"use_cache": False, "is_decoder": True}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_GEMMA4 = {"head_dim": 16, "global_head_dim": 32}  # the second is no field, but taken apart at construction

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    # No layer of the default's pattern, or too few in so shallow a model, is an attention layer.
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {
        "num_hidden_layers": 4,  # the class ties the weights of its hybrid layers, so there must be two
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_dt_rank": 8,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "num_key_value_heads": 4,
    },
    # These sizes must fit each other in a way their names do not say.
    "bailing_hybrid": {"head_dim": 16},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "musicgen_decoder": {"num_codebooks": 1},  # then its input is one row of tokens per sequence, as for all others
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [32, 32],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 32,
    },
    # The defaults leave something out that the class needs.
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},  # DBRX clips at 8
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    # A default that is not a decoder.
    "xlm": {"causal": True},
    # Sizes of some layers stand outside the fields.
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 12,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    # Later layers read the keys and values of earlier ones of the same kind.
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
}
"""What cannot be derived from a field's name and default, by the model type of the config or sub-config."""


@dataclass(frozen=True)
class TinyModel:
    """A tiny model and how its attention is spelled.

    Attributes:
        module: The transformers model, in evaluation mode, float32.
        implementation: ``attn_implementation``: sdpa where the architecture offers it, else eager.
    """

    module: nn.Module
    implementation: str


def architectures() -> dict[str, str]:
    """Every model type that transformers maps to a causal language model, with the class it maps to."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {name: c if isinstance(c, str) else c[0] for name, c in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def tiny_config(model_type: str) -> Any:  # noqa: ANN401 - a transformers config
    """Shrink the default config of a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrink(CONFIG_MAPPING[model_type])


def _shrink(config_class: Any) -> Any:  # noqa: ANN401 - a transformers config
    fields = [f.name for f in dataclasses.fields(config_class) if f.init]
    stored = vars(config_class())  # the class may refuse to be asked for what differs between layers
    default = {name: stored.get(config_class.attribute_map.get(name, name)) for name in {*fields, *stored}}
    subs = {name for name in getattr(config_class, "sub_configs", None) or {} if default.get(name) is not None}
    overrides = OVERRIDES.get(config_class.model_type, {})
    latent = _is_number(default.get("kv_lora_rank"))
    chosen: dict[str, Any] = {}
    for name in fields:
        value = default.get(name)
        if name in subs:
            chosen[name] = _shrink(type(value))
        elif name in TINY and _is_number(value):
            chosen[name] = TINY[name]
        elif name in _TOKENS and value is not None:
            chosen[name] = _TOKENS[name]
        elif name in _KEY_VALUE_HEADS and _is_number(value):
            chosen[name] = TINY["num_attention_heads"] if latent else min(value, 2)
        elif name in _SWITCHES:
            chosen[name] = _SWITCHES[name]
    chosen |= _layers(default, fields)
    for name, value in overrides.items():
        # A sub-config of its own model type has its own entry; one without is changed from here.
        if name in subs:
            for key, number in value.items():
                setattr(chosen[name], key, number)
        else:
            chosen[name] = value
    return config_class(**chosen)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layers(default: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Keep the first layer of every kind, at least two, of the lists that have one entry per layer."""
    counter = next((n for n in _LAYER_COUNTS if n in fields), None)
    count = default.get(counter) if counter else None
    if counter is None or not isinstance(count, int):
        return {}
    lists = {
        name: list(value)
        for name in fields
        if name not in _LAYER_INDICES
        and isinstance(value := default.get(name), list | tuple)
        and len(value) == count
        and count > 2
    }
    if not lists:
        return {}
    kinds = list(zip(*(map(str, v) for v in lists.values()), strict=True))
    keep = {kinds.index(kind) for kind in kinds}
    keep |= set([i for i in range(count) if i not in keep][: max(0, 2 - len(keep))])
    shrunk: dict[str, Any] = {
        name: [TINY[name] if name in TINY and _is_number(values[i]) else values[i] for i in sorted(keep)]
        for name, values in lists.items()
    }
    return {**shrunk, counter: len(keep)}


def build(model_type: str) -> TinyModel:
    """Build the tiny model of a type, with scaled-dot-product attention if it has that, else spelled out.

    Raises:
        Exception: Whatever transformers raises when the shrunk config does not make a model.
    """
    name = architectures()[model_type]
    model_class = getattr(importlib.import_module("transformers"), name)
    config = _for_class(tiny_config(model_type), model_class)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"the config was not shrunk: {size / 1e6:.0f} million parameters")
    try:
        module, implementation = _instantiate(model_class, config, "sdpa"), "sdpa"
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        module, implementation = _instantiate(model_class, config, "eager"), "eager"
    _randomise(module)
    return TinyModel(module, implementation)


def _for_class(config: Any, model_class: Any) -> Any:  # noqa: ANN401 - a transformers config and class
    """The part of a config of several modalities that the class is built from, as ``AutoModelForCausalLM`` takes it."""
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        for name in getattr(config, "sub_configs", None) or {}:
            if isinstance(getattr(config, name), wanted):
                return getattr(config, name)
    return config


def _instantiate(model_class: Any, config: Any, implementation: str) -> nn.Module:  # noqa: ANN401
    torch.manual_seed(0)
    module: nn.Module = model_class._from_config(config, attn_implementation=implementation)
    return module.float().eval()


def _randomise(module: nn.Module) -> None:
    """Give every parameter a value that would be missed: gains off one, biases off zero, scores off uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if not parameter.requires_grad:
                continue  # a table of sines
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            elif "norm" not in name:
                parameter.copy_(0.15 * noise)


def random_ids(batch: int, length: int, seed: int) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(10, 90, (batch, length), generator=torch.Generator().manual_seed(seed))
