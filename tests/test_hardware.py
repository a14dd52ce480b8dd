"""What follows from the machine, against tables and against what the operating system says of it."""

import os
import platform
from pathlib import Path

import pytest
import torch

from finetune import hardware

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without CUDA")


@ON_CPU
@pytest.mark.parametrize(
    ("devices", "count"),
    [
        (1, 1),
        (4, 4),
        ("2", 2),
        ("0,1", 2),
        ("0, 1, 3", 3),
        ("3,", 1),  # Lightning: the device of this number
        ([0, 2], 2),
        ((5,), 1),
        ("auto", 1),
        (-1, 1),
        ("-1", 1),
    ],
)
def test_device_count(devices, count):
    assert hardware.device_count(devices) == count


@pytest.mark.parametrize(("devices", "count"), [("auto", 8), (-1, 8), ("-1", 8), (2, 2)])
def test_all_devices_are_those_that_cuda_counts(monkeypatch, devices, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert hardware.device_count(devices) == count


@pytest.mark.parametrize(
    ("cuda", "native", "precision"), [(False, True, "32-true"), (True, True, "bf16-mixed"), (True, False, "16-mixed")]
)
def test_best_precision(monkeypatch, cuda, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert hardware.best_precision() == precision
    if cuda:
        assert hardware.bf16_is_emulated() is not native


@ON_CPU
@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads the flags of x86 on Linux")
def test_bfloat16_is_emulated_where_the_processor_lacks_it():
    flags = set(Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split())
    assert "sse2" in flags
    assert hardware.bf16_is_emulated() is not bool(flags & {"avx512_bf16", "amx_tile"})


@ON_CPU
def test_best_device_computes():
    device = hardware.best_device()
    assert device.type in ("cpu", "mps")
    assert float(torch.ones(3, device=device).sum()) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that binds processes to cores")
def test_workers_are_as_many_as_the_cores_of_this_process():
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert hardware.worker_count() == 1
    finally:
        os.sched_setaffinity(0, mine)
    assert hardware.worker_count() == min(8, len(mine))


def test_no_more_than_eight_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert hardware.worker_count() == 8
