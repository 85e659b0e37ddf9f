"""How a converted model is trained: one frozen, validated object, and the step sizes that follow from it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mla_compile.errors import UsageError
from mla_compile.settings import Settings

__all__ = ["ATTENTION", "DIVERGENCE", "NEXT_TOKEN", "Recipe", "make_recipe"]

NEXT_TOKEN, DIVERGENCE, ATTENTION = "next-token", "kl", "attention"
_OBJECTIVES = (NEXT_TOKEN, DIVERGENCE, ATTENTION)
_SPELL = "Give next-token, kl, attention, or a mixture such as kl=0.9,next-token=0.1."


class Recipe(Settings):
    """Settings of one fine-tuning.

    Attributes:
        objective: What to match: ``next-token`` (the text), ``kl`` (a teacher's predictions), ``attention`` (the
            original's attention outputs, layer by layer), or a mixture such as ``kl=0.9,next-token=0.1``. ``auto`` is
            ``kl`` if there is a teacher, else ``next-token``.
        match_steps: Initial steps with the objective ``attention`` instead: they skip everything after the last layer,
            and no layer sees another's error.
        train: Weights to train: ``latent`` (the latent matrices), ``attention`` (also output projections and all
            norms), or ``all``.
        lora_rank: Rank of LoRA adapters to train instead of the matrices, merged at the end; 0 for none. Nothing else
            changes.
        lora_alpha: Adapters are scaled by this over their rank; the rank by default.
        tokens: Tokens to train on, rounded up to whole steps of ``batch`` times ``seq_len``; the text once by default.
            Shorter text is repeated in another order.
        batch: Windows per step, over all processes.
        accumulate: Pieces that the windows of a step are computed in (gradient accumulation).
        seq_len: Tokens per window; the model's limit, at most 512, by default.
        rate: Learning rate, relative to the root mean square of each weight tensor.
        weight_decay: Weight decay of AdamW, per learning rate.
        clip: Gradient-norm clip.
        warm_up: Fraction of steps spent warming up.
        decay: Fraction of steps spent decaying to zero, as one minus a square root.
        every: Steps between evaluations, each with a checkpoint.
        patience: Evaluations without improvement after which training stops; 0 for never.
        keep: Checkpoints to keep, besides the best.
        eval_windows: Windows to hold out for evaluation; a tenth of the text if that is less, and the text ends before
            the tokens that are wanted, or comes as windows.
        seed: Seed for the order of windows.
        mixed_precision: ``bf16`` computes products in bfloat16; weights stay float32.
        recompute: Keep activations of one layer at a time and recompute the others in the backward pass.
        tracker: Tracker that accelerate logs to; ``auto`` is TensorBoard if it is installed, ``none`` is none.
    """

    command: ClassVar[str] = "finetune"

    schema_version: Literal[1] = 1
    objective: str = "auto"
    match_steps: int = Field(default=0, ge=0)
    train: Literal["latent", "attention", "all"] = "attention"
    lora_rank: int = Field(default=0, ge=0)
    lora_alpha: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    batch: int = Field(default=16, ge=1)
    accumulate: int = Field(default=1, ge=1)
    seq_len: int | None = Field(default=None, ge=2)
    rate: float = Field(default=0.01, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    clip: float = Field(default=1.0, gt=0.0)
    warm_up: float = Field(default=0.05, ge=0.0, le=1.0)
    decay: float = Field(default=0.2, ge=0.0, le=1.0)
    every: int = Field(default=100, ge=1)
    patience: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=1)
    eval_windows: int = Field(default=32, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    mixed_precision: Literal["no", "bf16"] = "no"
    recompute: bool = False
    tracker: str = "auto"

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every part of the objective, ``auto`` being the text alone."""
        if self.objective == "auto":
            return {NEXT_TOKEN: 1.0}
        parts = (part.split("=") for part in self.objective.split(","))
        return {name.strip(): float(*(weight or ["1"])) for name, *weight in parts}

    @property
    def learns_from_another(self) -> bool:
        """Whether some step asks a teacher."""
        return self.match_steps > 0 or self.weights.keys() != {NEXT_TOKEN}

    @property
    def skips_the_output(self) -> bool:
        """Whether some step trains nothing after the last attention layer."""
        return self.match_steps > 0 or self.weights.keys() == {ATTENTION}

    def steps(self, tokens: int, length: int) -> int:
        """Steps that take so many tokens, or more, in windows of ``length``."""
        return math.ceil(tokens / (self.batch * length))

    def weights_at(self, step: int) -> dict[str, float]:
        """The objective of one step."""
        return {ATTENTION: 1.0} if step < self.match_steps else self.weights

    def share(self, step: int, steps: int) -> float:
        """What step number ``step`` of ``steps`` takes of the full step size (MHA2MLA, appendix C)."""
        warm_up, decay = round(self.warm_up * steps), round(self.decay * steps)
        if step < warm_up:
            return (step + 1) / warm_up
        into = step - (steps - decay)
        return 1.0 if into <= 0 else 1 - math.sqrt(into / decay)

    @model_validator(mode="after")
    def _objective_is_known(self) -> Recipe:
        try:
            weights = self.weights
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"The objective '{self.objective}' is not spelled name=weight,name=weight.", _SPELL
            ) from error
        unknown = weights.keys() - {*_OBJECTIVES}
        if unknown:
            raise UsageError(f"The objective '{min(unknown)}' is not one of {', '.join(_OBJECTIVES)}.", _SPELL)
        if len(weights) < len(self.objective.split(",")):
            raise UsageError(f"The objective '{self.objective}' names a part twice.", "Name every part once.")
        if not all(w > 0 and math.isfinite(w) for w in weights.values()):
            raise UsageError(
                f"A weight of the objective '{self.objective}' is not a number above 0.",
                "Give every part a weight above 0, or leave the part out.",
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_a_rank(self) -> Recipe:
        if self.lora_alpha is not None and not self.lora_rank:
            raise UsageError(
                "lora_alpha scales adapters, and there are none without a lora_rank above 0.",
                "Give lora_rank too, or leave lora_alpha out.",
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Recipe:
        if self.batch % self.accumulate:
            raise UsageError(
                f"A batch of {self.batch} windows cannot be cut into {self.accumulate} equal pieces (accumulate).",
                "Make batch a multiple of accumulate.",
            )
        if self.warm_up + self.decay > 1:
            raise UsageError(
                f"warm_up {self.warm_up} and decay {self.decay} are shares of the same steps, and more than all "
                "together.",
                "Make their sum 1 at most.",
            )
        return self


def make_recipe(**settings: Any) -> Recipe:  # noqa: ANN401 - validated by pydantic
    """Validate settings.

    Raises:
        UsageError: A name is unknown or a value is out of range; the sentence names it.
    """
    return Recipe(**settings)
