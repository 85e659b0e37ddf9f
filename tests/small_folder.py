"""A Hugging Face folder that converts in seconds, and text in its words: what a user would have at hand."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pages import ROOT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def texts(first: int, count: int) -> list[str]:
    if str(ROOT / "examples") not in sys.path:
        sys.path.append(str(ROOT / "examples"))
    from story_grammar import stories

    return list(stories(range(first, first + count)))


def model_folder(path: Path) -> None:
    """A Llama of one layer with random weights, and the bundled model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny-llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
