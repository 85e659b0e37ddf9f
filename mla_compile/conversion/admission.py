"""Which models a conversion takes, and which of their layers: the rest is refused with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from mla_compile.config import CompileConfig
from mla_compile.conversion.encoders import is_encoder, require_encoder
from mla_compile.conversion.seq2seq import is_seq2seq, undecodable
from mla_compile.errors import RefusedError
from mla_compile.passes.recognise import Recognition
from mla_compile.program import AnyProgram, OtherProgram, Program
from mla_compile.site import AttentionSite, Kind, Rejection, reasons

__all__ = ["convertible", "is_beyond_causal", "require_causal", "would_be_refused"]


def is_beyond_causal(program: AnyProgram, found: Recognition, config: CompileConfig) -> bool:
    """Whether a model is converted as an encoder or an encoder-decoder, which the user has to ask for."""
    return config.encoders and (is_encoder(found) or not isinstance(program, Program))


def convertible(
    program: AnyProgram, found: Recognition, encoders: bool
) -> tuple[Sequence[AttentionSite], Sequence[Rejection]]:
    """Split what was found into layers that a conversion changes and others."""
    if encoders and is_encoder(found):
        return require_encoder(program, found)
    crossed = [r for r in found.rejections if r.site is not None and r.site.kind == Kind.CROSS]
    if encoders and is_seq2seq(found):
        sites = [*found.sites, *(r.site for r in crossed if r.site is not None)]
        return sites, [r for r in found.rejections if r not in crossed]
    return found.sites, found.rejections


def would_be_refused(program: AnyProgram, found: Recognition, encoders: bool) -> bool:
    """Whether a conversion would refuse the model for its attention."""
    if encoders and is_encoder(found):
        return False
    if encoders and is_seq2seq(found):
        return bool(undecodable(program, found))
    lost = any(r.plain is None for r in found.rejections)
    return not isinstance(program, Program) or not found.sites or lost


def require_causal(program: AnyProgram, found: Recognition) -> Program:
    """Refuse what is no causal language model, or has a layer that is not understood.

    Raises:
        RefusedError: Its attention is of another kind, or a layer is not understood.
        LoadError: It is no causal language model for another reason.
    """
    kinds = sorted({r.site.kind.value for r in found.rejections if r.site is not None})
    if isinstance(program, OtherProgram) and not kinds:
        raise program.why
    if isinstance(program, Program) or is_encoder(found):
        _require_some(program, found)
    if isinstance(program, Program):
        return program
    remedy = "Pass --encoders to convert what its decoder caches." if is_seq2seq(found) else ""
    raise RefusedError(
        f"'{program.source}' is no causal language model: some of its attention is {' and '.join(kinds)}.",
        remedy or "Run 'mla-compile inspect' for the whole table.",
    )


def _require_some(program: AnyProgram, found: Recognition) -> Recognition:
    """Refuse a model with nothing to convert, or with a layer that cannot even be kept as it is."""
    lost = [r for r in found.rejections if r.plain is None]
    if lost or (found.rejections and not found.sites):
        why = reasons(lost or found.rejections)
        verb = "decoded with a cache" if lost and found.sites else "converted"
        raise RefusedError(
            f"{len(lost or found.rejections)} of {len(found.rejections) + len(found.sites)} attention layers of "
            f"'{program.source}' cannot be {verb}: {why}.",
            "Pass --encoders to make its projections low-rank instead."
            if is_encoder(found)
            else "Run 'mla-compile inspect' for the whole table.",
        )
    if not found.sites:
        raise RefusedError(
            f"No attention was found in '{program.source}'.",
            "Export with run_decompositions({}) at most, so that attention is still a softmax between two products.",
        )
    return found
