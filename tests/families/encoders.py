"""Encoders and encoder-decoders of transformers, two layers each, and some written by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import DIM, HEADS, LAYERS, LONGEST, VOCABULARY, WIDTH

IMAGE, PATCH, BINS, FRAMES = 16, 4, 8, 20
PLACES = (IMAGE // PATCH) ** 2 + 1
"""Tokens of an image: its patches and one more."""


@dataclass(frozen=True)
class Attention:
    """One attention layer as its configuration describes it; ``code`` is the reason where it is not understood."""

    path: str
    mask: str
    padding: str | None = None
    scale: float = DIM**-0.5
    code: str | None = None


@dataclass(frozen=True)
class Encoder:
    """A model that is no causal language model.

    Attributes:
        build: Makes the model with fixed weights, in evaluation mode.
        layers: Every attention layer, in graph order.
        inputs: Makes inputs of so many sequences, and of so many tokens where their number may be chosen.
        given: Whether the compiler must be given inputs.
    """

    build: Callable[[], nn.Module]
    layers: tuple[Attention, ...]
    inputs: Callable[[int, int], dict[str, Tensor]]
    given: bool = False


def settle(module: nn.Module) -> nn.Module:
    """Weights that make scores matter, and norms and biases that are not ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 or "norm" in name:
                parameter.add_(0.1 * drawn)
            else:
                parameter.copy_(0.2 * drawn)
    return module.eval()


def transformers_model(name: str, config: str, *, eager: bool = False, **settings: object) -> nn.Module:
    """A model by the names of its class and of its configuration."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**settings)
    made._attn_implementation = "eager" if eager else "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = getattr(transformers, name)(made)
    return settle(module)


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int) -> Tensor:
    """A padding mask: every sequence is one token shorter than the one before."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, length - min(row, length - 1) :] = 0
    return mask


def text(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": ids(batch, length), "attention_mask": padded(batch, length)}


def placed(batch: int, length: int) -> dict[str, Tensor]:
    return {**text(batch, length), "position_ids": torch.arange(length).expand(batch, length).contiguous()}


def shuffled(batch: int, length: int) -> dict[str, Tensor]:
    places = torch.randperm(length, generator=torch.Generator().manual_seed(6)) + torch.arange(batch)[:, None]
    return {**text(batch, length), "position_ids": places}


def segments(batch: int, length: int, kinds: int = 2) -> dict[str, Tensor]:
    return {**placed(batch, length), "token_type_ids": ids(batch, length, 5) % kinds}


def image(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))}


def target(batch: int, length: int) -> dict[str, Tensor]:
    return {"decoder_input_ids": ids(batch, length, 1), "decoder_attention_mask": torch.ones(batch, length).long()}


def pair(batch: int, length: int) -> dict[str, Tensor]:
    return {**text(batch, length + 3), **target(batch, length)}


def speech(batch: int, length: int) -> dict[str, Tensor]:
    spectrum = torch.randn(batch, BINS, 2 * FRAMES, generator=torch.Generator().manual_seed(3))
    return {"input_features": spectrum, **target(batch, length)}


BERT: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 96,
    "max_position_embeddings": LONGEST,
}
BART: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": LONGEST,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": DIM,
    "d_ff": 96,
    "num_layers": 1,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
WHISPER = {k: v for k, v in BART.items() if k != "max_position_embeddings"} | {
    "num_mel_bins": BINS,
    "max_source_positions": FRAMES,
    "max_target_positions": LONGEST,
}


def both_ways(path: str, count: int = LAYERS, padding: str | None = "attention_mask") -> tuple[Attention, ...]:
    return tuple(Attention(path.format(i), "bidirectional", padding) for i in range(count))


def bart_layers(padding: str | None = "attention_mask") -> tuple[Attention, ...]:
    decoder = [
        layer
        for i in range(LAYERS)
        for layer in (
            Attention(f"model.decoder.layers.{i}.self_attn", "causal"),
            Attention(f"model.decoder.layers.{i}.encoder_attn", "cross", padding),
        )
    ]
    return (Attention("model.encoder.layers.0.self_attn", "bidirectional", padding), *decoder)


def t5_layers() -> tuple[Attention, ...]:
    return (
        Attention("encoder.block.0.layer.0.SelfAttention", "", code="scores"),
        Attention("decoder.block.0.layer.0.SelfAttention", "", code="scores"),
        Attention("decoder.block.0.layer.1.EncDecAttention", "cross", "attention_mask", 1.0),
    )


class Perceiver(nn.Module):
    """Latents read a sequence of vectors: queries have another width and another number than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(6, WIDTH))
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(24, WIDTH), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1) + x.mean(1, keepdim=True)[..., :1]
        q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in (self.q(latents), self.k(x), self.v(x)))
        scores = (q @ k.mT / 2).masked_fill(mask[:, None, None] == 0, -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` over vectors, without a mask; batches come second."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.transpose(0, 1)).transpose(0, 1)


class EinsumEncoder(nn.Module):
    """Attention by einsum over a fixed number of vectors, one of them as long as a vector is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, DIM)) for y in self.qkv(x).chunk(3, -1))
        weights = torch.einsum("bshd,bthd->bhst", q * 0.5, k).softmax(-1)
        return self.out(torch.einsum("bhst,bthd->bshd", weights, v).flatten(2))


class RotaryEncoder(nn.Module):
    """Two layers that see both ways, turned by the positions that are given, or by the token's place."""

    def __init__(self, given: bool) -> None:
        super().__init__()
        self.given, self.table = given, nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.register_buffer("frequency", 100.0 ** (-torch.arange(0, DIM, 2).float() / DIM))

    def turned(self, x: Tensor, angle: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Tensor:
        places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        angle = places[:, None, :, None].float() * self.frequency
        x = self.table(input_ids)
        for qkv in self.qkv:
            q, k, v = (y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
            seen = attention_mask[:, None, None].bool()
            y = F.scaled_dot_product_attention(self.turned(q, angle), self.turned(k, angle), v, attn_mask=seen)
            x = x + y.transpose(1, 2).flatten(2)
        return x


def vectors(width: int, count: int | None = None) -> Callable[[int, int], dict[str, Tensor]]:
    def made(batch: int, length: int) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, count or length, width, generator=torch.Generator().manual_seed(4))}

    return made


def by_hand(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return settle(kind())

    return made


def perceived(batch: int, length: int) -> dict[str, Tensor]:
    return {**vectors(24)(batch, length), "mask": padded(batch, length)}


ENCODERS: dict[str, Encoder] = {
    "bert": Encoder(
        lambda: transformers_model("BertForMaskedLM", "BertConfig", **BERT),
        both_ways("bert.encoder.layer.{}.attention.self"),
        segments,
    ),
    "bert-eager": Encoder(
        lambda: transformers_model("BertModel", "BertConfig", eager=True, **BERT),
        both_ways("encoder.layer.{}.attention.self"),
        segments,
    ),
    "roberta": Encoder(
        lambda: transformers_model("RobertaForMaskedLM", "RobertaConfig", **BERT),
        both_ways("roberta.encoder.layer.{}.attention.self"),
        lambda batch, length: segments(batch, length, 1),
    ),
    "distilbert": Encoder(
        lambda: transformers_model(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=WIDTH,
            n_layers=LAYERS,
            n_heads=HEADS,
            hidden_dim=96,
            max_position_embeddings=LONGEST,
        ),
        both_ways("distilbert.transformer.layer.{}.attention"),
        placed,
    ),
    "esm-rotary": Encoder(
        lambda: transformers_model(
            "EsmForMaskedLM",
            "EsmConfig",
            **BERT,
            pad_token_id=1,
            mask_token_id=2,
            position_embedding_type="rotary",
        ),
        both_ways("esm.encoder.layer.{}.attention.self"),
        placed,
    ),
    "modernbert-rotary": Encoder(  # every other layer sees a window in both directions
        lambda: transformers_model(
            "ModernBertForMaskedLM",
            "ModernBertConfig",
            **BERT,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=8,
            global_attn_every_n_layers=2,
        ),
        (
            Attention("model.layers.0.attn", "bidirectional", "attention_mask"),
            Attention("model.layers.1.attn", "", code="mask"),
        ),
        placed,
    ),
    "vit": Encoder(
        lambda: transformers_model(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=96,
            image_size=IMAGE,
            patch_size=PATCH,
        ),
        both_ways("vit.layers.{}.attention", padding=None),
        image,
    ),
    "vit-eager": Encoder(
        lambda: transformers_model(
            "ViTModel",
            "ViTConfig",
            eager=True,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=96,
            image_size=IMAGE,
            patch_size=PATCH,
        ),
        both_ways("layers.{}.attention", padding=None),
        image,
    ),
    "bart": Encoder(
        lambda: transformers_model("BartForConditionalGeneration", "BartConfig", **BART), bart_layers(), pair
    ),
    "marian": Encoder(lambda: transformers_model("MarianMTModel", "MarianConfig", **BART), bart_layers(), pair),
    "whisper": Encoder(
        lambda: transformers_model("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER),
        bart_layers(None),
        speech,
    ),
    "t5": Encoder(lambda: transformers_model("T5ForConditionalGeneration", "T5Config", **T5), t5_layers(), pair),
    "own-perceiver": Encoder(
        by_hand(Perceiver), (Attention("attention_0", "cross", "mask", 0.5),), perceived, given=True
    ),
    "own-torch-encoder": Encoder(
        by_hand(TorchEncoder),
        both_ways("encoder.layers.{}.self_attn", padding=None),
        vectors(WIDTH),
        given=True,
    ),
    "own-rotary": Encoder(by_hand(lambda: RotaryEncoder(False)), both_ways("attention_{}", LAYERS), text, given=True),
    "own-rotary-places": Encoder(
        by_hand(lambda: RotaryEncoder(True)), both_ways("attention_{}", LAYERS), shuffled, given=True
    ),
    "own-einsum": Encoder(
        by_hand(EinsumEncoder),
        (Attention("attention_0", "bidirectional", None, 0.5),),
        vectors(WIDTH, WIDTH),
        given=True,
    ),
}
