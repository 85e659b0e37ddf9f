"""What llama.cpp computes of a GGUF file of the architecture deepseek2, in float64.

Written after `src/models/deepseek2.cpp`, `llama-context.cpp` and the rope of `ggml-cpu/ops.cpp` (0c1e5709), for files
with split up-projections and dense blocks: an oracle where llama.cpp itself is not at hand.
"""

from __future__ import annotations

import math

import numpy as np
from gguf import GGUFReader


class Graph:
    def __init__(self, path):
        reader = GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.weights = {t.name: np.array(t.data, np.float64) for t in reader.tensors}

    def size(self, name, default=None):
        return self.fields.get(f"deepseek2.{name}", default)

    def norm(self, x, name):
        eps = self.size("attention.layer_norm_rms_epsilon")
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.weights[f"{name}.weight"]

    def product(self, x, name):
        return x @ self.weights[f"{name}.weight"].T

    def rotation(self, length):
        """Cosines and sines `[length, pairs]`, and the factor of logits."""
        dims, base = self.size("rope.dimension_count"), self.size("rope.freq_base")
        kind, factor = self.size("rope.scaling.type", "linear"), self.size("rope.scaling.factor", 1.0)
        if kind == "none":
            factor = 1.0
        pair = np.arange(dims // 2)
        plain = base ** (-2 * pair / dims)
        log = 1 + 0.1 * math.log(factor)
        magnitude, attention = 1.0, 1.0
        frequency = plain / factor
        if kind == "yarn":
            original = self.size("rope.scaling.original_context_length")
            fast, slow = (self.size(f"rope.scaling.yarn_beta_{x}") for x in ("fast", "slow"))
            low, high = (dims * math.log(original / (x * 2 * math.pi)) / (2 * math.log(base)) for x in (fast, slow))
            low, high = max(0, math.floor(low)), min(dims - 1, math.ceil(high))
            ramp = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
            frequency = frequency * (1 - ramp) + plain * ramp
            attention = log / log
            magnitude = attention * log
        scale = (attention * log) ** 2
        angle = np.arange(length)[:, None] * frequency
        return np.cos(angle) * magnitude, np.sin(angle) * magnitude, scale

    def logits(self, ids):
        rank, rope = self.size("attention.kv_lora_rank"), self.size("rope.dimension_count")
        width, values = self.size("attention.key_length_mla"), self.size("attention.value_length_mla")
        heads, count = self.size("attention.head_count"), len(ids)
        assert self.size("attention.key_length") == rank + rope
        assert self.size("attention.head_count_kv") == 1
        cos, sin, factor = self.rotation(count)
        hidden = np.triu(np.full((count, count), -np.inf), 1)

        def turned(x):  # [..., length, rope], neighbours are pairs
            real, imaginary = x[..., ::2], x[..., 1::2]
            return np.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).reshape(x.shape)

        x = self.weights["token_embd.weight"][ids]
        for i in range(self.size("block_count")):
            assert i < self.size("leading_dense_block_count")
            y = self.norm(x, f"blk.{i}.attn_norm")
            if self.size("attention.q_lora_rank"):
                q = self.norm(self.product(y, f"blk.{i}.attn_q_a"), f"blk.{i}.attn_q_a_norm")
                q = self.product(q, f"blk.{i}.attn_q_b")
            else:
                q = self.product(y, f"blk.{i}.attn_q")
            q = q.reshape(count, heads, width).swapaxes(0, 1)
            row = self.product(y, f"blk.{i}.attn_kv_a_mqa")
            latent, key = self.norm(row[:, :rank], f"blk.{i}.attn_kv_a_norm"), turned(row[:, rank:])
            absorbed = q[..., : width - rope] @ self.weights[f"blk.{i}.attn_k_b.weight"].swapaxes(1, 2)
            scores = (absorbed @ latent.T + turned(q[..., width - rope :]) @ key.T) * factor / math.sqrt(width)
            scores = np.exp(scores + hidden - (scores + hidden).max(-1, keepdims=True))
            attended = scores / scores.sum(-1, keepdims=True) @ latent
            out = attended @ self.weights[f"blk.{i}.attn_v_b.weight"].swapaxes(1, 2)
            x = x + self.product(out.swapaxes(0, 1).reshape(count, heads * values), f"blk.{i}.attn_output")
            y = self.norm(x, f"blk.{i}.ffn_norm")
            gate = self.product(y, f"blk.{i}.ffn_gate")
            up = gate / (1 + np.exp(-gate)) * self.product(y, f"blk.{i}.ffn_up")
            x = x + self.product(up, f"blk.{i}.ffn_down")
        return self.product(self.norm(x, "output_norm"), "output")
