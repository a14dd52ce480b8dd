"""A data module knows where training stands, at any moment and after a restart."""

import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from finetune.loading import TrainSampler
from finetune.positioned import PositionedDataModule

BATCHES = 3


class Numbers(Dataset):
    """What is asked for is what is given: 100 * epoch + index."""

    def __len__(self):
        return BATCHES

    def __getitem__(self, key):
        return torch.tensor([100.0 * key[0] + key[1]])


class Data(PositionedDataModule):
    key = 1

    @property
    def order_key(self):
        return self.key

    def train_dataloader(self):
        return DataLoader(Numbers(), sampler=TrainSampler(Numbers(), 1, 0, self.position))


class Module(L.LightningModule):
    def __init__(self, keep=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.keep = [], keep

    def training_step(self, batch, index):
        self.seen.append(int(batch))
        return self.layer(batch).sum()

    def on_train_batch_end(self, *_):
        if self.keep and len(self.seen) == BATCHES + 1:
            self.trainer.save_checkpoint(self.keep)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, epochs, data=None, module=None, path=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)
    data, module = data or Data(), module or Module()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*training batches.*")
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
    return trainer, data, module


def test_every_epoch_has_its_order(tmp_path):
    _, data, module = fit(tmp_path, 2)
    assert sorted(module.seen) == [0, 1, 2, 100, 101, 102]
    assert [number // 100 for number in module.seen] == [0, 0, 0, 1, 1, 1]
    assert data.state_dict() == {"epoch": 2, "batches": 0, "order": 1}


def test_without_a_trainer_it_is_the_beginning():
    data = Data()
    assert data.state_dict() == {"epoch": 0, "batches": 0, "order": 1}
    assert data.ranks() == (1, 0)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("other", [False, True])
def test_a_restart_within_an_epoch_goes_on_there_and_warns_of_another_order(tmp_path, other):
    _, _, whole = fit(tmp_path, 3, module=Module(keep=tmp_path / "middle.ckpt"))
    kept = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert kept["Data"] == {"epoch": 1, "batches": 1, "order": 1}
    again = Data()
    again.key = 2 if other else 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, after = fit(tmp_path, 3, again, path=tmp_path / "middle.ckpt")
    assert after.seen == whole.seen[BATCHES + 1 :]
    assert any("seen twice or not at all" in str(warning.message) for warning in caught) == other
