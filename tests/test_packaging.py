"""What is installed: an editable install that type checkers can follow, and a wheel with all files that the package reads."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import finetune

ROOT = Path(finetune.__file__).resolve().parent.parent
BUILD = (  # a plain path needs nothing of `editables`, which generates hooks into imports
    "import sys; sys.modules['editables'] = None; import hatchling.build as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheels of an editable and of a plain install, made by the build backend without a network."""
    found = {}
    for kind in ("build_editable", "build_wheel"):
        target = tmp_path_factory.mktemp(kind)
        subprocess.run([sys.executable, "-c", BUILD, kind, str(target)], cwd=ROOT, check=True, capture_output=True)
        (found[kind],) = target.glob("*.whl")
    return found


def test_an_editable_install_is_a_plain_path(wheels):
    with zipfile.ZipFile(wheels["build_editable"]) as wheel:
        outside = [name for name in wheel.namelist() if ".dist-info/" not in name]
        (path,) = outside
        assert path.endswith(".pth")  # no module that hooks into imports, which type checkers cannot run
        lines = wheel.read(path).decode().split()
    assert [Path(line).resolve() for line in lines] == [ROOT]
    assert (Path(lines[0]) / "finetune" / "py.typed").is_file()
    assert (Path(lines[0]) / "finetune" / "__init__.py").is_file()


def test_a_wheel_holds_what_the_package_reads(wheels):
    with zipfile.ZipFile(wheels["build_wheel"]) as wheel:
        names = set(wheel.namelist())
        entries = next(wheel.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "resnet-finetune = finetune.main:main" in entries
    package = {f"finetune/{path.relative_to(ROOT / 'finetune')}" for path in (ROOT / "finetune").rglob("*") if path.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    recipes = {f"finetune/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert {"finetune/py.typed", "finetune/bundled/resnet18.safetensors", "finetune/templates/base.html"} <= package
    assert len(recipes) > 5
    assert package | recipes <= names
    top = {name.partition("/")[0] for name in names}
    assert top == {"finetune", next(name for name in top if name.endswith(".dist-info"))}
