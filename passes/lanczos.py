"""Leading eigenvectors of many weightings of one Hermitian matrix, which are all that greedy choices need to know."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["leading_vectors"]

_KRYLOV, _RESTARTS, _LOOK = 64, 20, 4
"""Steps before a restart, restarts, and steps between looks at the residuals."""
_ROUNDING = 1e-13
"""What is left of a step, relative to the largest eigenvalue, when there is nowhere else to go."""


def leading_vectors(moment: Tensor, scale: Tensor, start: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues of ``diag(s) M diag(s)`` for many ``s``, by Lanczos iterations side by side.

    Args:
        moment: ``[N, N]``, Hermitian, with no negative eigenvalues but for rounding errors.
        scale: ``[T, N]``, the ``s``.
        start: ``[T, N]``, where to start: no vector that is orthogonal to the one that is looked for finds it.
        tolerance: Largest residual ``|A v - lambda v|`` relative to ``lambda``.

    Returns:
        Eigenvalues ``[T]`` and unit eigenvectors ``[T, N]``.
    """
    batch, size = scale.shape
    longest, vector = min(_KRYLOV, size), start * (scale > 0)
    for _ in range(_RESTARTS):
        current = vector / vector.norm(dim=1, keepdim=True)
        basis = current.new_zeros(batch, longest, size)
        small = torch.zeros(batch, longest, longest, dtype=scale.dtype)
        for step in range(longest):
            basis[:, step] = current
            known = basis[:, : step + 1]
            image = scale * ((scale * current) @ moment.T)
            small[:, step, step] = torch.where(current.any(1), (current.conj() * image).sum(1).real, -1.0)
            for _ in range(2):  # rounding errors of the first time are those of a long vector
                image = image - (known.mT @ (known.conj() @ image[:, :, None]))[..., 0]
            length = image.norm(dim=1)
            if step % _LOOK == _LOOK - 1 or step == longest - 1:
                values, vectors = torch.linalg.eigh(small[:, : step + 1, : step + 1])
                done = bool((length * vectors[:, -1, -1].abs() <= tolerance * values[:, -1]).all())
                if done:
                    break
            going = length > _ROUNDING * small.diagonal(dim1=1, dim2=2).amax(1)
            current = torch.where(going, 1 / length.clamp(min=1e-300), 0.0)[:, None] * image
            small[:, step + 1 : step + 2, step] = (length * going)[:, None]
        vector = (known.mT @ vectors[:, :, -1:].to(known.dtype))[..., 0]
        if done:
            break
    return values[:, -1], vector
