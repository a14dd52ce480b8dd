"""The moving average against the recursion done by hand, and the soup against a mean of tensors."""

import lightning as L
import pytest
import torch

from finetune import CheckpointError, ConfigError, FinetuneModule, FolderDataModule
from finetune.averaging import PhaseEMA, soup
from finetune.checkpoints import read

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


class Watch(L.Callback):
    """Keeps the weights behind every step, and those that validation sees."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self.steps.append({name: t.detach().clone() for name, t in module.state_dict().items()})

    def on_validation_batch_start(self, trainer, module, *args):
        if args[1] == 0:
            self.validated.append({name: t.detach().clone() for name, t in module.state_dict().items()})


def train(tmp_path, decay, epochs, freezing, ckpt_path=None, **options):
    L.seed_everything(0, verbose=False)
    data = FolderDataModule("digits", batch_size=64, image_size=32, workers=0, augment="none", shots=20)
    module = FinetuneModule("test_resnet", num_classes=10, weights="none", freezing=freezing, lr=0.1, **options)
    watch = Watch()
    trainer = L.Trainer(
        max_epochs=epochs, default_root_dir=tmp_path, callbacks=[PhaseEMA(decay), watch], num_sanity_val_steps=0, **QUIET
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module, watch


def by_hand(steps, decay, begin):
    """Return the average behind each step: a copy until the average begins, then the recursion."""
    averages, number = [], 0
    for step, weights in enumerate(steps, start=1):
        if number == 0:
            average = {name: t.double() for name, t in weights.items()}
        else:
            share = min(decay, (1 + number) / (10 + number))
            average = {name: share * averages[-1][name] + (1 - share) * t.double() for name, t in weights.items()}
        number = 0 if step <= begin else number + 1
        averages.append(average)
    return averages


def close(state, expected):
    return all(
        torch.allclose(t.double(), expected[name].double(), atol=1e-5) for name, t in state.items() if t.is_floating_point()
    )


def test_validation_and_the_end_see_the_recursion_which_begins_with_the_second_phase(tmp_path):
    trainer, module, watch = train(tmp_path, 0.9, 4, "lp_ft:2", bn="train")
    per_epoch = trainer.num_training_batches
    averages = by_hand(watch.steps, 0.9, begin=2 * per_epoch)
    for epoch, seen in enumerate(watch.validated):
        assert close(seen, averages[(epoch + 1) * per_epoch - 1]), epoch
    assert close(watch.validated[0], watch.steps[per_epoch - 1]), "in the probe phase nothing is averaged"
    assert not close(watch.validated[-1], watch.steps[-1]), "later something is"
    assert close(module.state_dict(), averages[-1])


def test_a_resumed_run_goes_on_with_both_the_weights_and_the_average(tmp_path):
    _, whole, _ = train(tmp_path, 0.99, 3, "full")

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                trainer.should_stop = True

    L.seed_everything(0, verbose=False)
    data = FolderDataModule("digits", batch_size=64, image_size=32, workers=0, augment="none", shots=20)
    module = FinetuneModule("test_resnet", num_classes=10, weights="none", freezing="full", lr=0.1)
    L.Trainer(max_epochs=3, default_root_dir=tmp_path, callbacks=[PhaseEMA(0.99), Stop()], **QUIET).fit(module, datamodule=data)
    inside = read(tmp_path / "half.ckpt")
    assert {"current_model_state", "averaging_state"} <= set(inside)
    _, resumed, _ = train(tmp_path, 0.99, 3, "full", ckpt_path=tmp_path / "half.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_what_is_frozen_stays_bit_equal(tmp_path):
    _, module, watch = train(tmp_path, 0.9, 2, "head", bn="frozen")
    for name, tensor in module.backbone.state_dict().items():
        assert torch.equal(tensor, watch.steps[0][f"backbone.{name}"]), name


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        PhaseEMA(decay)


def checkpoint(path, value, backbone="test_resnet"):
    module = FinetuneModule(backbone, num_classes=3, weights="none")
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(value)
    trainer = L.Trainer(max_epochs=0, **QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def test_a_soup_is_the_mean_of_the_weights_and_loads_like_any_checkpoint(tmp_path):
    paths = [checkpoint(tmp_path / f"{value}.ckpt", value) for value in (1, 2, 6)]
    out = soup(paths, tmp_path / "soup.ckpt")
    module = FinetuneModule.load_from_checkpoint(out)
    assert all((p == 3).all() for p in module.parameters())
    counters = [t for name, t in module.state_dict().items() if name.endswith("num_batches_tracked")]
    assert counters
    assert all(t == 1 for t in counters), "a counter is that of the best"


def test_a_soup_needs_two_of_one_network(tmp_path):
    one = checkpoint(tmp_path / "1.ckpt", 1)
    with pytest.raises(CheckpointError, match="at least 2"):
        soup([one], tmp_path / "soup.ckpt")
    other = checkpoint(tmp_path / "2.ckpt", 1, "resnet10t")
    with pytest.raises(CheckpointError, match="different networks"):
        soup([one, other], tmp_path / "soup.ckpt")
