"""Finished layers on disk: no more than one is in memory while others are made, and a killed conversion goes on.

A layer's file is named by a hash of everything that its content follows from (its weights, its description, its plan,
versions), so that whatever is found under that name is what would be computed again. What is read back is mapped from
the file: the system may drop it from memory at any time, and read it again.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mla_compile.disk.content import content_of
from mla_compile.disk.writing import explained, missing_folders, remove_empty, whole_file
from mla_compile.errors import ShareDone
from mla_compile.latent_weights import LatentWeights

__all__ = ["Journal", "LayerStore", "rounded", "store_beside", "store_folder"]

_SCHEMA = 2
"""Raise it with every change of how layers are made."""
_MATRICES = ("query", "row", "key_up", "value_up")
"""What takes room; the rest stays in float64."""


@dataclass(frozen=True)
class LayerStore:
    """A folder of finished layers.

    Attributes:
        folder: It is made when something is written.
    """

    folder: Path

    def recall(
        self,
        settled: object,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        make: Callable[[], LatentWeights],
    ) -> LatentWeights:
        """Read a layer that was finished before, or make it, write it and read it back.

        Args:
            settled: Everything but tensors that the layer follows from; its ``repr`` counts.
            tensors: The tensors.
            dtype: Type of its matrices, in the end.
            make: Computes the layer in float64.

        Raises:
            UsageError: It cannot be written.
        """
        key = content_of(tensors, repr((_SCHEMA, torch.__version__, dtype, settled)))
        path = self.folder / f"{key}.safetensors"
        with contextlib.suppress(FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):  # or damaged
            return _read(path)
        with explained(path):
            _write(path, rounded(make(), dtype))
            return _read(path)

    def journal(self, settled: object) -> Journal:
        """Numbers that were found before, of what follows from ``settled`` alone; its ``repr`` counts."""
        return Journal(self.folder / f"{content_of({}, repr((_SCHEMA, torch.__version__, settled)))}.json")


@dataclass(frozen=True)
class Journal:
    """Numbers by name, every one of which is on disk as soon as it is found.

    Attributes:
        path: The file.
    """

    path: Path

    def recall(self, name: str, make: Callable[[], float]) -> float:
        """Read a number that was found before, or find and write it.

        Raises:
            UsageError: It cannot be written.
        """
        found = self._read()
        if name not in found:
            found[name] = make()
            with explained(self.path), whole_file(self.path) as file:
                file.write_text(json.dumps(found), encoding="utf-8")
        return found[name]

    def _read(self) -> dict[str, float]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return {name: value for name, value in found.items() if isinstance(value, float | int)}
        return {}


def store_folder(out: Path) -> Path:
    """Where layers of a conversion, and checkpoints of its training, are kept until it is done: hidden, beside it."""
    return out.absolute().parent / f".{out.name}.layers"


@contextlib.contextmanager
def store_beside(out: Path) -> Iterator[LayerStore]:
    """Keep finished layers beside an output while it is made.

    They are removed when the body ends, fails or is interrupted, and stay when this process is killed or asked to end
    (``SIGTERM``): the same conversion then continues after the last of them. They also stay when this process has done
    its share of the text, because the first process, which continues, needs them.

    Args:
        out: The file or folder that is made.

    Yields:
        Where layers are kept.
    """
    folder = store_folder(out)
    created = missing_folders(folder.parent)
    try:
        yield LayerStore(folder)
    except ShareDone:
        raise
    except SystemExit:
        with contextlib.suppress(OSError):
            folder.rmdir()  # which holds nothing yet
        remove_empty(created)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        remove_empty(created)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def rounded(weights: LatentWeights, dtype: torch.dtype) -> LatentWeights:
    """A layer with its matrices in a type; what takes no room stays as it is."""
    return replace(weights, **{name: getattr(weights, name).to(dtype) for name in _MATRICES})


def _write(path: Path, weights: LatentWeights) -> None:
    tensors = {
        f.name: value.contiguous() for f in fields(weights) if isinstance(value := getattr(weights, f.name), Tensor)
    }
    with whole_file(path) as file:
        save_file(tensors, file, {"scaled_rope": str(int(weights.scaled_rope))})


def _read(path: Path) -> LatentWeights:
    with safe_open(path, "pt") as file:
        scaled = bool(int((file.metadata() or {})["scaled_rope"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    optional = {f.name: tensors.get(f.name) for f in fields(LatentWeights) if f.name != "scaled_rope"}
    return LatentWeights(**optional, scaled_rope=scaled)  # type: ignore[arg-type]
