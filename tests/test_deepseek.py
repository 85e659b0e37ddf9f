"""What a stock DeepSeek checkpoint can express: tables of frequencies, and layers it has no place for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mla_compile.deepseek import DeepSeekShape, deepseek_shape, require_expressible, require_table, rope_table
from mla_compile.errors import RefusedError, UsageError
from mla_compile.site import AttentionSite, Mask, Norm, Projection, RejectCode, Rejection, Rope, Scores


def projection(heads: int, dim: int, **extra: object) -> Projection:
    rows = tuple(tuple(range(h * dim, (h + 1) * dim)) for h in range(heads))
    return Projection("y", "x", "weight", None, rows, tuple((1.0,) * dim for _ in range(heads)), **extra)


def site(frequencies: torch.Tensor | None = None, *, index: int = 0, heads: int = 4, **scores: object) -> AttentionSite:
    frequencies = table(10000.0, 8) if frequencies is None else frequencies
    half = len(frequencies)
    rope = Rope(tuple((i, i + half) for i in range(half)), tuple(frequencies.tolist()))
    operands = projection(heads, 16), projection(2, 16), projection(2, 16)
    given = Scores(0.25, **scores)
    return AttentionSite(index, f"layers.{index}", *operands, rope, given, "out", ("b", "h", "s", "d"), "softmax", 0.0)


def table(theta: float, pairs: int) -> torch.Tensor:
    """Frequencies as models compute them, in float32."""
    return 1.0 / theta ** (torch.arange(0, 2 * pairs, 2).float() / (2 * pairs))


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6, 1234567.0])
@pytest.mark.parametrize("pairs", [2, 8, 64])
def test_base_is_found_again(theta, pairs):
    """To six digits; float32 has seven."""
    shape = deepseek_shape(site(table(theta, pairs)), 6, 40)
    assert shape == DeepSeekShape(6, pytest.approx(theta, rel=5e-6), 40)


@pytest.mark.parametrize("dims", [2, 8, 10, 32])
def test_a_rope_key_of_any_length_has_the_frequencies_of_such_a_checkpoint(dims):
    found = rope_table(site(), dims)
    torch.testing.assert_close(torch.tensor(found), table(10000.0, dims // 2), rtol=1e-6, atol=0)


def test_a_rope_key_as_long_as_the_model_has_its_own_frequencies():
    own = table(10000.0, 8)
    own[5:] /= 8  # llama3: only slow ones are scaled
    layer = site(own.flip(0))
    assert rope_table(layer, 16) == tuple(own.tolist())
    assert deepseek_shape(layer, 16, 8).rope_theta is None


@pytest.mark.parametrize("scaled", [table(1e4, 8) / 4, table(1e4, 8) * torch.linspace(1, 2, 8), table(1e4, 1)])
def test_scaled_frequencies_allow_no_other_length(scaled):
    layer = site(scaled)
    assert rope_table(layer, 8) is None
    with pytest.raises(UsageError, match="no rope key of 8 channels for this model, whose frequencies are scaled") as e:
        require_table(layer, 8)
    assert f"--rope-dims {layer.rope.rotary_dim}" in e.value.remedy
    require_table(layer, layer.rope.rotary_dim)
    require_table(layer, None)


def test_a_rope_key_has_some_length():
    with pytest.raises(UsageError, match="no rope key of 0 channels"):
        require_table(site(), 0)


def test_layers_alike_are_expressible():
    require_expressible([site(), site(index=1)], [])


def normed(layer: AttentionSite, operand: str) -> AttentionSite:
    found = getattr(layer, operand)
    return replace(layer, **{operand: replace(found, norm=Norm("rms", found.rows, 1e-6))})


OBSTACLES = {
    "sliding window": site(index=1, mask=Mask(8)),
    "soft-cap": site(index=1, softcap=30.0),
    "attention sinks": site(index=1, sinks=(0.0,) * 4, sinks_name="sinks"),
    "ALiBi": site(index=1, slopes=(0.5,) * 4),
    "keys have a norm": normed(site(index=1), "key"),
    "values have a norm": normed(site(index=1), "value"),
    "queries are not a linear projection": normed(site(index=1), "query"),
    "nothing in it rotates": replace(site(index=1), rope=Rope()),
    "heads are not those of layers.0": site(index=1, heads=8),
    "does not rotate like layers.0": site(table(20000.0, 8), index=1),
}


@pytest.mark.parametrize("reason", OBSTACLES)
def test_what_has_no_place_is_refused_by_layer_and_reason(reason):
    with pytest.raises(RefusedError, match=f"no place for 1 of 2 attention layers: layers.1: .*{reason}") as e:
        require_expressible([site(), OBSTACLES[reason]], [])
    assert e.value.remedy == "Use --layout free, and another format than deepseek or gguf."


def test_all_layers_without_a_place_are_named():
    kept = Rejection(2, "layers.2", RejectCode.MASK, "it looks ahead")
    with pytest.raises(RefusedError, match=r"2 of 3 .* layers\.1: .*window; layers\.2: it keeps an ordinary cache"):
        require_expressible([site(), OBSTACLES["sliding window"]], [kept])
