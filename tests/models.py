"""Pico models: the smallest instance of every architecture the tests convert, and of every kind that is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, HEADS = 97, 64, 2, 4


def _hf(config: object) -> nn.Module:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    return _settle(model)


def _settle(module: nn.Module) -> nn.Module:
    """Evaluation mode, without a cache, and with norms and biases that are not all ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if hasattr(module, "config"):
        module.config.use_cache = False
    return module.eval()


_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "use_cache": False,
}


def llama(**changes: object) -> nn.Module:
    from transformers import LlamaConfig

    return _hf(LlamaConfig(**{**_COMMON, **changes}))


def mistral(window: int | None = 6, positions: int = 128) -> nn.Module:
    from transformers import MistralConfig

    return _hf(MistralConfig(**{**_COMMON, "sliding_window": window, "max_position_embeddings": positions}))


def qwen2() -> nn.Module:
    from transformers import Qwen2Config

    return _hf(Qwen2Config(**_COMMON))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config

    return _hf(Qwen3Config(**{**_COMMON, "head_dim": 16}))


def gemma2() -> nn.Module:
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    config = Gemma2Config(**{**_COMMON, "head_dim": 16, "sliding_window": 6})
    return _settle(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager"))


def gpt2() -> nn.Module:
    from transformers import GPT2Config

    return _hf(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=128))


class _NanoAttention(nn.Module):
    """Fused projections with biases, learned positions elsewhere, fused or spelled-out attention."""

    def __init__(self, spelled_out: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.spelled_out = spelled_out
        self.register_buffer("seen", torch.tril(torch.ones(128, 128)).view(1, 1, 128, 128))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            y.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for y in self.qkv(x).split(width, dim=2)
        )
        if self.spelled_out:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(self.seen[:, :, :length, :length] == 0, -math.inf)
            y = F.softmax(scores, dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))


class NanoGPT(nn.Module):
    """A GPT-2-like model as a beginner writes it."""

    def __init__(self, spelled_out: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(128, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS))
        self.attentions = nn.ModuleList(_NanoAttention(spelled_out) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH)) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1], device=idx.device))
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x)


class TabledGPT(NanoGPT):
    """Positions are a sliced parameter, not an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 128, WIDTH) * 0.1)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx) + self.table[:, : idx.shape[1]]
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x)


class _ComplexAttention(nn.Module):
    """Complex-number rotation from a precomputed table, repeated key/value heads, additive mask buffer."""

    def __init__(self, kv_heads: int = 2) -> None:
        super().__init__()
        self.dim, self.kv_heads = WIDTH // HEADS, kv_heads
        self.wq = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk = nn.Linear(WIDTH, kv_heads * self.dim, bias=False)
        self.wv = nn.Linear(WIDTH, kv_heads * self.dim, bias=False)
        self.wo = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("mask", torch.full((1, 1, 128, 128), -math.inf).triu(1))

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, HEADS, self.dim)
        k = self.wk(x).view(batch, length, self.kv_heads, self.dim)
        v = self.wv(x).view(batch, length, self.kv_heads, self.dim)
        q, k = self.rotate(q, turn), self.rotate(k, turn)
        k, v = (y.repeat_interleave(HEADS // self.kv_heads, dim=2) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.dim) + self.mask[:, :, :length, :length]
        y = F.softmax(scores.float(), dim=-1).type_as(q) @ v
        return self.wo(y.transpose(1, 2).contiguous().view(batch, length, -1))

    @staticmethod
    def rotate(x: Tensor, turn: Tensor) -> Tensor:
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * turn[None, :, None]).flatten(3).type_as(x)


class ComplexLlama(nn.Module):
    """A Llama written with complex rotations and root-mean-square norms of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.attentions = nn.ModuleList(_ComplexAttention() for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(LAYERS + 1))
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 96, bias=False) for _ in range(LAYERS))
        self.downs = nn.ModuleList(nn.Linear(96, WIDTH, bias=False) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        dim = WIDTH // HEADS
        frequency = 10000.0 ** (-torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(128).float(), frequency)
        self.register_buffer("turn", torch.polar(torch.ones_like(angle), angle), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        turn = self.turn[: tokens.shape[1]]
        for attention, norm, up, down in zip(self.attentions, self.norms, self.ups, self.downs, strict=False):
            x = x + attention(norm(x), turn)
            x = x + down(F.silu(up(x)))
        return self.head(self.norms[-1](x))


class BidirectionalGPT(NanoGPT):
    """No causal mask: nothing is cached."""

    def __init__(self) -> None:
        super().__init__(spelled_out=True)
        for attention in self.attentions:
            attention.seen.fill_(1.0)


class ChunkedGPT(NanoGPT):
    """Tokens see those of their own chunk of 5."""

    def __init__(self) -> None:
        super().__init__(spelled_out=True)
        for attention in self.attentions:
            chunk = torch.arange(attention.seen.shape[-1]) // 5
            attention.seen.mul_(chunk[:, None] == chunk)


def handwritten(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return _settle(kind())


CONVERTIBLE: dict[str, Callable[[], nn.Module]] = {
    "llama-gqa": llama,
    "llama-mha": lambda: llama(num_key_value_heads=HEADS),
    "llama-mqa": lambda: llama(num_key_value_heads=1),
    "llama-attention-bias": lambda: llama(attention_bias=True),
    "llama-llama3-rope": lambda: llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "llama-yarn": lambda: llama(
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "smollm": lambda: llama(num_attention_heads=3, num_key_value_heads=1, hidden_size=48, tie_word_embeddings=True),
    "mistral-window": mistral,
    "mistral-full": lambda: mistral(window=None),
    "qwen2": qwen2,
    "nanogpt": lambda: handwritten(NanoGPT),
    "nanogpt-spelled-out": lambda: handwritten(lambda: NanoGPT(spelled_out=True)),
    "nanogpt-table": lambda: handwritten(TabledGPT),
    "complex-llama": lambda: handwritten(ComplexLlama),
}
"""Models that must convert: name to factory."""


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def example(model: nn.Module) -> dict[str, Tensor] | tuple[Tensor, ...]:
    """Inputs to export a pico model with."""
    ids = tokens(2, 5)
    if not hasattr(model, "config"):
        return (ids,)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(5).expand(2, 5).contiguous(),
    }


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the original model, whatever it returns."""
    with torch.no_grad():
        result = model(ids)
    return result if isinstance(result, Tensor) else result.logits
