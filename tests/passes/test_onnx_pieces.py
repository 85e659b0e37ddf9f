"""A file that is run in pieces computes what the whole file computes, with the weights of one piece in memory."""

import models
import numpy as np
import pytest
import torch

from mla_compile import api
from mla_compile.errors import VerificationError
from mla_compile.passes.onnx_pieces import PiecewiseSession
from mla_compile.passes.retype_onnx import write_float32_copy
from mla_compile.runtime.onnx_session import OnnxDecoder
from mla_compile.verification.onnx import check_lowering

PIECE = 20_000


@pytest.fixture(scope="module", params=["float32 growing", "bfloat16 growing", "float16 static"])
def files(request, programs, tmp_path_factory):
    """A file, and what ONNX Runtime runs as a whole: itself, or its float32 copy."""
    dtype, cache = request.param.split()
    folder = tmp_path_factory.mktemp("pieces")
    module = programs["llama-gqa"].module
    options = {"cache": "static"} if cache == "static" else {}
    compiled = api.compile(
        module, models.example(module), method="mha2mla", dtype=dtype, check=False, cache_ratio=0.4, **options
    )
    path = folder / "model.onnx"
    compiled.to_onnx(path)
    if dtype == "float32":
        return path, path
    write_float32_copy(path, folder / "wide.onnx")
    return path, folder / "wide.onnx"


def test_pieces_compute_what_the_whole_computes(files):
    path, whole = files
    session = PiecewiseSession(path, wide=path != whole, piece_bytes=PIECE)
    assert session.pieces > 5
    decoders = [OnnxDecoder(whole), OnnxDecoder(path, session=session)]
    ids = models.tokens(2, 12).numpy()
    expected, got = (decoder.logits(ids) for decoder in decoders)
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())  # of the same kernels: rounding
    expected, got = (decoder.generate([[1, 2, 3], [4]], 6) for decoder in decoders)
    assert got == expected
    assert decoders[0].cache_bytes_per_token == decoders[1].cache_bytes_per_token


def test_pieces_keep_to_their_size(files):
    path, whole = files
    session = PiecewiseSession(path, wide=path != whole, piece_bytes=PIECE)
    assert len(session._pieces) > 1
    for piece in session._pieces:
        sizes = [weight.const_value.nbytes for weight in piece.weights]
        assert sum(sizes) <= PIECE or len(sizes) == 1


def test_one_piece_is_the_whole_file(files):
    path, whole = files
    session = PiecewiseSession(path, wide=path != whole)
    assert session.pieces == 1
    ids = models.tokens(1, 5).numpy()
    expected, got = OnnxDecoder(whole).logits(ids), OnnxDecoder(path, session=session).logits(ids)
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())


def test_large_models_are_checked_in_pieces(programs, tmp_path, monkeypatch):
    """The links of a conversion hold where files are run in pieces, and a broken file is still found."""
    monkeypatch.setattr("mla_compile.verification.onnx.WHOLE", 0)
    opened = []

    class Watched(PiecewiseSession):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, piece_bytes=PIECE, **kwargs)
            opened.append(self.pieces)

    monkeypatch.setattr("mla_compile.verification.onnx.PiecewiseSession", Watched)
    module = programs["llama-gqa"].module
    compiled = api.compile(module, models.example(module), method="mha2mla", dtype="bfloat16", cache_ratio=0.4)
    report = compiled.to_onnx(tmp_path / "model.onnx")
    assert opened
    assert min(opened) > 5
    assert report.verification.lowering_error < 1e-5
    assert report.verification.lowering_greedy == 1
    with torch.no_grad():
        next(compiled.module.parameters()).mul_(2)
    with pytest.raises(VerificationError, match="ONNX Runtime differs"):
        check_lowering(compiled.module, tmp_path / "model.onnx", compiled.checks, report.cache_bytes_after, "auto")
