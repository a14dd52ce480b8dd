"""Run the command from a checkout without installing it: `python cli.py fit --config recipes/small.yaml`."""

import importlib.util
import os
import sys
from collections.abc import Callable

_HERE = os.path.dirname(os.path.abspath(__file__))


def _load() -> Callable[[], None]:
    """Load the package that lies beside this file, and take the folder of both off `sys.path`: nothing else is imported there.

    Processes that read data may run this file once more before they unpickle what they shall do.
    """
    if sys.path[:1] == [_HERE]:
        del sys.path[0]
    if "finetune" not in sys.modules:
        spec = importlib.util.spec_from_file_location("finetune", os.path.join(_HERE, "finetune", "__init__.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules["finetune"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    from finetune.main import main

    return main


main = _load()

if __name__ == "__main__":
    main()
