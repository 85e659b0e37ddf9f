"""What a recognised layer says of itself beyond its fields."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mla_compile.site import Rope

DIM = 128
THETA = 500000.0


def rope(kind: str, **settings: object) -> Rope:
    """A head whose channels turn as transformers has it."""
    parameters = {"rope_type": kind, "rope_theta": THETA, **settings}
    config = LlamaConfig(hidden_size=8 * DIM, num_attention_heads=8, head_dim=DIM, rope_parameters=parameters)
    table, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Rope(tuple((i, i + DIM // 2) for i in range(DIM // 2)), tuple(table.tolist()))


EXTENDED = {
    "linear": ({"factor": 4.0}, (4.0, 4.0)),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 4096}, (1.0, 4.0)),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        (1.0, 8.0),
    ),
}


@pytest.mark.parametrize("kind", EXTENDED)
def test_base_and_slowing_of_extended_contexts(kind):
    settings, slowing = EXTENDED[kind]
    found = rope(kind, **settings)
    # The tables are float32: a rounding of the two fastest frequencies grows by the number of pairs in the base.
    assert found.theta == pytest.approx(THETA, rel=1e-4)
    assert found.slowing == pytest.approx(slowing, rel=1e-4)


def test_a_plain_table_is_not_slowed():
    plain = Rope(((0, 2), (1, 3)), (1.0, 0.01))
    assert plain.theta == pytest.approx(10000.0)
    assert plain.slowing == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("frequencies", [(), (1.0,), (1.0, 0.0)])
def test_too_few_frequencies_have_no_base(frequencies):
    pairs = tuple((2 * i, 2 * i + 1) for i in range(len(frequencies)))
    assert Rope(pairs, frequencies).theta is None
    assert Rope(pairs, frequencies).slowing == (1.0, 1.0)
