"""Leading eigenvectors against full eigendecompositions."""

from __future__ import annotations

import pytest
import torch

from mla_compile.passes.lanczos import leading_vectors


def moments(size, rank, decay, seed=0):
    """A covariance with eigenvalues that fall by ``decay``, and weights of which some are zero."""
    draw = torch.Generator().manual_seed(seed)
    root = torch.randn(2, size, rank, generator=draw, dtype=torch.float64) * decay ** torch.arange(rank)
    root, scale = torch.complex(*root), torch.rand(5, size, generator=draw, dtype=torch.float64)
    start = torch.complex(*torch.randn(2, 5, size, generator=draw, dtype=torch.float64))
    return root @ root.mH, scale * (scale > 0.2), start


@pytest.mark.parametrize(
    ("size", "rank", "decay"),
    [(1, 1, 1.0), (3, 3, 0.9), (40, 2, 0.5), (40, 80, 0.9), (150, 300, 1.0)],
    ids=["one channel", "small", "of low rank", "falling", "flat, with restarts"],
)
def test_leading_vectors_are_those_of_full_decompositions(size, rank, decay):
    moment, scale, start = moments(size, rank, decay)
    scale[:, 0] = 1.0
    values, vectors = leading_vectors(moment, scale, start, 1e-10)
    matrices = scale[:, :, None] * moment * scale[:, None]
    # Residuals are 1e-10 of the eigenvalue, errors of eigenvalues about their squares.
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrices)[:, -1], rtol=1e-12, atol=0)
    images = (matrices @ vectors[:, :, None])[..., 0]
    torch.testing.assert_close(images, values[:, None] * vectors, rtol=0, atol=2e-10 * float(values.max()))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5).double())


def test_rough_vectors_are_closer_than_asked_for_in_their_values():
    moment, scale, start = moments(100, 200, 0.97)
    values, _ = leading_vectors(moment, scale, start, 1e-2)
    exact = torch.linalg.eigvalsh(scale[:, :, None] * moment * scale[:, None])[:, -1]
    assert ((values - exact).abs() < 1e-3 * exact).all()


def test_nothing_has_no_length():
    _, scale, start = moments(4, 4, 1.0)
    values, vectors = leading_vectors(torch.zeros(4, 4).cdouble(), scale, start, 1e-10)
    assert not values.any()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5).double())
