"""From ONNX files for TensorRT to a library of plugins with their kernels: Triton, then g++; no TensorRT, no GPU."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mla_compile.artifacts.places import check_place
from mla_compile.disk.writing import moved_into
from mla_compile.errors import LoadError, RefusedError, UsageError
from mla_compile.progress import Display, Stages

__all__ = ["build_plugin_library"]

_FLAGS = ("-shared", "-fPIC", "-std=c++17", "-O2", "-fvisibility=hidden")


def build_plugin_library(
    files: Sequence[Path],
    out: Path,
    *,
    tensorrt_include: Path,
    cuda_include: Path | None = None,
    architectures: Sequence[int] = (),
    self_registering: bool = False,
    force: bool = False,
    display: Display | None = None,
) -> None:
    """Build the plugins of some files, and only then give the library its name.

    Args:
        files: Written by ``mla-compile tensorrt --plugin cpp``.
        out: The ``.so`` file.
        tensorrt_include: Folder that holds ``NvInferRuntime.h`` of TensorRT 10.3 or later.
        cuda_include: Folder that holds ``cuda_runtime_api.h``; Triton's own by default.
        architectures: Compute capabilities, as 90 for 9.0; all there are kernels for by default.
        self_registering: Whether the library registers its plugins when it is opened, as ONNX Runtime's provider for
            TensorRT expects. TensorRT's own loader does that itself, and would find them registered already.
        force: Replace an existing file.
        display: Where to show progress; nowhere by default.

    Raises:
        LoadError: A file could not be read.
        RefusedError: A file holds no nodes for these plugins, or rows that are too wide for a GPU.
        UsageError: Headers, g++, Triton or its assembler are missing, there are no kernels for an architecture, or the
            library cannot be written.
    """
    if out.suffix != ".so":
        raise UsageError(f"'{out}' is not named like a shared library.", "Name it with the suffix .so.")
    check_place(out, force)
    compiler = _compiler()
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "Triton, which compiles the kernels, is not installed.", "Run: pip install 'mla-compile[cuda]'."
        )
    _check_header(
        tensorrt_include, "NvInferRuntime.h", "--tensorrt-include", "the headers of TensorRT (its include folder)"
    )
    cuda_include = cuda_include or _triton_headers()
    _check_header(cuda_include, "cuda_runtime_api.h", "--cuda-include", "the headers of CUDA's runtime")

    from mla_compile.runtime.kernels.aot import ARCHITECTURES, assembler
    from mla_compile.runtime.tensorrt.cubins import Decode
    from mla_compile.runtime.tensorrt.kernels import Append
    from mla_compile.runtime.tensorrt.nodes import read_nodes
    from mla_compile.runtime.tensorrt.source import PLUGIN_SOURCE, TABLES, kernel_tables

    unknown = next((a for a in architectures if a not in ARCHITECTURES), None)
    if unknown is not None:
        known = ", ".join(map(str, ARCHITECTURES))
        raise UsageError(f"There are no kernels for compute capability {unknown / 10}.", f"Choose some of {known}.")
    nodes = frozenset[Append | Decode]().union(*map(read_nodes, files))
    stages, wanted = Stages(display), tuple(dict.fromkeys(architectures)) or ARCHITECTURES
    for architecture in wanted:
        assembler(architecture)
    try:
        tables = kernel_tables(nodes, stages.each("compile kernels", wanted, len(wanted)))
    except ValueError as error:
        raise RefusedError(str(error), "Or leave this GPU out of --architecture.") from error
    with stages.stage("compile plugins"), moved_into(out.parent) as folder:
        source = folder / TABLES
        source.write_text(tables, encoding="ascii")
        headers = [f"-I{folder}", f"-isystem{tensorrt_include}", f"-isystem{cuda_include}"]
        defined = ["-DMLA_SELF_REGISTERING"] if self_registering else []
        command = [compiler, *_FLAGS, *defined, *headers, str(PLUGIN_SOURCE), "-o", str(folder / out.name), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        source.unlink()
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise UsageError(
                f"g++ could not compile the plugins ({said}).", "Use the headers of TensorRT 10.3 or later."
            )


def _compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        raise UsageError("g++, which compiles the plugins, was not found.", "Install it, such as by: apt install g++.")
    return found


def _check_header(folder: Path, header: str, option: str, what: str) -> None:
    if not (folder / header).is_file():
        raise LoadError(f"'{folder}' does not hold {header}.", f"Give {option} the folder of {what}.")


def _triton_headers() -> Path:
    """CUDA's headers as Triton brings them."""
    found = importlib.util.find_spec("triton")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "backends" / "nvidia" / "include"
