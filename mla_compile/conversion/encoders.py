"""The steps of converting an encoder: those of a causal language model, but for the cache, of which there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mla_compile.artifacts.archives import write_encoder_folder
from mla_compile.artifacts.onnx_files import write_encoder_onnx
from mla_compile.config import CompileConfig
from mla_compile.errors import RefusedError, UsageError, VerificationError
from mla_compile.passes.evaluate import example_inputs
from mla_compile.passes.factorise import factorise_layers
from mla_compile.passes.insert_low_rank import insert_low_rank
from mla_compile.passes.layout import Sizes
from mla_compile.passes.lower_encoder import EncoderFace
from mla_compile.passes.recognise import Recognition
from mla_compile.passes.scores import layer_sizes
from mla_compile.passes.weights import input_width
from mla_compile.plan import LatentPlan, clamped, plan_layers
from mla_compile.program import AnyProgram, Assets, Role
from mla_compile.progress import Display, Stages
from mla_compile.reporting.encoder_report import EncoderReport, EncoderVerification, projection_multiplications
from mla_compile.runtime.module import LowRankModel
from mla_compile.site import AttentionSite, Kind, Rejection, reasons
from mla_compile.text.evaluate import worst
from mla_compile.verification.agreement import require_equal, worst_error

__all__ = ["CompiledEncoder", "compile_encoder", "inputs_to_compare", "is_encoder", "require_encoder"]

_LENGTHS = (3, 12, 21)
"""Lengths the conversion is compared at, where they may be chosen."""
_REAL = 0.7
"""Share of tokens that are no padding in sequences that are padded."""


@dataclass(frozen=True)
class CompiledEncoder:
    """A converted encoder.

    Attributes:
        module: The model in PyTorch: callable and trainable, with the original's inputs and outputs.
        report: What was done.
        face: Its inputs and outputs.
        assets: Configuration and tokenizer of the original.
        checks: Inputs the ONNX file is checked on, by name; None when verification was switched off.
    """

    module: LowRankModel
    report: EncoderReport
    face: EncoderFace
    assets: Assets = field(default_factory=Assets)
    checks: Sequence[Mapping[str, Tensor]] | None = None

    def to_onnx(self, path: str | Path, *, force: bool = False, display: Display | None = None) -> EncoderReport:
        """Write the model as ONNX, with configuration, tokenizer and ``report.json`` beside it.

        The file appears under its name only after ONNX Runtime reproduced the PyTorch module with it.

        Args:
            path: A ``.onnx`` file.
            force: Replace existing files.
            display: Shows progress.

        Returns:
            The report, completed with what was measured on the file.

        Raises:
            UsageError: The path cannot be written, or something exists there.
            VerificationError: ONNX Runtime computes something else.
        """
        stages = Stages(display)
        return write_encoder_onnx(
            self.module,
            self.report,
            self.assets,
            self.face,
            Path(path),
            checks=self.checks,
            force=force,
            stages=stages,
        )

    def save(self, folder: str | Path, *, force: bool = False) -> EncoderReport:
        """Write the PyTorch module (a ``torch.export`` archive) with configuration, tokenizer and report.

        The archive is read back by ``torch.export.load(folder / "model.pt2").module()``.

        Args:
            folder: A folder that does not exist yet, or an empty one.
            force: Replace existing files.

        Raises:
            UsageError: The folder cannot be written, or is not empty.
        """
        return write_encoder_folder(self.module, self.report, self.assets, self.face, Path(folder), force)


def is_encoder(found: Recognition) -> bool:
    """Whether attention that is understood is all bidirectional."""
    kinds = {r.site.kind for r in found.rejections if r.site is not None}
    return not found.sites and kinds == {Kind.BIDIRECTIONAL}


def require_encoder(program: AnyProgram, found: Recognition) -> tuple[tuple[AttentionSite, ...], tuple[Rejection, ...]]:
    """Split the layers of an encoder into those to convert, and those that stay as they are.

    Raises:
        RefusedError: There is attention of another kind, or nothing to convert.
    """
    if not is_encoder(found):
        kinds = {s.kind for s in found.sites} | {r.site.kind for r in found.rejections if r.site is not None}
        told = ", ".join(sorted(k.value for k in kinds)) or "not understood"
        lost = reasons([r for r in found.rejections if r.site is None])
        told += f", and of some layers not understood ({lost})" if kinds and lost else f" ({lost})" if lost else ""
        raise RefusedError(
            f"The attention of '{program.source}' is {told}; --encoders converts models whose attention is all "
            "bidirectional, and decoders that read an encoder.",
            "Run 'mla-compile inspect' for the whole table.",
        )
    sites = tuple(r.site for r in found.rejections if r.site is not None)
    return sites, tuple(r for r in found.rejections if r.site is None)


def compile_encoder(
    program: AnyProgram, found: Recognition, config: CompileConfig, *, check: bool, stages: Stages, jobs: int = 1
) -> CompiledEncoder:
    """Convert an encoder's attention to low-rank keys and values.

    Args:
        program: The model.
        found: Its attention layers.
        config: Settings; the selection of rotary components is uniform unless it is given.
        check: Verify the conversion against the original.
        stages: Times and shows what runs.
        jobs: Layers that are factorised at a time.

    Returns:
        The converted model.

    Raises:
        RefusedError: A layer's attention is of another kind, or nothing is understood.
        UsageError: Settings do not fit the model.
        VerificationError: The conversion is not correct.
    """
    if config.selection == "2-norm":
        raise UsageError("The 2-norm selection needs text to measure on.", "Choose another --selection for an encoder.")
    if config.selection == "auto":
        config = config.model_copy(update={"selection": "uniform"})
    sites, kept = require_encoder(program, found)
    plans = plan_layers(sites, [input_width(program, s) for s in sites], config)
    converted = _convert(program, sites, plans, config, stages, jobs)
    sizes = layer_sizes(program)[sites[0].index]
    checks = inputs_to_compare(program, sizes, config.seed, any_positions=True)
    verification = None
    if check:
        with stages.stage("verify"):
            exact = converted
            if not config.exact:
                everything = config.lossless()
                full = plan_layers(sites, [input_width(program, s) for s in sites], everything)
                exact = _convert(program, sites, full, everything, Stages(), jobs)
            verification = _verified(program, exact, converted, checks)
    report = EncoderReport(
        source=program.source,
        in_memory=program.in_memory,
        config=config.model_dump(),
        sites=sites,
        plans=plans,
        kept=kept,
        parameters=(_numbers(program), sum(p.numel() for p in converted.parameters())),
        multiplications=_multiplications(program, sites, plans),
        verification=verification,
        warnings=_warnings(program, sites, plans, kept, config),
        stages=tuple(stages.timings),
    )
    face = EncoderFace.of(program, sizes)
    return CompiledEncoder(converted, report, face, program.assets, checks if check else None)


def _convert(
    program: AnyProgram,
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    config: CompileConfig,
    stages: Stages,
    jobs: int,
) -> LowRankModel:
    weights = factorise_layers(program, sites, plans, config, stages, jobs=jobs)
    with stages.stage("rewrite"):
        graph = insert_low_rank(program, sites, weights, torch.float32)
    return LowRankModel(graph, list(program.user_inputs), list(program.outputs))


def inputs_to_compare(
    program: AnyProgram, sizes: Sizes, seed: int, *, any_positions: bool
) -> tuple[dict[str, Tensor], ...]:
    """Random inputs of several lengths that the model can run on; two of three sequences are padded anywhere.

    Args:
        program: The model.
        sizes: Of one of its layers.
        seed: Seed of the random numbers.
        any_positions: Whether positions need not be in order, as an encoder's need not.

    Raises:
        RefusedError: It runs on none of the lengths.
    """
    original, found = program.whole_module(), []
    lengths = (sizes.short,) if sizes.fixed else _LENGTHS
    for number, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(seed + number)
        made = example_inputs(program, 3, length, seed=seed + number, sizes=sizes)
        for name, (role, _) in program.user_inputs.items():
            if role == Role.MASK and made[name].dim() == 2:
                made[name][1:, 1:] *= torch.rand(made[name][1:, 1:].shape, generator=generator) < _REAL
            if role == Role.POSITIONS and any_positions:
                made[name] = made[name].flip(-1)
        try:
            with torch.inference_mode():
                original(*made.values())
        except (RuntimeError, IndexError):  # a table inside the model ends earlier
            continue
        found.append(made)
    if not found:
        raise RefusedError(
            f"'{program.source}' runs on none of {', '.join(map(str, lengths))} tokens, so nothing can be verified.",
            "Export a model that takes more of them.",
        )
    return tuple(found)


def _verified(
    program: AnyProgram, exact: LowRankModel, converted: LowRankModel, checks: Sequence[Mapping[str, Tensor]]
) -> EncoderVerification:
    original = program.whole_module()
    rewrite, conversion, tokens = 0.0, 0.0, 0
    with torch.inference_mode():
        for inputs in checks:
            expected = dict(zip(program.outputs, original(*inputs.values()), strict=True))
            rewrite = worst(rewrite, worst_error(exact(**inputs), expected))
            conversion = worst(conversion, worst_error(converted(**inputs), expected))
            tokens += math.prod(next(iter(inputs.values())).shape[:2])
    require_equal("The rewritten graph at full rank", "the original model", rewrite)
    if not math.isfinite(conversion):
        raise VerificationError(
            f"Outputs of the converted '{program.source}' are not numbers.", "Check its weights, or keep a larger rank."
        )
    return EncoderVerification(rewrite, None, conversion, tokens)


def _numbers(program: AnyProgram) -> int:
    parameters = program.exported.graph_signature.inputs_to_parameters.values()
    values = {id(value): value for name in parameters if (value := program.exported.state_dict[name]) is not None}
    return sum(value.numel() for value in values.values())


def _multiplications(
    program: AnyProgram, sites: Sequence[AttentionSite], plans: Sequence[LatentPlan]
) -> tuple[int, int]:
    counts = [projection_multiplications(s, p, input_width(program, s)) for s, p in zip(sites, plans, strict=True)]
    return sum(before for before, _ in counts), sum(after for _, after in counts)


def _warnings(
    program: AnyProgram,
    sites: Sequence[AttentionSite],
    plans: Sequence[LatentPlan],
    kept: Sequence[Rejection],
    config: CompileConfig,
) -> tuple[str, ...]:
    found = ["the quality of the conversion was not measured: perplexity is for causal language models"]
    if config.exact:
        found = []
    found += clamped(plans, config)
    if kept:
        found.append(f"{len(kept)} attention layers stay as they are ({reasons(kept)})")
    before, after = _multiplications(program, sites, plans)
    if after >= before and not config.exact:
        found.append("keys and values take no fewer multiplications at this setting; choose a smaller --cache-ratio")
    return tuple(found)
