"""A ``torch.export`` archive read with its weights mapped from the file, which torch reads into memory.

Such an archive is a zip file whose records are stored as they are, and a weight's record is its numbers. torch is given
an archive without them, which says that they are on the device ``meta``, where nothing has numbers; what is mapped then
takes their place. Where an archive is laid out otherwise (other versions of torch may do so), torch reads all of it.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from mla_compile.disk.mapped import drop_pages
from mla_compile.errors import LoadError
from mla_compile.sources.archive_guard import load_data_only

__all__ = ["load_mapped"]

_WEIGHTS = "data/weights/"
_LIST = "model_weights_config.json"
_LOCAL = struct.Struct("<26xHH")
"""Of the header in front of a record: how long its name is, and what comes behind it."""
_PIECE = 2**24
"""Bytes whose checksum is computed at a time."""


def load_mapped(path: Path) -> ExportedProgram:
    """Read an archive that ``torch.export.save`` wrote. What is written to its weights later stays in memory.

    Raises:
        LoadError: A weight is damaged, or something in it would run code.
        Exception: Whatever torch raises for a file that it cannot read.
    """
    with zipfile.ZipFile(path) as archive:
        records = _weight_records(archive)
        exported = load_data_only(
            _without(archive, {info.filename for info in records.values()}) if records else path, str(path)
        )
    state, flat = exported.state_dict, dict[str, Tensor]()
    for name, info in records.items():
        like = state[name]
        if info.file_size != like.nbytes or not like.is_contiguous():  # a part of its record
            return load_data_only(path, str(path))
        if info.filename not in flat:  # others are tied to it
            flat[info.filename] = _mapped(path, info)
        weight = flat[info.filename].view(like.dtype).view(like.shape)
        state[name] = torch.nn.Parameter(weight, like.requires_grad) if isinstance(like, torch.nn.Parameter) else weight
    return exported


def _weight_records(archive: zipfile.ZipFile) -> Mapping[str, zipfile.ZipInfo]:
    """Where the numbers of weights are, by their names; none where not all are stored as they are."""
    infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if _WEIGHTS + _LIST not in infos:
        return {}
    listed: dict[str, Any] = json.loads(archive.read(infos[_WEIGHTS + _LIST]))["config"]
    found = {name: infos.get(_WEIGHTS + str(entry.get("path_name"))) for name, entry in listed.items()}
    whole = {name: info for name, info in found.items() if info is not None and _is_plain(info, listed[name])}
    return whole if len(whole) == len(listed) else {}


def _is_plain(info: zipfile.ZipInfo, entry: Mapping[str, Any]) -> bool:
    """Whether a weight's record is its numbers."""
    stored = info.compress_type == zipfile.ZIP_STORED and info.file_size > 0 and not entry["use_pickle"]
    return stored and entry["tensor_meta"]["device"]["type"] == "cpu"


def _without(archive: zipfile.ZipFile, left_out: set[str]) -> io.BytesIO:
    """The archive with nothing in its weights' records, and its weights nowhere."""
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w", zipfile.ZIP_STORED) as written:
        for info in archive.infolist():
            record = b"" if info.filename in left_out else archive.read(info)
            if info.filename.endswith(_WEIGHTS + _LIST):
                listed = json.loads(record)
                for entry in listed["config"].values():
                    entry["tensor_meta"]["device"] = {"type": "meta", "index": None}
                record = json.dumps(listed).encode()
            written.writestr(info.filename, record)
    small.seek(0)
    return small


def _mapped(path: Path, info: zipfile.ZipInfo) -> Tensor:
    """The bytes of a record in a storage of their own, compared with their checksum, as torch does where it reads."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        behind = sum(_LOCAL.unpack(file.read(_LOCAL.size)))
    begin = info.header_offset + _LOCAL.size + behind
    record = torch.from_numpy(np.memmap(path, np.uint8, "c", begin, (info.file_size,)))
    checksum = 0
    for piece in record.split(_PIECE):
        checksum = zlib.crc32(piece.numpy(), checksum)
        drop_pages([piece])
    if checksum != info.CRC:
        raise LoadError(
            f"'{path}' is damaged: {info.filename} in it is not what was written.", "Convert the model again."
        )
    return record
