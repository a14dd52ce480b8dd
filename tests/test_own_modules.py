"""Nothing is imported, and no setting is read, because it lies in the working folder; what is named there is found."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import finetune
from finetune import environment
from finetune.errors import ConfigError
from finetune.named_objects import import_path
from finetune.own_modules import is_library, own_modules
from finetune.trusted_code import guarding

ROOT = Path(finetune.__file__).resolve().parent.parent
CODE = "open('hacked', 'w').close()\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run(folder, words, **environment):
    """Run Python in a folder; return its exit code and what it printed."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=variables | environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("program", [["-m", "finetune"], ["-mfinetune"], [str(ROOT / "cli.py")]])
def test_a_file_does_not_stand_in_for_a_library(folder, program):
    for name in ("__future__", "typing", "enum", "re", "argparse", "tqdm", "finetune_plugin", "defusedxml", "pathlib"):
        (folder / f"{name}.py").write_text(CODE)
    code, said = run(folder, [*program, "recipes"])
    assert (code, (folder / "hacked").exists()) == (0, False), said
    code, said = run(folder, ["-c", "import tqdm"])
    assert (folder / "hacked").exists(), "with Python alone it does"


def test_a_file_does_not_complete_a_library(folder):
    (folder / "defusedxml").mkdir()
    (folder / "defusedxml" / "ElementTree.py").write_text(CODE)
    for name in ("a_library", "an_option"):
        (folder / f"{name}.py").write_text(CODE)
    source = "def get():\n    import an_option\n"
    library = {"__name__": "some_library"}
    exec(source, library)
    with own_modules():
        with pytest.raises(ImportError):
            library["get"]()
        with pytest.raises(ImportError):
            __import__("a_library")
        from PIL import Image

        assert "xmp" not in Image.new("RGB", (1, 1)).getexif()
    assert not (folder / "hacked").exists()


@pytest.mark.parametrize(
    "name", ["tqdm", "wandb", "defusedxml", "onnx", "numpy", "os", "json", "olefile", "torch_xla", "hypothesis"]
)
def test_a_library_is_never_taken_from_the_working_folder(folder, name):
    (folder / f"{name}.py").write_text(CODE + "\n\nclass OfTheFolder:\n    pass\n")
    assert is_library(name)
    with own_modules(), guarding(["fit", "--model", f"{name}.OfTheFolder"]), pytest.raises(ConfigError):
        import_path(f"{name}.OfTheFolder")
    assert not (folder / "hacked").exists()


def test_what_is_named_is_found_with_its_siblings_and_nothing_else(folder):
    (folder / "own_net.py").write_text(
        textwrap.dedent("""
            from own_helpers import base

            class Net(base):
                def later(self):
                    from own_package import inner
                    return inner.VALUE

                def by_name(self, name):
                    import importlib
                    return importlib.import_module(name)
            """)
    )
    (folder / "own_helpers.py").write_text("class base: pass")
    (folder / "own_package").mkdir()
    (folder / "own_package" / "inner.py").write_text("VALUE = 7")
    (folder / "own_third.py").write_text("")
    with pytest.raises(ConfigError, match="No module named 'own_net'"):
        import_path("own_net.Net")  # without the command
    with own_modules(), guarding():
        net = import_path("own_net.Net")()
        assert net.later() == 7
        assert net.by_name("own_third").__name__ == "own_third"
        assert str(folder) not in sys.path
        with pytest.raises(ImportError):
            __import__("own_fourth")
    assert not any(type(finder).__module__ == "finetune.own_modules" for finder in sys.meta_path)
    assert "RESNET_FINETUNE_OWN_MODULES" not in os.environ


WORKER = """
import multiprocessing
import finetune.main
from finetune.named_objects import import_path
from finetune.own_modules import own_modules, protect_processes

if __name__ == "__main__":
    protect_processes()
    with own_modules():
        kind = import_path("own_data.Data")
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=kind.work, args=(kind(), queue))
        process.start()
        print("worker", queue.get(timeout=60))
        process.join()
"""


def test_a_process_that_begins_anew_finds_what_its_parent_named(folder, tmp_path_factory):
    script = tmp_path_factory.mktemp("elsewhere") / "program.py"
    script.write_text(WORKER)
    (folder / "own_data.py").write_text(
        "import own_sibling\n\n\nclass Data:\n    def work(self, queue):\n        queue.put(own_sibling.VALUE)\n"
    )
    (folder / "own_sibling.py").write_text("VALUE = 'found its sibling'")
    for name in ("multiprocessing", "pickle", "signal"):
        (folder / f"{name}.py").write_text(CODE)
    code, said = run(folder, [str(script)], PYTHONPATH=str(ROOT))
    assert code == 0, said
    assert "worker found its sibling" in said
    if sys.version_info >= (3, 11):
        assert not (folder / "hacked").exists()


def test_matplotlib_reads_no_settings_of_the_working_folder(folder):
    (folder / "matplotlibrc").write_text("figure.dpi: 7\nbackend: module://evil\n")
    show = "import matplotlib; print(matplotlib.rcParams['figure.dpi'], matplotlib.rcParams._get_backend_or_none())"
    assert "7.0 module://evil" in run(folder, ["-c", show])[1]
    mine = f"import os, finetune.own_modules as own\nwith own.own_modules():\n    {show}\nprint(os.getcwd())"
    code, said = run(folder, ["-c", mine], PYTHONPATH=str(ROOT))
    assert code == 0, said
    assert "module://evil" not in said
    assert not said.startswith("7.0")
    assert said.splitlines()[-1] == str(folder)


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def test_git_runs_no_program_of_a_repository(folder):
    (folder / ".gitattributes").write_text("* filter=x\n")
    git(folder, "init", "-q")
    git(folder, "add", ".gitattributes")
    git(folder, "commit", "-qm", "a")
    commit = environment.git_state(folder)["commit"]
    assert environment.git_state(folder) == {"commit": commit, "dirty": False}
    git(folder, "config", "core.fsmonitor", f"touch {folder / 'hacked'}; false")
    os.utime(folder / ".gitattributes", (1, 1))
    assert environment.git_state(folder) == {"commit": commit, "dirty": False}
    git(folder, "config", "filter.x.clean", f"touch {folder / 'hacked'}; cat")
    (folder / "hacked").unlink(missing_ok=True)  # `git config` itself looks at nothing, but whoever it was shall not count
    assert environment.git_state(folder) == {"commit": commit, "dirty": None}
    assert not (folder / "hacked").exists()
    os.utime(folder / ".gitattributes", (2, 2))
    git(folder, "status")
    assert (folder / "hacked").exists(), "git alone runs them"
