"""Statistics of a model on a text, kept between conversions: measuring them is most of the work of a large model.

So is writing text, where the model does that itself.

A file is named by a hash of everything that its content follows from, so that it never has to be invalidated: another
weight, graph, text or version is another name.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from mla_compile.disk.content import content_of, hash_tensors
from mla_compile.disk.writing import whole_file
from mla_compile.errors import first_line
from mla_compile.program import Program
from mla_compile.runtime.user_cache import default_folder
from mla_compile.site import AttentionSite
from mla_compile.site_statistics import SiteStatistics

__all__ = ["Recalled", "StatisticsCache", "open_cache", "sampling_key", "statistics_key"]

T = TypeVar("T")

_MOST = 32 * 2**30
"""Bytes that the usual folder holds, at most: one file of a model of 7 billion parameters is about 4 GB."""
_NAMES = f"{'[0-9a-f]' * 32}.safetensors"
"""What files are called here."""
_SCHEMA = 2
"""Raise it with every change of what statistics are or how they are measured."""


@dataclass(frozen=True)
class Recalled(Generic[T]):
    """What was kept or has just been made, and where it came from.

    Attributes:
        value: Statistics, one entry per site; or windows of text.
        origin: In a few words.
        warnings: What the user should know.
    """

    value: T
    origin: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class StatisticsCache:
    """A folder of statistics.

    Attributes:
        folder: It is made when something is written.
        most: Bytes of statistics in it, at most, but for those written last; None for no limit.
    """

    folder: Path
    most: int | None = None

    def recall(
        self, key: str, measure: Callable[[], tuple[SiteStatistics, ...]]
    ) -> Recalled[tuple[SiteStatistics, ...]]:
        """Read what was measured before, or measure and keep it. A cache that fails costs time and nothing else.

        Args:
            key: Name of the statistics, from :func:`statistics_key`.
            measure: Measures them.
        """
        return self._recall(key, "statistics", measure, _read, _write)

    def recall_windows(self, key: str, write: Callable[[], Tensor]) -> Recalled[Tensor]:
        """Read text that was sampled before, or sample and keep it, likewise.

        Args:
            key: Name of the text, from :func:`sampling_key`.
            write: Samples it: token ids ``[windows, length]``.
        """
        return self._recall(key, "windows of text", write, _read_windows, _write_windows)

    def _recall(
        self, key: str, what: str, make: Callable[[], T], read: Callable[[Path], T], write: Callable[[Path, T], None]
    ) -> Recalled[T]:
        path = self.folder / f"{key}.safetensors"
        warnings = []
        try:
            found = Recalled(read(path), f"reused from {path}")
            with contextlib.suppress(OSError):
                path.touch()  # what was not used for longest goes first
            return found
        except FileNotFoundError:
            pass
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            warnings.append(f"saved {what} could not be read and were made anew ({path}: {first_line(error)})")
        made = make()
        try:
            write(path, made)
            if self.most is not None:
                _prune(path, self.most)
        except (OSError, SafetensorError) as error:
            warnings.append(f"{what} could not be saved to {self.folder} ({first_line(error)})")
            return Recalled(made, "computed", tuple(warnings))
        return Recalled(made, f"computed, saved to {path}", tuple(warnings))


def open_cache(where: bool | str | Path) -> StatisticsCache | None:
    """The cache a user asked for.

    Args:
        where: True for the usual folder, False for none, or a folder.
    """
    if isinstance(where, bool):
        return StatisticsCache(default_folder(), _MOST) if where else None
    return StatisticsCache(Path(where))


def statistics_key(program: Program, sites: Sequence[AttentionSite], windows: Tensor, *, gradients: bool) -> str:
    """Hash everything that statistics follow from.

    Args:
        program: The model: its graph, and every weight and constant of it.
        sites: What was recognised in it.
        windows: Token ids.
        gradients: Whether errors are weighed by the loss's gradients.
    """
    return _key(program, (gradients, tuple(sites)), windows)


def sampling_key(program: Program, starts: Tensor, length: int, seed: int) -> str:
    """Hash everything that text which a model writes itself follows from, but for how its numbers are rounded.

    Args:
        program: The model.
        starts: First tokens of every window.
        length: Tokens of each.
        seed: Of all that is drawn.
    """
    return _key(program, ("sampled", length, seed), starts)


def _key(program: Program, settled: object, windows: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    exported = program.exported
    code = [m.code for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    digest.update(repr((_SCHEMA, torch.__version__, settled, code, program.logits)).encode())
    constants = {name: value for name, value in exported.constants.items() if isinstance(value, Tensor)}
    for tensors in ({"windows": windows}, exported.state_dict, constants):
        hash_tensors(digest, tensors)
    return digest.hexdigest()


def _read(path: Path) -> tuple[SiteStatistics, ...]:
    """Read statistics.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: The file is missing or not what was written.
    """
    stored, tensors = _stored(path)
    sites = range(1 + max(int(name.split(".")[0]) for name in tensors))
    names = [f.name for f in fields(SiteStatistics) if f.name != "tokens"]
    return tuple(
        SiteStatistics(int(stored["tokens"]), **{name: tensors.get(f"{index}.{name}") for name in names})  # type: ignore[arg-type]
        for index in sites
    )


def _read_windows(path: Path) -> Tensor:
    """Read sampled text, likewise."""
    return _stored(path)[1]["windows"]


def _stored(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What was written about a file's tensors, and the tensors.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: The file is missing or not what was written.
    """
    with safe_open(path, "pt") as file:
        stored = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if stored["content"] != content_of(tensors):
        raise ValueError("Its content is not what was written. Remove the file.")
    return stored, tensors


def _prune(new: Path, most: int) -> None:
    """Remove from a folder the statistics that were not used for longest, until the others take at most ``most`` bytes.

    One that cannot be removed stays; one that another process removes meanwhile is gone.
    """
    found = []
    for file in new.parent.glob(_NAMES):
        with contextlib.suppress(OSError):
            found.append((file != new, -file.stat().st_mtime, file, file.stat().st_size))
    room = most
    for other, _, file, size in sorted(found):
        room -= size
        if room < 0 and other:
            with contextlib.suppress(OSError):
                file.unlink()


def _write(path: Path, statistics: Sequence[SiteStatistics]) -> None:
    """Write statistics.

    Raises:
        OSError, SafetensorError: The folder cannot be written to.
    """
    tensors = {
        f"{index}.{f.name}": value.contiguous()
        for index, found in enumerate(statistics)
        for f in fields(found)
        if isinstance(value := getattr(found, f.name), Tensor)
    }
    with whole_file(path) as file:
        save_file(tensors, file, {"tokens": str(statistics[0].tokens), "content": content_of(tensors)})


def _write_windows(path: Path, windows: Tensor) -> None:
    """Write sampled text, likewise."""
    tensors = {"windows": windows}
    with whole_file(path) as file:
        save_file(tensors, file, {"content": content_of(tensors)})
