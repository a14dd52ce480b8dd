"""Every precision clips gradients for every optimizer, and trains with every loss; the matrix: benchmarks/precision.py."""

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, TensorDataset

from finetune import FinetuneModule
from finetune.averaging import PhaseEMA
from finetune.errors import ConfigError
from finetune.optim import build_optimizer

SCALED = "16-mixed"
CLIPPING = {
    "none": {},
    "norm": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "norm"},
    "value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
}


class Watch(L.Callback):
    """The gradients that the optimizer took, as one vector per step, and the losses."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_train_start(self, trainer, module):
        self.before = [parameter.detach().clone() for parameter in module.parameters()]
        trainer.optimizers[0].register_step_post_hook(self.look)

    def look(self, optimizer, *_):
        parts = [p.grad.double().flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.gradients.append(torch.cat(parts))

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def train(precision, clip="none", accumulate=1, module=None, callbacks=(), **options):
    """Train two steps and return what was watched, and the module."""
    torch.manual_seed(0)
    given = {"num_classes": 3, "weights": "none", "lr": 0.05, **options}
    module = module or FinetuneModule("test_resnet", **given)
    images = torch.randint(0, 256, (8 * accumulate, 3, 32, 32), dtype=torch.uint8)
    watch = Watch()
    # Lightning has no 16-mixed on a CPU and takes bf16-mixed in its place, which does not scale the loss
    plugin = MixedPrecision(SCALED, "cpu", torch.amp.GradScaler("cpu", 2.0**8)) if precision == SCALED else None
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=None if plugin else precision,
        plugins=plugin,
        accumulate_grad_batches=accumulate,
        callbacks=[watch, *callbacks],
        **CLIPPING[clip],
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(module, DataLoader(TensorDataset(images, torch.arange(len(images)) % 3), batch_size=4))
    assert trainer.global_step == 2
    return watch, module


@pytest.mark.parametrize(
    ("precision", "clip", "optimizer", "accumulate"),
    [
        ("32-true", "norm", "sgd", 3),
        ("32-true", "value", "lamb", 1),
        ("bf16-mixed", "norm", "sgd", 1),
        ("bf16-mixed", "norm", "adamw", 3),
        ("bf16-mixed", "value", "sgd", 3),
        ("bf16-mixed", "value", "adamw", 1),
        ("bf16-mixed", "none", "lamb", 3),
        ("bf16-true", "norm", "adamw", 1),
        ("bf16-true", "value", "sgd", 1),
        ("bf16-true", "none", "lamb", 1),
        (SCALED, "norm", "adamw", 3),
        (SCALED, "value", "sgd", 1),
        (SCALED, "norm", "lamb", 1),
    ],
)
def test_two_steps_with_gradients_no_larger_than_the_clipping_allows(precision, clip, optimizer, accumulate):
    watch, module = train(precision, clip, accumulate, optimizer=optimizer)
    assert torch.tensor(watch.losses).isfinite().all()
    assert any(not torch.equal(old, new) for old, new in zip(watch.before, module.parameters(), strict=True))
    assert len(watch.gradients) == 2
    for gradient in watch.gradients:
        assert 0 < gradient.norm() <= {"none": float("inf"), "norm": 0.0101, "value": float("inf")}[clip]
        assert clip != "value" or gradient.abs().max() <= 0.00101


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fused_optimizer_that_was_asked_for_is_clipped_or_refused(optimizer):
    options = {"optimizer": optimizer, "optimizer_args": {"fused": True}}
    watch, _ = train("bf16-mixed", "norm", **options)
    assert all(gradient.norm() <= 0.0101 for gradient in watch.gradients)
    with pytest.raises(ConfigError, match=r"(?s)16-mixed the loss is scaled.*Leave out 'fused'.*gradient_clip_val"):
        train(SCALED, "norm", **options)
    train(SCALED, "none", **options)


class Own(FinetuneModule):
    """A module that configures its optimizer itself, fused."""

    def configure_optimizers(self):
        return build_optimizer("adamw", self.param_groups(), 0.9, None)


def test_an_optimizer_of_ones_own_is_clipped_or_refused_too():
    watch, _ = train("bf16-mixed", "value", module=Own("test_resnet", num_classes=3, weights="none"))
    assert all(gradient.abs().max() <= 0.00101 for gradient in watch.gradients)
    with pytest.raises(ConfigError, match="a fused AdamW unscales"):
        train(SCALED, "value", module=Own("test_resnet", num_classes=3, weights="none"))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("options", [{"mixup": 0.2}, {"cutmix": 1.0, "focal_gamma": 2.0}])
def test_mixed_pictures_train_where_the_weights_themselves_are_of_another_width(precision, options):
    watch, _ = train(precision, **options)
    assert torch.tensor(watch.losses).isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weighted_loss_of_any_width_is_that_of_float32(dtype, gamma):
    module = FinetuneModule("test_resnet", num_classes=3, weights="none", focal_gamma=gamma, label_smoothing=0.1)
    module.objective.weight = torch.tensor([0.5, 1.0, 1.5])
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.25, 0.5, -3.0]])  # exact in all of them
    for targets in (torch.tensor([0, 2]), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])):
        assert float(module.loss(logits.to(dtype), targets)) == pytest.approx(float(module.loss(logits, targets)), rel=1e-6)


def test_weights_of_float16_have_no_moving_average():
    with pytest.raises(ConfigError, match=r"run\.ema cannot average weights that are float16"):
        train("16-true", callbacks=[PhaseEMA(0.9)])
