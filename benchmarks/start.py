"""Starting: the answers that need no torch, against `import lightning`, in whole processes.

python benchmarks/start.py --rounds 5
"""

from __future__ import annotations

import subprocess
import sys

from common import alternate, arguments, machine, table


def main() -> None:
    options = arguments(__doc__.splitlines()[0]).parse_args()
    command = "from finetune.main import main; main()"
    sides = {"import lightning": [sys.executable, "-c", "import lightning"]}
    for words in (["--help"], ["recipes"], ["--version"]):
        sides[f"resnet-finetune {words[0]}"] = [sys.executable, "-c", command, *words]
    runs = {
        name: lambda call=call: subprocess.run(call, check=True, stdout=subprocess.DEVNULL) and None
        for name, call in sides.items()
    }
    print(table(f"starting\n{machine()}", alternate(runs, options.rounds), "import lightning"))


if __name__ == "__main__":
    main()
