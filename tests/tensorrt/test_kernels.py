"""Kernels in the form that TensorRT launches: still assembly, and of a size that any launch may have."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton

from mla_compile.runtime.kernels.cache import RowLayout
from mla_compile.runtime.kernels.schedule import choose_tiles, shared_bytes
from mla_compile.runtime.tensorrt.kernels import Append, Combine, Partial, launchable, launchable_ptx

LAYOUT = RowLayout(48, 3, 8)
SMALL = Partial(LAYOUT, 9, 1, "fp16", 0.3, 4)
SCALED = Partial(RowLayout(48, 3, 8, 3, 9), 9, 1, "fp16", 0.3, 4, softcap=30.0, slopes=True)
TAKEN = """
.visible .entry kernel(
\t.param .u64 kernel_param_0,
\t.param .u64 kernel_param_1,
\t.param .u64 kernel_param_2
)
{
\tld.param.b64 %rd1, [kernel_param_USED];
}
"""


@pytest.mark.parametrize(
    "made", [SMALL, SCALED, Combine(48, 4, "fp16"), Combine(48, 4, "fp16", True), Append(LAYOUT, "fp16")]
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_without_scratch_parameters_it_still_assembles(made, architecture, tmp_path):
    kernel = launchable(made, architecture)
    (tmp_path / "kernel.ptx").write_text(kernel.ptx)
    target = re.search(r"\.target (\w+)", kernel.ptx)[1]
    command = [triton.knobs.nvidia.ptxas.path, f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kernel.threads == 128


def test_what_is_used_is_not_taken_away():
    assert "kernel_param_2" not in launchable_ptx(TAKEN.replace("USED", "0"), "kernel", 2)
    with pytest.raises(ValueError, match="kernel uses scratch memory"):
        launchable_ptx(TAKEN.replace("USED", "2"), "kernel", 2)
    with pytest.raises(ValueError, match="has 3 parameters, not 4 or more"):
        launchable_ptx(TAKEN.replace("USED", "0"), "kernel", 4)


@pytest.mark.parametrize("rank", [48, 128, 512])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tactics_need_no_more_shared_memory_than_any_launch_has(rank, dtype):
    made = Partial(RowLayout(rank, 1, 64), 32, 1, dtype, 0.3, 16)
    tactics = made.tactics(90)
    assert tactics
    assert all(shared_bytes(made.spec, tiles) <= 48 * 1024 for tiles in tactics)
    assert len({*tactics}) == len(tactics)


def test_where_nothing_is_so_small_there_is_what_fits():
    made = Partial(RowLayout(512, 1, 64), 32, 1, "fp32", 0.3, 16)
    assert made.tactics(90) == (choose_tiles(made.spec, 90),)
