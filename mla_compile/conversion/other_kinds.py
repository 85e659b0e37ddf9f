"""Models that are no causal language models: what these cannot have is refused, and each kind has steps of its own."""

from __future__ import annotations

from mla_compile.artifacts.places import check_pair
from mla_compile.conversion.encoders import CompiledEncoder, compile_encoder
from mla_compile.conversion.number_types import require_float32
from mla_compile.conversion.request import Request, Session
from mla_compile.conversion.seq2seq import CompiledSeq2Seq, compile_seq2seq, is_seq2seq
from mla_compile.errors import UsageError
from mla_compile.passes.recognise import Recognition
from mla_compile.program import AnyProgram

__all__ = ["compile_other_kind"]


def compile_other_kind(program: AnyProgram, found: Recognition, session: Session) -> CompiledEncoder | CompiledSeq2Seq:
    """Convert an encoder or an encoder-decoder.

    Args:
        program: The model.
        found: Its attention layers.
        session: What was asked for.

    Raises:
        RefusedError: A layer is not understood.
        UsageError: Settings do not fit the model.
        VerificationError: The conversion is not correct.
    """
    request, stages = session.request, session.stages
    _require_plain(request)
    require_float32(program, program.dtype, "An encoder", "converted")
    if not is_seq2seq(found):
        return compile_encoder(program, found, request.config, check=request.check, stages=stages, jobs=request.jobs)
    if request.destination is not None:
        check_pair(request.destination.path, request.destination.force)
    return compile_seq2seq(program, found, request.config, check=request.check, stages=stages, jobs=request.jobs)


def _require_plain(request: Request) -> None:
    """Refuse what only a causal language model has.

    Raises:
        UsageError: It was asked for.
    """
    config = request.config
    if request.calibration is not None or request.finetune is not None:
        raise UsageError("Text cannot be used for an encoder.", "Leave --calibration and --finetune out.")
    if request.device is not None:
        raise UsageError("Only a causal language model is converted on another device.", "Leave --device out.")
    if config.cache == "static":
        raise UsageError("Only a causal language model can have a static cache.", "Leave --cache static out.")
    if config.cache_layout != "rows":
        raise UsageError(
            f"Only a causal language model has the cache layout {config.cache_layout}.",
            "Leave --cache-layout and --target out.",
        )
    if config.cache_type == "int8":
        raise UsageError("Only a causal language model can have an int8 cache.", "Leave --cache-type int8 out.")
