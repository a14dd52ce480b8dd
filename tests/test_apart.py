"""Trainings in other processes: what they trust, and how they are stopped."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

from finetune import trusted_code
from finetune.apart import train_apart
from finetune.trusted_code import guarding, trusted_here

STANDING_IN = """
import signal, sys, time
from pathlib import Path

def main(words=None):
    words = sys.argv[1:]
    Path("words").write_text(" ".join(words))
    def stop(number, frame):
        time.sleep(1)  # as one that writes a checkpoint
        Path("saved").write_text(str(number))
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    Path("ready").touch()
    time.sleep(60 if "wait" in words else 0)
    raise SystemExit(7)
"""


def package(folder, monkeypatch):
    """A package of the same name in a folder where Python is told to look: it is started instead of a training."""
    monkeypatch.setenv("PYTHONPATH", str(folder))
    (folder / "finetune").mkdir()
    (folder / "finetune" / "__init__.py").touch()
    (folder / "finetune" / "__main__.py").write_text(textwrap.dedent(STANDING_IN) + "\nmain()\n")
    monkeypatch.chdir(folder)


def test_words_trust_and_exit_code_pass_through(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch)
    monkeypatch.setattr(trusted_code, "_trusted", {"theirs"})
    with guarding(packages=["mine"]):
        assert trusted_here() == ["mine", "theirs"]
        assert train_apart(["fit", "--x", "1"]) == 7
    assert (tmp_path / "words").read_text() == "--trust mine --trust theirs fit --x 1"


def test_a_stop_waits_for_the_training_to_save(tmp_path, monkeypatch):
    package(tmp_path, monkeypatch)

    def ask():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    asking = threading.Thread(target=ask)
    asking.start()
    assert train_apart(["wait"]) == 143
    asking.join()
    assert (tmp_path / "saved").read_text() == str(int(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "finetune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1][0].isdigit()
