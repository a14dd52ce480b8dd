"""The numerical tests under every instruction set that torch and oneDNN can be told to use, with one and two threads.

    python benchmarks/instruction_sets.py
    python benchmarks/instruction_sets.py tests/test_reuse_fit.py --aten avx512 --threads 1

Sums that are taken in another order round differently, and a steep training makes much of that. A test that holds on one
machine only compares the wrong thing. One process runs at a time; settings that this CPU lacks are left out and named. It ends
with 1 if any test fails.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from common import machine
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
ATEN = ("default", "avx2", "avx512")
ONEDNN = ("AVX2", "AVX512_CORE")
THREADS = (1, 2)
NUMERICAL = (
    *("adapt", "adaptation_losses", "averaging", "boundaries", "bundled_weights", "calibration", "decoded", "distill"),
    *("distill_data", "evaluate", "explain", "export", "fold", "freezing", "gradient_flow", "head_start"),
    *("losses", "lr_find", "mixing", "module", "nonfinite", "optim", "package_weights", "predict", "predictor", "processes"),
    *("resume", "reuse", "reuse_fit", "reuse_stale", "scores", "stage_flow", "staged", "training", "transforms", "weights"),
)
"""The test files that compare what networks compute, or what training makes of them."""


class Setting(NamedTuple):
    """What torch's own kernels and oneDNN may use, and with how many threads."""

    aten: str
    onednn: str
    threads: int

    @property
    def needs(self) -> str:
        """The instruction set that the CPU must have."""
        return "AVX512" if self.aten == "avx512" or self.onednn == "AVX512_CORE" else "AVX2"

    def environment(self) -> dict[str, str]:
        """Return the variables that a process of this setting gets."""
        own = {"ATEN_CPU_CAPABILITY": self.aten, "ONEDNN_MAX_CPU_ISA": self.onednn, "OMP_NUM_THREADS": str(self.threads)}
        return {**os.environ, **own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="test files (default: all that compare what networks compute)")
    parser.add_argument("--aten", nargs="+", choices=ATEN, default=ATEN, help="values of ATEN_CPU_CAPABILITY")
    parser.add_argument("--onednn", nargs="+", choices=ONEDNN, default=ONEDNN, help="values of ONEDNN_MAX_CPU_ISA")
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS, help="values of OMP_NUM_THREADS")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose tests run (default: this one)")
    options = parser.parse_args()
    named = [str(options.root / "tests" / f"test_{name}.py") for name in NUMERICAL]
    files = options.files or [file for file in named if Path(file).is_file()]

    rows, failures = [], []
    for setting in itertools.starmap(Setting, itertools.product(options.aten, options.onednn, options.threads)):
        if not available(setting.needs):
            rows.append([*setting, "", "", "", f"left out: this CPU has no {setting.needs}"])
            continue
        begin = time.monotonic()
        counts, failed = run(files, setting, options.root)
        rows.append([*setting, counts["passed"], counts["failed"], counts["skipped"], f"{time.monotonic() - begin:.0f} s"])
        failures += [[*setting, name] for name in failed]
        print(*rows[-1], *failed, file=sys.stderr, flush=True)
    headers = ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "threads"]
    print(machine())
    print(tabulate(rows, [*headers, "passed", "failed", "skipped", "time"]))
    print(tabulate(failures, [*headers, "failed"]) if failures else "Nothing failed.")
    sys.exit(bool(failures))


def available(instructions: str) -> bool:
    """Say whether this CPU has an instruction set, whatever torch was told to use."""
    check = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    plain = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    done = subprocess.run([sys.executable, "-c", check], env=plain, capture_output=True, text=True, check=True)
    return instructions in ("AVX2", "AVX512")[: ("DEFAULT", "AVX2", "AVX512").index(done.stdout.strip())]


def run(files: list[str], setting: Setting, root: Path) -> tuple[dict[str, int], list[str]]:
    """Run tests in a process of their own; return how many passed, failed and were skipped, and the names of the failed."""
    with tempfile.TemporaryDirectory(prefix="instruction-sets-") as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        done = subprocess.run(command, cwd=root, env=setting.environment(), capture_output=True, text=True, check=False)
        if not report.is_file():
            sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": len(failed), "skipped": skipped}, failed


if __name__ == "__main__":
    main()
