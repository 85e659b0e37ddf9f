"""What a person sees: progress, tables and summaries; rich on a terminal, plain lines otherwise."""

from __future__ import annotations

from mla_compile.display.console import make_display, print_json, say, warn
from mla_compile.display.layers import conversion_row, plan_rows, show_conversion, show_layers, show_plan, show_verdict
from mla_compile.display.measured import generation_row, show_benchmark, show_generation, show_measurement, stream_text
from mla_compile.display.outcome import show_encoder_report, show_report, show_seq2seq_report, show_training
from mla_compile.display.written import (
    show_check,
    show_checkpoint,
    show_commands,
    show_exported,
    show_gguf,
    show_library,
    show_library_commands,
    show_quantised,
    show_written,
    written_row,
)

__all__ = [
    "conversion_row",
    "generation_row",
    "make_display",
    "plan_rows",
    "print_json",
    "say",
    "show_benchmark",
    "show_check",
    "show_checkpoint",
    "show_commands",
    "show_conversion",
    "show_encoder_report",
    "show_exported",
    "show_generation",
    "show_gguf",
    "show_layers",
    "show_library",
    "show_library_commands",
    "show_measurement",
    "show_plan",
    "show_quantised",
    "show_report",
    "show_seq2seq_report",
    "show_training",
    "show_verdict",
    "show_written",
    "stream_text",
    "warn",
    "written_row",
]
