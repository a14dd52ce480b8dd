"""Averages of weights during a run: a moving one, and one with those at the start of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks.weight_averaging import WeightAveraging
from torch import Tensor

from finetune.errors import ConfigError
from finetune.stages import HEAD

AVERAGED = "averaging_state"  # Lightning's entry in a checkpoint whose weights are an average


class PhaseAverage(WeightAveraging):
    """An average of weights that validation, checkpoints and what comes after the run see.

    It begins where the first phase that trains more than the head begins, and follows the weights until then: what a new head
    went through is not worth remembering.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the average.

        Raises:
            ConfigError: If the module can have none.
        """
        if stage == "fit" and (reason := getattr(pl_module, "why_no_average", None)):
            raise ConfigError(f"{reason} Leave out --run.ema, and set --run.wise_ft null.")
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average and the weights behind it; a test needs the average alone, and the module has it."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the average to the device of the weights, which were elsewhere when it was made."""
        if self._average_model is not None:
            self._average_model.to(pl_module.device)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the average when training is over: a later validation shall not swap it in."""
        self._average_model = None


class PhaseEMA(PhaseAverage):
    """Exponential moving average of the weights.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage has it, so that short
    runs are not held at their start.

    Args:
        decay: Share of the average that stays in each step, such as 0.999.

    Raises:
        ConfigError: If the decay is not between 0 and 1.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"Expected run.ema to be a decay between 0 and 1, such as 0.999; found {decay}.")
        super().__init__(multi_avg_fn=lambda averages, weights, steps: ema_step(averages, weights, steps, decay))
        self.decay = decay

    def state_dict(self) -> dict[str, Any]:
        """Return the decay, so that a checkpoint tells what its weights are an average of."""
        return {**super().state_dict(), "decay": self.decay}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make sure that the weights have room for small steps.

        Raises:
            ConfigError: If they are float16 themselves.
        """
        if any(parameter.dtype == torch.float16 for parameter in pl_module.parameters()):
            raise ConfigError(
                "run.ema cannot average weights that are float16 themselves, as under precision 16-true. Use 16-mixed, "
                "bf16-true or 32-true, or leave out run.ema."
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Move the average, or let it follow the weights as long as it has not begun."""
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if self._average_model is not None and trainer.current_epoch < first_epoch(pl_module):
            self._average_model.n_averaged.zero_()  # the next update copies the weights


class WiseFT(PhaseAverage):
    """The weights between those that training began with and those it has reached: start + share * (now - start).

    What pretrained weights knew is kept better, and few pictures are learnt by heart less (Wortsman et al. 2022, "Robust
    fine-tuning of zero-shot models", who recommend a share of 0.5).

    Args:
        share: How far to go from the start, between 0 and 1.

    Raises:
        ConfigError: If the share is not between 0 and 1, or a head begins with random weights, as training does.
    """

    def __init__(self, share: float) -> None:
        if not 0 < share < 1:
            raise ConfigError(f"Expected run.wise_ft to be a share between 0 and 1, such as 0.5; found {share}.")
        super().__init__()
        self.share = share
        self._start: dict[str, Tensor] = {}

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Leave the average to this class."""
        return False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the average.

        Raises:
            ConfigError: If the module's BatchNorm statistics become others in validation, which a mixture would undo.
        """
        if stage == "fit" and getattr(getattr(pl_module, "adaptation", None), "restates_batchnorm", False):
            raise ConfigError(
                f"{type(pl_module.adaptation).__name__} measures the model with the target's BatchNorm statistics, and "
                "run.wise_ft mixes them with those at the start. Leave the mixture out: --run.wise_ft null."
            )
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the weights, unless a checkpoint brought those of the start."""
        if not self._start:
            self._begin(pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Refuse a random start, before the first step; the module knows its phases by now."""
        random = getattr(pl_module, "head_is_new", False) and pl_module.hparams["head_init"] == "default"
        if random and not trainer.global_step and not first_epoch(pl_module):
            raise ConfigError(
                "run.wise_ft mixes the trained weights with those at the start, and there this head is random. Let it be "
                "solved for (--model.head_init logistic) or trained first (--model.freezing lp_ft), or leave the mixture out "
                "(--run.wise_ft null)."
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Begin behind the last step of the head's own phase."""
        if trainer.is_last_batch and trainer.current_epoch + 1 == first_epoch(pl_module):
            self._begin(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let validation see the mixture."""
        self._mix(trainer, pl_module)
        super().on_validation_epoch_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint hold the mixture."""
        self._mix(trainer, pl_module)
        super().on_save_checkpoint(trainer, pl_module, checkpoint)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the mixture in the module."""
        self._mix(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _begin(self, module: L.LightningModule) -> None:
        now = module.state_dict()
        self._start = {name: tensor.detach().clone() for name, tensor in now.items() if tensor.is_floating_point()}

    def _mix(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Bring the average up to date: the weights themselves until it begins, then the mixture."""
        if self._average_model is None:
            return
        now, averages = module.state_dict(), self._average_model.module.state_dict()
        begun = trainer.current_epoch >= first_epoch(module)
        for name, tensor in now.items():
            mixed = begun and name in self._start
            averages[name].copy_(torch.lerp(self._start[name].to(tensor), tensor, self.share) if mixed else tensor)

    def state_dict(self) -> dict[str, Any]:
        """Return the start, which a resumed run needs, and the share, so that a checkpoint tells what its weights are."""
        return {**super().state_dict(), "start": self._start, "share": self.share}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the start from a checkpoint."""
        super().load_state_dict(state_dict)
        self._start = dict(state_dict["start"])


def average_of(options: Any) -> PhaseAverage | None:
    """Return the average that the options of a run ask for.

    Args:
        options: RunOptions, or a mapping's namespace with `ema` and `wise_ft`.
    """
    if options.ema is not None:
        return PhaseEMA(options.ema)
    return WiseFT(options.wise_ft) if options.wise_ft is not None else None


def kind_of_average(checkpoint: Mapping[str, Any]) -> str | None:
    """Return which average a checkpoint holds, as its option is called: `ema`, `wise_ft`, or None."""
    if AVERAGED not in checkpoint:
        return None
    return "wise_ft" if WiseFT.__name__ in checkpoint.get("callbacks", {}) else "ema"


def describe_average(checkpoint: Mapping[str, Any]) -> str:
    """Return what the weights of a checkpoint are an average of, as its options say it; empty if they are none."""
    kind = kind_of_average(checkpoint)
    if kind is None:
        return ""
    cls, option = {"ema": (PhaseEMA, "decay"), "wise_ft": (WiseFT, "share")}[kind]
    state = checkpoint.get("callbacks", {}).get(cls.__name__)
    value = state.get(option) if isinstance(state, Mapping) else None  # checkpoints of earlier versions do not hold it
    return f"{kind} {value:g}" if isinstance(value, float) else kind


def refuse_other_average(written: str | None, options: Any) -> None:
    """Make sure that a resumed run averages as it did.

    Args:
        written: The kind that the checkpoint holds.
        options: RunOptions.

    Raises:
        ConfigError: If the options ask for another one.
    """
    asked = "ema" if options.ema is not None else "wise_ft" if options.wise_ft is not None else None
    if asked != written:
        with_what = {None: "without an average of the weights", "ema": "with run.ema", "wise_ft": "with run.wise_ft"}
        raise ConfigError(
            f"The checkpoint was written {with_what[written]}, and now the run is {with_what[asked]}: a resumed run goes on as "
            f"it was. Leave these options as they were, or start anew from the trained weights: --model.weights CHECKPOINT."
        )


def ema_step(averages: list[Tensor], weights: list[Tensor], steps: Tensor | int, decay: float) -> None:
    """Move averages by one step, in place.

    Args:
        averages: The averages so far; tensors of one dtype.
        weights: The weights now.
        steps: How many weights the averages hold.
        decay: The greatest share of the average that stays.
    """
    if not averages[0].is_floating_point():
        torch._foreach_copy_(averages, weights)  # counters
        return
    number = int(steps)
    weights = [weight.to(average.dtype) for average, weight in zip(averages, weights, strict=True)]
    torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + number) / (10 + number)))


def first_epoch(module: L.LightningModule) -> int:
    """Return the epoch in which the first phase begins that trains more than the head; 0 for modules without phases."""
    timetable = getattr(module, "timetable", None)
    if timetable is None:
        return 0
    return next((int(phase.start) for phase in timetable.phases if set(phase.train) - {HEAD} or phase.norms), 0)
