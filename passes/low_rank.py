"""The best factors of a matrix of a given rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LowRank", "low_rank_factors", "truncated_svd"]


@dataclass(frozen=True)
class LowRank:
    """Two factors of a matrix ``[rows, width]``; past the smaller of its sizes their entries are zero.

    Attributes:
        up: ``[rows, rank]``, which carries the singular values.
        down: ``[rank, width]``, whose other rows are orthonormal.
        squares: Squares of all singular values of the matrix, falling; None where nothing is left out and they were not
            computed.
    """

    up: Tensor
    down: Tensor
    squares: Tensor | None


def truncated_svd(matrix: Tensor, rank: int) -> LowRank:
    """Best rank-``rank`` factors of a matrix (Eckart-Young), with reproducible signs.

    The directions are eigenvectors of the smaller Gram matrix. That squares the condition number, which in float64
    costs nothing that shows: the factors are the matrix projected on an orthonormal basis, whose error is second order
    in what a direction is off, and a direction is off only among those of alike or negligible singular values. It takes
    half the time of an SVD, or a third (``benchmarks/scale.py``).

    Args:
        matrix: ``[rows, width]``, float64.
        rank: Number of components.
    """
    available = min(rank, *matrix.shape)
    if matrix.shape[0] < matrix.shape[1]:
        squares, left = torch.linalg.eigh(matrix @ matrix.mT)
        down = torch.linalg.qr(matrix.mT @ left.flip(1)[:, :available])[0].mT
    else:
        squares, right = torch.linalg.eigh(matrix.mT @ matrix)
        down = right.flip(1)[:, :available].mT
    return _projected(matrix, down, rank, squares.flip(0).clamp(min=0))


def low_rank_factors(matrix: Tensor, rank: int) -> LowRank:
    """:func:`truncated_svd`, but where nothing is left out by a basis of the rows in no order, which costs far less."""
    smaller = min(matrix.shape)
    if rank < smaller:
        return truncated_svd(matrix, rank)
    return _projected(matrix, torch.linalg.qr(matrix[:smaller].mT)[0].mT, rank, None)


def _projected(matrix: Tensor, down: Tensor, rank: int, squares: Tensor | None) -> LowRank:
    """A matrix projected on orthonormal rows, whose largest entries are made positive, with zeros up to the rank."""
    down = down * down.gather(1, down.abs().argmax(1, keepdim=True)).sign()
    missing, pad = rank - len(down), torch.nn.functional.pad
    return LowRank(pad(matrix @ down.mT, (0, missing)), pad(down, (0, 0, 0, missing)), squares)
