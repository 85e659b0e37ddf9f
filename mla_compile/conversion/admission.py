"""Which models a conversion takes, and which of their layers: the rest is refused with its reason."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mla_compile.config import CompileConfig
from mla_compile.conversion.encoders import is_encoder, require_encoder
from mla_compile.conversion.seq2seq import is_seq2seq, require_decodable
from mla_compile.conversion_cost import polish_cost
from mla_compile.devices import free_memory
from mla_compile.errors import RefusedError, UsageError
from mla_compile.passes.plain_caches import with_plain_caches
from mla_compile.passes.recognise import Recognition
from mla_compile.passes.task import Task
from mla_compile.passes.trace import FLEXIBLE
from mla_compile.passes.weights import has_numbers, stored_numbers
from mla_compile.plan import latent_budget, shared_rope_plan
from mla_compile.program import AnyProgram, OtherProgram, Program
from mla_compile.site import AttentionSite, Kind, Rejection, reasons
from mla_compile.verification.agreement import WHOLE

__all__ = [
    "as_causal",
    "convertible",
    "is_beyond_causal",
    "require_causal",
    "require_convertible",
    "require_in_pieces",
    "require_no_kept_layers",
    "require_room_to_polish",
]


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


def require_convertible(program: AnyProgram, found: Recognition, encoders: bool) -> None:
    """Refuse what a conversion would refuse, without converting.

    Raises:
        RefusedError: For its attention; or, of a model that is small enough to be tried, for what is outside of it.
        LoadError: It is no causal language model for another reason.
    """
    if encoders and is_encoder(found):
        return
    if encoders and is_seq2seq(found):
        require_decodable(program, found)
        return
    require_in_pieces(require_causal(program, found))


def require_in_pieces(program: Program) -> None:
    """Refuse a model that is something else than the original when it is run in pieces; a large one is not tried.

    Raises:
        RefusedError: Something outside attention looks at the length or at other tokens.
    """
    if has_numbers(program) and stored_numbers(program) * torch.float32.itemsize <= WHOLE:
        with_plain_caches(program)


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


def as_causal(config: CompileConfig) -> CompileConfig:
    """Settings as they hold for a causal language model, which ``encoders`` says nothing of."""
    return config.model_copy(update={"encoders": False})


def _require_some(program: AnyProgram, found: Recognition) -> None:
    """Refuse a model with nothing to convert, or with a layer that cannot even be kept as it is."""
    lost = [r for r in found.rejections if r.plain is None]
    if lost or (found.rejections and not found.sites):
        why = reasons(lost or found.rejections)
        verb = "decoded with a cache" if lost and found.sites else "converted"
        raise RefusedError(
            f"{len(lost or found.rejections)} of {len(found.rejections) + len(found.sites)} attention layers of "
            f"'{program.source}' cannot be {verb}: {why}.",
            "Use torch.nn.functional.scaled_dot_product_attention with a mask in its place."
            if any(FLEXIBLE in r.reason for r in lost)
            else "Pass --encoders to make its projections low-rank instead."
            if is_encoder(found)
            else "Run 'mla-compile inspect' for the whole table.",
        )
    if not found.sites and program.token_inputs and not program.looks_up:
        raise RefusedError(
            f"Token ids of '{program.source}' are looked up in no table of embeddings, behind which attention begins.",
            "Use torch.nn.Embedding for them.",
        )
    if not found.sites:
        raise RefusedError(
            f"No attention was found in '{program.source}'.",
            "Export with run_decompositions({}) at most, so that attention is still a softmax between two products.",
        )


def require_no_kept_layers(found: Recognition) -> None:
    """Refuse a cache in halves where a layer is kept: its rows are keys and values, of another length.

    Raises:
        RefusedError: There are such layers.
    """
    if found.rejections:
        raise RefusedError(
            f"{len(found.rejections)} attention layers were not converted, and a cache in halves needs rows of one "
            "length.",
            "Leave --cache-layout genai out.",
        )


def require_room_to_polish(task: Task) -> None:
    """Refuse, before anything is measured, to polish a model whose matrices alone do not fit where that is done.

    Sizes are not known yet: all of a layer's budget is taken to be latent, or the rank is the one that was asked for.

    Raises:
        UsageError: They do not fit.
    """
    config, memory = task.config, free_memory(task.resources.device)
    if not config.polish_steps or memory is None:
        return
    plans = [
        shared_rope_plan(site, width, 0, config.kv_rank or max(1, latent_budget(site, config)))
        for site, width in zip(task.sites, task.widths, strict=True)
    ]
    program = task.program
    cost = polish_cost(
        task.sites, plans, task.widths, config, stored_numbers(program), program.dtype.itemsize, program.vocabulary
    )
    if cost.least_memory_bytes > memory:
        where = "this machine" if task.resources.device == "cpu" else f"the device {task.resources.device}"
        raise UsageError(
            f"Polishing trains all layers at once, whose matrices alone take {cost.least_memory_bytes / 1e9:,.1f} GB, "
            f"and {where} has {memory / 1e9:,.1f} GB of memory.",
            "Leave --polish-steps out, or give it a machine with more memory; 'mla-compile plan' says what it takes.",
        )
