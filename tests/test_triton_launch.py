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
from hf_flashinfer_attn.kernels import pad_head_dim
from hf_flashinfer_attn.ragged.triton_tokens import number_tokens

pad_head_dim.use_triton = lambda tensor: True

expected = []
for rows in (3, 3, 2000):
    valid = torch.ones(rows, 8, dtype=torch.bool)
    ranks = valid.flatten().cumsum(0, dtype=torch.int32)
    slots, tokens = number_tokens(valid.flatten(), ranks, rows * 8)
    expected.append([valid.data_ptr(), ranks.data_ptr(), slots.data_ptr(), tokens.data_ptr(), rows * 8, 1024])
count = pad_head_dim.scratch_bytes(10, 10, 4, 4, 64, 32, 2)
for scratch in (None, torch.empty(count, dtype=torch.uint8)):
    gather = pad_head_dim.GatherQkv(None, None, 64, scratch)
    for _ in range(3):
        sides = torch.randn(3, 2, 5, 4, 32).half().transpose(2, 3).unbind(0)
        packed = gather(*sides)
        expected.append([side.data_ptr() for side in (*sides, *packed)])
    assert (gather.output_buffer is None) == (scratch is None)
scatter = pad_head_dim.ScatterOutput(None, (2, 5), 32)
for _ in range(3):
    output = torch.randn(10, 4, 64).half()
    expected.append([output.data_ptr(), output.data_ptr(), scatter(output).data_ptr()])
print(json.dumps([launches, expected]))
"""


def test_a_repeated_launch_passes_what_the_first_one_did() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True
    )
    launches, expected = json.loads(done.stdout.splitlines()[-1])
    assert len(launches) == len(expected) == 12
    assert {stream for _, stream, _ in launches} == {1234}
    for (grid, _, arguments), given in zip(launches[:3], expected):
        assert grid == [-(-given[4] // 1024), 1, 1]
        assert arguments == given
    # Pointers, two of which are not read without positions; then strides, sizes and constants, the same each time.
    for first, num_pointers, num_rest in ((3, 8, 9 + 4 + 11), (6, 8, 9 + 4 + 11), (9, 3, 1 + 7)):
        for (_, _, arguments), given in zip(launches[first : first + 3], expected[first:]):
            assert arguments[: len(given)] == given
            assert arguments[num_pointers:] == launches[first][2][num_pointers:]
            assert len(arguments) == num_pointers + num_rest
    # Scratch memory is the same in all calls.
    assert all(arguments[3:6] == expected[6][3:6] for _, _, arguments in launches[6:9])
