"""The program: its commands by name, and what becomes of an error. Nothing here imports torch."""

from __future__ import annotations

import difflib
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated

import typer

from mla_compile.cli.convert import convert
from mla_compile.cli.export import export, fuse, quantize, report, verify
from mla_compile.cli.finetune import fine_tune
from mla_compile.cli.look import inspect, plan
from mla_compile.cli.measure import bench_speed, evaluate
from mla_compile.cli.narrow import NarrowCommand, NarrowGroup, narrow_width
from mla_compile.cli.run import run
from mla_compile.cli.tensorrt import build_plugin, tensorrt
from mla_compile.errors import MlaCompileError, ShareDone

__all__ = ["COMMANDS", "app", "main"]

app = typer.Typer(
    name="mla-compile",
    cls=NarrowGroup,
    help="Shrink a trained transformer's KV cache: rewrite its attention as latent attention and export it to ONNX.\n\n"
    "'mla-compile MODEL --out FILE.onnx' is short for 'mla-compile convert MODEL --out FILE.onnx'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert,
    "inspect": inspect,
    "plan": plan,
    "run": run,
    "eval": evaluate,
    "bench": bench_speed,
    "finetune": fine_tune,
    "export": export,
    "tensorrt": tensorrt,
    "quantize": quantize,
    "fuse": fuse,
    "build-plugin": build_plugin,
    "verify": verify,
    "report": report,
}
_ALIKE = 0.75
"""How much a word is to be like a command to be taken for one that was mistyped."""
_TERMINATED = 128 + signal.SIGTERM
_OF_ALL = ("--help", "--version", "--install-completion", "--show-completion")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mla-compile {version('mla-compile')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Nothing is done before a command."""


for _name, _command in COMMANDS.items():
    app.command(_name, cls=NarrowCommand)(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; ``sys.argv`` by default.

    Returns:
        The exit code: 0 done, 1 our defect, 2 usage, 3 refused, 4 quality gate, 5 verification, 6 training,
        130 interrupted, 141 nobody reads the result any more. After ``SIGTERM`` the process ends with 143.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] not in COMMANDS and words[0] not in _OF_ALL:
        if meant := _mistyped(words[0]):
            return _fail(f"There is no command '{words[0]}', and no such file. Did you mean '{meant}'?", 2)
        words.insert(0, "convert")  # the default verb
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that a terminal's encoding lacks are spelled out
            stream.reconfigure(errors="backslashreplace")
    if arguments is None:  # a process of its own
        signal.signal(signal.SIGTERM, _end)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        width = narrow_width()
        app.rich_markup_mode = "rich" if width is None else None
        code = app(args=words or ["--help"], prog_name="mla-compile", standalone_mode=False, terminal_width=width)
        sys.stdout.flush()  # while there is somebody to tell that nobody reads
    except MlaCompileError as error:
        return _fail(str(error), error.exit_code)
    except ShareDone:
        from mla_compile.text.processes import end_share

        end_share()
    except (KeyboardInterrupt, typer.Abort) as stopped:
        if isinstance(stopped.__cause__, EOFError):  # of a file, which the parser takes for the end of what is typed
            raise stopped.__cause__ from None
        return _fail("Interrupted.", 130)
    except BrokenPipeError:
        return _end_quietly()
    except SystemExit as ended:  # the parser's own answer to a closed pipe
        if not isinstance(ended.__context__, BrokenPipeError):
            raise
        return _end_quietly()
    except OSError as error:
        return _fail(_explained(error), 2)
    except Exception as error:
        if not hasattr(error, "format_message"):  # anything but the parser's own
            raise
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "mla-compile"
        sentence = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
        return _fail(f"{sentence}. See '{command} --help'.", 2)
    if code == 130:  # the parser turns an interrupt into this code
        return _fail("Interrupted.", 130)
    return 2 if not words else code or 0


def _mistyped(word: str) -> str | None:
    """The command that somebody may have meant by a word that names no file either."""
    close = difflib.get_close_matches(word, COMMANDS, 1, _ALIKE)
    return close[0] if close and not os.path.lexists(word) else None


def _end(_signal: int, _frame: FrameType | None) -> None:
    """End as after an interrupt, with nothing half-written left behind."""
    raise SystemExit(_TERMINATED)


def _explained(error: OSError) -> str:
    """What the system refused, and of which file, where it says so."""
    reason = error.strerror or str(error) or type(error).__name__
    what = f"'{error.filename}'" if error.filename else "A file"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what} cannot be opened ({reason}). Give yourself access to it, or choose another place."
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
        return f"{what} cannot be used ({reason}). Give another path."
    return f"{what} could not be read or written ({reason}). Free some space, or choose another folder."


def _end_quietly() -> int:
    """Nobody reads standard output any more (``| head``): end as other programs do, and do not try again."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return 141


def _fail(sentence: str, code: int) -> int:
    typer.echo(f"mla-compile: {sentence}", err=True)
    return code
