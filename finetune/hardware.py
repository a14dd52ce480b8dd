"""What the machine has, and what follows from it: precision and devices."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import torch


def best_precision() -> str:
    """Return the Trainer's precision: mixed where the accelerator computes it natively, 32 bit elsewhere.

    bfloat16 is chosen only on CUDA devices that have it (emulated it is several times slower than float32); a CPU stays at
    32 bit, which keeps results exact.
    """
    if not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def bf16_is_emulated() -> bool:
    """Say whether this machine computes bfloat16 in software (measured: 13 times slower than float32)."""
    if torch.cuda.is_available():
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.backends.cpu.get_cpu_capability()
    return not (_cpu_has("_is_avx512_bf16_supported") or _cpu_has("_is_amx_tile_supported") or capabilities.startswith("SVE"))


def _cpu_has(check: str) -> bool:
    probe = getattr(torch.cpu, check, None)
    return bool(probe()) if callable(probe) else False


def device_count(devices: int | str | Sequence[int], accelerator: str = "auto") -> int:
    """Return how many processes the Trainer's `devices` will start on an accelerator."""
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1
    return int(text) if text.isdigit() else sum(1 for index in text.split(",") if index.strip())  # "0," is one device


def best_device() -> torch.device:
    """Return the fastest device for prediction."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe_device(device: torch.device, number: int = 1) -> str:
    """Return what a run computes on, for people, such as `2 x NVIDIA A100-SXM4-40GB`.

    Args:
        device: The device of a process.
        number: Number of processes.

    >>> describe_device(torch.device("mps"))
    'MPS'
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    else:
        name = device.type.upper()
    return name if number == 1 else f"{number} x {name}"


def worker_count() -> int:
    """Return how many processes should read pictures: one per core that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)
