"""Two-layer instances of the families in transformers, each with the features its real checkpoints have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from families import DIM, HEADS, LAYERS, LONGEST, VOCABULARY, WIDTH, Family, Layer

WINDOW, THETA = 6, 10000.0
SLIDING_FIRST = ["sliding_attention", "full_attention"]
FULL_FIRST = SLIDING_FIRST[::-1]
COMMON: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "use_cache": False,
}
GPT2: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": LONGEST,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
"""The other way of naming the same."""


def build(config: str, *, eager: bool = False, **settings: object) -> nn.Module:
    """A model by its configuration class, with fixed weights that make all its features count.

    Args:
        config: Name of the class in transformers.
        eager: Spelled-out attention even where the fused operator is supported.
        **settings: Of the configuration.
    """
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    load = transformers.AutoModelForCausalLM.from_config
    try:
        module = load(made, dtype=torch.float32, attn_implementation="eager" if eager else "sdpa")
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        module = load(made, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if name.endswith("sinks"):
                parameter.copy_(drawn)
            elif parameter.dim() == 1 or "norm" in name:
                parameter.add_(0.1 * drawn)
            else:  # scores of about one, as in a trained model: with the usual 0.02 attention is all but uniform
                parameter.copy_(0.2 * drawn)
    module.config.use_cache = False
    return module.eval()


def rope(rope_type: str = "default", **settings: object) -> dict[str, object]:
    """Rotary settings with the usual base."""
    return {"rope_type": rope_type, "rope_theta": THETA, **settings}


def yarn() -> dict[str, object]:
    return rope("yarn", factor=4.0, original_max_position_embeddings=32)


YARN_SCALE = (0.1 * math.log(4.0) + 1) ** 2
"""What yarn multiplies scores by (Peng 2023, eq. 22)."""


def longrope(original: int) -> dict[str, object]:
    """Two sets of frequencies: one up to ``original`` tokens, the other for longer sequences."""
    pairs = DIM // 2
    return rope(
        "longrope",
        short_factor=[1.0 + 0.125 * i for i in range(pairs)],
        long_factor=[2.0 + 0.5 * i for i in range(pairs)],
        original_max_position_embeddings=original,
    )


def held(module: nn.Module, layer: int) -> Tensor:
    """Frequencies as the model holds them: the one buffer, or the one of the layer's type."""
    buffers = {n.rpartition(".")[2]: b for n, b in module.named_buffers() if n.endswith("inv_freq")}
    if "inv_freq" in buffers:
        return buffers["inv_freq"]
    return buffers[f"{module.config.layer_types[layer]}_inv_freq"]


def _family(
    config: str,
    layers: Layer | tuple[Layer, ...],
    *,
    base: dict[str, object] = COMMON,
    frequencies: Callable[[nn.Module, int], Tensor] | None = None,
    **settings: object,
) -> Family:
    layers = layers if isinstance(layers, tuple) else (layers,) * LAYERS
    return Family(lambda: build(config, **{**base, **settings}), layers, True, frequencies)


def _partial(count: int, **changes: object) -> Layer:
    return dataclasses.replace(GROUPED, rotary_dim=count, **changes)


def _sliding(layer: Layer, which: tuple[bool, ...] = (True, False)) -> tuple[Layer, ...]:
    return tuple(dataclasses.replace(layer, window=WINDOW if sliding else None) for sliding in which)


FULL = Layer(layout="half", rotary_dim=DIM, theta=THETA)
GROUPED = dataclasses.replace(FULL, kv_heads=2)
SCALED = dataclasses.replace(GROUPED, theta=None)
NORMED = dataclasses.replace(GROUPED, key_norm="rms")
SLOPES = (0.25, 0.0625, 0.015625, 0.00390625)
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

CONVERTIBLE: dict[str, Family] = {
    "llama2": _family("LlamaConfig", FULL, num_key_value_heads=HEADS),
    "llama3": _family("LlamaConfig", SCALED, rope_parameters=rope("llama3", **_LLAMA3), frequencies=held),
    "llama-yarn": _family(
        "LlamaConfig",
        dataclasses.replace(SCALED, scale=DIM**-0.5 * YARN_SCALE),
        rope_parameters=yarn(),
        frequencies=held,
    ),
    "llama-linear": _family("LlamaConfig", SCALED, rope_parameters=rope("linear", factor=4.0), frequencies=held),
    "llama-bias": _family("LlamaConfig", GROUPED, attention_bias=True),
    "llama-eager": _family("LlamaConfig", GROUPED, eager=True),
    "mistral": _family("MistralConfig", dataclasses.replace(GROUPED, window=WINDOW), sliding_window=WINDOW),
    "mixtral": _family("MixtralConfig", GROUPED, rope_parameters=rope(), **_MOE),
    "qwen2": _family(
        "Qwen2Config",
        _sliding(GROUPED, (False, True)),
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=FULL_FIRST,
    ),
    "qwen3": _family(
        "Qwen3Config",
        _sliding(NORMED, (False, True)),
        head_dim=DIM,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=FULL_FIRST,
    ),
    "qwen3-moe": _family(
        "Qwen3MoeConfig", NORMED, head_dim=DIM, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gemma": _family("GemmaConfig", dataclasses.replace(FULL, kv_heads=1), head_dim=DIM, num_key_value_heads=1),
    "gemma2": _family(
        "Gemma2Config",
        _sliding(dataclasses.replace(GROUPED, scale=24**-0.5, softcap=2.0)),
        head_dim=DIM,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        layer_types=SLIDING_FIRST,
    ),
    "gemma3": _family(
        "Gemma3TextConfig",
        _sliding(dataclasses.replace(NORMED, theta=None, scale=24**-0.5)),
        head_dim=DIM,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        layer_types=SLIDING_FIRST,
        rope_parameters={
            "sliding_attention": rope(),
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
        frequencies=held,
    ),
    "phi": _family(
        "PhiConfig",
        dataclasses.replace(FULL, rotary_dim=8),
        num_key_value_heads=HEADS,
        rope_parameters=rope(partial_rotary_factor=0.5),
    ),
    "phi3": _family(
        "Phi3Config",
        _partial(8, window=WINDOW),
        sliding_window=WINDOW,
        rope_parameters=rope(partial_rotary_factor=0.5),
    ),
    "phi3-longrope": _family(
        "Phi3Config",
        SCALED,
        original_max_position_embeddings=LONGEST,
        rope_parameters=longrope(LONGEST),
        frequencies=held,
    ),
    "gpt-neox": _family(
        "GPTNeoXConfig",
        dataclasses.replace(FULL, rotary_dim=4),
        num_key_value_heads=HEADS,
        rope_parameters=rope(partial_rotary_factor=0.25),
    ),
    "gpt-j": _family(
        "GPTJConfig", dataclasses.replace(FULL, layout="interleaved", rotary_dim=8), base=GPT2, rotary_dim=8
    ),
    "gpt2": _family("GPT2Config", Layer(), base=GPT2),
    "gpt-neo": _family(
        "GPTNeoConfig",
        (Layer(scale=1.0), Layer(scale=1.0, window=WINDOW)),
        base={k: v for k, v in COMMON.items() if k not in ("num_hidden_layers", "num_attention_heads")},
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
    ),
    "gpt-bigcode": _family("GPTBigCodeConfig", Layer(kv_heads=1), base=GPT2, multi_query=True),
    "opt": _family("OPTConfig", Layer(), ffn_dim=96, word_embed_proj_dim=WIDTH, pad_token_id=1),
    "bloom": _family(
        "BloomConfig",
        Layer(slopes=SLOPES),
        base={"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "use_cache": False},
    ),
    "mpt": _family(
        "MptConfig",
        Layer(slopes=SLOPES),
        base={"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "use_cache": False},
        max_seq_len=LONGEST,
    ),
    "falcon-multi-query": _family(
        "FalconConfig",
        dataclasses.replace(FULL, kv_heads=1),
        multi_query=True,
        new_decoder_architecture=False,
        alibi=False,
        bias=False,
    ),
    "falcon-new": _family(
        "FalconConfig", GROUPED, num_kv_heads=2, new_decoder_architecture=True, alibi=False, bias=False
    ),
    "falcon-alibi": _family(
        "FalconConfig",
        Layer(slopes=tuple(s * DIM**-0.5 for s in SLOPES)),
        multi_query=False,
        new_decoder_architecture=False,
        alibi=True,
        bias=True,
    ),
    "starcoder2": _family(
        "Starcoder2Config", dataclasses.replace(GROUPED, window=WINDOW), use_bias=True, sliding_window=WINDOW
    ),
    "olmo": _family("OlmoConfig", GROUPED),
    "olmo2": _family("Olmo2Config", dataclasses.replace(NORMED, per_head=False)),
    "cohere": _family("CohereConfig", dataclasses.replace(GROUPED, layout="interleaved"), rope_parameters=rope()),
    "cohere-qk-norm": _family(
        "CohereConfig",
        dataclasses.replace(GROUPED, layout="interleaved", key_norm="layer"),
        use_qk_norm=True,
        rope_parameters=rope(),
    ),
    "cohere2": _family(
        "Cohere2Config",
        (dataclasses.replace(GROUPED, layout="interleaved", window=WINDOW), Layer(kv_heads=2)),
        sliding_window=WINDOW,
        layer_types=SLIDING_FIRST,
    ),
    "glm": _family(
        "GlmConfig",
        _partial(8, layout="interleaved"),
        head_dim=DIM,
        attention_bias=True,
        rope_parameters=rope(partial_rotary_factor=0.5),
    ),
    "glm4": _family(
        "Glm4Config",
        _partial(8, layout="interleaved"),
        head_dim=DIM,
        attention_bias=True,
        rope_parameters=rope(partial_rotary_factor=0.5),
    ),
    "granite": _family(
        "GraniteConfig",
        dataclasses.replace(GROUPED, scale=0.125),
        attention_multiplier=0.125,
        embedding_multiplier=6.0,
        residual_multiplier=0.22,
        logits_scaling=4.0,
    ),
    "smollm3": _family("SmolLM3Config", (GROUPED, Layer(kv_heads=2)), no_rope_layer_interval=2, rope_parameters=rope()),
    "stablelm": _family(
        "StableLmConfig", _partial(4), use_qkv_bias=True, rope_parameters=rope(partial_rotary_factor=0.25)
    ),
    "stablelm-qk-norm": _family(
        "StableLmConfig",
        _partial(4, key_norm="layer"),
        qk_layernorm=True,
        rope_parameters=rope(partial_rotary_factor=0.25),
    ),
    "nemotron": _family("NemotronConfig", _partial(8), head_dim=DIM, rope_parameters=rope(partial_rotary_factor=0.5)),
    "gpt-oss": _family(
        "GptOssConfig",
        tuple(
            dataclasses.replace(
                SCALED,
                scale=DIM**-0.5 * YARN_SCALE,
                window=WINDOW if i == 0 else None,
                sinks=f"model.layers.{i}.self_attn.sinks",
            )
            for i in range(LAYERS)
        ),
        head_dim=DIM,
        sliding_window=WINDOW,
        layer_types=SLIDING_FIRST,
        rope_parameters=yarn() | {"truncate": False},
        frequencies=held,
        **_MOE,
    ),
    "gemma4": _family(
        "Gemma4TextConfig",
        _sliding(dataclasses.replace(NORMED, theta=None, scale=1.0, value_norm="rms"), (True, False, True, False)),
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        head_dim=DIM,
        global_head_dim=DIM,
        attention_k_eq_v=True,
        sliding_window=WINDOW,
        layer_types=SLIDING_FIRST * 2,
        rope_parameters={
            "sliding_attention": rope(),
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        frequencies=held,
    ),
    "nanochat": _family("NanoChatConfig", dataclasses.replace(NORMED, layout="custom"), rope_parameters=rope()),
    "hunyuan": _family("HunYuanDenseV1Config", NORMED, head_dim=DIM, rope_parameters=rope()),
    "ministral3": _family(
        "Ministral3Config",
        SCALED,
        head_dim=DIM,
        rope_parameters=rope(llama_4_scaling_beta=0.5, original_max_position_embeddings=4),
        frequencies=held,
    ),
    "granite-swa": _family(
        "GraniteSWAConfig",
        tuple(
            dataclasses.replace(layer, scale=0.125, sinks=f"model.layers.{i}.self_attn.sinks")
            for i, layer in enumerate(_sliding(GROUPED))
        ),
        attention_multiplier=0.125,
        sliding_window=WINDOW,
        layer_types=SLIDING_FIRST,
        layer_rope_theta=[THETA, THETA],
    ),
    "diffllama": _family(
        "DiffLlamaConfig",
        (dataclasses.replace(FULL, value_heads=2),) * 4,
        num_key_value_heads=HEADS,
        rope_parameters=rope(),
    ),
    "jetmoe": _family(
        "JetMoeConfig",
        dataclasses.replace(GROUPED, heads=4, kv_heads=2),
        base={k: v for k, v in COMMON.items() if k != "num_attention_heads"},
        kv_channels=DIM,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters=rope(),
    ),
    # Queries of the second kind of layer are multiplied with numbers that grow with their position.
    "llama4": _family(
        "Llama4TextConfig",
        (
            dataclasses.replace(NORMED, layout="interleaved", window=WINDOW, chunked=True),
            Layer(kv_heads=2),
        ),
        head_dim=DIM,
        attention_chunk_size=WINDOW,
        no_rope_layers=[1, 0],
        floor_scale=4,
        attn_scale=0.5,
        intermediate_size_mlp=96,
        num_experts_per_tok=1,
        num_local_experts=2,
        rope_parameters=rope(),
    ),
}
"""Models that must convert."""

REFUSED: dict[str, Family] = {
    # From 33 tokens on, all keys turn at other speeds than before: a cache of turned keys is wrong for them.
    "phi3-longrope-switching": _family(
        "Phi3Config", SCALED, original_max_position_embeddings=32, rope_parameters=longrope(32)
    ),
    "deepseek-v3": _family(
        "DeepseekV3Config",
        Layer(),
        num_key_value_heads=HEADS,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
    ),
    # What is added to a score is computed from the key's value.
    "doge": _family("DogeConfig", Layer(), rope_parameters=rope()),
}
"""Latent attention already, or masks that a cache of rows does not say."""
