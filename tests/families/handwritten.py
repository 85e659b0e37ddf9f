"""Decoders as people write them by hand: every model here is a small, faithful spelling of a well-known manner.

The trunk is the same; what differs is how attention is written, how positions come in, and how a block is wired.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import DIM, HEADS, LAYERS, LONGEST, VOCABULARY, WIDTH, Family, Layer

KV_HEADS, FEEDFORWARD, THETA = 2, 96, 10000.0


def settle(kind: Callable[[], nn.Module]) -> nn.Module:
    """Build with fixed weights, large enough for scores that matter; norms and biases are not ones and zeros."""
    torch.manual_seed(0)
    module = kind()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def angles(dim: int, length: int = LONGEST, theta: float = THETA) -> Tensor:
    """``[length, dim / 2]``: radians every pair has turned by."""
    frequency = theta ** (-torch.arange(0, dim, 2).float() / dim)
    return torch.outer(torch.arange(length).float(), frequency)


class RMSNorm(nn.Module):
    """Root-mean-square norm, spelled out."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class SwiGLU(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, FEEDFORWARD, bias=False)
        self.w2 = nn.Linear(FEEDFORWARD, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, FEEDFORWARD, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, SwiGLU()
        self.attention_norm, self.mlp_norm = RMSNorm(WIDTH), RMSNorm(WIDTH)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *context)
        return x + self.mlp(self.mlp_norm(x))


class Trunk(nn.Module):
    """Embedding, blocks, norm, head; ``context`` is what all layers share at one length."""

    attention: type[nn.Module]
    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(self.block(self.attention()) for _ in range(LAYERS))
        self.norm = RMSNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def context(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return ()

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tok_embeddings(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x, context = self.embed(tokens), self.context(tokens)
        for layer in self.layers:
            x = layer(x, *context)
        return self.output(self.norm(x))


# ---- nanoGPT: one fused projection with biases, learned positions, flash or a mask buffer


class NanoAttention(nn.Module):
    """Causal self-attention with one fused projection."""

    flash = True

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=True)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=True)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.1), nn.Dropout(0.1)
        if not self.flash:
            seen = torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST)
            self.register_buffer("bias", seen)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (y.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for y in (q, k, v))
        if self.flash:
            dropout = 0.1 if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
            y = self.attn_dropout(F.softmax(scores, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(batch, length, width)
        return self.resid_dropout(self.c_proj(y))


class ManualNanoAttention(NanoAttention):
    """The same without the fused operator."""

    flash = False


class NanoGPT(nn.Module):
    """Layer norms, learned positions, a head tied to the embedding."""

    attention: type[nn.Module] = NanoAttention

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(WIDTH),
                    "attn": self.attention(),
                    "ln_2": nn.LayerNorm(WIDTH),
                    "mlp": nn.Sequential(nn.Linear(WIDTH, FEEDFORWARD), nn.GELU(), nn.Linear(FEEDFORWARD, WIDTH)),
                }
            )
            for _ in range(LAYERS)
        )
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        length = idx.size(1)
        assert length <= LONGEST, f"cannot forward a sequence of {length} tokens"
        position = torch.arange(0, length, dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(position))
        for block in self.h:
            x = x + block["attn"](block["ln_1"](x))
            x = x + block["mlp"](block["ln_2"](x))
        return self.lm_head(self.ln_f(x))


class ManualNanoGPT(NanoGPT):
    """With the attention spelled out."""

    attention = ManualNanoAttention


# ---- llama2.c: rotation as complex numbers or as two tables, repeated key/value heads, a mask buffer


class LlamaAttention(nn.Module):
    """Grouped attention; the rotation is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.wk = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.wv = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.wo = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        mask = torch.full((1, 1, LONGEST, LONGEST), float("-inf"))
        self.register_buffer("mask", torch.triu(mask, diagonal=1))

    def rotate(self, q: Tensor, k: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, *table: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        q = q.view(batch, length, HEADS, DIM)
        k, v = k.view(batch, length, KV_HEADS, DIM), v.view(batch, length, KV_HEADS, DIM)
        q, k = self.rotate(q, k, *table)
        k, v = self.repeat(k), self.repeat(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(DIM)
        scores = F.softmax((scores + self.mask[:, :, :length, :length]).float(), dim=-1).type_as(q)
        y = torch.matmul(scores, v).transpose(1, 2).contiguous().view(batch, length, -1)
        return self.wo(y)

    @staticmethod
    def repeat(x: Tensor) -> Tensor:
        batch, length, heads, dim = x.shape
        count = HEADS // KV_HEADS
        return x[:, :, :, None, :].expand(batch, length, heads, count, dim).reshape(batch, length, heads * count, dim)


class ComplexAttention(LlamaAttention):
    """Pairs are complex numbers."""

    def rotate(self, q: Tensor, k: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
        (turn,) = table
        turned = []
        for x in (q, k):
            z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            turned.append(torch.view_as_real(z * turn.view(1, z.shape[1], 1, z.shape[-1])).flatten(3).type_as(x))
        return turned[0], turned[1]


class TableAttention(LlamaAttention):
    """Pairs are unbound into real and imaginary parts."""

    def rotate(self, q: Tensor, k: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
        turned = []
        for x in (q, k):
            real, imaginary = x.float().reshape((*x.shape[:-1], -1, 2)).unbind(-1)
            cos, sin = (t.view(1, x.shape[1], 1, -1) for t in table)
            turned.append(
                torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1).flatten(3).type_as(x)
            )
        return turned[0], turned[1]


class ComplexLlama(Trunk):
    """One complex table, sliced to the length."""

    attention = ComplexAttention

    def __init__(self) -> None:
        super().__init__()
        turn = angles(DIM)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(turn), turn), persistent=False)

    def context(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return (self.freqs_cis[: tokens.shape[1]],)


class TableLlama(Trunk):
    """Two real tables, sliced to the length."""

    attention = TableAttention

    def __init__(self) -> None:
        super().__init__()
        turn = angles(DIM)
        self.register_buffer("freqs_cos", turn.cos(), persistent=False)
        self.register_buffer("freqs_sin", turn.sin(), persistent=False)

    def context(self, tokens: Tensor) -> tuple[Tensor, ...]:
        length = tokens.shape[1]
        return self.freqs_cos[:length], self.freqs_sin[:length]


# ---- litgpt: queries, keys and values interleaved by group; partial rotation; grouping in the operator


class LitAttention(nn.Module):
    """Every group of the projection is its queries, its key, its value."""

    rotary = 8

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=True)
        self.proj = nn.Linear(HEADS * DIM, WIDTH, bias=True)

    @staticmethod
    def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.size(-1) // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return ((x * cos) + (turned * sin)).to(dtype=x.dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.size()
        per_group = HEADS // KV_HEADS
        qkv = self.attn(x).view(batch, length, KV_HEADS, per_group + 2, DIM).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((per_group, 1, 1), dim=2)
        q, k, v = (y.reshape(batch, -1, length, DIM) for y in (q, k, v))
        n = self.rotary
        q = torch.cat((self.apply_rope(q[..., :n], cos, sin), q[..., n:]), dim=-1)
        k = torch.cat((self.apply_rope(k[..., :n], cos, sin), k[..., n:]), dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0 / math.sqrt(DIM), enable_gqa=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, HEADS * DIM))


class LitGPT(Trunk):
    """Cosines and sines are picked by index."""

    attention = LitAttention

    def __init__(self) -> None:
        super().__init__()
        turn = angles(LitAttention.rotary).repeat(1, 2)
        self.register_buffer("cos", turn.cos(), persistent=False)
        self.register_buffer("sin", turn.sin(), persistent=False)

    def context(self, tokens: Tensor) -> tuple[Tensor, ...]:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return self.cos.index_select(0, place), self.sin.index_select(0, place)


# ---- torchtune: a stacked cache of cosines and sines inside a module of its own, grouping by expansion


class TuneRope(nn.Module):
    """``[longest, dim / 2, 2]``, applied to ``[batch, length, heads, dim]``."""

    def __init__(self) -> None:
        super().__init__()
        turn = angles(DIM)
        self.register_buffer("cache", torch.stack([turn.cos(), turn.sin()], dim=-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        cache = self.cache[: x.size(1)]
        shaped = x.float().reshape(*x.shape[:-1], -1, 2)
        cache = cache.view(-1, shaped.size(1), 1, shaped.size(3), 2)
        turned = torch.stack(
            [
                shaped[..., 0] * cache[..., 0] - shaped[..., 1] * cache[..., 1],
                shaped[..., 1] * cache[..., 0] + shaped[..., 0] * cache[..., 1],
            ],
            -1,
        )
        return turned.flatten(3).type_as(x)


class TuneAttention(nn.Module):
    """Keys and values are expanded before the rotation of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.output_proj = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.pos_embeddings = TuneRope()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        per_group = HEADS // KV_HEADS
        q = self.q_proj(x).view(batch, length, KV_HEADS * per_group, DIM)
        q = self.pos_embeddings(q).transpose(1, 2)
        k = self.pos_embeddings(self.k_proj(x).view(batch, length, -1, DIM)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, -1, DIM).transpose(1, 2)
        shape = (batch, KV_HEADS, per_group, -1, DIM)
        k, v = (y.unsqueeze(2).expand(shape).flatten(1, 2) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.output_proj(y.transpose(1, 2).contiguous().view(batch, length, -1))


class TorchTune(Trunk):
    """Each layer has its rope module."""

    attention = TuneAttention


# ---- einsum: parameters of three dimensions, five-dimensional scores, no transposes


class EinsumAttention(nn.Module):
    """Weights are ``[d, h, k]``; queries get a group axis instead of keys being repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.randn(WIDTH, HEADS, DIM))
        self.wk = nn.Parameter(torch.randn(WIDTH, KV_HEADS, DIM))
        self.wv = nn.Parameter(torch.randn(WIDTH, KV_HEADS, DIM))
        self.wo = nn.Parameter(torch.randn(HEADS, DIM, WIDTH))

    @staticmethod
    def rope(x: Tensor, place: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        angle = place[:, None].float() * THETA ** (-torch.arange(half, device=x.device).float() / half)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        place = torch.arange(length, device=x.device)
        q = torch.einsum("bsd,dhk->bshk", x, self.wq)
        k = torch.einsum("bsd,dhk->bshk", x, self.wk)
        v = torch.einsum("bsd,dhk->bshk", x, self.wv)
        q, k = self.rope(q, place), self.rope(k, place)
        q = q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, DIM)
        scores = torch.einsum("bqkgd,bskd->bkgqs", q, k) * DIM**-0.5
        seen = place[:, None] >= place[None, :]
        p = torch.where(seen, scores, torch.tensor(-1e9)).softmax(-1)
        y = torch.einsum("bkgqs,bskd->bqkgd", p, v).reshape(x.shape[0], length, HEADS, DIM)
        return torch.einsum("bqhd,hdm->bqm", y, self.wo)


class EinsumLM(Trunk):
    """Everything an einsum."""

    attention = EinsumAttention


# ---- torch.nn's own attention


class OwnAttention(nn.Module):
    """``nn.MultiheadAttention`` with a causal mask."""

    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=self.batch_first)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        hidden = torch.triu(torch.ones(length, length, dtype=torch.bool, device=x.device), diagonal=1)
        if not self.batch_first:
            x = x.transpose(0, 1)
        y, _ = self.mha(x, x, x, attn_mask=hidden, need_weights=False)
        return y if self.batch_first else y.transpose(0, 1)


class OwnAttentionLengthFirst(OwnAttention):
    """The default arrangement, ``[length, batch, width]``."""

    batch_first = False


class OwnLM(Trunk):
    """Learned positions added in the trunk."""

    attention = OwnAttention

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(LONGEST, WIDTH)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tok_embeddings(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))


class OwnLMLengthFirst(OwnLM):
    """The same, length first inside attention."""

    attention = OwnAttentionLengthFirst


class EncoderLM(nn.Module):
    """``nn.TransformerEncoder`` made causal by a mask: the tutorial's language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.zeros(1, LONGEST, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        x = self.embedding(tokens) * math.sqrt(WIDTH) + self.position[:, :length]
        return self.decoder(self.encoder(x, mask=mask, is_causal=True))


# ---- other mechanisms around attention that conversion must leave as they are


class GatedAttention(nn.Module):
    """Half of the query projection is a sigmoid gate on the attention output, head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * 2 * DIM, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, gate = self.q_proj(x).view(batch, length, HEADS, 2 * DIM).chunk(2, dim=-1)
        k = self.k_proj(x).view(batch, length, KV_HEADS, DIM).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, KV_HEADS, DIM).transpose(1, 2)
        q, k = LitAttention.apply_rope(q.transpose(1, 2), cos, sin), LitAttention.apply_rope(k, cos, sin)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, -1)
        return self.o_proj(y * torch.sigmoid(gate.reshape(batch, length, -1)))


class GatedLM(Trunk):
    """Gated attention with whole-head rotation."""

    attention = GatedAttention

    def __init__(self) -> None:
        super().__init__()
        turn = angles(DIM).repeat(1, 2)
        self.register_buffer("cos", turn.cos(), persistent=False)
        self.register_buffer("sin", turn.sin(), persistent=False)

    def context(self, tokens: Tensor) -> tuple[Tensor, ...]:
        length = tokens.shape[1]
        return self.cos[:length], self.sin[:length]


class ParallelBlock(Block):
    """Attention and feed-forward read the same norm and are added together."""

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        y = self.attention_norm(x)
        return x + self.attention(y, *context) + self.mlp(y)


class ParallelAttention(GatedAttention):
    """Plain grouped attention; the operator repeats keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, HEADS, DIM).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, KV_HEADS, DIM).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, KV_HEADS, DIM).transpose(1, 2)
        q, k = LitAttention.apply_rope(q, cos, sin), LitAttention.apply_rope(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class ParallelLM(GatedLM):
    """Parallel blocks around plain grouped attention."""

    attention, block = ParallelAttention, ParallelBlock


# ---- products with weights in other words


class ConvolutionAttention(ParallelAttention):
    """Every projection is a convolution of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Conv1d(WIDTH, HEADS * DIM, 1), nn.Conv1d(HEADS * DIM, WIDTH, 1)
        self.k_proj, self.v_proj = (nn.Conv1d(WIDTH, KV_HEADS * DIM, 1) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = x.transpose(1, 2)
        heads = (HEADS, KV_HEADS, KV_HEADS)
        q, k, v = (
            project(turned).view(x.shape[0], count, DIM, x.shape[1]).transpose(2, 3)
            for project, count in zip((self.q_proj, self.k_proj, self.v_proj), heads, strict=True)
        )
        q, k = LitAttention.apply_rope(q, cos, sin), LitAttention.apply_rope(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(2, 3).flatten(1, 2)).transpose(1, 2)


class ConvolutionLM(GatedLM):
    """Attention of convolutions."""

    attention = ConvolutionAttention


class TensordotAttention(ParallelAttention):
    """Keys and queries by weights stored input-first, values by one of three axes, outputs by a sum over two."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.randn(WIDTH, HEADS * DIM))
        self.wk = nn.Parameter(torch.randn(WIDTH, KV_HEADS * DIM))
        self.wv = nn.Parameter(torch.randn(KV_HEADS, DIM, WIDTH))
        self.wo = nn.Parameter(torch.randn(HEADS, DIM, WIDTH))
        self.bias = nn.Parameter(torch.zeros(KV_HEADS * DIM))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = torch.tensordot(x, self.wq, dims=1).unflatten(2, (HEADS, DIM)).transpose(1, 2)
        k = (torch.tensordot(x, self.wk, dims=1) + self.bias).unflatten(2, (KV_HEADS, DIM)).transpose(1, 2)
        v = torch.tensordot(x, self.wv, dims=([-1], [-1])).transpose(1, 2)
        q, k = LitAttention.apply_rope(q, cos, sin), LitAttention.apply_rope(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.tensordot(y.transpose(1, 2), self.wo, dims=2)


class TensordotLM(GatedLM):
    """Attention of tensordots."""

    attention = TensordotAttention


class PerHeadAttention(ParallelAttention):
    """Weights ``[heads, width, head_dim]`` and biases of every head; outputs by an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.randn(HEADS, WIDTH, DIM))
        self.wk, self.wv = (nn.Parameter(torch.randn(KV_HEADS, WIDTH, DIM)) for _ in range(2))
        self.wo = nn.Parameter(torch.randn(HEADS, DIM, WIDTH))
        self.bq, self.bk = nn.Parameter(torch.randn(HEADS, 1, DIM)), nn.Parameter(torch.randn(KV_HEADS, 1, DIM))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = x[:, None] @ self.wq + self.bq, x[:, None] @ self.wk + self.bk, x[:, None] @ self.wv
        q, k = LitAttention.apply_rope(q, cos, sin), LitAttention.apply_rope(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.einsum("bhsc,hcd->bsd", y, self.wo)


class PerHeadLM(GatedLM):
    """Attention of a weight per head."""

    attention = PerHeadAttention


class PerHeadEinsumAttention(PerHeadAttention):
    """The same by einsums, with outputs of every head added up."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsd,hdc->bhsc", x, w) for w in (self.wq, self.wk, self.wv))
        q, k = LitAttention.apply_rope(q + self.bq, cos, sin), LitAttention.apply_rope(k + self.bk, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return (y @ self.wo).sum(1)


class PerHeadEinsumLM(GatedLM):
    """Attention of einsums over a weight per head."""

    attention = PerHeadEinsumAttention


class FactoredAttention(ParallelAttention):
    """Projections are two layers each, as a singular value decomposition leaves them."""

    rank = 12

    def __init__(self) -> None:
        super().__init__()
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}
        for name, count in heads.items():
            down, up = nn.Linear(WIDTH, self.rank, bias=False), nn.Linear(self.rank, count * DIM)
            setattr(self, name, nn.Sequential(down, up))


class FactoredLM(GatedLM):
    """Attention of projections in two steps."""

    attention = FactoredAttention


class SharedAttention(nn.Module):
    """Queries and keys are the same projection; order is told by the rotation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(WIDTH, HEADS * DIM, bias=True)
        self.v = nn.Linear(WIDTH, HEADS * DIM, bias=True)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qk = self.qk(x).view(batch, length, HEADS, DIM).transpose(1, 2)
        qk = LitAttention.apply_rope(qk, cos, sin)
        v = self.v(x).view(batch, length, HEADS, DIM).transpose(1, 2)
        y = F.scaled_dot_product_attention(qk, qk, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class SharedLM(GatedLM):
    """Shared queries and keys."""

    attention = SharedAttention


class BiasedAttention(nn.Module):
    """Plain attention without rotation; ``bias`` is added to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def bias(self, length: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (y.view(batch, length, HEADS, DIM).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(DIM) + self.bias(length)
        y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class AlibiAttention(BiasedAttention):
    """Scores are discounted by distance, each head by its slope."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.tensor(SLOPES).view(HEADS, 1, 1), persistent=False)

    def bias(self, length: int) -> Tensor:
        place = torch.arange(length)
        return self.slopes * (place[None, :] - place[:, None])


class AlibiLM(Trunk):
    """No other positions."""

    attention = AlibiAttention


class BucketAttention(BiasedAttention):
    """A learned bias per head and bucket of the distance, as in T5."""

    buckets, exact, farthest = 16, 8, 64

    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(self.buckets, HEADS)

    def bias(self, length: int) -> Tensor:
        place = torch.arange(length)
        distance = (place[:, None] - place[None, :]).clamp(min=0)
        scaled = torch.log(distance.float().clamp(min=1) / self.exact) / math.log(self.farthest / self.exact)
        far = (self.exact + (scaled * (self.buckets - self.exact)).long()).clamp(max=self.buckets - 1)
        bucket = torch.where(distance < self.exact, distance, far)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)


class BucketLM(Trunk):
    """Learned relative bias."""

    attention = BucketAttention


class BatchMixingLM(TableLlama):
    """Every sequence of the batch sees the average of all: no cache can be right for it."""

    def embed(self, tokens: Tensor) -> Tensor:
        x = super().embed(tokens)
        return x + x.mean(0)


SLOPES = (0.25, 0.0625, 0.015625, 0.00390625)
_ROPE = {"rotary_dim": DIM, "theta": THETA}
_GROUPED = Layer(kv_heads=KV_HEADS)
_INTERLEAVED = Layer(kv_heads=KV_HEADS, layout="interleaved", **_ROPE)
_HALF = Layer(kv_heads=KV_HEADS, layout="half", **_ROPE)


def _family(kind: type[nn.Module], layer: Layer) -> Family:
    return Family(lambda: settle(kind), (layer,) * LAYERS)


CONVERTIBLE: dict[str, Family] = {
    "nanogpt-flash": _family(NanoGPT, Layer()),
    "nanogpt-manual": _family(ManualNanoGPT, Layer()),
    "llama2c-complex": _family(ComplexLlama, _INTERLEAVED),
    "llama2c-tables": _family(TableLlama, _INTERLEAVED),
    "litgpt": _family(LitGPT, Layer(kv_heads=KV_HEADS, layout="half", rotary_dim=8, theta=THETA)),
    "torchtune": _family(TorchTune, _INTERLEAVED),
    "einsum": _family(EinsumLM, _HALF),
    "mha-batch-first": _family(OwnLM, Layer()),
    "mha-length-first": _family(OwnLMLengthFirst, Layer()),
    "encoder": _family(EncoderLM, Layer()),
    "gated": _family(GatedLM, _HALF),
    "alibi": _family(AlibiLM, Layer(slopes=SLOPES)),
    "parallel": _family(ParallelLM, _HALF),
    "convolutions": _family(ConvolutionLM, _HALF),
    "tensordots": _family(TensordotLM, _HALF),
    "per-head": _family(PerHeadLM, _HALF),
    "per-head-einsum": _family(PerHeadEinsumLM, _HALF),
    "factored": _family(FactoredLM, _HALF),
    "shared-qk": _family(SharedLM, Layer(layout="half", **_ROPE)),
}
"""Models that must convert."""

REFUSED: dict[str, Family] = {
    "bucket-bias": _family(BucketLM, Layer()),
    "batch-mixing": _family(BatchMixingLM, _INTERLEAVED),
}
"""Models nothing can be made of."""
