"""L2-SP against an independent computation, and that a resumed run is drawn to the weights that the first one began with."""

import lightning as L
import pytest
import torch

from finetune import ConfigError, FinetuneModule, FolderDataModule
from finetune.checkpoints import read

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
OPTIONS = {"backbone": "test_resnet", "num_classes": 10, "freezing": "full", "bn": "frozen", "lr": 0.05, "l2_sp": 0.3}


def trainer(folder, epochs=1, **options):
    return L.Trainer(max_epochs=epochs, default_root_dir=folder, **QUIET, **options)


@pytest.fixture
def start(tmp_path):
    """A file with weights: what is random in a network has no start to be drawn to."""
    torch.manual_seed(0)
    file = tmp_path / "start.pth"
    torch.save(FinetuneModule("test_resnet", num_classes=10, weights="none").backbone.state_dict(), file)
    return str(file)


def data():
    return FolderDataModule("digits", batch_size=128, image_size=32, workers=0, augment="none")


def test_uneven_classes_are_corrected_for_once(tmp_path):
    module = FinetuneModule("test_resnet", num_classes=10, weights="none", class_weights="balanced")
    balanced = FolderDataModule("digits", image_size=32, workers=0, sampling="balanced")
    with pytest.raises(ConfigError, match="twice"):
        trainer(tmp_path).fit(module, datamodule=balanced)


def test_the_pull_and_its_gradient_equal_an_independent_computation(start, tmp_path):
    module = FinetuneModule(**OPTIONS, weights=start)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(tmp_path, limit_train_batches=2, limit_val_batches=0).fit(module, datamodule=data())
    moved = {
        name: (p.detach() - before[name]).double() for name, p in module.named_parameters() if name.startswith("backbone.")
    }
    expected = 0.3 / 2 * sum(float((d**2).sum()) for d in moved.values())
    assert expected > 0
    pull = module.objective.pull(module)
    assert float(pull.detach()) == pytest.approx(expected, rel=1e-5)
    module.zero_grad()
    pull.backward()
    for name, p in module.named_parameters():
        if name in moved:
            assert torch.allclose(p.grad.double(), 0.3 * moved[name], atol=1e-6), name
        else:
            assert p.grad is None, "the head has no start to be drawn to"


def test_it_takes_the_place_of_weight_decay_but_for_the_head(start):
    module = FinetuneModule(**OPTIONS, weights=start, weight_decay=0.01)
    decays = {group["name"]: group["weight_decay"] for group in module.param_groups()}
    assert {name for name, value in decays.items() if value} == {"head"}


def test_it_is_part_of_the_training_loss_and_zero_at_the_start(start):
    module = FinetuneModule(**OPTIONS, weights=start)
    module.objective.hold_to_start(module, [])
    assert float(module.objective.pull(module).detach()) == 0
    with torch.no_grad():
        next(iter(module.backbone.parameters())).add_(1.0)
    count = next(iter(module.backbone.parameters())).numel()
    assert float(module.objective.pull(module).detach()) == pytest.approx(0.15 * count, rel=1e-4)


def test_random_stages_are_left_alone(start):
    module = FinetuneModule(**OPTIONS, weights=start)
    module.objective.hold_to_start(module, ["stem"])
    stem = {f"backbone.{name}" for name in module.stages[0].parameters}
    assert not stem & set(module.objective.start)
    assert module.objective.start


def test_a_resumed_run_is_drawn_to_the_first_start(start, tmp_path):
    L.seed_everything(1, verbose=False)
    whole = FinetuneModule(**OPTIONS, weights=start)
    trainer(tmp_path, epochs=2, limit_train_batches=3, limit_val_batches=0).fit(whole, datamodule=data())
    L.seed_everything(1, verbose=False)
    half = FinetuneModule(**OPTIONS, weights=start)
    file = tmp_path / "half.ckpt"

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint(file)
            trainer.should_stop = True

    first = trainer(tmp_path, epochs=2, limit_train_batches=3, limit_val_batches=0, callbacks=[Stop()])
    first.fit(half, datamodule=data())
    assert read(file)["l2_sp_start"]
    resumed = FinetuneModule(**OPTIONS, weights="none")
    L.seed_everything(1, verbose=False)
    trainer(tmp_path, epochs=2, limit_train_batches=3, limit_val_batches=0).fit(
        resumed, datamodule=data(), ckpt_path=file, weights_only=True
    )
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
