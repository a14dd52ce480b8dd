"""Peak memory of training under each policy: the hand-written version against the toolkit, each in a process of its own.

python benchmarks/memory.py photos/ --policies head last:1 gradual:1
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import arguments, choice, machine
from tabulate import tabulate

SIDES = ("hand-written", "toolkit, reuse off", "toolkit, reuse exact")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", default=["head", "last:1", "gradual:1", "full"])
    parser.add_argument("--only", nargs=3, metavar=("ROOT", "POLICY", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(run(options, *options.only))
        return
    rows = []
    with choice(options.root, options.train, options.val) as root, tempfile.TemporaryDirectory() as cache:
        for policy in options.policies:
            peaks = [measure(root, cache, policy, side) for side in SIDES if not (policy == "full" and "exact" in side)]
            rows.append([policy, *(f"{peak:.0f} ({peaks[0] / peak:.2f}x)" for peak in peaks)])
    print(f"\npeak memory [MB] and ratio, {options.backbone} at {options.size} px, batch {options.batch_size}, {machine()}")
    print(tabulate(rows, headers=["policy", *SIDES], disable_numparse=True, stralign="right"))


def measure(root: Path, cache: str, policy: str, side: str) -> float:
    """Run one side in a process of its own; return its peak memory in MB."""
    environment = {**os.environ, "RESNET_FINETUNE_CACHE": cache}
    call = [sys.executable, *sys.argv, "--only", str(root), policy, side]
    done = subprocess.run(call, check=True, capture_output=True, text=True, env=environment)
    print(f"  {policy}, {side}: {done.stdout.split()[-1]} MB", file=sys.stderr, flush=True)
    return float(done.stdout.split()[-1])


def run(options: argparse.Namespace, root: str, policy: str, side: str) -> float:
    """Train for as many epochs as the policy has phases; return the peak of this process in MB."""
    import frozen
    from common import quiet

    options.policy, options.hand_epochs = policy, None
    options.epochs = 6 if policy.startswith("gradual") else 2
    with quiet():
        if side == "hand-written":
            frozen.hand_written(Path(root), options, 0)
        else:
            frozen.toolkit(
                Path(root),
                options,
                side.split()[-1],
                os.environ["RESNET_FINETUNE_CACHE"],
                workers=0,
                eval_batch_size=options.batch_size,
            )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main()
