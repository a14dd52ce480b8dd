"""The progress bar on a real terminal, and the silence where nobody looks."""

import os
import re
import struct
import subprocess
import sys
import threading

import pytest

pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))  # not on Windows

COMMAND = [sys.executable, "-c", "from finetune.main import main; main()", "fit"]
OPTIONS = [
    *["--model.backbone", "test_resnet", "--model.weights", "none", "--model.freezing", "lp_ft:1", "--data.workers", "0"],
    *["--data.batch_size", "16", "--data.image_size", "64", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "12"],
]
BAR = re.compile(r"epoch [12]/2: +\d+%\|")


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "TERM")}
    return {**kept, "TERM": "xterm", "OMP_NUM_THREADS": "1", **more}


def run(folder, errors, **more):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*COMMAND, *OPTIONS], cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=errors, text=True
    )


def on_a_terminal(folder, **more):
    """Run with stderr on a terminal and stdout in a pipe, as with `| tee log`; return what came out of both."""
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # without a width there is no bar
    shown = []

    def read():
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # how Linux says that the other end is closed
                return
            if not piece:
                return
            shown.append(piece)

    with run(folder, theirs, **more) as process:
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        lines = process.stdout.read()
    reader.join()
    os.close(terminal)
    assert process.returncode == 0, b"".join(shown).decode()
    return lines, b"".join(shown).decode()


def test_a_terminal_shows_a_bar_and_the_pipe_gets_lines(tmp_path):
    lines, shown = on_a_terminal(tmp_path)
    assert BAR.search(shown)
    assert re.search(r"loss \d\.\d+, lr 0\.\d+", shown)
    assert re.search(r"val/acc 0\.\d+", shown)
    assert "validation:" in shown
    assert "test:" in shown
    assert "%|" not in lines
    assert "\r" not in lines
    parts = [
        "phase 2 of 2 begins",
        "epoch 2/2  train/loss",
        "best   val/acc",
        "time   ",
        "test/acc",
        "files  runs/run/",
        "next   ",
    ]
    assert [part for part in parts if part not in lines] == []
    assert sorted(parts, key=lines.index) == parts
    assert re.search(r"best   val/acc 0\.\d{4} in epoch [12] \(runs/run/", lines)


@pytest.mark.parametrize("where", ["pipe", "build"])
def test_nobody_looks(tmp_path, where):
    if where == "build":  # some of them have a terminal
        lines, shown = on_a_terminal(tmp_path, CI="true")
    else:
        with run(tmp_path, subprocess.PIPE) as process:
            lines, shown = process.communicate()
    assert not BAR.search(lines + shown)
    assert "\r" not in lines
    assert "\r" not in shown.replace("\r\n", "")
    assert "%|" not in shown
    assert "epoch 2/2  train/loss" in lines
