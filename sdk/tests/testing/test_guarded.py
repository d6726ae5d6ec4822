"""The kit's own test: kernels that stay within their tensors run as ever, those that leave them end the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys

import torch
import triton
import triton.language as tl
from light_sdk.testing.guarded import guarded_launches


@triton.jit
def copy(out_ptr, x_ptr, first_out, first_x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first_x + i, mask=i < SIZE, other=0.0)
    tl.store(out_ptr + first_out + i, x, mask=i < SIZE)


side, first_out, first_x = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
whole = torch.arange(40.0)
# A view: what lies beside it in its storage is none of the kernel's.
x, out = whole[5:10], torch.zeros(7)
with guarded_launches(side):
    copy[(1,)](out[1:6], x, first_out, first_x, SIZE=5, BLOCK=8)
assert out.tolist() == [0, 5, 6, 7, 8, 9, 0] and whole.tolist() == list(range(40)), out
"""


def run(tmp_path: Path, *arguments: object) -> int:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True).returncode


@pytest.mark.parametrize(
    ("side", "first_out", "first_x", "code"),
    [
        ("behind", 0, 0, 0),
        ("before", 0, 0, 0),
        ("behind", 0, 1, -signal.SIGSEGV),
        ("before", 0, -1, -signal.SIGSEGV),
        ("behind", 1, 0, -signal.SIGSEGV),
    ],
    ids=["within", "within, from the front", "reads behind", "reads before", "writes behind"],
)
def test_side(side: str, first_out: int, first_x: int, code: int, tmp_path: Path) -> None:
    assert run(tmp_path, side, first_out, first_x) == code
