"""The range test: rates by hand, ratios kept, the module left as it was, and the verb's files."""

import csv
import math

import lightning as L
import pytest
import torch

from finetune import ConfigError, FinetuneModule, FolderDataModule
from finetune.lr_find import Curve, LearningRateSweep, find_lr
from finetune.main import main


def parts(**options):
    L.seed_everything(0, verbose=False)
    data = FolderDataModule("digits", batch_size=32, image_size=32, workers=0, augment="none", shots=20)
    options = {"freezing": "gradual", "lr": 0.01, "lr_decay": 0.5, **options}
    return FinetuneModule("test_resnet", num_classes=10, weights="none", **options), data


class Rates(L.Callback):
    """Keeps the rates that the steps were made with."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append({group["stage"]: group["lr"] for group in optimizer.param_groups})


def test_all_stages_rise_together_with_their_ratios_and_nothing_is_left_behind():
    module, data = parts()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    seen = Rates()
    curve = find_lr(module, data, steps=30, callbacks=[seen], accelerator="cpu", enable_progress_bar=False)
    stages = module.stage_names
    for step, rates in enumerate(seen.rates):
        head = 0.01 * 1e-4 * 10 ** (7 * step / 29)
        for distance, stage in enumerate(reversed(stages)):
            assert rates[stage] == pytest.approx(head * 0.5**distance), (step, stage)
    assert curve.rates == pytest.approx([rates["head"] for rates in seen.rates])
    assert len(curve.losses) >= 10
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_it_stops_when_the_loss_explodes():
    module, data = parts(optimizer="sgd", lr=1.0, freezing="full", lr_decay=1.0)
    curve = find_lr(module, data, steps=60, accelerator="cpu", enable_progress_bar=False)
    assert len(curve.losses) < 60
    assert all(math.isfinite(loss) for loss in curve.losses)


def test_smoothing_and_suggestion_by_hand():
    curve = Curve([10.0**k for k in range(-12, 0)], [3, 3, 3, 3, 2, 1, 1, 1, 4, 9, 20, 50])
    mean, smooth = 0.0, []
    for number, loss in enumerate(curve.losses, start=1):
        mean = 0.9 * mean + 0.1 * loss
        smooth.append(mean / (1 - 0.9**number))
    assert curve.smooth() == pytest.approx(smooth)
    first = next(i for i in range(11, 12) if smooth[i] > 3 * min(smooth[: i + 1]))  # not before the eleventh
    assert curve.exploded() == first
    assert curve.suggestion() == pytest.approx(curve.rates[first] / 5)


def test_a_loss_that_never_explodes_suggests_a_fifth_of_the_last_rate():
    curve = Curve([10.0**k for k in range(-12, 0)], [3.0] * 12)
    assert curve.exploded() is None
    assert curve.suggestion() == pytest.approx(0.1 / 5)


def test_too_short_a_curve_is_said():
    with pytest.raises(ConfigError, match="after 3 steps"):
        Curve([1, 2, 3], [1, 2, 3]).suggestion()


def test_the_factors_span_seven_powers_of_ten():
    sweep = LearningRateSweep(steps=8)
    assert [round(math.log10(sweep.factor(step)), 6) for step in range(8)] == list(range(-4, 4))


def test_the_verb_writes_curve_and_picture_and_says_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--config", "large", "--model.backbone", "test_resnet", "--model.weights", "none", "--data.image_size", "32"]
    words += ["--data.workers", "0", "--data.shots", "20"]
    main(["lr-find", *words, "--trainer.max_steps", "15"])  # of the sweep, and not of the run that is suggested
    out = capsys.readouterr().out
    (table,) = tmp_path.glob("runs/lr_find/*/lr_find.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 10
    suggested = out.partition("lr     ")[2].split()[0]
    assert f"next   resnet-finetune fit {' '.join(words)} --model.lr {suggested}" in out
    assert table.with_name("lr_find.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("runs/large*")), "no run is kept"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ckpt_path", "RUN"], "lr-find starts a run"),
        (["--trainer.max_steps", "5"], "at least 10 steps"),
        (["--trainer.fast_dev_run", "true"], "at least 10 steps"),
    ],
)
def test_what_makes_no_sweep_is_refused(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    tiny = ["--model", "finetune.FinetuneModule", "--model.backbone", "test_resnet", "--model.weights", "none"]
    if words[1] == "RUN":
        main(["fit", *tiny, "--data.workers", "0", "--data.image_size", "32", "--trainer.max_epochs", "1", "--data.shots", "5"])
        words = [words[0], str(next((tmp_path / "runs" / "run").iterdir()))]
    with pytest.raises(SystemExit):
        main(["lr-find", *tiny, *words])
    assert says in capsys.readouterr().err


def test_accumulated_gradients_are_one_step_and_a_rule_of_the_batch_is_not_applied_twice():
    module, data = parts(lr_rule="linear", lr_batch=8)
    seen = Rates()
    options = {"accelerator": "cpu", "enable_progress_bar": False, "accumulate_grad_batches": 2}
    curve = find_lr(module, data, steps=12, callbacks=[seen], **options)
    assert len(curve.rates) == len(seen.rates)
    assert [rates["head"] for rates in seen.rates] == pytest.approx([64 / 8 * rate for rate in curve.rates])


def test_a_loss_that_becomes_negative_has_not_exploded():
    curve = Curve([10.0**k for k in range(-30, 0)], [1.0 - 0.1 * k for k in range(30)])
    assert curve.exploded() is None


def test_the_verb_needs_stages(own_class, capsys):
    with pytest.raises(SystemExit):
        main(["lr-find", "--model", "lightning.pytorch.demos.boring_classes.BoringModel"])
    assert "FinetuneModule, found BoringModel" in capsys.readouterr().err
