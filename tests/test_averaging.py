"""The moving average against the recursion done by hand, the mixture with the start and the soup against means of tensors."""

import lightning as L
import pytest
import torch

from finetune import CheckpointError, ConfigError, FinetuneModule, FolderDataModule
from finetune.averaging import PhaseEMA, WiseFT, kind_of_average, refuse_other_average
from finetune.checkpoints import read
from finetune.defaults import RunOptions
from finetune.soup import soup

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


class Stop(L.Callback):
    """Writes half.ckpt behind the second epoch and stops."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / "half.ckpt")
            trainer.should_stop = True


def train(tmp_path, average, epochs, freezing, ckpt_path=None, others=(), **options):
    L.seed_everything(0, verbose=False)
    data = FolderDataModule("digits", batch_size=64, image_size=32, workers=0, augment="none", shots=20)
    options = {"lr": 0.1, "weights": "none", **options}
    module = FinetuneModule("test_resnet", num_classes=10, freezing=freezing, **options)
    watch = Watch()
    callbacks = [average, watch, *others]
    trainer = L.Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=callbacks, num_sanity_val_steps=0, **QUIET)
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
    trainer, module, watch = train(tmp_path, PhaseEMA(0.9), 4, "lp_ft:2", bn="train")
    per_epoch = trainer.num_training_batches
    averages = by_hand(watch.steps, 0.9, begin=2 * per_epoch)
    for epoch, seen in enumerate(watch.validated):
        assert close(seen, averages[(epoch + 1) * per_epoch - 1]), epoch
    assert close(watch.validated[0], watch.steps[per_epoch - 1]), "in the probe phase nothing is averaged"
    assert not close(watch.validated[-1], watch.steps[-1]), "later something is"
    assert close(module.state_dict(), averages[-1])


@pytest.mark.parametrize("average", [lambda: PhaseEMA(0.99), lambda: WiseFT(0.3)])
def test_a_resumed_run_goes_on_with_both_the_weights_and_the_average(tmp_path, average):
    options = {"freezing": "full", "head_init": "zero"}
    _, whole, _ = train(tmp_path, average(), 3, **options)
    train(tmp_path, average(), 3, others=[Stop(tmp_path)], **options)
    inside = read(tmp_path / "half.ckpt")
    assert {"current_model_state", "averaging_state"} <= set(inside)
    assert kind_of_average(inside) == ("ema" if isinstance(average(), PhaseEMA) else "wise_ft")
    _, resumed, _ = train(tmp_path, average(), 3, ckpt_path=tmp_path / "half.ckpt", **options)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.parametrize("average", [PhaseEMA(0.9), WiseFT(0.6)])
def test_what_is_frozen_stays_bit_equal(tmp_path, average):
    _, module, watch = train(tmp_path, average, 2, "head", bn="frozen", head_init="zero")
    for name, tensor in module.backbone.state_dict().items():
        assert torch.equal(tensor, watch.steps[0][f"backbone.{name}"]), name


def test_the_mixture_lies_between_the_start_and_each_step(tmp_path):
    """Validation and the end see start + 0.3 (now - start), in float64; counters are those of now."""
    started = []

    class Start(L.Callback):
        def on_train_start(self, trainer, module):
            started.append({name: t.detach().clone() for name, t in module.state_dict().items()})

    options = {"head_init": "ridge", "bn": "train"}
    trainer, module, watch = train(tmp_path, WiseFT(0.3), 2, "full", others=[Start()], **options)
    assert started[0]["head.weight"].abs().sum() > 0, "the head is solved before the start is remembered"
    per_epoch = trainer.num_training_batches
    for seen, step in [*zip(watch.validated, (per_epoch, 2 * per_epoch), strict=True), (module.state_dict(), 2 * per_epoch)]:
        now = watch.steps[step - 1]
        expected = {name: t.double() + 0.3 * (now[name].double() - t.double()) for name, t in started[0].items()}
        assert close(seen, expected)
        counters = [name for name in now if name.endswith("num_batches_tracked")]
        assert all(torch.equal(seen[name], now[name]) for name in counters)
        assert not close(seen, now)


def test_the_mixture_starts_where_the_probe_ended(tmp_path):
    trainer, module, watch = train(tmp_path, WiseFT(0.5), 2, "lp_ft:1")
    start, now = watch.steps[trainer.num_training_batches - 1], watch.steps[-1]
    assert close(watch.validated[0], start)
    assert close(module.state_dict(), {name: (start[name].double() + now[name].double()) / 2 for name in now})


def test_a_random_head_is_not_mixed_in(tmp_path):
    with pytest.raises(ConfigError, match=r"this head is random.*head_init logistic"):
        train(tmp_path, WiseFT(0.5), 1, "full")


@pytest.mark.parametrize("share", [0.0, 1.0, -1])
def test_a_share_out_of_range(share):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        WiseFT(share)


@pytest.mark.parametrize(
    ("written", "now"), [(None, {"ema": 0.9}), ("ema", {}), ("wise_ft", {"ema": 0.9}), ("ema", {"wise_ft": 0.5})]
)
def test_a_resumed_run_averages_as_it_did(written, now):
    with pytest.raises(ConfigError, match="a resumed run goes on as it was"):
        refuse_other_average(written, RunOptions(**now))


def test_two_averages_are_one_too_many():
    with pytest.raises(ConfigError, match="two averages"):
        RunOptions(ema=0.9, wise_ft=0.5)


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
