"""The key of what a network computes is equal in every process, and follows settings, tensors and code."""

import functools
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from finetune.computation_key import computation_key

NET = """
from torch import nn

NAMES = frozenset({"a", "b", "c", "d"})


def chosen(name):
    return name in {"alpha", "beta", "gamma", "delta"} or name in NAMES


class Net(nn.Module):
    kinds = {"x", "y", "z"}

    def __init__(self):
        super().__init__()
        self.names = {"one", "two", "three"}
        self.layer = nn.Linear(2, 2)
        nn.init.ones_(self.layer.weight)
        nn.init.ones_(self.layer.bias)

    def forward(self, x):
        return self.layer(x) if chosen("alpha") else x
"""
PROGRAM = """
import sys
sys.path.insert(0, "")
import timm, torch
from the_net import Net
from finetune.computation_key import computation_key
from finetune.transforms import InputSpec, train_transform
print(computation_key(Net()))
torch.manual_seed(0)
print(computation_key(timm.create_model("test_resnet")))
print(computation_key(train_transform(InputSpec.default(), "strong")))
"""


def test_the_key_is_equal_in_another_process(tmp_path):
    (tmp_path / "the_net.py").write_text(NET)
    said = []
    for seed in ("1", "2"):  # sets of strings are in another order
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said[0] == said[1]
    assert len(set(said[0])) == 3


def code(text):
    module = types.ModuleType("somebody")
    exec(text, module.__dict__)
    return module.f


SAME = {
    "a comment": ("def f(x):\n    return x + 1", "# why\n\n\ndef f(x):\n    # more\n    return x + 1"),
    "a global that is not used": ("A = 1\ndef f(x):\n    return x", "A = 2\ndef f(x):\n    return x"),
}
OTHER = {
    "a constant": ("def f(x):\n    return x + 1", "def f(x):\n    return x + 2"),
    "a name": ("import math\ndef f(x):\n    return math.sin(x)", "import math\ndef f(x):\n    return math.cos(x)"),
    "a global": ("A = 1\ndef f(x):\n    return x + A", "A = 2\ndef f(x):\n    return x + A"),
    "a function behind a function": (
        "def h(x):\n    return x\ndef g(x):\n    return h(x)\ndef f(x):\n    return g(x)",
        "def h(x):\n    return -x\ndef g(x):\n    return h(x)\ndef f(x):\n    return g(x)",
    ),
    "a default": ("def f(x, y=1):\n    return x", "def f(x, y=2):\n    return x"),
    "a closure": ("def o(a):\n    return lambda x: x + a\nf = o(1)", "def o(a):\n    return lambda x: x + a\nf = o(2)"),
    "a method": ("class f:\n    def g(self):\n        return 1", "class f:\n    def g(self):\n        return 2"),
    "a property": ("class f:\n    g = property(lambda s: 1)", "class f:\n    g = property(lambda s: 2)"),
    "a base": (
        "class b:\n    n = 1\nclass f(b):\n    pass",
        "class b:\n    n = 2\nclass f(b):\n    pass",
    ),
    "a member of an enumeration": (
        "from enum import Enum\nclass E(Enum):\n    A = 1\ndef f(x, e=E.A):\n    return x",
        "from enum import Enum\nclass E(Enum):\n    A = 2\ndef f(x, e=E.A):\n    return x",
    ),
    "an object's attribute": (
        "class O:\n    def __init__(self, n):\n        self.n = n\ndef f(x, o=O(1)):\n    return x",
        "class O:\n    def __init__(self, n):\n        self.n = n\ndef f(x, o=O(2)):\n    return x",
    ),
    "recursion": ("def f(x):\n    return f(x - 1)", "def f(x):\n    return f(x - 2)"),
}


@pytest.mark.parametrize("pair", SAME)
def test_code_that_does_the_same(pair):
    one, other = SAME[pair]
    assert computation_key(code(one)) == computation_key(code(other))


@pytest.mark.parametrize("pair", OTHER)
def test_code_that_does_something_else(pair):
    one, other = OTHER[pair]
    assert computation_key(code(one)) == computation_key(code(one))
    assert computation_key(code(one)) != computation_key(code(other))


def test_a_long_chain_of_calls():
    def chain(end):
        links = [f"def f{n}(x):\n    return f{n + 1}(x)" for n in range(3000)]
        return code("\n".join([*links, f"def f3000(x):\n    return {end}", "f = f0"]))

    assert computation_key(chain(1)) == computation_key(chain(1)) != computation_key(chain(2))


def test_values():
    values = [
        *(1, 1.0, True, "1", b"1", None, (1, 2), [[1], 2], {"a": 1}, {1, 2}, torch.float16, torch.ones(2), torch.ones(2, 1)),
        *(functools.partial(max, 1), functools.partial(max, 2), max, min, nn.ReLU, nn.ReLU(), nn.GELU(), nn.GELU("tanh")),
        *(nn.Dropout(0.1), nn.Dropout(0.2), nn.Dropout(0.1).eval(), nn.BatchNorm2d(2), nn.BatchNorm2d(2, eps=1e-3)),
    ]
    assert len({computation_key(value) for value in values}) == len(values)
    cyclic = [1]
    cyclic.append(cyclic)
    assert computation_key(cyclic) == computation_key(cyclic)


def test_a_part_of_a_network():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    first = {"leave_out": lambda name: name.startswith("2"), "moded": lambda name: name.startswith("0")}
    before = computation_key(network, **first)
    with torch.no_grad():
        network[2].weight.add_(1)
    network.eval()
    network[0].train()
    assert computation_key(network, **first) == before
    with torch.no_grad():
        network[0].weight.add_(1)
    assert computation_key(network, **first) != before


def test_a_patched_method_of_a_library_is_code(monkeypatch):
    before = computation_key(nn.ReLU())
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x)
    assert computation_key(nn.ReLU()) != before
