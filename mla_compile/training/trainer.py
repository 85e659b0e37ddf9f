"""The loop: steps, evaluations and checkpoints. Devices, precision and processes are accelerate's."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, skip_first_batches
from accelerate.tracking import get_available_trackers
from accelerate.utils import DeepSpeedPlugin, DistributedType, LoggerType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mla_compile.errors import RefusedError, TrainingError, UsageError
from mla_compile.program import Program
from mla_compile.progress import Stage, Stages
from mla_compile.report import Training, TrainingPoint
from mla_compile.runtime.module import LatentModel
from mla_compile.training.checkpoints import Checkpoints, State
from mla_compile.training.lora import Adapter, adapt, adapter_groups, merge
from mla_compile.training.objectives import Student, Teacher, TeacherAnswers
from mla_compile.training.packing import PackedText, order
from mla_compile.training.recipe import ATTENTION, NEXT_TOKEN, Recipe
from mla_compile.training.trained import (
    constant_rows,
    hold_constants,
    own_copies,
    parameter_groups,
    restore_constants,
    trained_names,
)

__all__ = ["start_engine", "train"]

_BETAS = (0.9, 0.95)
_STAGES = 2
"""Of ZeRO: the first shards the states of the optimiser, the second gradients too, the third also weights."""
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""Engines that part weights, gradients or states among processes."""


def start_engine(recipe: Recipe, folder: Path) -> Accelerator:
    """Join the processes that were started together, and find the device.

    Args:
        recipe: The settings.
        folder: Where the tracker writes.

    Raises:
        UsageError: This process computes in another precision already, the device cannot do what is asked for, the
            processes cannot share a batch, or DeepSpeed is missing, or asked for what it was not tried with.
    """
    tracker = _tracker(recipe)
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            # DeepSpeed's own is the type of the weights themselves; see _set_up_deepspeed.
            mixed_precision="no" if _is_asked_for(DistributedType.DEEPSPEED) else recipe.mixed_precision,
            gradient_accumulation_steps=recipe.accumulate,
            dataloader_config=DataLoaderConfiguration(split_batches=True, dispatch_batches=False),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=recipe.skips_the_output)],
            log_with=tracker,
            project_dir=str(folder),
        )
    except ValueError as error:
        raise UsageError(
            f"accelerate refuses these settings in this process ({error}).", "Start another process for the training."
        ) from error
    except ImportError as error:
        raise UsageError("DeepSpeed is not installed.", "Run: pip install 'mla-compile[deepspeed]'.") from error
    for kind in _SHARDED:
        if _is_asked_for(kind) and accelerator.distributed_type != kind:
            raise UsageError(
                "accelerate shards a training on accelerators only, and there is none.", f"Train without {kind.name}."
            )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _set_up_deepspeed(accelerator.deepspeed_plugin, recipe)
    piece = recipe.batch // recipe.accumulate
    if piece % accelerator.num_processes:
        raise UsageError(
            f"{piece} windows cannot be shared by {accelerator.num_processes} processes.",
            "Make --batch over --accumulate a multiple of them.",
        )
    return accelerator


def _is_asked_for(kind: DistributedType) -> bool:
    """Whether the launcher was told to use an engine."""
    return os.environ.get(f"ACCELERATE_USE_{kind.name}") == "true"


def _set_up_deepspeed(plugin: DeepSpeedPlugin, recipe: Recipe) -> None:
    """Tell DeepSpeed, whose backward pass takes the step, what a step is, and what products are computed in.

    Raises:
        UsageError: It would shard the weights themselves.
    """
    if plugin.zero_stage > _STAGES:
        raise UsageError(
            f"Weights that DeepSpeed shards (ZeRO stage {plugin.zero_stage}) are not gathered here.",
            f"Choose stage {_STAGES} or less, or FSDP.",
        )
    plugin.deepspeed_config.update(gradient_clipping=recipe.clip, gradient_accumulation_steps=recipe.accumulate)
    if recipe.mixed_precision == "bf16":
        plugin.deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def _tracker(recipe: Recipe) -> str | None:
    """What the curve is sent to, which has to be installed; ``auto`` is TensorBoard if it is.

    Raises:
        UsageError: It is not installed, or accelerate knows no such tracker.
    """
    available = ["all", *map(str, get_available_trackers())]
    if recipe.tracker == "none" or (recipe.tracker == "auto" and "tensorboard" not in available):
        return None
    wanted = "tensorboard" if recipe.tracker == "auto" else recipe.tracker
    known = [*map(str, LoggerType)]
    if wanted not in known:
        raise UsageError(
            f"There is no tracker '{wanted}'.", f"Choose auto, none, or one of accelerate's: {', '.join(known)}."
        )
    if wanted not in available:
        raise UsageError(f"The tracker '{wanted}' is not installed.", "Install it, or leave --tracker out.")
    return wanted


def train(
    accelerator: Accelerator,
    model: LatentModel,
    teacher: Program | None,
    text: PackedText,
    recipe: Recipe,
    checkpoints: Checkpoints,
    stages: Stages,
    *,
    resume: bool = False,
) -> Training:
    """Train a model in place, and leave it with the weights that did best on held-out text.

    Args:
        accelerator: From :func:`start_engine`.
        model: The converted model; parameters that are trained become its own.
        teacher: What it learns from, if the objective asks for one.
        text: Windows.
        recipe: The settings, all of them chosen.
        checkpoints: Where checkpoints go.
        stages: Times and shows what runs.
        resume: Whether to go on from the last checkpoint, if there is one.

    Returns:
        What was done.

    Raises:
        TrainingError: The loss is not finite, or a checkpoint could not be written.
        UsageError: The last checkpoint is of another training.
        RefusedError: The model cannot be trained with these settings.
    """
    run = _Run.start(accelerator, model, teacher, text, recipe, checkpoints)
    state = checkpoints.last() if resume else None
    if state is None:
        state = State(0, (TrainingPoint(0, 0, None, *run.measure(0)),))
        checkpoints.save(accelerator, state)
    else:
        checkpoints.load(accelerator, state.step)
    if state.step == 0:
        run.begin_counting()
    if _tracker(recipe) is not None:
        accelerator.init_trackers("finetune", {k: v for k, v in recipe.model_dump().items() if v is not None})
    pieces = iter(skip_first_batches(run.loader, state.step * recipe.accumulate))
    with stages.stage("train", run.steps - state.step) as stage:  # steps of before would tell nothing of time left
        while state.step < run.steps and not run.is_over(state):
            state = run.advance(state, pieces, stage)
            checkpoints.save(accelerator, state)
    if state.best.step != state.step:
        checkpoints.load(accelerator, state.best.step)
    run.hand_back()
    accelerator.end_training()  # at last: it parts the processes
    return Training(
        objective=recipe.objective,
        train=recipe.train,
        steps=state.step,
        tokens=state.curve[-1].tokens,
        best_step=state.best.step,
        before=state.curve[0].held_out,
        after=state.best.held_out,
        held_out_tokens=text.held_out[:, 1:].numel(),
        curve=state.curve,
    )


@dataclass(frozen=True)
class _Run:
    """Everything that stays the same from step to step.

    Attributes:
        accelerator: The engine.
        model: The model that is trained.
        whole: It with its loss.
        constants: Entries of its weights that are no weights, and stay as they are.
        adapters: What is trained instead of its matrices, if that was asked for.
        student: ``whole`` as the engine prepared it.
        optimiser: As the engine prepared it.
        loader: Pieces of steps, as the engine prepared it: every process sees its share.
        teacher: What is learned from.
        text: Windows.
        recipe: The settings.
        checkpoints: Where checkpoints are.
        steps: Steps in all.
    """

    accelerator: Accelerator
    model: LatentModel
    whole: Student
    constants: Mapping[nn.Parameter, Tensor]
    adapters: list[Adapter]
    student: nn.Module
    optimiser: torch.optim.Optimizer
    loader: DataLoader[Tensor]
    teacher: Teacher | None
    text: PackedText
    recipe: Recipe
    checkpoints: Checkpoints
    steps: int

    @classmethod
    def start(
        cls,
        accelerator: Accelerator,
        model: LatentModel,
        teacher: Program | None,
        text: PackedText,
        recipe: Recipe,
        checkpoints: Checkpoints,
    ) -> _Run:
        """Choose what is trained, and prepare everything.

        Raises:
            RefusedError: The training is sharded, and the recipe has what that cannot be had with.
            UsageError: All steps would match attention outputs.
        """
        matching = recipe.match_steps > 0 or ATTENTION in recipe.weights
        if accelerator.distributed_type in _SHARDED and (matching or recipe.lora_rank or constant_rows(model)):
            raise RefusedError(
                "A sharded training can neither match attention outputs, nor have adapters, nor hold an entry of a "
                "latent constant.",
                f"Train without {accelerator.distributed_type.name}.",
            )
        names = trained_names(model, recipe.train)
        own_copies(model, names)
        hold_constants(model)
        constants = constant_rows(model)
        model.to(accelerator.device)
        whole = Student(model, matching=matching, recompute=recipe.recompute)
        adapters = _adapters(whole, model, names, recipe) if recipe.lora_rank else []
        steps = recipe.steps(recipe.tokens or text.train.numel(), text.length)
        if recipe.match_steps >= steps:
            raise UsageError(
                f"All {steps} steps would match attention outputs (--match-steps {recipe.match_steps}).",
                "Match in fewer steps, or give more --tokens.",
            )
        numbers = order(len(text.train), steps * recipe.batch, recipe.seed)
        student, optimiser, loader = accelerator.prepare(
            whole,
            torch.optim.AdamW(
                adapter_groups(adapters, recipe.rate) if adapters else parameter_groups(model, recipe.rate),
                betas=_BETAS,
                weight_decay=recipe.weight_decay,
            ),
            DataLoader(text.train, batch_size=recipe.batch // recipe.accumulate, sampler=numbers),  # type: ignore[arg-type]
        )
        answers = None if teacher is None else Teacher.of(teacher, accelerator.device, layers=matching)
        return cls(
            accelerator,
            model,
            whole,
            constants,
            adapters,
            student,
            optimiser,
            loader,
            answers,
            text,
            recipe,
            checkpoints,
            steps,
        )

    def begin_counting(self) -> None:
        """Forget the step without gradients that torch took to save the state of an optimiser of sharded weights."""
        for moments in self.optimiser.state.values():
            moments["step"].zero_()

    def advance(self, state: State, pieces: Iterator[Tensor], stage: Stage) -> State:
        """Train up to the next evaluation.

        Raises:
            TrainingError: The loss, or its gradient, is not finite.
        """
        begin, losses = time.perf_counter(), []
        end = min(self.steps, (state.step // self.recipe.every + 1) * self.recipe.every)
        per_step = self.recipe.batch * self.text.length
        for step in range(state.step, end):
            losses.append(self._step(step, pieces))
            speed = len(losses) * per_step / (time.perf_counter() - begin)
            stage.note = f"loss {losses[-1]:.4f}, {speed:,.0f} tokens/s"
            stage()
        point = TrainingPoint(end, end * per_step, sum(losses) / len(losses), *self.measure(end))
        self.accelerator.log({"loss": point.loss, "held_out": point.held_out, "tokens": point.tokens}, step=end)
        stage.tell(f"step {end}/{self.steps}: {stage.note}, held-out loss {point.held_out:.4f}")
        return State(end, (*state.curve, point))

    def measure(self, step: int) -> tuple[float, float]:
        """Losses of next token and objective on held-out text after so many steps; every process measures all of it.

        Raises:
            TrainingError: They are not finite.
        """
        weights = self.recipe.weights
        parts = tuple(dict.fromkeys((NEXT_TOKEN, *weights)))
        totals = torch.zeros(len(parts), dtype=torch.float64)
        with torch.no_grad():
            for piece in self.text.held_out.split(self.recipe.batch // self.recipe.accumulate):
                ids = piece.to(self.accelerator.device).long()
                losses = self.student(ids, parts, self._wanted(ids, parts))
                totals += losses.cpu().double() * len(ids)
        means = dict(zip(parts, (totals / len(self.text.held_out)).tolist(), strict=True))
        held_out, towards = means[NEXT_TOKEN], sum(weight * means[part] for part, weight in weights.items())
        if step == 0 and not (math.isfinite(held_out) and math.isfinite(towards)):
            model = "its teacher" if math.isfinite(held_out) else "the converted model"
            raise TrainingError(
                f"Before any training {model} gives no finite loss on the held-out text.",
                "Check that model with mla-compile eval, or give another text.",
            )
        what = "loss on held-out text"
        return self._finite(held_out, what, step), self._finite(towards, what, step)

    def is_over(self, state: State) -> bool:
        """Whether enough evaluations have passed since the best one."""
        measured = [point.step for point in state.curve]
        return 0 < self.recipe.patience <= len(measured) - 1 - measured.index(state.best.step)

    def hand_back(self) -> None:
        """Leave the model on the CPU, whole and trainable as it was given; of sharded weights, in the main process."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            whole = self.accelerator.get_state_dict(self.student)
            gathered: dict[nn.Parameter, nn.Parameter] = {}
            for name, parameter in [*self.model.named_parameters(remove_duplicate=False)]:
                if f"model.{name}" in whole:
                    path, _, leaf = name.rpartition(".")
                    gathered.setdefault(parameter, nn.Parameter(whole[f"model.{name}"].clone()))
                    setattr(self.model.get_submodule(path), leaf, gathered[parameter])
        merge(self.whole.graphs, self.adapters)
        self.model.to("cpu").requires_grad_(True).zero_grad()

    def _step(self, step: int, pieces: Iterator[Tensor]) -> float:
        """One step; its loss."""
        objective = self.recipe.weights_at(step)
        share = self.recipe.share(step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * share
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.recipe.accumulate):
            ids = next(pieces).long()
            wanted = self._wanted(ids, objective)
            with self.accelerator.accumulate(self.student):
                losses = self.student(ids, tuple(objective), wanted)
                loss = torch.stack([weight * losses[i] for i, weight in enumerate(objective.values())]).sum()
                self.accelerator.backward(loss)
                total += loss.detach() / self.recipe.accumulate
                if self.accelerator.sync_gradients:
                    length = self.accelerator.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
                    found = self._finite(float(self.accelerator.reduce(total, "mean")), "loss", step + 1)
                    self._finite(float(length), "gradient", step + 1)
                self.optimiser.step()
                restore_constants(self.constants)
                self.optimiser.zero_grad()
        return found

    def _wanted(self, ids: Tensor, parts: Collection[str]) -> TeacherAnswers:
        return TeacherAnswers() if self.teacher is None else self.teacher.answer(ids, parts)

    def _finite(self, value: float, what: str, step: int) -> float:
        if not math.isfinite(value):
            folder, stay = self.checkpoints.folder, self.checkpoints.stay
            left = f"checkpoints of earlier steps are in '{folder}'" if stay else "nothing is left of it"
            how = "" if stay else " by mla-compile finetune, on a conversion without --finetune,"
            raise TrainingError(
                f"The {what} is not finite at step {step}; training ended, and {left}.",
                f"Begin anew{how} with a smaller --rate or a longer --warm-up.",
            )
        return value


def _adapters(student: Student, model: LatentModel, names: set[str], recipe: Recipe) -> list[Adapter]:
    """Adapters of the matrices that would be trained, which are frozen."""
    return adapt(
        student.graphs,
        names,
        model,
        constant_rows(model),
        rank=recipe.lora_rank,
        alpha=recipe.lora_alpha or recipe.lora_rank,
        seed=recipe.seed,
    )
