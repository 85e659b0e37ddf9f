"""Names by content: a hash of tensors, so that what was made of them never has to be invalidated."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from mla_compile.disk.mapped import drop_pages

__all__ = ["content_of", "hash_tensors"]

_CHUNK = 2**24
"""Bytes hashed at once."""


def hash_tensors(digest: hashlib.blake2b, tensors: Mapping[str, Tensor]) -> None:
    """Feed names, types, shapes and values of tensors to a hash, in the order of their names.

    Tensors that are mapped from a file are read piece by piece, and never held whole.
    """
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        for part in value.reshape(-1).view(torch.uint8).split(_CHUNK):
            digest.update(part.numpy())
        drop_pages([value])


def content_of(tensors: Mapping[str, Tensor], settled: str = "") -> str:
    """Hash of tensors, and of what else something follows from."""
    digest = hashlib.blake2b(settled.encode(), digest_size=16)
    hash_tensors(digest, tensors)
    return digest.hexdigest()
