"""Processes that were started together (``accelerate launch``, ``torchrun``) and share the text of a calibration.

Every process runs the same program. What is summed over text is summed by each over its own batches, and then over the
processes in the order of their numbers: the result depends on how many there are, in its last digits, but not on which
is faster. Only the first goes on from there.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from mla_compile.errors import LoadError, ShareDone

__all__ = ["Processes", "end_share", "join_processes"]

_TORCHRUN = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
"""What torch's launcher tells every process; some of it is set on clusters where nothing was launched."""

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes, as one of them sees it.

    Attributes:
        index: Its number, from 0.
        count: How many there are.
        device: Where it computes.
    """

    index: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether it is the one that goes on."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Its own part of some items: every ``count``-th."""
        return items[self.index :: self.count]

    def total(self, value: Tensor) -> Tensor:
        """Sum tensors of one shape over all processes, in the order of their numbers."""
        if self.count == 1:
            return value
        from accelerate.utils import gather

        parts: Tensor = gather(value[None].to(self.device)).cpu()
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def wait(self) -> None:
        """Wait until all processes have come as far."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def leave_unless_first(self) -> None:
        """Go on in the first process only.

        Raises:
            ShareDone: This is another.
        """
        if not self.first:
            raise ShareDone

    def agreed(self, value: T) -> T:
        """What the first process says."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        (said,) = broadcast_object_list([value])
        found: T = said
        return found


def join_processes() -> Processes:
    """Join the processes that were started together; alone, and on the CPU, where a launcher started none.

    Raises:
        LoadError: A launcher started this process, but accelerate is not installed.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ and not os.environ.keys() >= _TORCHRUN:
        return Processes()
    if importlib.util.find_spec("accelerate") is None:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return Processes()
        raise LoadError(
            "Sharing text between processes takes the package accelerate, which is not installed.",
            "Run: pip install 'mla-compile[train]'.",
        )
    from accelerate import PartialState

    state = PartialState(cpu=not torch.accelerator.is_available())
    # Threads of a group that is still there when a process ends make it abort instead.
    atexit.register(state.destroy_process_group)
    return Processes(state.process_index, state.num_processes, str(state.device))


def end_share() -> NoReturn:
    """End a process whose share is done as it is, with exit code 0.

    Its group is the first process's too, which goes on. Taking the group down here now and then met threads that were
    still at work, so that this process aborted, and its launcher then ended the first one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
