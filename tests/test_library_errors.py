"""Exceptions of libraries that an ordinary mistake leads to, as they are raised, and the sentence that they become."""

import errno
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from torch import nn
from torch.utils.data import DataLoader, Dataset

from finetune import library_errors
from finetune.library_errors import explained


def raised(action):
    with pytest.raises(Exception) as found:  # noqa: PT011
        action()
    return explained(found.value)


class Ends(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        import os

        os.kill(os.getpid(), 9)


@pytest.mark.filterwarnings("ignore")
def test_a_reading_process_that_was_killed():
    message = str(raised(lambda: list(DataLoader(Ends(), num_workers=1))))
    assert "DataLoader worker (pid" in message
    assert "--data.workers 0" in message


def test_a_batch_of_one_under_batchnorm():
    found = raised(lambda: nn.BatchNorm1d(3).train()(torch.zeros(1, 3)))
    assert "drop_last=True" in str(found)
    assert "--data.batch_size to 2 or more" in str(found)


class Logs(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.weight(torch.zeros(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


@pytest.mark.parametrize("callback", [ModelCheckpoint, EarlyStopping])
def test_a_metric_that_is_not_logged(callback, tmp_path):
    own = callback(monitor="val/accuracy")

    def fit():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
            saves = callback is ModelCheckpoint
            trainer = L.Trainer(
                max_epochs=1, accelerator="cpu", callbacks=[own], default_root_dir=tmp_path, enable_checkpointing=saves, **quiet
            )
            trainer.fit(Logs(), DataLoader([0]), DataLoader([0]))

    message = str(raised(fit))
    assert "'val/accuracy'" in message
    assert "Did you mean 'val/acc'?" in message
    assert "--run.monitor" in message


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress._RICH_AVAILABLE", False)
    assert "pip install -U rich" in str(raised(RichProgressBar))


def test_a_full_disk_and_a_closed_one():
    def write():
        with open("/dev/full", "w") as file:
            file.write("x")

    assert "no disk space left" in str(raised(write))
    for number in (errno.EROFS, errno.EACCES):
        message = str(explained(OSError(number, "closed", "run/\x1b.csv")))
        assert message.startswith("run/\\x1b.csv cannot be opened or written: ")
    inner = RuntimeError("unexpected pos 64 vs 0")
    inner.__cause__ = OSError(errno.ENOSPC, "full", "a.ckpt")
    assert "a.ckpt cannot be written" in str(explained(inner))


def test_want_of_memory():
    found = raised(lambda: torch.empty(2**55, dtype=torch.uint8))
    assert "--data.batch_size" in str(found)
    assert "memory" in str(explained(MemoryError()))


def test_others_stay_as_they_are_and_a_circle_ends():
    a, b = ValueError("a"), KeyError("b")
    a.__cause__, b.__cause__ = b, a
    assert explained(a) is None
    assert explained(FileNotFoundError(errno.ENOENT, "no", "x")) is None
    assert all(callable(explain) for _, explain in library_errors._PATTERNS)
