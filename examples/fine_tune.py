"""Train a converted model to predict what the original does, in a training loop of one's own, and measure both.

The converted module is an ordinary ``nn.Module``. `mla-compile finetune` is a ready loop (several processes,
checkpoints, mixtures of objectives); this is what it does at heart.

    python examples/fine_tune.py
    python examples/fine_tune.py --model FOLDER --text FILE.txt --cache-ratio 0.125 --steps 1000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from story_grammar import TRAIN_SEEDS, stories
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import mla_compile
from mla_compile.text.corpus import read_documents, token_windows, tokenize
from mla_compile.training.trained import trained_names

HERE = Path(__file__).parent
LENGTH, BATCH = 128, 8


def main() -> None:
    """Convert, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HERE / "tiny-llama", help="a folder or a hub id")
    parser.add_argument("--text", help="a .txt or .jsonl file; seeded stories by default")
    parser.add_argument("--cache-ratio", type=float, default=0.125)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, help="folder to save to")
    options = parser.parse_args()
    torch.manual_seed(0)

    # 1. Windows of text: some to convert by, some to train on, some that are only measured on.
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents = list(stories(TRAIN_SEEDS[:400])) if options.text is None else read_documents(options.text)
    windows = token_windows(tokenize(documents, tokenizer), LENGTH)
    held_out, training = windows[:16], windows[16:]

    # 2. The original is the teacher. `compile` reads it by itself: what is trained below shares nothing with it.
    teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    mla = mla_compile.compile(str(options.model), calibration=training[:64], cache_ratio=options.cache_ratio)
    student = mla.module

    def distance(ids: torch.Tensor) -> torch.Tensor:
        """KL(original || converted) in nats per token, over ``[windows, length]``."""
        with torch.no_grad():
            target = log_softmax(teacher(ids, use_cache=False).logits, dim=-1).flatten(0, 1)
        predicted = log_softmax(student(ids).logits, dim=-1).flatten(0, 1)
        return kl_div(predicted, target, log_target=True, reduction="batchmean")

    with torch.no_grad():
        before = float(distance(held_out))
    print(f"after conversion: {before:.4f} nats per token from the original, on text held back")

    # 3. Train the matrices that the conversion made, and leave the rest of the model alone.
    names = trained_names(student, "latent")
    new = [p.requires_grad_(name in names) for name, p in student.named_parameters()]
    new = [p for p in new if p.requires_grad]
    print(f"{len(new)} new tensors of {sum(p.numel() for p in new):,} numbers are trained")
    optimizer = torch.optim.AdamW(new, lr=options.rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(options.steps):
        share = min((step + 1) / 5, 1.0) * (1 - step / options.steps) ** 0.5  # warm up, then come to rest
        optimizer.param_groups[0]["lr"] = options.rate * share
        loss = distance(training[torch.randint(len(training), (BATCH,))])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(new, 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: {loss.item():.4f}")

    with torch.no_grad():
        after = float(distance(held_out))
    print(f"after {options.steps} steps: {after:.4f} nats per token from the original ({after / before:.0%})")
    if options.out:
        mla.save(options.out)  # and then: mla-compile export FOLDER --out model.onnx


if __name__ == "__main__":
    main()
