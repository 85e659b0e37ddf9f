"""The steps of converting an encoder-decoder: its decoder caches latents of its own tokens and of the encoder's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mla_compile.artifacts.onnx_files import write_seq2seq_onnx
from mla_compile.config import CompileConfig
from mla_compile.conversion.encoders import inputs_to_compare
from mla_compile.errors import RefusedError, UsageError
from mla_compile.passes.factorise import factorise_layers
from mla_compile.passes.insert_latent import LatentGraph, insert_latent
from mla_compile.passes.insert_low_rank import insert_rows
from mla_compile.passes.lower_encoder import EncoderFace
from mla_compile.passes.recognise import Recognition, recognise
from mla_compile.passes.scores import layer_sizes
from mla_compile.passes.split_decoder import encoder_inputs, encoder_layers, split_decoder
from mla_compile.passes.weights import input_width
from mla_compile.plan import LatentPlan, clamped, plan_layers
from mla_compile.program import AnyProgram, Assets, DecoderProgram
from mla_compile.progress import Display, Stages
from mla_compile.reporting.seq2seq_report import Seq2SeqReport, Seq2SeqVerification
from mla_compile.runtime.module import LatentModel, LatentSeq2Seq, LowRankModel
from mla_compile.runtime.onnx_cache import CROSS
from mla_compile.site import AttentionSite, Kind, reasons
from mla_compile.text.evaluate import worst
from mla_compile.verification.agreement import require_equal, worst_error
from mla_compile.verification.encoders import seq2seq_in_chunks, without_padding

__all__ = ["CompiledSeq2Seq", "compile_seq2seq", "is_seq2seq", "plan_seq2seq", "require_decodable"]

_UNMEASURED = "the quality of the conversion was not measured on text"


@dataclass(frozen=True)
class CompiledSeq2Seq:
    """A converted encoder-decoder.

    Attributes:
        module: The model in PyTorch: encode once, then decode with an explicit latent cache; trainable.
        report: What was done.
        face: Inputs and outputs of the encoder's part.
        tokens: Name of the decoder's token input in ``checks``.
        assets: Configuration and tokenizer of the original.
        checks: Inputs the ONNX files are checked on, by name; None when verification was switched off.
    """

    module: LatentSeq2Seq
    report: Seq2SeqReport
    face: EncoderFace
    tokens: str
    assets: Assets = field(default_factory=Assets)
    checks: Sequence[Mapping[str, Tensor]] | None = None

    def to_onnx(self, path: str | Path, *, force: bool = False, display: Display | None = None) -> Seq2SeqReport:
        """Write two files: ``X.onnx``, the decoder's step, and ``X.encoder.onnx``, which makes the rows it reads.

        They appear under their names only after ONNX Runtime reproduced the PyTorch module with them.

        Args:
            path: The decoder's ``.onnx`` file.
            force: Replace existing files.
            display: Shows progress.

        Returns:
            The report, completed with what was measured on the files.

        Raises:
            UsageError: The path cannot be written, or something exists there.
            VerificationError: ONNX Runtime computes something else.
        """
        return write_seq2seq_onnx(
            self.module,
            self.report,
            self.assets,
            self.face,
            Path(path),
            tokens=self.tokens,
            checks=self.checks,
            force=force,
            stages=Stages(display),
        )

    def save(self, folder: str | Path, *, force: bool = False) -> Seq2SeqReport:
        """Refuse: an encoder-decoder is written as ONNX only.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "An encoder-decoder cannot be saved as a folder yet.", "Write it with to_onnx, or --out FILE.onnx."
        )


def is_seq2seq(found: Recognition) -> bool:
    """Whether a model has a causal decoder that reads another sequence."""
    crossed = any(r.site is not None and r.site.kind == Kind.CROSS for r in found.rejections)
    causal = bool(found.sites) or any(r.site is None for r in found.rejections)
    return crossed and causal


def require_decodable(program: AnyProgram, found: Recognition) -> None:
    """Refuse a decoder with layers that are not understood; those of the encoder cache nothing and may be anything.

    Raises:
        RefusedError: There are some; they are named.
    """
    inside = encoder_layers(program, _cross(found))
    lost = tuple(r for r in found.rejections if r.site is None and r.plain is None and r.index not in inside)
    if lost:
        raise RefusedError(
            f"{len(lost)} attention layers of the decoder of '{program.source}' cannot be decoded with a cache: "
            f"{reasons(lost)}.",
            "Run 'mla-compile inspect' for the whole table.",
        )


def plan_seq2seq(
    program: AnyProgram, found: Recognition, config: CompileConfig
) -> tuple[tuple[LatentPlan, ...], tuple[LatentPlan, ...]]:
    """Plan the caches of the decoder's own tokens and of the encoder's.

    Raises:
        RefusedError: A layer of the decoder is not understood.
        UsageError: Settings do not fit the model.
    """
    require_decodable(program, found)
    return _planned(program, found.sites, config), _planned(program, _cross(found), config)


def compile_seq2seq(
    program: AnyProgram, found: Recognition, config: CompileConfig, *, check: bool, stages: Stages, jobs: int = 1
) -> CompiledSeq2Seq:
    """Convert an encoder-decoder: the decoder's self-attention and its cross attention.

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
        RefusedError: A layer of the decoder is not understood, or the model cannot be cut in two.
        UsageError: Settings do not fit the model.
        VerificationError: The conversion is not correct.
    """
    if config.selection == "2-norm":
        raise UsageError(
            "The 2-norm selection needs text to measure on.", "Choose another --selection for an encoder-decoder."
        )
    if config.selection == "auto":
        config = config.model_copy(update={"selection": "uniform"})
    plans, cross_plans = plan_seq2seq(program, found, config)
    cross = _cross(found)
    sizes = layer_sizes(program)[cross[0].index]
    with stages.stage("split"):
        decoder = split_decoder(program, cross, sizes)
        inside = recognise(decoder)
    if [s.key.weight for s in inside.sites] != [s.key.weight for s in found.sites]:
        raise RefusedError(
            f"The decoder of '{program.source}' is not the same by itself as in the whole model.",
            "Report this with the output of 'mla-compile inspect'.",
        )
    parts = _Parts(program, decoder, cross, inside)
    converted = _convert(parts, plans, cross_plans, config, stages, jobs)
    checks = inputs_to_compare(program, sizes, config.seed, any_positions=False)
    verification = None
    if check:
        with stages.stage("verify"):
            exact = converted
            if not config.exact:
                everything = config.lossless()
                exact = _convert(parts, *plan_seq2seq(program, found, everything), everything, Stages(), jobs)
            verification = _verified(parts, exact, converted, checks)
    report = Seq2SeqReport(
        source=program.source,
        in_memory=program.in_memory,
        config=config.model_dump(),
        sites=found.sites,
        plans=plans,
        cross=cross,
        cross_plans=cross_plans,
        kept=tuple(r for r in found.rejections if r.index in encoder_layers(program, cross)),
        verification=verification,
        warnings=() if config.exact else (*clamped((*plans, *cross_plans), config), _UNMEASURED),
        stages=tuple(stages.timings),
    )
    rows = {CROSS.format(i): (sizes.batch, sizes.keys, p.elements_after) for i, p in enumerate(cross_plans)}
    face = EncoderFace(program, sizes, encoder_inputs(program, cross), rows)
    return CompiledSeq2Seq(converted, report, face, decoder.tokens, program.assets, checks if check else None)


@dataclass(frozen=True)
class _Parts:
    """A model, its decoder by itself, and the layers of both.

    Attributes:
        whole: The model.
        decoder: Its decoder.
        cross: Cross attention layers as the whole model names them.
        inside: Layers as the decoder by itself names them.
    """

    whole: AnyProgram
    decoder: DecoderProgram
    cross: tuple[AttentionSite, ...]
    inside: Recognition


def _cross(found: Recognition) -> tuple[AttentionSite, ...]:
    return tuple(r.site for r in found.rejections if r.site is not None and r.site.kind == Kind.CROSS)


def _planned(program: AnyProgram, sites: Sequence[AttentionSite], config: CompileConfig) -> tuple[LatentPlan, ...]:
    return plan_layers(sites, [input_width(program, s) for s in sites], config)


def _convert(
    parts: _Parts,
    plans: Sequence[LatentPlan],
    cross_plans: Sequence[LatentPlan],
    config: CompileConfig,
    stages: Stages,
    jobs: int,
) -> LatentSeq2Seq:
    own = factorise_layers(parts.decoder, parts.inside.sites, plans, config, stages, jobs=jobs)
    crossed = factorise_layers(parts.whole, parts.cross, cross_plans, config, stages, jobs=jobs)
    kept = [r for r in parts.inside.rejections if r.site is None]
    inputs = encoder_inputs(parts.whole, parts.cross)
    with stages.stage("rewrite"):
        encoder = insert_rows(parts.whole, inputs, parts.cross, crossed, torch.float32)
        pairs = list(zip(_cross(parts.inside), crossed, strict=True))
        graph: LatentGraph = insert_latent(parts.decoder, parts.inside.sites, own, torch.float32, kept, pairs)
    names = [CROSS.format(i) for i in range(len(crossed))]
    decoder = LatentModel(graph.module, graph.rows)
    return LatentSeq2Seq(LowRankModel(encoder, inputs, names), decoder, parts.decoder.encoder_mask)


def _verified(
    parts: _Parts, exact: LatentSeq2Seq, converted: LatentSeq2Seq, checks: Sequence[Mapping[str, Tensor]]
) -> Seq2SeqVerification:
    """Compare on whole sequences of the decoder, padded ones of the encoder."""
    original = parts.whole.whole_module()
    logits = list(parts.whole.outputs).index(_logits_name(parts))
    rewrite = conversion = decode = 0.0
    tokens = 0
    with torch.inference_mode():
        for inputs in checks:
            whole = without_padding(inputs, parts.decoder.attention_mask)
            ids = whole[parts.decoder.tokens]
            expected = {"logits": original(*whole.values())[logits]}
            same = {"logits": exact(ids, _encoded(exact, whole)).logits}
            context = _encoded(converted, whole)
            got = {"logits": converted(ids, context).logits}
            pieces = {"logits": seq2seq_in_chunks(converted, ids, context)}
            rewrite = worst(rewrite, worst_error(same, expected))
            conversion = worst(conversion, worst_error(got, expected))
            decode = worst(decode, worst_error(pieces, got))
            tokens += ids.numel()
    require_equal("The rewritten graph at full rank", "the original model", rewrite)
    require_equal("Decoding with the latent cache", "the same model on the whole sequence", decode)
    return Seq2SeqVerification(rewrite, None, conversion, tokens, decode)


def _encoded(model: LatentSeq2Seq, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """What the decoder reads of the encoder, from inputs of the whole model."""
    return model.encode(**{name: inputs[name] for name in model.encoder.inputs})


def _logits_name(parts: _Parts) -> str:
    """Name of the whole model's output that is the decoder's."""
    nodes = {n.name: n for n in parts.whole.exported.graph.nodes}
    decoder = {n.name: n for n in parts.decoder.exported.graph.nodes}
    width = decoder[parts.decoder.logits].meta["val"].shape[-1]
    tokens = parts.whole.user_inputs[parts.decoder.tokens][1]
    return next(
        name
        for name, node in parts.whole.outputs.items()
        if [*map(str, nodes[node].meta["val"].shape)] == [*map(str, tokens.shape), str(width)]
    )
