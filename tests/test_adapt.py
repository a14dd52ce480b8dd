"""AdaptModule: what a step computes, that the source alone stays alone, and what its checkpoints are good for."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from PIL import Image
from scipy.special import expit, softmax
from torch.utils.data import DataLoader, TensorDataset

import finetune
from finetune import Adaptation, AdaptDataModule, AdaptModule, ConfigError, DataError, FinetuneModule
from finetune.adaptation import DomainBatch, describe
from finetune.adaptation_methods import CDAN, DANN, METHODS, create
from finetune.averaging import WiseFT
from finetune.batch_statistics import batchnorm_layers, statistics_of
from finetune.main import main
from finetune.predictor import Predictor
from finetune.reuse import Kept
from finetune.target import UNKNOWN

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
QUIET |= {"num_sanity_val_steps": 0, "enable_checkpointing": False}
TINY = {"backbone": "test_resnet", "weights": "none", "num_classes": 3}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Three classes of bright, middle and dark pictures; the target is the same upside down in colour, and unlike in noise."""
    root, rng = tmp_path_factory.mktemp("domains"), np.random.default_rng(0)
    for domain, size in (("source", 40), ("target", 12)):
        for label, name in enumerate(("a", "b", "c")):
            (root / domain / name).mkdir(parents=True)
            for i in range(10):
                noise = rng.integers(0, size, (32, 32, 3))
                pixels = (80 * label + noise) if domain == "source" else (80 * label + 60 - noise)
                Image.fromarray(pixels.astype(np.uint8)).save(root / domain / name / f"{i}.png")
    return root


def data_of(domains, **options):
    given = {"batch_size": 8, "image_size": 32, "workers": 0, "steps_per_epoch": 2}
    return AdaptDataModule(str(domains / "source"), str(domains / "target"), **{**given, **options})


def module(method="MCC", **options):
    return AdaptModule(method, **{**TINY, **options})


def drawn_batch(n=6, m=5, width=4, classes=3, progress=0.5):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.arange(n) % classes
    return DomainBatch(draw(n, width), draw(m, width), draw(n, classes), draw(m, classes), labels, progress)


# -- methods ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_again_from_its_description(name):
    method = create(name)
    method.build(4, 3)
    again = create(describe(method))
    again.build(4, 3)
    assert type(again) is METHODS[name]
    again.load_state_dict(method.state_dict())
    found = method.double().loss(drawn_batch())
    loss = found["loss"] if isinstance(found, dict) else found
    assert loss.shape == ()
    assert loss.isfinite()


def linear(method):
    """Replace the discriminator by a linear one, which is easily computed by hand."""
    weight = torch.nn.Linear(method.discriminator[0].in_features, 1).double()
    method.discriminator = weight
    return weight.weight.detach().numpy()[0], weight.bias.item()


def binary(logits, source, weights=None):
    each = -np.log(expit(logits if source else -logits))
    return np.average(each, weights=weights)


def test_dann_by_hand():
    method, batch = DANN(strength=0.8, hidden=4), drawn_batch()
    method.build(4, 3)
    weight, bias = linear(method)
    said = [x.numpy() @ weight + bias for x in (batch.source_features, batch.target_features)]
    found = method.loss(batch)
    assert found["loss"].item() == pytest.approx((binary(said[0], True) + binary(said[1], False)) / 2, rel=1e-12)
    assert found["domain_acc"].item() == pytest.approx(((said[0] > 0).mean() + (said[1] < 0).mean()) / 2)
    assert found["grl"].item() == pytest.approx(0.8 * np.tanh(2.5), rel=1e-6)
    assert DANN(strength=0.8, schedule="constant").reversal(0.1) == 0.8


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("widest", [4096, 8])
def test_cdan_by_hand(entropy, widest):
    method, batch = CDAN(hidden=4, entropy=entropy, widest=widest), drawn_batch()
    method.build(4, 3)
    method.double()
    weight, bias = linear(method)
    losses = []
    for features, logits, source in (
        (batch.source_features, batch.source_logits, True),
        (batch.target_features, batch.target_logits, False),
    ):
        shares = softmax(logits.numpy(), 1)
        if widest == 4096:
            joined = np.stack([np.outer(p, f).ravel() for p, f in zip(shares, features.numpy(), strict=True)])
        else:
            maps = method.features_map.numpy(), method.classes_map.numpy()
            joined = (features.numpy() @ maps[0]) * (shares @ maps[1]) / np.sqrt(2)
        weights = 1 + np.exp((shares * np.log(shares)).sum(1)) if entropy else None
        losses.append(binary(joined @ weight + bias, source, weights))
    assert method.loss(batch)["loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-10)


@pytest.mark.parametrize("method", ["DANN", "CDAN", "MCC"])
def test_a_run_in_half_precision_computes_its_method_in_single(domains, method):
    network = module(method)
    L.Trainer(**QUIET, max_epochs=1, limit_val_batches=0, precision="bf16-true").fit(network, data_of(domains))
    kinds = {str(value.dtype) for value in network.adaptation.parameters()}
    assert kinds == ({"torch.float32"} if method != "MCC" else set())
    assert {value.dtype for value in network.backbone.parameters()} == {torch.bfloat16}
    assert all(value.isfinite().all() for value in network.parameters())


@pytest.mark.parametrize("kind", [DANN, CDAN])
def test_features_learn_the_reverse_of_what_the_discriminator_learns(kind):
    """Differences say what the loss does when features move; the gradient on them must be that times -strength."""
    method, batch = kind(hidden=4, strength=0.7, schedule="constant"), drawn_batch()
    method.build(4, 3)
    method.double().eval()  # BatchNorm of the discriminator would tie the pictures of a batch together
    features = batch.source_features.clone().requires_grad_()

    def loss(x):
        return method.loss(DomainBatch(x, batch.target_features, batch.source_logits, batch.target_logits, batch.labels, 0.5))

    gradient = torch.autograd.grad(loss(features)["loss"], features)[0]
    differences, step = torch.zeros_like(features), 1e-6
    for place in np.ndindex(*features.shape):
        moved = torch.zeros_like(features)
        moved[place] = step
        high, low = (loss(features.detach() + sign * moved)["loss"].item() for sign in (1, -1))
        differences[place] = (high - low) / (2 * step)
    assert differences.abs().max() > 1e-4
    np.testing.assert_allclose(gradient.numpy(), -0.7 * differences.numpy(), atol=1e-8)


def test_unknown_methods_and_arguments_are_named():
    with pytest.raises(ConfigError, match=r"no adaptation method 'CORRAL'\. Did you mean 'CORAL'\? Expected SourceOnly, AdaBN"):
        create("CORRAL")
    with pytest.raises(ConfigError, match="MCC cannot be made with"):
        create({"class_path": "MCC", "init_args": {"warmth": 2}})
    with pytest.raises(ConfigError, match="temperature of MCC to be above 0, found 0"):
        create({"class_path": "MCC", "init_args": {"temperature": 0}})

    class Forgetful(Adaptation):
        def __init__(self, weight=1.0):
            super().__init__()

    with pytest.raises(ConfigError, match=r"write self\.weight = weight in its __init__"):
        describe(Forgetful())


# -- a step -------------------------------------------------------------------------------------------------------------------


class Seen(L.Callback):
    """Count the pictures that pass through the network in training."""

    def on_fit_start(self, trainer, pl_module):
        self.shapes = []
        pl_module.backbone.register_forward_pre_hook(
            lambda net, inputs: self.shapes.append(len(inputs[0])) if net.training else None
        )


@pytest.mark.parametrize("method", ["SourceOnly", "AdaBN"])
def test_without_adaptation_the_network_sees_the_source_alone(domains, method):
    """BatchNorm would learn of the target: that is worth 26 points, and was once sold as a source-only network."""
    seen, data = Seen(), data_of(domains, augment="none")
    model, plain = module(method), FinetuneModule(**TINY)
    plain.load_state_dict(model.state_dict())
    L.seed_everything(0, verbose=False)
    L.Trainer(max_epochs=2, limit_val_batches=0, callbacks=[seen], **QUIET).fit(model, data)
    assert seen.shapes == [8] * 4
    # the plain module looks at the source's pictures only
    L.Trainer(max_epochs=2, limit_val_batches=0, **QUIET).fit(plain, data_of(domains, augment="none"))
    for (name, left), right in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_both_domains_pass_together_or_one_after_the_other(domains):
    for joint, shapes in ((True, [16] * 2), (False, [8] * 4)):
        seen = Seen()
        model = module("MCC", joint_bn=joint)
        L.Trainer(max_epochs=1, limit_val_batches=0, callbacks=[seen], **QUIET).fit(model, data_of(domains))
        assert seen.shapes == shapes


def test_labelled_pictures_of_the_target_are_learned(domains):
    data = data_of(domains, target_shots=2, augment="none")
    batch = next(iter(data.train_dataloader()))
    model = module("SourceOnly").eval()
    known = batch["target"]["known"] >= 0
    assert known.sum() == 2
    images = torch.cat([batch["image"], batch["target"]["image"][known]])
    labels = torch.cat([batch["label"], batch["target"]["known"][known]])
    expected = torch.nn.functional.cross_entropy(model(images), labels)
    model.log = lambda *args, **kwargs: None
    assert model.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_layers_of_a_method_learn_at_the_heads_rate_and_frozen_stages_stay(domains):
    model = module(DANN(hidden=8), lr=0.1, lr_scale=0.1, bottleneck=16, freezing="last:1")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = L.Trainer(max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(model, data_of(domains))
    rates = {group["stage"]: group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert {stage: pytest.approx(rates[stage]) for stage in ("layer4", "head", "embedding", "adaptation")} == {
        "layer4": 0.01,
        "head": 0.1,
        "embedding": 0.1,
        "adaptation": 0.1,
    }
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"backbone", "embedding", "head", "adaptation"}
    frozen = [name for stage in model.stages[:-1] for name in stage.parameters]
    assert frozen
    assert all(torch.equal(model.state_dict()[f"backbone.{name}"], before[f"backbone.{name}"]) for name in frozen)


def test_two_plain_loaders_will_do():
    def loader(number, shift):
        images = torch.rand(number, 3, 32, 32) / 2 + shift
        return DataLoader(TensorDataset(images, torch.arange(number) % 3), batch_size=4, drop_last=True)

    both = CombinedLoader({"source": loader(8, 0), "target": loader(12, 0.5)}, "max_size_cycle")
    model = module("CORAL")
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, both)
    assert trainer.global_step == 3
    assert set(trainer.callback_metrics) >= {"train/loss", "train/cls_loss", "train/adapt_loss", "train/acc"}


def test_labels_that_a_loader_brings_along_for_the_target_are_not_learned():
    model = module("MCC").eval()
    model.log = lambda *args, **kwargs: None
    images, labels = torch.rand(6, 3, 32, 32), torch.arange(6) % 3
    losses = []
    for wrong in (labels, labels.flip(0), torch.full((6,), UNKNOWN)):
        target = {"image": images.flip(0), "label": wrong}
        losses += [
            model.training_step({"source": (images, labels), "target": each}, 0) for each in (target, [*target.values()])
        ]
    assert len({loss.item() for loss in losses}) == 1


def test_other_channels_and_other_batches_are_named():
    model = module()
    images, labels = torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    with pytest.raises(DataError, match="found 3 x 32 x 32 in the source and 1 x 32 x 32 in the target"):
        model.training_step({"source": (images, labels), "target": (images[:, :1], labels)}, 0)
    with pytest.raises(DataError, match=r"Expected a batch of two domains.*found a mapping with \['image', 'label'\]"):
        model.training_step({"image": images, "label": labels}, 0)


# -- BatchNorm of the target --------------------------------------------------------------------------------------------------


def test_adabn_is_measured_with_the_targets_statistics_and_trains_with_the_sources(domains, tmp_path):
    class Notes(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            self.measured = statistics_of(pl_module)
            trainer.save_checkpoint(tmp_path / f"{type(pl_module.adaptation).__name__}.ckpt")

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.training = statistics_of(pl_module)

    first, second = Notes(), Notes()
    data = data_of(domains, augment="none")
    options = {"max_epochs": 2, **QUIET}
    adapted, plain = module("AdaBN"), module("SourceOnly")
    plain.load_state_dict(adapted.state_dict())
    L.Trainer(callbacks=[first], **options).fit(adapted, data)
    L.Trainer(callbacks=[second], **options).fit(plain, data_of(domains, augment="none"))
    for name, value in first.training.items():
        assert torch.equal(value, second.training[name]), name
    assert torch.equal(adapted.head.weight, plain.head.weight)
    name = next(iter(batchnorm_layers(plain.backbone)))
    layer, inputs = plain.backbone.get_submodule(name), []
    layer.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    for batch in data.target_loader("train"):
        plain.eval()(batch["target"]["image"])
    assert len(inputs[-1]) != len(inputs[0])  # a smaller batch counts less
    expected = torch.cat(inputs).mean((0, 2, 3))
    np.testing.assert_allclose(first.measured[f"backbone.{name}.running_mean"], expected.detach(), rtol=1e-4, atol=1e-6)
    kept = FinetuneModule.load_from_checkpoint(tmp_path / "AdaBN.ckpt").backbone.get_submodule(name)
    assert torch.equal(kept.running_mean, first.measured[f"backbone.{name}.running_mean"])
    assert not torch.allclose(kept.running_mean, layer.running_mean, rtol=0.01)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match=r"AdaBN measures the model with the target's .* --run\.wise_ft null"):
        WiseFT(0.5).setup(L.Trainer(**QUIET), module("AdaBN"), "fit")
    with pytest.raises(ConfigError, match=r"mixup and model\.cutmix do not go with domain adaptation"):
        module(mixup=0.2)
    with pytest.raises(ConfigError, match="AdaBN needs BatchNorm, and test_vit has none"):
        AdaptModule("AdaBN", backbone="test_vit", weights="none", num_classes=3)


# -- watching, and checkpoints ------------------------------------------------------------------------------------------------

FIT = ["fit", "--config", "domain_adaptation", "--model.backbone", "test_resnet", "--model.weights", "none"]
FIT += ["--data.image_size", "32", "--data.workers", "0", "--data.batch_size", "8", "--data.steps_per_epoch", "2"]


@pytest.fixture(scope="module")
def run(domains, tmp_path_factory):
    """A run of the command: CDAN with a bottleneck."""
    folder = tmp_path_factory.mktemp("run")
    words = [
        *FIT,
        "--data.root",
        str(domains / "source"),
        "--data.target",
        str(domains / "target"),
        "--run.folder",
        str(folder),
    ]
    words += ["--model.adaptation", "CDAN", "--model.adaptation.hidden", "8", "--model.bottleneck", "16"]
    here = Path.cwd()
    os.chdir(folder)
    try:
        main([*words, "--trainer.max_epochs", "2"])
    finally:
        os.chdir(here)
    return next((folder / "domain_adaptation").iterdir())


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_validators_are_logged_and_choose_and_the_oracle_stands_aside(run):
    ends = [row for row in rows(run) if row["target/infomax"]]
    assert len(ends) == 2
    assert all(row["oracle/target_acc"] and row["val/acc"] for row in ends)
    assert {name for name in ends[0] if name.startswith("target/")} == {
        f"target/{name}" for name in ("infomax", "neg_entropy", "bnm", "snd")
    }
    assert any(row["train/domain_acc"] and row["train/grl"] and row["train/adapt_loss"] for row in rows(run))
    record = finetune.read_record(run)
    assert record["data"]["target"]["counts"] == {"train": 30, "val": 0, "test": 0}
    assert "oracle" in (run / "report.html").read_text()
    assert len(json.loads((run / "domains.json").read_text())["points"]) == 36
    assert (record["monitor"], record["mode"]) == ("target/infomax", "max")
    assert record["best"]["value"] == pytest.approx(max(float(row["target/infomax"]) for row in ends), rel=1e-6)


def test_the_plain_module_reads_the_checkpoint(run, domains):
    path = run / "checkpoints" / "best.ckpt"
    assert any(name.startswith("adaptation.") for name in torch.load(path, weights_only=True)["state_dict"])
    plain, whole = FinetuneModule.load_from_checkpoint(path).eval(), AdaptModule.load_from_checkpoint(path).eval()
    assert type(plain) is FinetuneModule
    assert isinstance(whole.adaptation, CDAN)
    assert whole.adaptation.hidden == 8
    images = next(iter(data_of(domains).target_loader("train")))["target"]["image"]
    assert torch.equal(plain(images), whole(images))
    assert plain.class_names == ["a", "b", "c"]
    stamped = torch.load(path, weights_only=True)["finetune"]  # so that a method of one's own need not be there
    assert stamped["class_path"] == "finetune.module.FinetuneModule"


def test_a_bottleneck_stands_between_backbone_and_head(run):
    plain = FinetuneModule.load_from_checkpoint(run / "checkpoints" / "best.ckpt").eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    linear, norm, _ = plain.embedding
    features = plain.backbone(plain.normalise(images)).flatten(1)
    expected = norm(linear(features)).clamp_min(0)
    assert expected.shape == (2, 16)
    assert torch.equal(plain.features(images), expected)
    stage = plain.stages[-2].name
    kept = Kept(plain.lower(images, stage), stage)
    torch.testing.assert_close(plain.features(kept), expected)
    with pytest.raises(ConfigError, match=r"model\.bottleneck to be at least 1, or null for none; found 0"):
        FinetuneModule(**TINY, bottleneck=0)


def test_validate_and_test_measure_a_run_again(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["validate", "--ckpt_path", str(run)])
    said = dict(line.split() for line in capsys.readouterr().out.splitlines() if len(line.split()) == 2)
    best = max((row for row in rows(run) if row["target/infomax"]), key=lambda row: float(row["target/infomax"]))
    for name in ("target/infomax", "oracle/target_acc", "val/acc"):
        assert float(said[name]) == pytest.approx(float(best[name]), abs=1e-4)


def test_predict_evaluate_and_export_take_the_run(run, domains, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = [str(path) for path in sorted((domains / "target").glob("*/*.png"))]
    main(["predict", str(run), str(domains / "target"), "--out", "p.csv", "--workers", "0", "--probabilities"])
    with open("p.csv", newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == files
    main(["evaluate", str(run), str(domains / "target"), "--workers", "0", "--resamples", "0", "--out", "e"])
    main(["export", str(run), "--format", "torch_export", "--pictures", str(domains / "target")])
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", "timm", "--pictures", str(domains / "target")])
    assert "bottleneck 16" in capsys.readouterr().err


def test_what_the_best_checkpoint_says_of_both_domains_is_kept(run, domains):
    for split, domain, number in (("val", "source", 6), ("target", "target", 30)):
        outcome = finetune.outcomes.read_outcome(run / f"predictions.{split}.csv")
        assert len(outcome.files) == number
        assert all(Path(path).parent.parent.name == domain for path in outcome.files)
        np.testing.assert_allclose(outcome.probabilities, Predictor(run).probabilities(outcome.files), atol=1e-4)


def test_target_images_that_are_trained_with_their_labels_count_in_no_accuracy(domains, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ["--data.root", str(domains / "source"), "--data.target", str(domains / "target"), "--data.target_shots", "2"]
    main([*FIT, *places, "--trainer.max_epochs", "1"])
    (run,) = Path("runs/domain_adaptation").iterdir()
    data = data_of(domains, target_shots=2)
    trained = {str(data.files("target")[place]) for place in data.labelled_target}
    assert len(trained) == 6
    outcome = finetune.outcomes.read_outcome(run / "predictions.target.csv")
    assert set(outcome.files) == {str(path) for path in data.files("target")} - trained
    (measured,) = (float(row["oracle/target_acc"]) for row in rows(run) if row["oracle/target_acc"])
    assert measured == pytest.approx((outcome.predicted == outcome.labels).mean())
    assert "The labels of 6 target images were trained with" in (run / "report.html").read_text()


def test_a_validator_of_ones_own_can_choose_the_checkpoint(domains, tmp_path):
    class Watched(AdaptModule):
        def target_validators(self, logits):
            best = logits.softmax(1).topk(2).values
            return {**super().target_validators(logits), "margin": (best[:, 0] - best[:, 1]).mean()}

    best = ModelCheckpoint(tmp_path, monitor="target/margin", mode="max")
    trainer = L.Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=1, callbacks=[best])
    model, data = Watched(**TINY, adaptation="MCC"), data_of(domains)
    trainer.fit(model, data)
    with torch.no_grad():
        shares = torch.cat([model.eval()(batch["target"]["image"]) for batch in data.target_loader("train")]).softmax(1).numpy()
    first, second = np.sort(shares, 1)[:, -1], np.sort(shares, 1)[:, -2]
    assert float(best.best_model_score) == pytest.approx(float((first - second).mean()), abs=1e-5)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("method", "precision"), [("DANN", "32-true"), ("DANN", "bf16-true"), ("AdaBN", "32-true")])
def test_a_resumed_run_comes_to_the_same_weights(domains, tmp_path, method, precision):
    given = {"class_path": method, "init_args": {"hidden": 8} if method == "DANN" else {}}
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    options = {**QUIET, "max_epochs": 3, "precision": precision}
    models = []
    for more in ({"callbacks": [keep], "enable_checkpointing": True}, {}):
        L.seed_everything(0, verbose=False)
        models.append(module(given, bn="frozen" if method == "AdaBN" else "auto"))
        path = None if more else tmp_path / "epoch=0.ckpt"
        L.Trainer(**{**options, **more}).fit(models[-1], data_of(domains), ckpt_path=path, weights_only=True)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_a_checkpoint_chosen_by_the_oracle_is_said_to_be(domains, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*FIT, "--data.root", str(domains / "source"), "--data.target", str(domains / "target")]
    main([*words, "--run.monitor", "oracle/target_acc", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"])
    assert "best.ckpt is chosen by labels of the target" in capsys.readouterr().out


# -- two processes ------------------------------------------------------------------------------------------------------------

PROBE = """
import sys
import lightning as L
import torch
from finetune import AdaptDataModule, AdaptModule
from finetune.adaptation_methods import DANN
from finetune.batch_statistics import restate, statistics_of

if __name__ == "__main__":
    root = sys.argv[1]
    L.seed_everything(0, verbose=False)
    data = AdaptDataModule(f"{root}/source", f"{root}/target", batch_size=4, image_size=32, workers=0, steps_per_epoch=3)
    model = AdaptModule(DANN(hidden=8), backbone="test_resnet", weights="none", num_classes=3, lr=0.1, bottleneck=8)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    trainer.fit(model, data)
    torch.save(dict(model.named_parameters()), f"{sys.argv[2]}/{trainer.global_rank}.pt")
    restate(model, model._target_pictures(data), model.features)
    torch.save(statistics_of(model), f"{sys.argv[2]}/statistics{trainer.global_rank}.pt")
    if trainer.global_rank == 0:
        torch.save({name: float(value) for name, value in trainer.callback_metrics.items()}, f"{sys.argv[2]}/metrics.pt")
"""


def test_two_processes_train_to_equal_parameters(domains, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(finetune.__file__).parent.parent)}
    command = [sys.executable, "probe.py", str(domains), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    left, right = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(name.startswith("adaptation.discriminator") for name in left)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    left, right = (torch.load(tmp_path / f"statistics{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    metrics = torch.load(tmp_path / "metrics.pt", weights_only=True)
    assert 0 <= metrics["oracle/target_acc"] * 30 == pytest.approx(round(metrics["oracle/target_acc"] * 30), abs=1e-4)
