"""``inspect`` and ``plan``: what a model has, and what a conversion would make of it; nothing is written."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from mla_compile.cli.groups import MethodOptions, SizeOptions, SourceOptions, grouped
from mla_compile.cli.options import (
    AsJson,
    AttnImplementation,
    CacheType,
    Described,
    Encoders,
    Quiet,
    UnsafeLoad,
    Verbose,
)

__all__ = ["inspect", "plan"]

_CONTEXT = 4096
"""Tokens in the cache of the step that a plan estimates, unless the model takes fewer."""


def inspect(
    model: Described,
    encoders: Encoders = False,
    attn_implementation: AttnImplementation = "auto",
    unsafe_load: UnsafeLoad = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Show every attention layer: what was recognised, or why it cannot be converted."""
    from mla_compile import api, display
    from mla_compile.conversion.admission import convertible, require_convertible
    from mla_compile.conversion.preview import lossless_elements
    from mla_compile.report import summarise_site

    with display.make_display(quiet, as_json, verbose) as shown:
        program, found = api.inspect(
            model, attn_implementation=attn_implementation, unsafe_load=unsafe_load, display=shown
        )
        sites, rejections = convertible(program, found, encoders)
        lossless = lossless_elements(program, sites)
    rows = [summarise_site(s) | {"lossless_elements_per_token": n} for s, n in zip(sites, lossless, strict=True)]
    rows += map(summarise_site, rejections)
    rows.sort(key=lambda row: int(row["index"]))
    if as_json:
        display.print_json({"model": model, "layers": rows})
    else:
        display.show_layers(rows)
    require_convertible(program, found, encoders)
    if not (as_json or quiet):
        display.show_verdict(rows, model, encoders=encoders)


@grouped
def plan(
    *,
    model: Described,
    sizes: SizeOptions,
    how: MethodOptions,
    source: SourceOptions,
    cache_type: CacheType = "auto",
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in the cache for the estimate of a step's time.",
            show_default=f"{_CONTEXT}; the model's limit, if that is less",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    machine: Annotated[Literal["cpu", "gpu"], typer.Option(help="Hardware to estimate the time for.")] = "cpu",
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Show ranks, rotating channels, cache bytes per token and the estimated time of a step; nothing is written.

    'mla-compile plan MODEL --method mha2mla' takes seconds and no text; other methods nearly as long as converting.
    """
    from mla_compile import display
    from mla_compile.config import make_config
    from mla_compile.cost import MACHINES, DecodeStep, decode_costs

    config = make_config(**how.settings(), **sizes.settings(), cache_type=cache_type)
    with display.make_display(quiet, as_json, verbose) as shown:
        from mla_compile import api

        planned = api.plan(model, config, **source.arguments(), display=shown)
    longest = planned.max_positions
    if context is not None and longest is not None and context > longest:
        display.warn(f"--context {context} is more than the {longest} tokens of the model's longest sequence")
    context = context or min(_CONTEXT, longest or _CONTEXT)
    step = DecodeStep(MACHINES[machine], context, batch)
    costs = decode_costs(planned.found.sites, planned.plans, planned.widths, step) if planned.widths else ()
    held = "int8" if cache_type == "int8" else planned.dtype
    if as_json:
        rows = display.plan_rows(planned.plans, costs, step, held, planned.source_type)
        display.print_json(rows | display.conversion_row(planned.conversion, planned.alike))
    else:
        cached = held if planned.found.sites else None
        display.show_plan(planned.plans, costs, step, cached, planned.source_type)
        if not quiet:
            display.show_conversion(planned.conversion, planned.alike, step if costs else None)
