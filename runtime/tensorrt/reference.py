"""A file for TensorRT in ONNX Runtime: what its engine is compared with, and how it is checked itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_compile.errors import LoadError
from mla_compile.runtime.fixed_cache import FixedCache, FixedCacheDecoder, Limits
from mla_compile.runtime.generate import Ids
from mla_compile.runtime.onnx_cache import PAST, cached_layers
from mla_compile.runtime.onnx_session import open_session

__all__ = ["OnnxFixedDecoder"]


class OnnxFixedDecoder(FixedCacheDecoder):
    """A file for TensorRT in ONNX Runtime, by the bodies of its nodes; for checks, as every step copies the caches.

    Args:
        path: The ``.onnx`` file.

    Raises:
        LoadError: The file is missing, damaged, or not made for TensorRT by this compiler.
        UsageError: ONNX Runtime is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._session, _ = open_session(path)
        inputs = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
        stored = self._session.get_modelmeta().custom_metadata_map.get("mla_compile")
        if stored is None or "lengths" not in inputs:
            raise LoadError(
                f"'{path}' is no file for TensorRT.",
                "Give one written by: mla-compile tensorrt FOLDER --out FILE.onnx.",
            )
        self._inputs = frozenset(inputs)
        caches = [inputs[PAST.format(i)] for i in range(cached_layers(inputs))]
        vocabulary = int(self._session.get_outputs()[0].shape[-1])
        rows = [int(shape[-1]) for shape in caches]
        room = int(caches[0][2])
        super().__init__(str(path), Limits(room, new=room), rows, 4, vocabulary, json.loads(stored))

    def memory(self, batch: int) -> FixedCache:
        """See :meth:`FixedCacheDecoder.memory`."""
        return FixedCache([np.zeros((batch, 1, self.limits.room, row), np.float32) for row in self.rows])

    def run(self, ids: Ids, lengths: Ids, positions: Ids, cache: FixedCache) -> NDArray[Any]:
        """Run new tokens; see :meth:`FixedCacheDecoder.run`."""
        given = {"input_ids": ids, "lengths": lengths.astype(np.int32), "position_ids": positions}
        fed = {name: np.ascontiguousarray(x) for name, x in given.items() if name in self._inputs}
        fed |= {PAST.format(i): x for i, x in enumerate(cache.rows)}
        logits, *cache.rows = self._session.run(None, fed)
        return np.asarray(logits)
