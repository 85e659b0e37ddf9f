"""``mla-compile finetune``: from a converted model, text and settings to a trained one."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mla_compile.artifacts.companions import MODEL
from mla_compile.artifacts.places import check_place, is_named_file
from mla_compile.artifacts.runnable import module_scorer
from mla_compile.artifacts.saved import RECIPE, open_saved, write_trained
from mla_compile.config import REPORT, SETTINGS
from mla_compile.disk.content import content_of
from mla_compile.disk.writing import explained
from mla_compile.errors import LoadError, UsageError
from mla_compile.passes.retype import is_narrow, widened
from mla_compile.program import Program
from mla_compile.progress import Display, Stages
from mla_compile.report import Training
from mla_compile.reporting.report_page import PAGE
from mla_compile.runtime.module import LatentModel
from mla_compile.sources import frontend
from mla_compile.sources.given import require_named
from mla_compile.text.calibration import Text, read_text
from mla_compile.text.corpus import check_vocabulary, load_tokenizer
from mla_compile.text.evaluate import longest_window, perplexity, require_window
from mla_compile.training.checkpoints import Checkpoints, remove_checkpoints, require_same_settings
from mla_compile.training.packing import PackedText, pack
from mla_compile.training.recipe import DIVERGENCE, NEXT_TOKEN, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["finetune", "finetune_module", "require_accelerate"]

_log = logging.getLogger(__name__)
_CHECKPOINTS = "checkpoints"
_RESULTS = (MODEL, SETTINGS, REPORT, PAGE, RECIPE)
_MANY_MORE = 1.1
"""Tokens that whole steps take over those that were asked for, from which the user is told."""


@dataclass(frozen=True)
class _Task:
    """Everything that is known before processes join.

    Attributes:
        model: The converted model.
        teacher: What it learns from, if the objective asks for one.
        text: Windows.
        recipe: The settings, all of them chosen.
    """

    model: LatentModel
    teacher: Program | None
    text: PackedText
    recipe: Recipe

    @classmethod
    def of(
        cls,
        model: LatentModel,
        source: str,
        longest: int | None,
        teacher: Program | None,
        text: Iterable[str] | Tensor,
        tokenizer: Any,  # noqa: ANN401 - transformers' tokenizers share no public base
        recipe: Recipe,
    ) -> _Task:
        """Choose what was left open, and cut the text.

        Args:
            model: The converted model.
            source: Its name.
            longest: Longest sequence it says it can run, if it says so.
            teacher: What there is to learn from.
            text: Documents or windows.
            tokenizer: A tokenizer, for documents.
            recipe: The settings, the objective chosen.

        Raises:
            UsageError: Text, tokenizer, teacher and model do not fit together.
        """
        if isinstance(text, Tensor) and recipe.seq_len not in (None, text.shape[1]):
            raise UsageError(
                f"The windows have {text.shape[1]} tokens, and a seq_len of {recipe.seq_len} is asked for.",
                "Leave seq_len out, or cut the text into such windows.",
            )
        score = module_scorer(model)
        length = text.shape[1] if isinstance(text, Tensor) else recipe.seq_len
        if length is None:
            length = longest_window(score, longest)
        else:
            require_window(score, longest, length, source)
        known = _vocabulary(model, source, teacher)
        packed = pack(text, tokenizer, length, recipe.tokens, recipe.eval_windows)
        largest = max(int(packed.train.max()), int(packed.held_out.max()))
        check_vocabulary(largest, known, source, model.vocabulary)
        tokens = recipe.tokens or packed.train.numel()
        recipe = recipe.model_copy(update={"seq_len": length, "tokens": tokens})
        return cls(model, teacher if recipe.learns_from_another else None, packed, recipe)

    def checkpoints(self, folder: Path, *, stay: bool) -> Checkpoints:
        """Checkpoints of this training in a folder."""
        return Checkpoints(
            folder / _CHECKPOINTS,
            self.recipe,
            text=self.text.fingerprint,
            model=content_of(self.model.state_dict()),
            teacher="" if self.teacher is None else content_of(self.teacher.exported.state_dict),
            stay=stay,
        )

    def train(self, engine: Accelerator, checkpoints: Checkpoints, stages: Stages, *, resume: bool) -> Training:
        """Train, and keep checkpoints."""
        from mla_compile.training.trainer import train

        return train(engine, self.model, self.teacher, self.text, self.recipe, checkpoints, stages, resume=resume)


def finetune(
    folder: str | Path,
    data: Text,
    out: str | Path,
    recipe: Recipe | Mapping[str, Any],
    *,
    teacher: str | Path | None = None,
    tokenizer: str | None = None,
    resume: bool = False,
    force: bool = False,
    display: Display | None = None,
) -> dict[str, Any] | None:
    """Fine-tune a converted model that was saved, and save it again.

    Every process of several calls it; they share the work, and the first of them writes.

    Args:
        folder: Written by :meth:`~mla_compile.conversion.compiled.CompiledModel.save`.
        data: Text to train on, as for :func:`mla_compile.compile`.
        out: The folder to write, with checkpoints in it while and after training.
        recipe: The settings, also as a dictionary.
        teacher: The original, or a larger model with the same vocabulary, for objectives that learn from one.
        tokenizer: Folder of the tokenizer, if the converted model has none.
        resume: Continue from the last checkpoint in ``out``.
        force: Start over where ``out`` holds something; checkpoints and result of a training there are removed first.
        display: Shows progress.

    Returns:
        The report of the model, with the training in it; None in processes that wrote nothing.

    Raises:
        LoadError: Model, teacher, tokenizer or text cannot be read, or accelerate is not installed.
        UsageError: They do not fit together, or ``out`` cannot be written.
        RefusedError: The model cannot be trained with these settings.
        TrainingError: The loss is not finite, or a checkpoint could not be written.
    """
    folder, out, recipe = Path(folder), Path(out), Recipe.of(recipe)
    _require_packages(recipe)
    if teacher is not None and recipe.objective != "auto" and not recipe.learns_from_another:
        raise UsageError(
            f"The objective '{recipe.objective}' asks no teacher, and '{teacher}' is one.",
            "Leave --teacher out, or give --objective kl.",
        )
    recipe = _with_objective(recipe, teacher is not None)
    if teacher is not None:
        require_named(teacher)
    _check_out(folder, out, resume=resume, force=force)
    if resume:
        require_same_settings(out / _CHECKPOINTS, recipe)
    stages = Stages(display)
    text = read_text(data)
    with stages.stage("load"):
        saved = open_saved(folder)
        model = _in_float32(saved.module)
        program = None if teacher is None else frontend.load_program(teacher)  # with a tokenizer of its own, if any
        words = None if isinstance(text, Tensor) else load_tokenizer(tokenizer or str(folder))
        if program is not None and words is not None:
            _require_same_words(program, words, tokenizer or str(folder))
        task = _Task.of(model, str(folder), saved.longest, program, text, words, recipe)  # type: ignore[arg-type]
    from mla_compile.training.trainer import start_engine

    engine = start_engine(task.recipe, out)  # all processes have checked the folder when this returns
    if engine.is_main_process and not resume:
        _remove_earlier(out)
        _tell_rounding(recipe.tokens, task)
    engine.wait_for_everyone()
    training = task.train(engine, task.checkpoints(out, stay=True), stages, resume=resume)
    if not engine.is_main_process:
        return None
    if model is not saved.module:
        _write_back(model, saved.module)
        with stages.stage("evaluate"):  # once more: weights were rounded
            found = perplexity(module_scorer(saved.module), task.text.held_out.long(), task.recipe.batch)
        training = replace(training, after=found.loss)
    with stages.stage("write"):
        return write_trained(saved, saved.module, training, task.recipe.model_dump(), out)


def finetune_module(
    model: LatentModel,
    original: Program,
    data: Text,
    tokenizer: Any,  # noqa: ANN401 - a folder or any transformers tokenizer
    recipe: Recipe,
    stages: Stages,
    folder: Path | None = None,
) -> Training:
    """Fine-tune a converted model in place, with its original as the teacher; checkpoints are temporary.

    Args:
        model: The model. Weights that are trained become its own, so that the original keeps its.
        original: What it was converted from.
        data: Text to train on.
        tokenizer: A tokenizer, if the original brings none.
        recipe: The settings.
        stages: Times and shows what runs.
        folder: Where checkpoints lie until the training is done. One that was killed goes on behind the last of them.
            A temporary folder by default.

    Raises:
        LoadError: Text or tokenizer cannot be read, or accelerate is not installed.
        UsageError: Settings do not fit.
        RefusedError: The model cannot be trained with these settings.
        TrainingError: The loss is not finite, or a checkpoint could not be written.
    """
    _require_packages(recipe)
    text = read_text(data)
    if not isinstance(text, Tensor) and (tokenizer is None or isinstance(tokenizer, str | Path)):
        tokenizer = load_tokenizer(original.assets.folder)
    recipe = _with_objective(recipe.model_copy(update={"tracker": "none"}), True)
    task = _Task.of(model, original.source, original.max_positions, original, text, tokenizer, recipe)  # type: ignore[arg-type]
    from mla_compile.training.trainer import start_engine

    with tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder) as place:
        checkpoints = task.checkpoints(Path(place), stay=False)
        resume = _are_there(checkpoints)
        if not resume:
            _tell_rounding(recipe.tokens, task)
        training = task.train(start_engine(task.recipe, Path(place)), checkpoints, stages, resume=resume)
        remove_checkpoints(checkpoints.folder)
        return training


def _tell_rounding(wanted: int | None, task: _Task) -> None:
    """Say so where whole steps take many more tokens than were asked for."""
    length, batch = task.text.length, task.recipe.batch
    taken = 0 if wanted is None else task.recipe.steps(wanted, length) * batch * length
    if wanted is not None and taken > _MANY_MORE * wanted:
        _log.warning(
            "Training takes %d tokens, not %d: whole steps of %d windows of %d tokens.", taken, wanted, batch, length
        )


def _are_there(checkpoints: Checkpoints) -> bool:
    """Whether there are checkpoints of this very training to go on from; those of another are removed."""
    try:
        return checkpoints.last() is not None
    except UsageError:  # a LoadError, of damage, is one too
        remove_checkpoints(checkpoints.folder)
        return False


def _remove_earlier(out: Path) -> None:
    """Remove what an earlier training left, so that no result of it lies beside checkpoints of another."""
    remove_checkpoints(out / _CHECKPOINTS)
    if (out / RECIPE).is_file():
        with explained(out):
            for name in _RESULTS:
                (out / name).unlink(missing_ok=True)


def require_accelerate() -> None:
    """Refuse to train without the engine, before any work is done.

    Raises:
        LoadError: It is not installed.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise LoadError(
            "Fine-tuning takes the package accelerate, which is not installed.",
            "Run: pip install 'mla-compile[train]'.",
        )


def _in_float32(model: LatentModel) -> LatentModel:
    """A model to train: a copy with float32 weights, where narrow ones would lose small steps."""
    graph = model.graph
    return LatentModel(widened(graph, stored=True), model.rows, model.windows) if is_narrow(graph) else model


def _write_back(trained: LatentModel, model: LatentModel) -> None:
    """Round trained weights to the types that a model stores them in."""
    wide = dict(trained.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(wide[name])


def _with_objective(recipe: Recipe, taught: bool) -> Recipe:
    """Choose the objective that was left open.

    Args:
        recipe: The settings.
        taught: Whether there is a teacher.

    Raises:
        UsageError: There is none, and some step asks one.
    """
    if recipe.objective == "auto":
        recipe = recipe.model_copy(update={"objective": DIVERGENCE if taught else NEXT_TOKEN})
    if recipe.learns_from_another and not taught:
        first = f" with {recipe.match_steps} steps of matching" if recipe.match_steps else ""
        raise UsageError(
            f"The objective '{recipe.objective}'{first} learns from another model, and none was given.",
            "Give the original, or a larger model with the same vocabulary, with --teacher MODEL.",
        )
    return recipe


def _require_packages(recipe: Recipe) -> None:
    require_accelerate()
    if recipe.lora_rank and importlib.util.find_spec("peft") is None:
        raise LoadError(
            "Low-rank adapters take the package peft, which is not installed.",
            "Run: pip install 'mla-compile[train,lora]'.",
        )


def _check_out(folder: Path, out: Path, *, resume: bool, force: bool) -> None:
    """Refuse a folder that cannot be written, before any work is done.

    Raises:
        UsageError: It is that of the converted model, or holds something and neither ``resume`` nor ``force`` is given;
            what to do depends on whether that is a training that is finished.
    """
    if resume and force:
        raise UsageError("--resume goes on and --force begins anew.", "Give one of them.")
    if is_named_file(out):
        raise UsageError(
            f"'{out}' is not named like a folder.", "Name a folder, and write ONNX from it with mla-compile export."
        )
    if out.exists() and folder.exists() and out.samefile(folder):
        raise UsageError(f"'{out}' is the folder of the converted model.", "Choose another folder.")
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and not resume and not force and (out / RECIPE).is_file():
        raise UsageError(
            f"'{out}' holds a training that is finished.",
            f"Train it further into a new folder with mla-compile finetune {out}, or begin anew with --force.",
        )
    if occupied and not resume and not force:
        raise UsageError(f"'{out}' exists already.", "Go on with --resume, or begin anew with --force.")
    if resume and not any((out / _CHECKPOINTS).glob("step-*")):
        raise UsageError(
            f"'{out}' holds no checkpoints to go on from.",
            f"Choose another folder, or {'pass --force instead of' if occupied else 'leave out'} --resume.",
        )
    check_place(out, force=True)


def _require_same_words(teacher: Program, words: Any, source: str) -> None:  # noqa: ANN401
    """Refuse a teacher whose tokens mean something else.

    Raises:
        UsageError: Its tokenizer is another.
    """
    try:
        theirs = load_tokenizer(teacher.assets.folder)
    except LoadError:  # it brings none to compare
        return
    if theirs.get_vocab() != words.get_vocab():
        raise UsageError(
            f"'{teacher.source}' has another vocabulary than '{source}'.", "Choose a teacher with the same tokenizer."
        )


def _vocabulary(model: LatentModel, source: str, teacher: Program | None) -> int:
    """How many token ids the model, and its teacher, can be given and predict.

    Raises:
        UsageError: They predict different numbers of tokens.
    """
    if teacher is None:
        return model.known_tokens
    own, theirs = model.vocabulary, teacher.vocabulary
    if own != theirs:
        raise UsageError(
            f"'{teacher.source}' predicts {theirs} tokens and '{source}' {own}: they have different vocabularies.",
            "Choose a teacher with the same vocabulary.",
        )
    return min(model.known_tokens, teacher.known_tokens)
