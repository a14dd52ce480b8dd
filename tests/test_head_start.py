"""A head that is solved for, against scikit-learn on the same features."""

import dataclasses

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight

from finetune import ConfigError, FinetuneModule, FolderDataModule
from finetune.head_start import logistic, ridge, signed_errors, split_features, start_head

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


@pytest.fixture(scope="module")
def features():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 90)
    return generator.normal(size=(90, 12)) * 3 + np.eye(4, 12)[labels] * 4 + 7, labels


def fitted(head_init, **options):
    L.seed_everything(0, verbose=False)
    data = FolderDataModule("digits", batch_size=32, image_size=32, workers=0, shots=15)
    module = FinetuneModule("test_resnet", num_classes=10, weights="none", freezing="head", head_init=head_init, lr=1e-12)
    trainer = L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET, **options)
    return module, data, trainer


def test_ridge_has_the_direction_and_strength_of_scikit_learn(features):
    x, y = features
    one_hot = np.eye(4)[y]
    alphas = np.logspace(-3, 5, 17) * x.var(0).mean()
    best = min(alphas, key=lambda alpha: np.mean([_left_out(x, one_hot, alpha, i) for i in range(len(x))]))
    theirs = Ridge(alpha=best).fit(x, one_hot)
    assert RidgeCV(alphas=alphas).fit(x, one_hot).alpha_ == best
    solution = ridge(x, y, 4)
    scale = solution.weight / theirs.coef_
    assert scale == pytest.approx(scale.mean(), rel=1e-6)
    assert scale.mean() > 1
    assert solution.bias / theirs.intercept_ == pytest.approx(scale.mean(), rel=1e-6)


def _left_out(x, one_hot, alpha, i):
    others = np.arange(len(x)) != i
    model = Ridge(alpha=alpha).fit(x[others], one_hot[others])
    return ((model.predict(x[i : i + 1]) - one_hot[i]) ** 2).mean()


def test_errors_on_what_was_left_out_are_those_of_leaving_it_out(features):
    x, y = features
    one_hot = np.eye(4)[y]
    errors = signed_errors(x, one_hot, 5.0)
    for i in (0, 17, 89):
        others = np.arange(len(x)) != i
        expected = one_hot[i] - Ridge(alpha=5.0).fit(x[others], one_hot[others]).predict(x[i : i + 1])[0]
        assert errors[i] == pytest.approx(expected, rel=1e-8)


def test_logistic_gives_the_probabilities_of_scikit_learn(features):
    x, y = features
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(x, y)
    solution = logistic(x, y, 4)
    found = torch.from_numpy(x @ solution.weight.T + solution.bias).softmax(1).numpy()
    assert found == pytest.approx(theirs.predict_proba(x), abs=1e-6)


def test_a_feature_that_hardly_varies_does_not_outvote_the_others(features):
    x, y = features
    almost_dead = np.zeros((len(x), 1))
    almost_dead[0] = 1e-6
    without, solution = logistic(x, y, 4), logistic(np.hstack([x, almost_dead]), y, 4)
    alive = np.hstack([x, np.full((len(x), 1), 0.3 * x.std())])
    logits = x @ without.weight.T + without.bias
    assert alive @ solution.weight.T + solution.bias == pytest.approx(logits, abs=1e-3)
    assert np.isfinite(logistic(np.zeros((4, 2)), np.arange(4), 4).weight).all()


def test_logistic_of_two_classes_and_of_a_class_without_pictures(features):
    x, y = features
    two = y % 2
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)).fit(x, two)
    solution = logistic(x, two, 2)
    found = torch.from_numpy(x @ solution.weight.T + solution.bias).softmax(1).numpy()
    assert found == pytest.approx(theirs.predict_proba(x), abs=1e-6)
    wider = logistic(x, y, 6)
    assert set((x @ wider.weight.T + wider.bias).argmax(1)) <= {0, 1, 2, 3}


def test_logistic_with_class_weights_is_that_of_scikit_learn(features):
    x, y = features
    y = np.where((y == 3) & (np.arange(len(y)) % 4 > 0), 2, y)
    weights = compute_class_weight("balanced", classes=np.arange(4), y=y)
    scaled = StandardScaler().fit_transform(x)
    theirs = LogisticRegression(C=0.01, max_iter=1000, class_weight="balanced").fit(scaled, y)
    solution = logistic(x, y, 4, weights)
    found = torch.from_numpy(x @ solution.weight.T + solution.bias).softmax(1).numpy()
    assert found == pytest.approx(theirs.predict_proba(scaled), abs=1e-5)


@pytest.mark.parametrize("options", [{"class_weights": "balanced"}, {"sampling": "balanced"}])
def test_a_run_that_weighs_classes_starts_from_a_weighted_solution(options):
    heads = []
    for chosen in ({}, options):
        L.seed_everything(0, verbose=False)
        in_data = {key: value for key, value in chosen.items() if key == "sampling"}
        in_model = {key: value for key, value in chosen.items() if key == "class_weights"}
        data = FolderDataModule("digits", batch_size=32, image_size=32, workers=0, **in_data)
        rare = [p for p in data.folder.splits["train"] if p.label or int(p.file.split("/")[-1].split(".")[0]) % 7 == 0]
        data.folder = dataclasses.replace(data.folder, splits={**data.folder.splits, "train": rare})
        options = {"freezing": "head", "head_init": "logistic", "lr": 1e-12, **in_model}
        module = FinetuneModule("test_resnet", num_classes=10, weights="none", **options)
        L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET).fit(module, datamodule=data)
        with torch.inference_mode():
            said = [module.eval()(batch["image"]).softmax(1)[:, 0] for batch in data.eval_loader("train")]
        heads.append(torch.cat(said).mean().item())
    assert heads[1] > 2 * heads[0], "the rare class is thought to be more likely"


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_run_starts_with_the_solution_on_features_without_augmentation(kind):
    module, data, trainer = fitted(kind)
    trainer.fit(module, datamodule=data)
    plain = FolderDataModule("digits", image_size=32, workers=0, shots=15)
    plain.input_spec = plain._resized(module.input_spec)
    module.eval()
    with torch.inference_mode():
        batches = [(module.features(b["image"]), module(b["image"]), b["label"]) for b in plain.eval_loader("train")]
    x = torch.cat([b[0] for b in batches]).double().numpy()
    logits = torch.cat([b[1] for b in batches]).numpy()
    y = torch.cat([b[2] for b in batches]).numpy()
    solution = (ridge if kind == "ridge" else logistic)(x, y, 10)
    assert logits == pytest.approx(x @ solution.weight.T + solution.bias, abs=1e-3)
    with torch.inference_mode():
        right = [module(batch["image"]).argmax(1) == batch["label"] for batch in plain.eval_loader("val")]
    assert module.start_accuracy == pytest.approx(torch.cat(right).double().mean().item())


def test_zero_and_that_a_loaded_or_resumed_head_is_left_alone(tmp_path, capsys):
    module, data, trainer = fitted("zero")
    trainer.fit(module, datamodule=data)
    assert module.head.weight.abs().max() < 1e-9
    trainer.save_checkpoint(tmp_path / "zero.ckpt")
    again, data, trainer = fitted("logistic")
    trainer.fit_loop.max_epochs = 2
    again.hparams["head_init"] = "zero"
    trainer.fit(again, datamodule=data, ckpt_path=tmp_path / "zero.ckpt", weights_only=True)
    assert again.head.weight.abs().max() < 1e-9
    assert capsys.readouterr().out.count("head: starts at zero") == 1


def test_features_of_many_pictures_are_a_draw(monkeypatch):
    monkeypatch.setattr("finetune.head_start._MOST", 40)
    module, data, trainer = fitted("default")
    trainer.fit(module, datamodule=data)
    x, y = split_features(module, trainer, "train")
    assert x.shape == (40, module.head.in_features)
    assert len(y) == 40


def test_what_cannot_be_solved_for_is_said():
    module, _, trainer = fitted("logistic")
    module.head = torch.nn.Sequential(module.head)
    with pytest.raises(ConfigError, match="needs a linear head, found Sequential"):
        start_head(module, trainer, "ridge")

    class Theirs(L.LightningDataModule):
        num_classes = 10

        def train_dataloader(self):
            return FolderDataModule("digits", image_size=32, workers=0).train_dataloader()

    module, _, trainer = fitted("logistic")
    with pytest.raises(ConfigError, match="Theirs has no method eval_loader"):
        trainer.fit(module, datamodule=Theirs())


def test_a_head_that_has_learned_is_not_solved_for_again(tmp_path):
    module, data, _ = fitted("logistic")
    for _ in range(2):
        L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET).fit(module, data)
        before = module.head.weight.detach().clone()
        module.head.weight.data += 1
    trainer = L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, data)
    torch.testing.assert_close(module.head.weight.detach(), before + 1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = FinetuneModule.load_from_checkpoint(tmp_path / "a.ckpt")
    L.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, **QUIET).fit(loaded, data)
    torch.testing.assert_close(loaded.head.weight.detach(), before + 1)


def test_a_head_behind_a_bottleneck_is_solved_for_what_training_sees():
    L.seed_everything(0, verbose=False)
    data = FolderDataModule("digits", batch_size=64, image_size=32, workers=0, augment="none")
    module = FinetuneModule(
        "test_resnet", num_classes=10, weights="none", head_init="logistic", lr=1e-12, bottleneck=32, freezing="head"
    )
    trainer = L.Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, data)
    assert float(trainer.callback_metrics["val/acc"]) == pytest.approx(module.start_accuracy, abs=0.05)
    assert float(trainer.callback_metrics["train/acc"]) == pytest.approx(module.start_accuracy, abs=0.1)
