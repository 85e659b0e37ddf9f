"""File permissions that bind root too, as they bind every other user."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VERSION_3 = 0x20080522  # of the structures that capget(2) and capset(2) take
_OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def binding() -> Iterator[None]:
    """Lay down root's capabilities to read and write everything, in this thread.

    A process that it starts has them again.
    """
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "capset"):
        pytest.skip("root may read and write everything, and this system has no capabilities to lay down")
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable of the lower 32 capabilities, then of the upper

    def put(effective: int) -> None:
        if libc.capset(header, (ctypes.c_uint32 * 6)(effective, *held[1:])) != 0:
            pytest.skip("root may read and write everything here, and may not lay that down")

    libc.capget(header, held)
    put(held[0] & ~_OVERRIDES)
    try:
        yield
    finally:
        put(held[0])
