"""Every probe alone, on sub-graphs whose answer is known."""

from __future__ import annotations

import pytest
import torch
import zoo

from mla_compile.passes.evaluate import GraphEvaluator
from mla_compile.passes.layout import Sizes
from mla_compile.passes.mismatch import MismatchError
from mla_compile.passes.probe import SHORT, Operand, probe_linear, probe_rope, probe_rows
from mla_compile.passes.scores import anchor_layouts, probe_probabilities, probe_scores
from mla_compile.passes.trace import DataFlow, find_anchors, read_projection
from mla_compile.site import Mask, RejectCode, Rope

ROLES = ("query", "key", "value")


class Question:
    """One anchor of a program, and its operands."""

    def __init__(self, program, layer=0):
        self.flow, self.evaluator = DataFlow(program), GraphEvaluator(program)
        self.anchor = find_anchors(self.flow, program)[layer]
        self.sizes = Sizes.of(program)
        self.layouts = anchor_layouts(self.sizes, self.anchor)

    def operand(self, role):
        node = getattr(self.anchor, role)
        projection = read_projection(self.flow, node, role)
        return Operand(self.evaluator, self.sizes, role, projection.node, node, getattr(self.layouts, role))

    def rows(self, role):
        return probe_rows(self.operand(role), generator())

    def rope(self, role):
        rows, gain, _ = self.rows(role)
        return probe_rope(self.operand(role), rows, gain)

    def scores(self, heads=zoo.HEADS, dim=zoo.DIM):
        return probe_scores(self.evaluator, self.flow, self.sizes, self.anchor, self.layouts, heads, dim)

    def probabilities(self):
        probe_probabilities(self.evaluator, self.sizes, self.anchor, self.layouts)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", [zoo.Attention, zoo.SpelledOut, zoo.FlatProduct, zoo.InterleavedProjection])
@pytest.mark.parametrize("role", ROLES)
def test_operand_is_evaluated_from_the_projection_as_batch_length_heads_channels(zoo_programs, kind, role):
    operand = Question(zoo_programs[kind]).operand(role)
    outputs = torch.randn(2, 7, operand.width, generator=generator(), dtype=torch.float64)
    if kind is zoo.InterleavedProjection:
        expected = outputs.view(2, 7, zoo.HEADS, 3, zoo.DIM)[:, :, :, ROLES.index(role)]
    else:
        expected = outputs.view(2, 7, zoo.HEADS, zoo.DIM)
    if kind in (zoo.FlatProduct, zoo.InterleavedProjection) and role != "value":
        expected = zoo.rotate(expected.transpose(1, 2)).transpose(1, 2)
    # The expected rotation has angles of up to 7 in float32, which the evaluator computes in float64.
    torch.testing.assert_close(operand(outputs), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", [zoo.HalfRope, zoo.ParameterProduct, zoo.ScaledQueries, zoo.InterleavedProjection])
def test_positionwise_affine_operands_pass(zoo_programs, kind, role):
    probe_linear(Question(zoo_programs[kind]).operand(role), generator())


@pytest.mark.parametrize(
    ("kind", "role", "code"),
    [
        (zoo.ConvolvedKeys, "key", RejectCode.POSITION_MIXING),
        (zoo.ShiftedValues, "value", RejectCode.POSITION_MIXING),
        (zoo.AveragedValues, "value", RejectCode.POSITION_MIXING),
        (zoo.RectifiedQueries, "query", RejectCode.NONLINEAR),
        (zoo.NormedKeys, "key", RejectCode.NONLINEAR),
    ],
)
def test_other_operands_do_not(zoo_programs, kind, role, code):
    question = Question(zoo_programs[kind])
    with pytest.raises(MismatchError) as caught:
        probe_linear(question.operand(role), generator())
    assert caught.value.code == code
    for other in {*ROLES} - {role}:
        probe_linear(question.operand(other), generator())


@pytest.mark.parametrize("role", ROLES)
def test_rows_of_interleaved_heads(zoo_programs, role):
    rows, gain, offset = Question(zoo_programs[zoo.InterleavedProjection]).rows(role)
    expected = torch.arange(3 * zoo.HEADS * zoo.DIM).view(zoo.HEADS, 3, zoo.DIM)[:, ROLES.index(role)]
    assert torch.equal(rows, expected)
    assert torch.equal(gain, torch.ones_like(gain))
    assert not offset.any()


def test_rows_of_repeated_heads(zoo_programs):
    rows, _, _ = Question(zoo_programs[zoo.GroupedByRepetition]).rows("key")
    assert torch.equal(rows, torch.arange(2 * zoo.DIM).view(2, zoo.DIM).repeat_interleave(2, 0))


@pytest.mark.parametrize("kind", [zoo.MixedChannels, zoo.RopeFromOne])
def test_sums_of_rows_are_a_mismatch(zoo_programs, kind):
    with pytest.raises(MismatchError) as caught:
        Question(zoo_programs[kind]).rows("key")
    assert caught.value.code == RejectCode.ROW_MAP


@pytest.mark.parametrize("role", ["query", "key"])
@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        (zoo.HalfRope, ((0, 3), (1, 4), (2, 5))),
        (zoo.InterleavedRope, ((0, 1), (2, 3), (4, 5))),
        (zoo.PartialRope, ((2, 4), (3, 5))),
        (zoo.BackwardRope, ((3, 0), (4, 1), (5, 2))),
    ],
)
def test_pairs_and_their_frequencies(zoo_programs, kind, pairs, role):
    found = Question(zoo_programs[kind]).rope(role)
    frequencies = [50.0 ** (-i / len(pairs)) for i in range(len(pairs))]
    if kind is zoo.BackwardRope:  # its pairs are counted from the other end
        frequencies.reverse()
    assert found.pairs == pairs
    # The model holds the frequencies in float32.
    assert found.inv_freq == pytest.approx(frequencies, rel=1e-6)


def test_channels_that_stand_still(zoo_programs):
    assert Question(zoo_programs[zoo.Attention]).rope("query") == Rope()
    assert Question(zoo_programs[zoo.HalfRope]).rope("value") == Rope()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(zoo.RopePerHead, "heads of the query rotate differently"), (zoo.DecayingRope, "not only rotated but scaled too")],
)
def test_other_rotations_are_a_mismatch(zoo_programs, kind, reason):
    with pytest.raises(MismatchError, match=reason) as caught:
        Question(zoo_programs[kind]).rope("query")
    assert caught.value.code == RejectCode.ROPE


class ClippedRope(zoo.Attention):
    """Positions stop counting at 300, far beyond the short probes."""

    def queries(self, q):
        return rotate_clipped(q)

    def keys(self, k):
        return rotate_clipped(k)


def rotate_clipped(x):
    angle = torch.arange(x.shape[2]).clamp(max=300)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    a, b = x[..., :3], x[..., 3:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def test_tables_that_change_far_out_are_noticed(zoo_programs):
    with pytest.raises(MismatchError, match="not proportional to position"):
        Question(zoo_programs[ClippedRope]).rope("query")


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        (zoo.Attention, zoo.SCALE),
        (zoo.DefaultScale, zoo.DIM**-0.5),
        (zoo.SpelledOut, zoo.SCALE),
        (zoo.LargeNegativeMask, zoo.SCALE),
        (zoo.DoublePrecisionSoftmax, zoo.SCALE),
    ],
)
def test_scale_and_causal_mask(zoo_programs, kind, scale):
    found = Question(zoo_programs[kind]).scores()
    # A scale is a ratio of differences of logits, which costs some digits.
    assert found.scale == pytest.approx(scale, rel=1e-9)
    assert (found.mask, found.softcap, found.slopes, found.sinks) == (Mask(), 0.0, None, None)


def test_window_of_an_exported_mistral(programs):
    assert Question(programs["mistral-window"].program).scores(4, 16).mask == Mask(6)


@pytest.mark.parametrize("window", [SHORT - 1, SHORT, 4096])
def test_window_within_and_beyond_the_probe(window):
    program = zoo.program_of(zoo.model(zoo.windowed(window)))
    assert Question(program).scores().mask == Mask(window)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (zoo.TemperatureBehindCap, RejectCode.SCORES),
        (zoo.Dilated, RejectCode.MASK),
        (zoo.HiddenByActivation, RejectCode.MASK),
    ],
)
def test_other_scores_and_masks_are_a_mismatch(zoo_programs, kind, code):
    with pytest.raises(MismatchError) as caught:
        Question(zoo_programs[kind]).scores()
    assert caught.value.code == code


def test_soft_cap(zoo_programs):
    found = Question(zoo_programs[zoo.SoftCapped]).scores()
    assert (found.softcap, found.scale) == (pytest.approx(5.0), pytest.approx(zoo.SCALE))


def test_slopes(zoo_programs):
    found = Question(zoo_programs[zoo.LinearBias]).scores()
    assert found.slopes == pytest.approx([2.0**-h for h in range(1, zoo.HEADS + 1)])
    assert found.mask == Mask()


def test_sinks(zoo_programs):
    found = Question(zoo_programs[zoo.Sink]).scores()
    assert found.sinks_name == "layers.0.sink"
    expected = zoo_programs[zoo.Sink].exported.state_dict["layers.0.sink"].flatten().tolist()
    assert found.sinks == pytest.approx(expected)


@pytest.mark.parametrize("kind", [zoo.Attention, zoo.SpelledOut, zoo.DoublePrecisionSoftmax, zoo.Sink])
def test_probabilities_that_reach_the_values_unchanged(zoo_programs, kind):
    Question(zoo_programs[kind]).probabilities()


@pytest.mark.parametrize("kind", [zoo.ScaledProbabilities, zoo.LivingDropout, zoo.OtherAxis])
def test_probabilities_that_do_not(zoo_programs, kind):
    question = Question(zoo_programs[kind])
    with pytest.raises(MismatchError, match=r"changed between softmax and values|dropped out at random"):
        question.probabilities()
