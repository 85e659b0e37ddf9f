"""Checkpoints: whole or not there at all, some of them kept, and read back to go on from."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError

from mla_compile.artifacts.saved import RECIPE
from mla_compile.disk.writing import missing_folders, remove_empty
from mla_compile.errors import LoadError, TrainingError, UsageError, first_line
from mla_compile.report import TrainingPoint
from mla_compile.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Checkpoints", "State", "remove_checkpoints", "require_same_settings"]

_FREE = ("keep", "patience", "tracker")
"""Settings that may change from one run to the next: they do not change what a step does."""
_NAME = re.compile(r"step-(\d{8,})")
_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, SafetensorError, pickle.UnpicklingError)
"""What readers of JSON, safetensors and torch's files raise where bytes are not theirs."""


@dataclass(frozen=True)
class State:
    """Where training is.

    Attributes:
        step: Steps that were taken.
        curve: What was measured, from step 0 on.
    """

    step: int
    curve: tuple[TrainingPoint, ...]

    @property
    def best(self) -> TrainingPoint:
        """Where what is trained towards was closest, on held-out text."""
        return min(self.curve, key=lambda point: point.objective)


@dataclass(frozen=True)
class Checkpoints:
    """A folder of checkpoints of one training.

    A checkpoint holds the weights (safetensors), the states of optimiser and random generators as accelerate writes
    them, ``recipe.yaml`` and ``state.json``. It is written under a hidden name, and renamed when it is whole.

    Attributes:
        folder: Where they are.
        recipe: The settings, all of them chosen.
        text: Fingerprint of the text.
        model: Fingerprint of the weights that training began with.
        teacher: Fingerprint of the weights of what is learned from; empty without a teacher.
        stay: Whether they are still there when training failed, for somebody to go on from.
    """

    folder: Path
    recipe: Recipe
    text: str
    model: str
    teacher: str
    stay: bool = True

    @property
    def _origin(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("model", "teacher", "text")}

    def save(self, accelerator: Accelerator, state: State) -> None:
        """Write a checkpoint, and remove those that are kept no longer; called by every process.

        Raises:
            TrainingError: It could not be written whole, and nothing of it is left.
        """
        hidden = self.folder / f".{_name(state.step)}"
        created = missing_folders(self.folder)
        try:
            if accelerator.is_main_process:
                shutil.rmtree(hidden, ignore_errors=True)
                hidden.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(hidden))
            if accelerator.is_main_process:
                (hidden / RECIPE).write_text(yaml.safe_dump(self.recipe.model_dump(), sort_keys=False), "utf-8")
                written = {**self._origin, "step": state.step, "curve": [asdict(point) for point in state.curve]}
                (hidden / "state.json").write_text(json.dumps(written, indent=1) + "\n", "utf-8")
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(hidden, ignore_errors=True)
            remove_empty(created)
            reason, earlier = first_line(error), self.stay and state.step > 0
            then = "go on with --resume" if earlier else "begin again"
            raise TrainingError(
                f"The checkpoint of step {state.step} could not be written to '{self.folder}' ({reason}); "
                f"{'earlier ones are whole' if earlier else 'nothing is left of this training'}.",
                f"Free some space, and {then}.",
            ) from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            hidden.rename(self.folder / _name(state.step))
            kept = {*self._steps()[-self.recipe.keep :], state.best.step}
            for step in self._steps():
                if step not in kept:
                    shutil.rmtree(self.folder / _name(step))
        accelerator.wait_for_everyone()

    def last(self) -> State | None:
        """What the last checkpoint says of itself; None where there is none.

        Raises:
            LoadError: It is damaged.
            UsageError: It belongs to a training with other settings, or of another model, teacher or text.
        """
        steps = self._steps()
        if not steps:
            return None
        found = self.folder / _name(steps[-1])
        with _damage_explained(found):
            written = json.loads((found / "state.json").read_text("utf-8"))
            state = State(int(written["step"]), tuple(TrainingPoint(**point) for point in written["curve"]))
            stored = dict(yaml.safe_load((found / RECIPE).read_text("utf-8")))
            changed = _changes(stored, self.recipe.model_dump()) or _changes(written, self._origin)
        if changed:
            raise _of_another(self.folder, changed)
        return state

    def load(self, accelerator: Accelerator, step: int) -> None:
        """Take weights and states of one checkpoint; called by every process.

        What accelerate writes by pickling is read as plain data: no code in it is run.

        Raises:
            LoadError: It is damaged.
        """
        found = self.folder / _name(step)
        with _damage_explained(found):
            accelerator.load_state(str(found))

    def _steps(self) -> Sequence[int]:
        """Steps of which there is a checkpoint, in order."""
        return _steps_in(self.folder)


def require_same_settings(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on from a training with other settings, as far as they are chosen before anything is loaded.

    Args:
        folder: A folder of checkpoints.
        recipe: The settings; those that model and text will choose are None.

    Raises:
        LoadError: The last checkpoint is damaged.
        UsageError: It is one of other settings.
    """
    steps = _steps_in(folder)
    if not steps:
        return
    found = folder / _name(steps[-1])
    with _damage_explained(found):
        stored = dict(yaml.safe_load((found / RECIPE).read_text("utf-8")))
    chosen = {name: value for name, value in recipe.model_dump().items() if value is not None}
    if changed := _changes(stored, chosen):
        raise _of_another(folder, changed)


def _of_another(folder: Path, changed: Sequence[str]) -> UsageError:
    """What to say of checkpoints that another training wrote, which may be finished."""
    names, out = ", ".join(changed), folder.parent
    if (out / RECIPE).is_file():
        return UsageError(
            f"'{folder}' holds checkpoints of another training, with another {names}, and it is finished.",
            f"Train its result further into a new folder with mla-compile finetune {out}, or begin anew with --force.",
        )
    return UsageError(
        f"'{folder}' holds checkpoints of another training, with another {names}.",
        "Resume with the same settings, model, teacher and text, or pass --force to begin anew.",
    )


def _steps_in(folder: Path) -> list[int]:
    """Steps that a folder has a checkpoint of, in order."""
    return sorted(int(found[1]) for path in folder.glob("step-*") if (found := _NAME.fullmatch(path.name)))


@contextlib.contextmanager
def _damage_explained(checkpoint: Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into a sentence."""
    try:
        yield
    except (*_DAMAGE, yaml.YAMLError) as error:
        reason = first_line(error)
        raise LoadError(
            f"The checkpoint '{checkpoint}' is damaged ({reason}).",
            "Remove it to go on from the one before, or pass --force to begin anew.",
        ) from error


def remove_checkpoints(folder: Path) -> None:
    """Remove checkpoints, whole or not, and nothing else that somebody put beside them.

    Raises:
        UsageError: They cannot be removed.
    """
    try:
        for path in [*folder.iterdir()] if folder.is_dir() else []:
            if _NAME.fullmatch(path.name.removeprefix(".")):
                shutil.rmtree(path)
        remove_empty([folder])
    except OSError as error:
        raise UsageError(
            f"The checkpoints in '{folder}' could not be removed ({error.strerror}).",
            "Remove them yourself, or choose another folder.",
        ) from error


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _changes(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    return [name for name in present if name not in _FREE and stored.get(name) != present[name]]
