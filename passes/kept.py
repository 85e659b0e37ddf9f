"""Activations between two segments of a graph, kept until they are read: in memory, or in files that are mapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mla_compile.disk.writing import own_folder
from mla_compile.errors import UsageError, first_line

__all__ = ["KeptValues", "kept_values"]


@contextmanager
def kept_values(folder: Path | None) -> Iterator[KeptValues]:
    """Keep values in memory, or in a folder of their own in another, until the end of the block.

    Raises:
        UsageError: Nothing can be written to the folder.
    """
    if folder is None:
        yield KeptValues()
        return
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own = stack.enter_context(own_folder(folder))
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield KeptValues(own)


class KeptValues:
    """Values by batch and name.

    Args:
        folder: Where tensors are written, one file each; in memory by default.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._held: dict[tuple[int, str], Any] = {}

    def put(self, batch: int, values: Mapping[str, Any]) -> None:
        """Keep values of one batch: tensors, or numbers about them.

        Raises:
            UsageError: They cannot be written.
        """
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = _alone(value.detach())
                if self._folder is not None and not value.is_complex():
                    value = _write(self._folder / f"{batch}-{name}.safetensors", value)
            self._held[batch, name] = value

    def get(self, batch: int, names: Iterable[str]) -> dict[str, Any]:
        """Read values of one batch."""
        found = {name: self._held[batch, name] for name in names}
        return {name: _read(value) if isinstance(value, Path) else value for name, value in found.items()}

    def add(self, batch: int, name: str, value: Tensor) -> None:
        """Add to a value, which is 0 until then."""
        before = self.get(batch, [name])[name] if self.has(batch, name) else None
        self.put(batch, {name: value if before is None else before + value})

    def has(self, batch: int, name: str) -> bool:
        """Whether a value is kept."""
        return (batch, name) in self._held

    def drop(self, batch: int, names: Iterable[str]) -> None:
        """Forget values of one batch."""
        for name in names:
            value = self._held.pop((batch, name), None)
            if isinstance(value, Path):
                value.unlink()


def _alone(value: Tensor) -> Tensor:
    """A tensor that keeps no larger one alive."""
    value = value.contiguous().cpu()
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def _write(path: Path, value: Tensor) -> Path:
    try:
        path.unlink(missing_ok=True)  # a file that is still mapped must not change
        save_file({"value": value}, path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(path.parent.parent, error) from error
    return path


def _unwritable(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        f"Activations could not be written to '{folder}' ({first_line(error)}).",
        "Make room there, name another folder with --offload, or calibrate on fewer --calibration-tokens.",
    )


def _read(path: Path) -> Tensor:
    with safe_open(path, "pt") as file:
        found: Tensor = file.get_tensor("value")
    return found
