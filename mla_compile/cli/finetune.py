"""``finetune``: train a converted model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mla_compile.cli.options import (
    CHECKS,
    OBJECTIVE,
    OUTPUT,
    SCHEDULE,
    TEXT,
    AsJson,
    Quiet,
    SeqLen,
    Tokenizer,
    TrainTokens,
    Verbose,
)

__all__ = ["fine_tune"]


def fine_tune(
    folder: Annotated[Path, typer.Argument(help="A folder written by 'mla-compile convert MODEL --out FOLDER'.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text to train on: .txt (documents separated by <|endoftext|>), .jsonl, .parquet, or "
            "hf:NAME[:CONFIG][:SPLIT].",
            rich_help_panel=TEXT,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, with its checkpoints.", rich_help_panel=OUTPUT)],
    objective: Annotated[
        str,
        typer.Option(
            help="What to match: next-token (the text), kl (a teacher's predictions), attention (the original's "
            "attention outputs), or a mixture such as kl=0.9,next-token=0.1.",
            show_default="kl with a teacher, else next-token",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "auto",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The original, or a larger model with the same vocabulary, to learn from.", rich_help_panel=OBJECTIVE
        ),
    ] = None,
    match_steps: Annotated[
        int,
        typer.Option(min=0, help="Initial steps that match attention outputs instead.", rich_help_panel=OBJECTIVE),
    ] = 0,
    train: Annotated[
        str,
        typer.Option(
            help="Weights to train: latent (the latent matrices), attention (also output projections and all norms) or "
            "all.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "attention",
    lora_rank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Train LoRA adapters of this rank instead of the matrices, and merge them at the end.",
            show_default="none",
            rich_help_panel=OBJECTIVE,
        ),
    ] = 0,
    lora_alpha: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="LoRA alpha: adapters are scaled by alpha over rank.",
            show_default="the rank",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    tokens: TrainTokens = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Windows per step, over all processes.", rich_help_panel=SCHEDULE)
    ] = 16,
    accumulate: Annotated[
        int,
        typer.Option(min=1, help="Gradient accumulation: pieces that a step is computed in.", rich_help_panel=SCHEDULE),
    ] = 1,
    seq_len: SeqLen = None,
    rate: Annotated[
        float,
        typer.Option(help="Learning rate, relative to the root mean square of every weight.", rich_help_panel=SCHEDULE),
    ] = 0.01,
    weight_decay: Annotated[
        float, typer.Option(min=0.0, help="Weight decay of AdamW.", rich_help_panel=SCHEDULE)
    ] = 0.0,
    warm_up: Annotated[
        float, typer.Option(help="Fraction of steps spent warming up.", rich_help_panel=SCHEDULE)
    ] = 0.05,
    decay: Annotated[
        float, typer.Option(help="Fraction of steps spent decaying to zero.", rich_help_panel=SCHEDULE)
    ] = 0.2,
    clip: Annotated[float, typer.Option(help="Gradient-norm clip.", rich_help_panel=SCHEDULE)] = 1.0,
    every: Annotated[
        int, typer.Option(min=1, help="Steps between evaluations, each with a checkpoint.", rich_help_panel=CHECKS)
    ] = 100,
    patience: Annotated[
        int,
        typer.Option(
            min=0,
            help="Stop after this many evaluations without improvement; 0 never stops early.",
            rich_help_panel=CHECKS,
        ),
    ] = 0,
    keep: Annotated[
        int, typer.Option(min=1, help="Checkpoints to keep, besides the best.", rich_help_panel=OUTPUT)
    ] = 2,
    eval_windows: Annotated[
        int, typer.Option(min=1, help="Most windows of the text to hold out for evaluation.", rich_help_panel=CHECKS)
    ] = 32,
    mixed_precision: Annotated[
        str, typer.Option(help="no, or bf16 for bfloat16 products.", rich_help_panel=SCHEDULE)
    ] = "no",
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Recompute activations (gradient checkpointing): less memory, more time.",
            rich_help_panel=SCHEDULE,
        ),
    ] = False,
    tracker: Annotated[
        str,
        typer.Option(
            help="Tracker that accelerate logs to: none, auto (TensorBoard if it is installed), or a name it knows.",
            rich_help_panel=OUTPUT,
        ),
    ] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.", rich_help_panel=OUTPUT)
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Start over if --out is not empty; an earlier training there is removed first.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    tokenizer: Tokenizer = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the order of windows.", rich_help_panel=SCHEDULE)] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Fine-tune a converted model. 'accelerate launch -m mla_compile finetune ...' runs it in several processes."""
    from mla_compile import display
    from mla_compile.training.recipe import make_recipe

    recipe = make_recipe(
        objective=objective,
        match_steps=match_steps,
        train=train,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        tokens=tokens,
        batch=batch,
        accumulate=accumulate,
        seq_len=seq_len,
        rate=rate,
        weight_decay=weight_decay,
        clip=clip,
        warm_up=warm_up,
        decay=decay,
        every=every,
        patience=patience,
        keep=keep,
        eval_windows=eval_windows,
        seed=seed,
        mixed_precision=mixed_precision,
        recompute=recompute,
        tracker=tracker,
    )
    first = os.environ.get("RANK", "0") == "0"
    with display.make_display(quiet or not first, as_json, verbose if first else 0) as shown:
        from mla_compile.training.run import finetune

        report = finetune(
            folder,
            data,
            out,
            recipe,
            teacher=teacher,
            tokenizer=tokenizer,
            resume=resume,
            force=force,
            display=shown,
        )
    if report is None:
        return
    if as_json:
        display.print_json(report)
    else:
        display.show_training(report, out)
