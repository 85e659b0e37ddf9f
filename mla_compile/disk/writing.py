"""Write so that a name either holds a whole result or nothing new, and say why writing failed.

Everything is written into a hidden folder beside the target and moved into place at the end. What fails is a full disk,
a folder that became read-only, or a limit of sizes.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mla_compile.errors import LoadError, UsageError, first_line

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = [
    "explained",
    "held",
    "is_occupied",
    "missing_folders",
    "moved_into",
    "own_folder",
    "remove_empty",
    "require_possible",
    "sizes_in",
    "unseen_errors",
    "whole_file",
]

_HIDDEN = ".mla-compile-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_MORE_ROOM, _ELSEWHERE = "Free some room on that disk, or choose another folder.", "Choose another folder."
_OTHERS = ("PytorchStreamWriter failed", "Error while serializing", "I/O error")
"""How torch's and safetensors' own errors, which say no number, begin where a file could not be written."""


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure of the body to write into a sentence.

    Args:
        path: What is written.

    Raises:
        UsageError: It could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*_FULL, *_REFUSED):
            raise
        remedy = _MORE_ROOM if error.errno in _FULL else _ELSEWHERE
        raise UsageError(f"'{path}' could not be written ({os.strerror(error.errno)}).", remedy) from error
    except Exception as error:
        text = str(error)
        if not any(words in text for words in _OTHERS):
            raise
        reason = next((os.strerror(n) for n in _FULL if os.strerror(n) in text), first_line(error))
        raise UsageError(f"'{path}' could not be written ({reason}).", _MORE_ROOM) from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write a file at, which gets its name when the body has ended: it holds all of it or nothing new.

    Args:
        path: The file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with own_folder(path.parent) as beside:
        written = beside / path.name
        yield written
        written.replace(path)


@contextlib.contextmanager
def unseen_errors(path: Path) -> Iterator[BinaryIO]:
    """A file for a writer that must not see it fail: what goes wrong is raised when the body has ended.

    Args:
        path: The file to write.

    Raises:
        OSError: Something could not be written.
    """
    with path.open("wb", buffering=0) as file:
        to = _Unfailing(file)
        with io.BufferedWriter(to) as buffered:
            yield buffered
        if to.error is not None:
            raise to.error


class _Unfailing(io.RawIOBase):
    """Writes until something goes wrong, keeps that, and takes whatever comes after it."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        return self._unless_failed(lambda: self._file.write(data), memoryview(data).nbytes)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._unless_failed(lambda: self._file.seek(offset, whence), offset)

    def _unless_failed(self, action: Callable[[], int], otherwise: int) -> int:
        if self.error is None:
            try:
                return action()  # of a large piece, perhaps a part: the rest is asked for again
            except OSError as error:
                self.error = error
        return otherwise


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder for as long as the body, or this process, lives; yields whether no other process holds it.

    Where the system has no such locks, nobody ever holds a folder for certain, and the answer is no.
    """
    try:
        handle = _hold(folder)
    except OSError:  # it is another's, or gone
        handle = None
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _hold(folder: Path) -> int | None:
    """A handle that holds a folder until it is closed; None where the system has no such locks.

    Raises:
        BlockingIOError: Another holds it.
        OSError: It cannot be opened.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle


@contextlib.contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """Give a hidden folder of this process in another, which is removed when the body has ended.

    What processes that were killed left there is removed first.

    Args:
        parent: The folder to make it in; it is there.

    Raises:
        OSError: No folder can be made.
    """
    for left in parent.glob(f"{_HIDDEN}*"):
        with held(left) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)
    folder, handle = _new_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _new_folder(parent: Path) -> tuple[Path, int | None]:
    """A hidden folder, and what holds it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_HIDDEN, dir=parent))
        try:
            handle = _hold(folder)
        except (BlockingIOError, FileNotFoundError):  # until it was held, somebody took it for a leftover
            continue
        if folder.is_dir():
            return folder, handle
        if handle is not None:
            os.close(handle)


def missing_folders(path: Path) -> list[Path]:
    """A folder and those it is in, as far as they do not exist; the innermost first."""
    return [p for p in (path.absolute(), *path.absolute().parents) if not p.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove the folders that are there and hold nothing."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def require_possible(path: str | Path) -> None:
    """Refuse a name that there can be nothing of: a part of it is longer than a file system holds, or it is a loop.

    Raises:
        LoadError: It is one.
    """
    try:
        Path(path).lstat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise LoadError(f"'{path}' cannot be used ({error.strerror}).", "Give another path.") from error


def is_occupied(path: Path) -> bool:
    """Whether there is a file, or a folder with anything but what a process that was killed left in it."""
    return path.is_file() or (path.is_dir() and any(not p.name.startswith(_HIDDEN) for p in path.iterdir()))


def sizes_in(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder and in those that it holds, by what it is called from there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


@contextlib.contextmanager
def moved_into(target: Path) -> Iterator[Path]:
    """Give a hidden folder to write in; on success move its files into ``target``, on failure remove everything.

    What a process that was killed left there is removed first.

    Raises:
        UsageError: Something could not be written.
    """
    created = missing_folders(target)
    target.mkdir(parents=True, exist_ok=True)
    try:
        with explained(target), own_folder(target) as hidden:
            yield hidden
            _move(hidden, target)
    except BaseException:
        remove_empty(created)
        raise


def _move(hidden: Path, target: Path) -> None:
    """Move files to where they belong; one that others continue (``X.onnx``, and ``X.onnx.data``) comes last.

    It is removed before: a process that is killed in between leaves none, rather than a new one with old weights.

    Raises:
        UsageError: A folder is in the place of one of them; then none is moved.
    """
    names = sizes_in(hidden)
    if blocked := next((target / name for name in names if (target / name).is_dir()), None):
        raise UsageError(f"'{blocked}' is a folder, and a file is to be written there.", "Choose another folder.")
    heads = [name for name in names if any(other.startswith(f"{name}.") for other in names)]
    for name in heads:
        (target / name).unlink(missing_ok=True)
    for name in [*(n for n in names if n not in heads), *heads]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden / name).replace(target / name)
        if name.endswith(".onnx") and f"{name}.data" not in names:  # weights of an earlier file, which was larger
            (target / f"{name}.data").unlink(missing_ok=True)
