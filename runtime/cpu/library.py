"""Compile the operators with the system's compiler, for this processor, once."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from mla_compile.errors import UsageError
from mla_compile.runtime.user_cache import default_folder

__all__ = ["SOURCE", "compile_library", "compiler", "library"]

SOURCE = Path(__file__).parent / "operators.cpp"
_FLAGS = ("-shared", "-fPIC", "-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-maybe-uninitialized")
_NATIVE = "-march=native"
"""For this processor; what runs on others too is made with another ``-march``."""


def compiler() -> list[str] | None:
    """What a compiler's command begins with: ``$CXX``, of several words perhaps, else ``c++``, ``g++`` or ``clang++``.

    Returns:
        The words, or None: no C++ compiler for Linux or macOS is there.

    Raises:
        UsageError: ``$CXX`` is set, and its first word is no command.
    """
    if platform.system() not in ("Linux", "Darwin"):
        return None
    named = os.environ.get("CXX", "")
    try:
        words = shlex.split(named)
    except ValueError:  # a quotation that does not end
        words = [named]
    for name in words[:1] or ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found, *words[1:]]
    if words:
        raise UsageError(
            f"There is no compiler '{words[0]}', which the environment variable CXX names.",
            "Name another there, or none; or run files without it: --kernel standard.",
        )
    return None


def library() -> Path:
    """The library for this processor, compiled now unless it has been, and kept in the user's cache folder.

    Raises:
        UsageError: There is no compiler, it fails, or the folder cannot be written.
    """
    path = default_folder() / f"mla-compile-cpu-{_key()}.so"
    if not path.is_file():
        logging.getLogger(__name__).info("compiling the fused kernel, once, with %s", shlex.join(compiler() or ()))
        compile_library(path)
    return path


def compile_library(out: Path, march: str = _NATIVE) -> None:
    """Compile the library; a file of the name appears whole or not at all.

    Args:
        out: The file.
        march: What processor it is for, as the compiler's flag.

    Raises:
        UsageError: There is no compiler, it fails, or the file cannot be written.
    """
    words = compiler()
    if words is None:
        raise UsageError(
            "The fused kernel needs a C++ compiler, and none was found.",
            "Install one, such as by: apt install g++; or run files without it: --kernel standard.",
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".compiling-", dir=out.parent) as folder:
            made = Path(folder) / out.name
            done = _run([*words, *_FLAGS, march, str(SOURCE), "-o", str(made)])
            if done.returncode:
                command = shlex.join(words)
                said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                if march != _NATIVE and "-march" in said:
                    raise UsageError(
                        f"'{command}' knows no processor '{march.removeprefix('-march=')}' ({said[:200]}).",
                        "Give one that it names as --march: x86-64-v3, say, or native.",
                    )
                raise UsageError(
                    f"'{command}' could not compile the fused kernel ({said[:200]}).",
                    "Name GCC 11 or Clang 14 or later in the environment variable CXX; or run files without it: "
                    "--kernel standard.",
                )
            made.replace(out)
    except OSError as error:
        raise UsageError(f"'{out}' cannot be written ({error.strerror}).", "Choose another folder.") from error


def _run(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a compiler.

    Raises:
        UsageError: The system cannot.
    """
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise UsageError(
            f"The compiler '{words[0]}' cannot be run ({error.strerror}).",
            "Name another in the environment variable CXX, or none; or run files without it: --kernel standard.",
        ) from error


def _key() -> str:
    """What a library follows from: sources, compiler and its version, flags and processor."""
    parts = [path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]*"))]
    words = compiler() or []
    version = _run([*words, "--version"]).stdout.partition("\n")[0] if words else ""
    parts += [text.encode() for text in (shlex.join(words), version, " ".join(_FLAGS), _processor())]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What a processor can do: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")
