"""``run``: text by a converted model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mla_compile.cli.options import AsJson, Quiet, Seed, Tokenizer, Verbose, one_of
from mla_compile.errors import LoadError, UsageError

__all__ = ["run"]


def run(
    model: Annotated[Path, typer.Argument(help="An ONNX file, a folder or a TensorRT engine made by mla-compile.")],
    prompt: Annotated[
        list[str], typer.Option(help="Text to continue; repeat the option for a batch.", show_default=False)
    ] = [],  # noqa: B006 - typer makes a list of its own
    prompt_file: Annotated[
        list[str],
        typer.Option(help="File with a text to continue, or - for standard input; repeatable.", show_default=False),
    ] = [],  # noqa: B006
    stop: Annotated[
        list[str], typer.Option(help="Text in front of which to stop; repeatable.", show_default=False)
    ] = [],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the most likely token.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample among the fewest tokens that reach this probability.")
    ] = 1.0,
    seed: Seed = 0,
    tokenizer: Tokenizer = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longest sequence in tokens, prompt included.",
            show_default="as long as needed",
        ),
    ] = None,
    provider: Annotated[
        str | None, typer.Option(help="Where to run: cpu or cuda.", callback=one_of("cpu", "cuda"), show_default="cpu")
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            help="Attention kernel on the CPU: fused (needs a C++ compiler the first time), standard (the operators in "
            "the file), or auto for fused where possible.",
            callback=one_of("auto", "fused", "standard"),
            show_default="auto",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads per operator.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
) -> None:
    """Generate text with a converted model in ONNX Runtime, PyTorch or TensorRT."""
    from mla_compile import display
    from mla_compile.evaluation.textgen import generate_text
    from mla_compile.runtime.generate import Sampling

    prompts = [*prompt, *map(_read_prompt, prompt_file)]
    if not prompts:
        raise UsageError("There is no text to continue.", "Give one with --prompt TEXT or --prompt-file FILE.")
    streamed = len(prompts) == 1 and not as_json
    with display.make_display(quiet, as_json, verbose):
        result = generate_text(
            model,
            prompts,
            max_new_tokens,
            Sampling(temperature, top_k, top_p, seed),
            tokenizer=tokenizer,
            threads=threads,
            provider=provider,
            max_length=max_length,
            kernel=kernel,
            stop=stop,
            on_text=display.stream_text if streamed else None,
        )
    if as_json:
        display.print_json(display.generation_row(result), one_line=True)
    else:
        display.show_generation(result, streamed, quiet)


def _read_prompt(name: str) -> str:
    """A prompt from a file or standard input, without the line's end that editors put behind everything.

    Raises:
        LoadError: It cannot be read, or is not UTF-8 text.
    """
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return content.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise LoadError(f"'{name}' cannot be read ({error.strerror}).", "Check its name.") from error
    except UnicodeDecodeError as error:
        raise LoadError(f"The prompt in '{name}' is not UTF-8 text.", "Save it in UTF-8.") from error
