"""Repeated launches of Triton kernels with the installed Triton: compiled for a GPU, launched on a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launches = []

class Utils:
    def load_binary(self, *arguments): return "module", 7, 16, 0, 1024
    def get_device_properties(self, device): return {"max_shared_mem": 1 << 17}
    def unload_module(self, module): ...

class Launcher:
    def __init__(self, src, metadata): ...
    def __call__(self, x, y, z, stream, function, *rest):
        # Four or more things of Triton's own come before the kernel's arguments.
        launches.append([[x, y, z], stream, [getattr(value, "data_ptr", lambda: value)() for value in rest[4:]]])

class Driver:
    utils, launcher_cls = Utils(), Launcher
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 1234
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
from hf_flashinfer_attn.kernels.triton_pad import Packer
from hf_flashinfer_attn.ragged.triton_tokens import number_tokens

expected = []
for rows in (3, 3, 2000):
    valid = torch.ones(rows, 8, dtype=torch.bool)
    ranks = valid.flatten().cumsum(0, dtype=torch.int32)
    slots, tokens = number_tokens(valid.flatten(), ranks, rows * 8)
    expected.append([valid.data_ptr(), ranks.data_ptr(), slots.data_ptr(), tokens.data_ptr(), rows * 8, 1024])
packer = Packer(None, None, 64)
for _ in range(3):
    sides = torch.randn(3, 2, 5, 4, 32).half().transpose(2, 3).unbind(0)
    packed = packer(*sides)
    pointers = [*(side.data_ptr() for side in (*sides, *packed)), sides[0].data_ptr(), sides[0].data_ptr()]
    expected.append(pointers)
print(json.dumps([launches, expected]))
"""


def test_a_repeated_launch_passes_what_the_first_one_did() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True
    )
    launches, expected = json.loads(done.stdout.splitlines()[-1])
    assert len(launches) == len(expected) == 6
    for (grid, stream, arguments), pointers in zip(launches[:3], expected[:3]):
        assert grid == [-(-pointers[4] // 1024), 1, 1]
        assert (stream, arguments) == (1234, pointers)
    for _, stream, arguments in launches[3:]:
        assert stream == 1234
        # All but the pointers is the same each time.
        assert arguments[8:] == launches[3][2][8:]
        assert len(arguments) == 8 + 9 + 4 + 11
    for (_, _, arguments), pointers in zip(launches[3:], expected[3:]):
        assert arguments[:8] == pointers
