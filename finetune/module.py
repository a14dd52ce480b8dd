"""FinetuneModule: a pretrained backbone in stages, a linear head, and everything that must never be skewed between them.

    pictures (uint8) → normalise → backbone → features → head → logits → loss, metrics

Subclasses change it at named seams: `features`, `head`, `loss`, `param_groups`. All optimizer groups exist from the first step;
freezing only toggles `requires_grad` and modes, and is a function of the epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from finetune import checkpoints
from finetune.accepted_input import require_size
from finetune.backbones import build_bottleneck, checkpoint_gradients, create_model, initialise, input_spec_of
from finetune.behind import Behind
from finetune.checkpoint_file import require_optimizer_fits
from finetune.console import clean
from finetune.errors import DataError
from finetune.freezing import Phase, phase_at, plan
from finetune.head_start import start_head
from finetune.labels import classes_of, labels_of
from finetune.losses import ClassWeights
from finetune.metrics import MeanLoss, build_metrics
from finetune.objective import Objective
from finetune.optim import (
    LearningRateRule,
    StageRates,
    build_groups,
    build_optimizer,
    effective_batch,
    let_gradients_be_clipped,
    lr_factor,
    scales_loss,
)
from finetune.options import HeadInit, check_options
from finetune.pace import Pace, lengths_of
from finetune.place import Place, batches_done, place_of
from finetune.predicting import PredictingModule
from finetune.randomness import global_seed, seed_of
from finetune.reuse import Kept
from finetune.schedules import Schedule, ScheduleName
from finetune.staged import StagedModule
from finetune.stages import split_head
from finetune.strategies import refuse_synchronised_batchnorm, require_searching
from finetune.timetable import Timetable, build_timetable, run_length
from finetune.transforms import InputSpec
from finetune.trusted_code import guarded_parser, guarding
from finetune.weights import load_weights

BatchNormMode = Literal["auto", "frozen", "train"]


class FinetuneModule(PredictingModule, StagedModule):
    """Fine-tune a backbone for image classification.

    Args:
        backbone: A timm model name, or the dotted path of your own nn.Module class (or of a function that returns one).
        num_classes: Number of classes. The command takes it from the data.
        class_names: Their names in the order of the labels. The command, and a trainer, take them from the data.
        backbone_args: Further arguments of the backbone, such as {drop_rate: 0.2, drop_path_rate: 0.1}.
        bottleneck: Width of a layer between backbone and head (linear, BatchNorm, ReLU), which learns at the head's rate; none
            if null.
        weights: Where the weights come from: auto (hub, else bundled, else package), hub, bundled, package, none, a
            .safetensors or .pth file, or a checkpoint of this toolkit.
        partial_weights: Accept a weights file that does not fill the whole backbone; what is missing starts random.
        init: How layers start that no weights fill: default (the backbone's own way) or kaiming (He et al. 2015, fan-out).
        head_init: How a new head starts: default (as init says), zero, or as the solution of a ridge or logistic regression on
            the features of the training pictures, so that it need not be learned first. The logistic one follows class weights.
        dropout: Share of the features that the head does not see in a training step.
        drop_path: Stochastic depth (Huang et al. 2016): share of the last residual branch's pictures that skip it in training,
            less towards the stem; for backbones that have it.
        freezing: What trains when: full, head, last:N, gradual[:K], lp_ft[:LENGTH], surgical:STAGES, norm, or a list of phases.
        bn: BatchNorm statistics. auto: they move where the layer trains; frozen: nowhere; train: everywhere.
        bn_momentum: Momentum of BatchNorm statistics; the backbone's own if null.
        bn_eps: Epsilon of BatchNorm; the backbone's own if null.
        optimizer: sgd (with Nesterov momentum), adamw, or any timm optimizer by name.
        optimizer_args: Further arguments of the optimizer, such as {betas: [0.9, 0.99]}.
        lr: Learning rate of the head.
        lr_rule: How lr follows the effective batch (batch size x devices x accumulated batches): none, linear (Goyal et al.
            2017) or sqrt (Krizhevsky 2014).
        lr_batch: The effective batch that lr is meant for, under lr_rule.
        lr_decay: Factor of the learning rate per stage from the head towards the stem (0.38 is ULMFiT's 1/2.6).
        lr_scale: Factors of lr in place of lr_decay: one number for all stages before the head (0.1), or a mapping from stages.
        momentum: Momentum of the optimizer, where it has one.
        weight_decay: Weight decay; never applied to biases and normalisation layers.
        schedule: How the learning rate goes after the warm-up: cosine, flat or step.
        warmup_epochs: Epochs of linear warm-up.
        warmup_steps: Steps of linear warm-up, instead of warmup_epochs.
        ramp_epochs: Epochs over which the learning rate of a newly unfrozen stage rises to its value.
        min_lr_ratio: Where cosine ends, as a share of the learning rate.
        step_milestones: Where step drops the learning rate, as shares of the run.
        step_drop: By what step multiplies the learning rate.
        label_smoothing: Label smoothing of the training loss (Szegedy et al. 2016).
        class_weights: Weights of the classes in the training loss, from their numbers of pictures: none, balanced (each class
            weighs the same) or effective (milder for large classes; Cui et al. 2019).
        focal_gamma: Exponent of the focal loss (Lin et al. 2017), such as 2; 0 for cross-entropy.
        mixup: Mix pairs of training pictures (Zhang et al. 2018); the parameter of the Beta distribution, such as 0.2.
        cutmix: Paste parts of training pictures into others (Yun et al. 2019); the parameter, such as 1.0.
        mix_share: Share of the run, from its start, in which pictures are mixed.
        l2_sp: Strength of the pull of pretrained weights towards their start (Li et al. 2018), such as 0.1; it takes the place
            of weight decay there, which stays for the head.
        memory_format: Layout of pictures in memory: auto (channels_last, but on Apple GPUs), channels_last, contiguous.
        grad_checkpointing: Compute activations again in the backward pass instead of holding them: less memory, more time.
        compile: A backend of torch.compile for the backbone, such as inductor; none if null.

    Raises:
        ConfigError: If options are unknown or contradict each other.
        WeightsError: If the weights cannot be had or do not fit.
    """

    timetable: Timetable | None = None
    _head_has_learned = False
    _resumed = (0, 0)
    _behind = Behind()  # what a checkpoint says of the part of the run that is behind
    start_accuracy: float | None = None  # on the validation pictures, of a head that was solved for

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        num_classes: int,
        class_names: list[str] | None = None,
        backbone_args: dict[str, Any] | None = None,
        bottleneck: int | None = None,
        weights: str = "auto",
        partial_weights: bool = False,
        init: Literal["default", "kaiming"] = "default",
        head_init: HeadInit = "default",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        freezing: str | list[dict[str, Any]] = "full",
        bn: BatchNormMode = "auto",
        bn_momentum: float | None = None,
        bn_eps: float | None = None,
        optimizer: str = "sgd",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 0.01,
        lr_rule: LearningRateRule = "none",
        lr_batch: int = 32,
        lr_decay: float = 1.0,
        lr_scale: float | dict[str, float] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: ScheduleName = "cosine",
        warmup_epochs: float = 0.0,
        warmup_steps: int = 0,
        ramp_epochs: float = 0.5,
        min_lr_ratio: float = 0.0,
        step_milestones: list[float] | None = None,
        step_drop: float = 0.1,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights = "none",
        focal_gamma: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_share: float = 0.9,
        l2_sp: float = 0.0,
        memory_format: Literal["auto", "channels_last", "contiguous"] = "auto",
        grad_checkpointing: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        weights = os.fspath(weights)
        self.save_hyperparameters()
        check_options(self.hparams)
        self.class_names = class_names
        backbone_args = {**(backbone_args or {}), **({"drop_path_rate": drop_path} if drop_path else {})}
        self.backbone = create_model(backbone, num_classes, **backbone_args)
        self.input_spec = input_spec_of(self.backbone)
        classifier, self.stages = split_head(self.backbone)
        self.classifier_name = classifier.name
        self.embedding = build_bottleneck(classifier.in_features, bottleneck)
        self.head: nn.Module = nn.Linear(bottleneck or classifier.in_features, num_classes)
        self.dropout = nn.Dropout(dropout)
        self.objective = Objective(self.hparams)
        initialise(self.backbone, self.head, init, bn_momentum=bn_momentum, bn_eps=bn_eps)
        self.weights_report = load_weights(
            self.backbone,
            self.head,
            source=weights,
            backbone_name=backbone,
            classifier=classifier.name,
            stages=self.stages,
            partial=partial_weights,
            backbone_options=backbone_args,
            class_names=class_names,
        )
        if grad_checkpointing:
            checkpoint_gradients(self.backbone, self._dummy_size)
        self._never_trained = {name for name, p in self.named_parameters() if not p.requires_grad}
        self.metrics = nn.ModuleDict(
            {f"{split}_metrics": build_metrics(split, num_classes) for split in ("train", "val", "test")}
        )
        self.losses = nn.ModuleDict({f"{split}_loss": MeanLoss(split == "train") for split in ("train", "val", "test")})
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(1, 3, 1, 1), persistent=False)
        said = self.weights_report.input
        self.expect(self.input_spec if said is None else InputSpec.from_plain(said))
        if memory_format == "auto":
            memory_format = "contiguous" if torch.backends.mps.is_available() else "channels_last"
        self.memory_layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format
        self.to(memory_format=self.memory_layout)

    # ---------------------------------------------------------------------------------------------------------- steps

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss: in training as the options say, otherwise plain cross-entropy.

        Args:
            logits: (N, num_classes).
            labels: (N,), class indices; or (N, num_classes), distributions, where pictures were mixed.
        """
        return self.objective.loss(logits, labels) if self.training else F.cross_entropy(logits, labels)

    @property
    def has_cross_entropy(self) -> bool:
        """Whether the training loss is of the size of a cross-entropy, so that guessing has ln(num_classes)."""
        mine = ("loss", "_step", "training_step")
        return self.classifies and all(getattr(type(self), name) is getattr(FinetuneModule, name) for name in mine)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first of several processes, above a progress bar, and without letters that steer a terminal."""
        super().print(*(clean(str(arg)) for arg in args), **kwargs)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer groups, one per stage and kind of weight decay, each with its own rate in it."""
        rule = self.hparams["lr_rule"]
        batch = self.hparams["lr_batch"] if rule == "none" else effective_batch(self.trainer)
        options = StageRates(
            lr=self.hparams["lr"] * lr_factor(rule, batch, self.hparams["lr_batch"]),
            lr_decay=self.hparams["lr_decay"],
            lr_scale=self.hparams["lr_scale"],
            weight_decay=self.hparams["weight_decay"],
        )
        groups = build_groups(dict(self.named_parameters()), self.stage_parameters(), self.stage_names, options)
        if self.hparams["l2_sp"]:
            drawn = {stage.name for stage in self.stages} - set(self.weights_report.untrained)  # to their start, not to zero
            for group in groups:
                group["weight_decay"] *= group["stage"] not in drawn
        return groups

    def unpack(self, batch: Any) -> tuple[Tensor | Kept, Tensor]:
        """Return pictures and labels of a batch: a mapping with `image` (or `kept` and `stage`) and `label`, or a pair."""
        if isinstance(batch, Mapping) and {"kept", "stage", "label"} <= set(batch):
            return Kept(batch["kept"], batch["stage"]), batch["label"]
        if isinstance(batch, Mapping) and {"image", "label"} <= set(batch):
            return batch["image"], batch["label"]
        if isinstance(batch, Sequence) and len(batch) >= 2:
            return batch[0], batch[1]
        found = f"a mapping with {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(f"Expected a batch with 'image' and 'label', or a pair (images, labels); found {found}.")

    def images_and_labels(self, batch: Any) -> tuple[Tensor | Kept, Tensor]:
        """Return pictures and labels of a batch: class indices (N,), or distributions (N, num_classes); see `labels.labels_of`.

        Raises:
            DataError: If the batch has no labels of its pictures.
        """
        images, labels = self.unpack(batch)
        number = len(images.activation if isinstance(images, Kept) else images)
        ours = isinstance(batch, Mapping) and "index" in batch  # of a folder: an accelerator need not wait for a look at them
        check = not ours or getattr(labels, "is_cpu", True)
        return images, labels_of(labels, number, self.hparams["num_classes"], check_values=check)

    def _step(self, batch: Any, split: str) -> dict[str, Tensor]:
        images, labels = self.images_and_labels(batch)
        targets = labels
        if split == "train":
            images, targets = self.objective.mix(
                images, labels, self.current_epoch, self.timetable.epochs if self.timetable else 0
            )
        logits = self(images)
        loss = self.loss(logits, targets)
        if split == "train":
            loss = loss + self.objective.pull(self)
        labels = classes_of(labels)
        self._metrics_of(split).update(logits.detach(), labels)
        self._log_loss(split, loss, len(labels), add_dataloader_idx=False)
        return {"loss": loss, "logits": logits.detach(), "labels": labels}

    def _log_loss(self, split: str, loss: Tensor, number: int, **options: Any) -> None:
        mean = self.losses[f"{split}_loss"]
        mean.update(loss.detach(), number)  # type: ignore[operator]
        self.log(f"{split}/loss", mean, on_step=False, on_epoch=True, batch_size=number, **options)  # type: ignore[arg-type]

    def _metrics_of(self, split: str) -> MetricCollection:
        metrics = self.metrics[f"{split}_metrics"]
        assert isinstance(metrics, MetricCollection)
        return metrics

    def _log_metrics(self, split: str) -> None:
        metrics = self._metrics_of(split)
        values = metrics.compute()
        metrics.reset()
        for name, value in values.items():
            self.log(name, value, prog_bar=name.endswith("/acc"), sync_dist=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a training batch."""
        return self._step(batch, "train")["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Add a validation batch to the metrics; return its loss, logits and labels."""
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Add a test batch to the metrics; return its loss, logits and labels."""
        return self._step(batch, "test")

    def on_train_epoch_end(self) -> None:
        """Log the training metrics of the epoch."""
        self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test")

    # ------------------------------------------------------------------------------------------------------- training

    def setup(self, stage: str) -> None:
        """Take class names and input size from the data; work out the phases of the run."""
        data = getattr(self.trainer, "datamodule", None)
        if stage != "predict":  # images need no classes then
            self.class_names = list(getattr(data, "classes", None) or []) or self.class_names
        said = getattr(data, "input_spec", None)
        if said is not None:  # normalisation is of the weights, whoever says the size
            self.input_spec = replace(said, mean=self.input_spec.mean, std=self.input_spec.std)
            require_size(self.backbone, self.input_spec.size)
        if stage == "fit":
            if self.hparams["compile"]:
                self.backbone.compile(backend=self.hparams["compile"])
            phases = plan(self.hparams["freezing"], self.stage_names, run_length(self.trainer))
            if self.has_unused_parameters:
                require_searching(
                    self.trainer, f"With model.freezing {self.hparams['freezing']} not everything trains all the time"
                )
            refuse_synchronised_batchnorm(self.trainer, self.backbone)
            self._phase = self._hashed = None
            self.train()
            everything = Phase(tuple(self.stage_names), False, 0, 1)
            self._set_trainable(phases[0] if len(phases) == 1 else everything)  # what may thaw must be known to DDP
            self.objective.weigh_classes(data)

    def on_fit_start(self) -> None:
        """Let a new head start as the options say, unless a checkpoint will bring it."""
        if self.head_is_new and self.trainer.ckpt_path is None and self.hparams["head_init"] != "default":
            self.print(start_head(self, self.trainer, self.hparams["head_init"]))

    def on_train_end(self) -> None:
        """Remember that the head has learned: another training goes on with it."""
        self._head_has_learned = True

    @property
    def head_is_new(self) -> bool:
        """Whether no weights brought the head, and no training has finished since."""
        return self.weights_report.head == "new" and not self._head_has_learned

    def configure_optimizers(self) -> Any:
        """Return the optimizer with all groups, and a scheduler that multiplies each by its factor at every step."""
        optimizer = build_optimizer(
            self.hparams["optimizer"],
            self.param_groups(),
            self.hparams["momentum"],
            self.hparams["optimizer_args"],
            fused=not scales_loss(self.trainer),  # or gradients would be unscaled behind their clipping
        )
        stages = [group["stage"] for group in optimizer.param_groups]
        factors = [self._factor_of(stage) for stage in stages]
        self._rates, self._accumulated = [group["lr"] for group in optimizer.param_groups], self.trainer.accumulate_grad_batches
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"}}

    def _factor_of(self, stage: str) -> Callable[[int], float]:
        """Return the factor of a stage as a scheduler asks for it: the place in the run counts, not the scheduler's steps."""
        return lambda _: self.timetable.factor_at(stage, self.place) if self.timetable else 1.0

    @property
    def place(self) -> Place:
        """Where training stands."""
        return place_of(self.trainer, self._resumed)

    def on_train_start(self) -> None:
        """Fix the timetable of phases and rates, now that the epoch and the length of an epoch are known."""
        if self.trainer.ckpt_path is not None:
            require_optimizer_fits(self.trainer.optimizers)
        let_gradients_be_clipped(self.trainer)
        behind, self._behind = self._behind, Behind()
        behind.settle(self.trainer)
        self._resumed = batches_done(self.trainer)
        self.timetable = build_timetable(self.trainer, self.stage_names, self.hparams, self.place, behind.knots)
        self._set_rates()
        if change := behind.change(self.timetable, self.place):
            self.print(change)
        self.apply_phase(phase_at(self.timetable.phases, self.current_epoch))
        self.objective.hold_to_start(self, self.weights_report.untrained)
        self.print(self.weights_report.summary())
        self.print(self.timetable.table(self.trainer.optimizers[0].param_groups))
        self._warn_of_random_parts()

    def _warn_of_random_parts(self) -> None:
        assert self.timetable is not None
        untrained = self.weights_report.untrained
        never = self.timetable.never_trained(untrained)
        if never:
            fault = f"{', '.join(never)} start from random weights and never train"
        elif untrained and self.hparams["bn"] == "frozen":
            fault = f"{', '.join(untrained)} start from random weights, and their BatchNorm keeps the statistics of the start"
        else:
            return
        self.print(
            f"warning: {fault}. Give pretrained weights, or train everything "
            "(--model.freezing full --model.bn train, or the recipe scratch)."
        )

    def _set_rates(self) -> None:
        """Give the optimizer the rates of this place."""
        scheduler = getattr(self, "_scheduler", None)
        if scheduler is None:  # a subclass has its own configure_optimizers
            return
        groups = self.trainer.optimizers[0].param_groups
        if self.hparams["lr_rule"] != "none":  # a resumed run may have another effective batch than its checkpoint
            factor = lr_factor(self.hparams["lr_rule"], self.trainer.accumulate_grad_batches, self._accumulated)
            followed = [rate * factor for rate in self._rates]
            scheduler.base_lrs = followed
            for group, rate in zip(groups, followed, strict=True):
                group["initial_lr"] = rate
        rates = [base * share(0) for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
        for group, rate in zip(groups, rates, strict=False):
            group["lr"] = rate

    def on_train_epoch_start(self) -> None:
        """Enter the phase of the epoch, and take notice if it has another length than the last."""
        assert self.timetable is not None
        self._follow_length()
        phase = phase_at(self.timetable.phases, self.current_epoch)
        if phase != self._phase:
            self.apply_phase(phase)
            self.print(self.timetable.announce(self.current_epoch))
        else:
            self.train()

    def _follow_length(self) -> None:
        times = self.timetable
        lengths = lengths_of(self.trainer)
        if times is None or times.pace is None or lengths is None or not isinstance(times.schedule, Schedule):
            return  # a sweep of the learning rate is none
        if Pace(lengths).length(self.current_epoch) != times.steps_per_epoch:
            knots = times.pace.until(Fraction(self.current_epoch))
            self.timetable = build_timetable(self.trainer, self.stage_names, self.hparams, self.place, knots)
        self._set_rates()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what is random in the step (dropout, stochastic depth) by its place in the run; log the learning rates."""
        torch.manual_seed(seed_of(global_seed(), "step", self.current_epoch, batch_idx, self.global_rank))
        if self.global_step % getattr(self.trainer, "log_every_n_steps", 50) == 0 and self.trainer.loggers:
            rates = {f"lr/{g['stage']}": g["lr"] for g in self.trainer.optimizers[0].param_groups if "stage" in g}
            for logger in self.trainer.loggers:
                logger.log_metrics(rates, step=self.global_step)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let class names, normalisation, input size and the origin of the weights travel inside, as plain values."""
        checkpoints.stamp(checkpoint, self)
        self.objective.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take class names and input size from a checkpoint, and refuse one that contradicts the options of a resumed run."""
        self._head_has_learned = True
        self._loaded_step = checkpoint.get("global_step")
        checkpoints.adopt(checkpoint, self)
        self._behind = Behind.of(checkpoint)
        self.objective.load(checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, **kwargs: Any) -> FinetuneModule:  # type: ignore[override]
        """Load a checkpoint without running pickled code and without looking for the pretrained weights again.

        Args:
            checkpoint_path: The file.
            **kwargs: Values that replace those in the checkpoint, and the other arguments of Lightning's method.
        """
        kwargs = {"weights": "none", "weights_only": True, "map_location": "cpu", **kwargs}
        with guarding(packages=[cls.__module__.partition(".")[0]]), guarded_parser():  # it may name a backbone
            return super().load_from_checkpoint(checkpoint_path, **kwargs)
