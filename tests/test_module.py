"""FinetuneModule through a real Trainer: freezing, rates, resume, metrics."""

import lightning as L
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset

from finetune import CheckpointError, ConfigError, DataError, FinetuneModule
from finetune.freezing import plan
from finetune.reuse import Kept
from finetune.strategies import refuse_synchronised_batchnorm


class Pictures(Dataset):
    """Pictures whose class is the brightest channel; no folder, no module of ours."""

    def __init__(self, number, size=32, dictionary=True):
        generator = torch.Generator().manual_seed(number)
        self.labels = torch.arange(number) % 3
        self.images = torch.randint(0, 120, (number, 3, size, size), generator=generator, dtype=torch.uint8)
        self.images[torch.arange(number), self.labels] += 90
        self.dictionary = dictionary

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if self.dictionary:
            return {"image": self.images[index], "label": self.labels[index], "index": index}
        return self.images[index].float() / 255, self.labels[index]


def loader(number=16, batch=8, **kwargs):
    return DataLoader(Pictures(number, **kwargs), batch_size=batch)


def module(**options):
    return FinetuneModule(**{"backbone": "test_resnet", "num_classes": 3, "weights": "none", "lr": 0.1, **options})


def trainer(tmp_path, **options):
    defaults = {
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return L.Trainer(**{**defaults, "default_root_dir": tmp_path, "enable_checkpointing": False, **options})


class Rates(L.Callback):
    """Write down the rate of every stage at every step, and which stages could learn."""

    def __init__(self):
        self.rows, self.trained = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        self.rows[trainer.global_step] = {g["stage"]: g["lr"] for g in groups}
        self.trained[trainer.global_step] = {g["stage"] for g in groups if any(p.requires_grad for p in g["params"])}


# 6 epochs of 2 steps, one more stage each epoch; 0.8 for the head, halved per stage; warm-up and ramps of 2 steps (1/2, then 1)
GRADUAL = {
    "head": [0.4, *[0.8] * 11],
    "layer4": [0, 0, 0.2, *[0.4] * 9],
    "layer3": [0, 0, 0, 0, 0.1, *[0.2] * 7],
    "layer2": [*[0] * 6, 0.05, *[0.1] * 5],
    "layer1": [*[0] * 8, 0.025, *[0.05] * 3],
    "stem": [*[0] * 10, 0.0125, 0.025],
}


def test_rates_of_a_gradual_run_by_hand_before_and_after_a_resume(tmp_path):
    options = {"freezing": "gradual", "lr": 0.8, "lr_decay": 0.5, "schedule": "flat", "warmup_steps": 2, "ramp_epochs": 1.0}
    keep = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, rest = Rates(), Rates()
    model = module(**options)
    trainer(tmp_path, max_epochs=6, callbacks=[whole, keep], enable_checkpointing=True).fit(model, loader())

    resumed = module(**options)
    other = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    again = trainer(tmp_path, max_epochs=6, callbacks=[rest, other], enable_checkpointing=True)
    again.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True)

    assert sorted(whole.rows) == list(range(12))
    assert sorted(rest.rows) == list(range(6, 12))
    for step in range(12):
        expected = {stage: pytest.approx(rates[step]) for stage, rates in GRADUAL.items()}
        assert whole.rows[step] == expected
        assert whole.trained[step] == {stage for stage, rates in GRADUAL.items() if rates[step] > 0}
        if step >= 6:
            assert rest.rows[step] == expected
            assert rest.trained[step] == whole.trained[step]

    groups = again.optimizers[0].param_groups
    placed = [id(p) for group in groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in resumed.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True))


@pytest.mark.parametrize(("backbone", "size"), [("test_resnet", 32), ("resnetv2_50", 64), ("resnet50_clip", 64)])
def test_head_changes_nothing_outside_the_classifier(tmp_path, backbone, size):
    # regression: frozen BatchNorm of Lightning's callbacks normalises with batch statistics (traps 1, 2)
    model = module(backbone=backbone, freezing="head", weight_decay=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(tmp_path).fit(model, loader(8, 4, size=size), loader(4, 4, size=size))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    images = Pictures(4, size=size).images
    with torch.no_grad():
        in_train = model.train().features(images)
        in_eval = model.eval().features(images)
    assert torch.equal(in_train, in_eval)


@pytest.mark.parametrize(
    ("bn", "freezing", "moving"),
    [
        ("auto", "last:1", {"layer4"}),
        ("auto", "norm", {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        ("frozen", "full", set()),
        ("train", "head", {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_batchnorm_statistics_move_where_the_mode_says(tmp_path, bn, freezing, moving):
    model = module(bn=bn, freezing=freezing)
    before = {name: value.clone() for name, value in model.backbone.named_buffers()}
    trainer(tmp_path).fit(model, loader(), loader())
    moved = {name.split(".")[0] for name, value in model.backbone.named_buffers() if not torch.equal(value, before[name])}
    assert moved == moving


def test_no_call_of_train_thaws_a_frozen_stage():
    model = module(freezing="last:1")
    model.apply_phase(plan("last:1", model.stage_names, 1)[0])
    for _ in range(2):
        model.train()
        modes = {name: m.training for name, m in model.backbone.named_modules() if isinstance(m, _BatchNorm)}
        assert {name.split(".")[0] for name, mode in modes.items() if mode} == {"layer4"}
        model.eval()
        assert not any(m.training for m in model.modules())


def test_freezing_clears_stale_gradients():
    # regression: a stale gradient keeps moving a frozen weight through momentum and weight decay (trap 7)
    model = module()
    model(Pictures(4).images).sum().backward()
    model.apply_phase(plan("head", model.stage_names, 1)[0])
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.head.weight.grad is not None


def test_norm_trains_normalisation_layers_and_the_head_only(tmp_path):
    model = module(freezing="norm")
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer(tmp_path).fit(model, loader())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    norms = {
        f"backbone.{n}.{p}" for n, m in model.backbone.named_modules() if isinstance(m, _BatchNorm) for p in ("weight", "bias")
    }
    assert changed == {*norms, "head.weight", "head.bias"}


def test_metrics_equal_scikit_learn(tmp_path):
    model = module()
    data = Pictures(50)
    data.labels[:13] = 2  # uneven
    run = trainer(tmp_path)
    values = run.test(model, DataLoader(data, batch_size=7), verbose=False)[0]
    with torch.no_grad():
        logits = model.eval()(data.images)
    guess = logits.argmax(1)
    assert values["test/acc"] == pytest.approx(accuracy_score(data.labels, guess))
    assert values["test/acc_macro"] == pytest.approx(balanced_accuracy_score(data.labels, guess))
    assert values["test/f1"] == pytest.approx(f1_score(data.labels, guess, average="macro"), abs=1e-6)
    assert values["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, data.labels)), rel=1e-4)


def test_uint8_and_float_pictures_give_the_same_logits_and_normalised_ones_are_refused():
    model = module().eval()
    images = Pictures(4).images
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(images.float() / 255))
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (model.input_spec.mean, model.input_spec.std))
        plain = model.head(model.backbone((images.float() / 255 - mean) / std))
    torch.testing.assert_close(model(images), plain)
    with pytest.raises(DataError, match="leave Normalize out"):
        model((images.float() / 255 - mean) / std)


def test_pairs_are_batches_too(tmp_path):
    model = module()
    trainer(tmp_path).fit(model, loader(dictionary=False))
    with pytest.raises(DataError, match=r"found a mapping with \['pixels'\]"):
        model.unpack({"pixels": 1})


def test_label_smoothing_is_for_training_only():
    model = module(label_smoothing=0.2)
    logits, labels = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    p = logits.log_softmax(1)[0]
    assert float(model.train().loss(logits, labels)) == pytest.approx(float(-(0.8 * p[0] + 0.2 * p.mean())))
    assert float(model.eval().loss(logits, labels)) == pytest.approx(float(-p[0]))


def test_a_subclass_changes_features_and_its_own_layers_are_optimised_once(tmp_path):
    class Bottleneck(FinetuneModule):
        def __init__(self, width=7, **options):
            super().__init__(**options)
            self.neck = nn.Linear(self.head.in_features, width)
            self.head = nn.Linear(width, self.hparams["num_classes"])

        def features(self, images):
            return self.neck(super().features(images)).relu()

    model = Bottleneck(backbone="test_resnet", num_classes=3, weights="none", freezing="head", lr=0.1)
    groups = model.param_groups()
    placed = [id(p) for group in groups for p in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())
    before = model.neck.weight.clone()
    trainer(tmp_path).fit(model, loader())
    assert not torch.equal(model.neck.weight, before)
    assert model.hparams["width"] == 7


def test_checkpoint_holds_plain_values_and_loads_without_pickle(tmp_path):
    model = module(freezing=[{"train": "head", "share": 0.5}, {"train": "full"}], lr_scale={"stem": 0.1})
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    inside = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert inside["finetune"]["input"]["size"] == model.input_spec.size
    assert inside["finetune"]["weights"]["source"] == "none"
    again = FinetuneModule.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    images = Pictures(4).images
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))


def test_resuming_with_another_option_is_refused_and_names_both(tmp_path):
    run = trainer(tmp_path)
    run.fit(module(lr=0.1), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = module(lr=0.2)
    with pytest.raises(CheckpointError, match=r"lr: 0\.1 in the checkpoint, 0\.2 now"):
        trainer(tmp_path, max_epochs=2).fit(other, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_classes": 1}, "at least 2"),
        ({"lr": 0.0}, "lr to be greater than 0"),
        ({"warmup_epochs": 1, "warmup_steps": 3}, "both set"),
        ({"label_smoothing": 1.0}, "below 1"),
        ({"backbone": "test_resnt"}, "Did you mean 'test_resnet'"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(ConfigError, match=says):
        module(**options)


@pytest.mark.parametrize(
    "options", [{"max_epochs": -1, "max_time": "00:00:00:05"}, {"max_epochs": -1, "limit_train_batches": 2}]
)
def test_a_run_without_length_is_refused(tmp_path, options):
    with pytest.raises(ConfigError, match="length of the run"):
        trainer(tmp_path, **options).fit(module(), loader())


def test_max_steps_sets_the_length_of_schedule_and_phases(tmp_path):
    model = module(freezing="lp_ft:1")
    rates = Rates()
    trainer(tmp_path, max_epochs=-1, max_steps=6, callbacks=[rates]).fit(model, loader())
    assert sorted(rates.rows) == list(range(6))
    assert model.timetable.schedule.total == 6
    assert rates.trained[1] == {"head"}
    assert len(rates.trained[2]) == 6


def test_kaiming_start_and_batchnorm_constants():
    model = module(backbone="resnet18", init="kaiming", bn_momentum=0.02, bn_eps=1e-3)
    weight = model.backbone.layer3[0].conv2.weight  # 256 x 256 x 3 x 3: std sqrt(2 / (256 * 9))
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert {(m.momentum, m.eps) for m in model.modules() if isinstance(m, _BatchNorm)} == {(0.02, 1e-3)}


def test_fast_dev_run_takes_one_batch_of_the_first_phase(tmp_path):
    model = module(freezing="lp_ft")
    trainer(tmp_path, fast_dev_run=True).fit(model, loader(), loader())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_a_compiled_backbone_is_the_same_and_can_still_be_cut(tmp_path):
    plain, compiled = (
        FinetuneModule("test_resnet", num_classes=3, weights="none", freezing="last:1", compile=backend)
        for backend in (None, "eager")
    )
    compiled.load_state_dict(plain.state_dict())
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = [{"image": images, "label": torch.tensor([0, 1, 2, 0]), "index": torch.arange(4)}] * 2
    for model in (plain, compiled):
        L.seed_everything(0, verbose=False)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        L.Trainer(max_epochs=1, **quiet).fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    for (name, wanted), found in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, msg=name)
    compiled.eval()
    whole = compiled.features(images)
    cut = Kept(compiled.lower(images, "layer2"), "layer2")
    torch.testing.assert_close(compiled.features(cut), whole)


def test_synchronised_batchnorm_that_would_drop_activations_is_refused():
    trainer = L.Trainer(
        strategy="ddp", devices=1, accelerator="cpu", sync_batchnorm=True, logger=False, enable_checkpointing=False
    )
    refuse_synchronised_batchnorm(trainer, FinetuneModule("test_resnet", num_classes=10, weights="none"))
    with pytest.raises(ConfigError, match="take the activations out"):
        refuse_synchronised_batchnorm(trainer, FinetuneModule("test_efficientnet", num_classes=10, weights="none"))
