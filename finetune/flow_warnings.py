"""What is wrong with the gradients of a run, in words that name the stage; each fault is told once per stage.

Gradients of different stages are compared with those of the stage that is nearest to the loss, at the same step: at the end of
a good run all of them are small. In the healthy runs that the limits were chosen by (ResNets of 18 to 56 layers, pretrained and
random) the ratio stayed between 1/140 and 20; in a network of 56 layers without shortcuts it went from 5,700 to 1/5,000.

How far a step moves a stage is judged by itself, as a share of the norm of its weights: with Adam it is in proportion to the
learning rate, so that a rate that would be right follows from it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from torch import nn

from finetune.stage_flow import Flow, finite
from finetune.stages import HEAD

VANISHING = 1e-3
"""Below this share of the gradient norm nearest to the loss, a stage's gradient has vanished."""
EXPLODING = 1e3
"""Above this multiple of it, it has exploded."""
TOO_FAR = 0.1
"""An update of this share of the norm of the weights is a hundred times the usual one: what was pretrained is lost soon."""
ROUGH = 0.01
"""An update of this share is rough, and as much as a rate that is suggested may lead to."""
NEW_TOO_FAR = 2.0
"""What starts from random values or zero has nothing to lose and may move by its own norm at first; this is too far at once."""
NEW_STEPS = 16
"""After so many steps of a phase its limit is that of all others."""
LOSS_TOO_HIGH = 3.0
"""A training loss of this many times that of guessing has diverged."""
LASTING = 3
"""A fault that may pass, as while a new head is still zero, is one after so many measurements in a row."""


class Rate(NamedTuple):
    """The learning rate of a stage.

    Attributes:
        now: At the step that was measured.
        peak: The highest of its schedule.
    """

    now: float
    peak: float


class FlowWarnings:
    """Judge measurements as they come.

    Args:
        scaled: Whether the loss is scaled (16-bit mixed precision), so that a step with infinite gradients now and then is part
            of finding the scale.
        lr: The learning rate that the user sets (`model.lr`), for a suggestion of another; none is made if None.
        new: The stages that start from random values or zero.
    """

    def __init__(self, scaled: bool = False, lr: float | None = None, new: Collection[str] = (HEAD,)) -> None:
        self._scaled = scaled
        self._new_stages = frozenset(new)
        self._lr = lr
        self._suggested = math.inf
        self._told: set[tuple[str, str]] = set()
        self._in_a_row: Counter[tuple[str, str]] = Counter()

    def judge(
        self, step: int, flows: Mapping[str, Flow], rates: Mapping[str, Rate] | None = None, since: float | None = None
    ) -> list[str]:
        """Return what there is to say about a measurement.

        Args:
            step: The optimizer step, counted from 0.
            flows: What the step did to each stage, in the order of the network.
            rates: The learning rate of each stage, as far as it is known.
            since: Steps since the phase began; those of the run if None.
        """
        trained = {stage: flow for stage, flow in flows.items() if not flow.frozen}
        nearest = next(reversed(trained), "")
        near = trained[nearest].grad_norm if trained else None
        broken = {stage: flow for stage, flow in trained.items() if flow.nonfinite}
        said = [self._not_finite(step, broken)]
        if near and finite(near):
            ratio = {s: flow.grad_norm / near for s, flow in trained.items() if flow.grad_norm is not None and s not in broken}
            small = {s: share for s, share in ratio.items() if share < VANISHING and ("rests", s) not in self._told}
            large = {stage: share for stage, share in ratio.items() if share > EXPLODING}
            said += [self._vanishing(step, small, trained, nearest), self._exploding(step, large, trained, nearest)]
        settled = (step if since is None else since) >= NEW_STEPS
        limits = {stage: NEW_TOO_FAR if stage in self._new_stages and not settled else TOO_FAR for stage in trained}
        far = {s: flow.update_ratio for s, flow in trained.items() if flow.update_ratio and flow.update_ratio > limits[s]}
        return [text for text in (*said, self._too_far(step, far, rates or {})) if text]

    def judge_loss(self, epoch: int, loss: float, classes: int) -> list[str]:
        """Return what there is to say about the mean training loss of an epoch.

        Args:
            epoch: The epoch, counted from 1.
            loss: Its mean loss, a cross-entropy.
            classes: How many classes there are: guessing has the logarithm of their number.
        """
        guessing = math.log(max(classes, 3))  # of two classes a wrong one may cost more than three times ln 2
        if not (math.isfinite(loss) and loss > LOSS_TOO_HIGH * guessing):
            return []
        text = (
            f"the training loss of epoch {epoch} is {loss:.3g}, where guessing among {classes} classes has "
            f"{math.log(classes):.2g}: training does not learn but diverges. {self._advice(None)}"
        )
        return self.once("loss", "", text)

    def once(self, fault: str, stage: str, text: str) -> list[str]:
        """Return a text in a list unless this fault of the stage was told before."""
        return [text] if self._new(fault, [stage]) else []

    def _new(self, fault: str, stages: Iterable[str], lasting: int = 1) -> list[str]:
        """Count a fault that some stages show at this time; return those of which it has to be told now."""
        stages = list(stages)
        for key in [key for key in self._in_a_row if key[0] == fault and key[1] not in stages]:
            del self._in_a_row[key]
        self._in_a_row.update((fault, stage) for stage in stages)
        new = [s for s in stages if self._in_a_row[fault, s] >= lasting and (fault, s) not in self._told]
        self._told.update((fault, stage) for stage in new)
        return new

    def _not_finite(self, step: int, broken: Mapping[str, Flow]) -> str | None:
        stages = self._new("not finite", broken, LASTING if self._scaled else 1)
        if not stages:
            return None
        numbers = ", ".join(f"{stage} ({broken[stage].nonfinite:,} values)" for stage in stages)
        weights = [stage for stage in stages if not finite(broken[stage].weight_norm)]
        lost = "The weights themselves are lost, too: go back to a checkpoint, or start again. " if weights else ""
        return (
            f"at step {step} gradients are NaN or infinite: {numbers}. {lost}A smaller --model.lr, --model.warmup_epochs or "
            "--trainer.gradient_clip_val 1.0 may help; pictures with NaN are named apart."
        )

    def _vanishing(self, step: int, ratio: Mapping[str, float], flows: Mapping[str, Flow], nearest: str) -> str | None:
        stages = self._new("vanishing", ratio, LASTING)
        if not stages:
            return None
        return (
            f"gradients vanish: at step {step} their norm is {_norms(stages, flows)}, and {flows[nearest].grad_norm:.2g} in "
            f"{nearest}. They hardly learn. Shortcuts, normalisation layers or another start (--model.init kaiming) help."
        )

    def _exploding(self, step: int, ratio: Mapping[str, float], flows: Mapping[str, Flow], nearest: str) -> str | None:
        stages = self._new("exploding", ratio)
        if not stages:
            return None
        return (
            f"gradients explode: at step {step} their norm is {_norms(stages, flows)}, and {flows[nearest].grad_norm:.2g} in "
            f"{nearest}. --trainer.gradient_clip_val 1.0, --model.warmup_epochs or shortcuts help."
        )

    def _too_far(self, step: int, ratio: Mapping[str, float], rates: Mapping[str, Rate]) -> str | None:
        stages = self._new("too far", ratio)
        if not stages:
            return None
        at = {stage: f" (learning rate {rates[stage].now:.2g})" if stage in rates else "" for stage in stages}
        numbers = ", ".join(f"{stage} by {ratio[stage]:.3g} times{at[stage]}" for stage in stages)
        factors = [
            ROUGH / ratio[s] * min(1.0, rates[s].now / rates[s].peak) for s in stages if s in rates and rates[s].peak > 0
        ]
        return (
            f"the weights explode: step {step} changed {numbers} their own norm, where a thousandth is usual and a hundredth "
            f"is rough. {self._advice(min(factors, default=None))}"
        )

    def _advice(self, factor: float | None) -> str:
        """Say what to type.

        Args:
            factor: What the learning rate should be multiplied by at most; not known if None.
        """
        if self._lr is None or self._lr <= 0:
            return (
                "The learning rate is too large: lower --model.lr, or add --model.warmup_epochs or "
                "--trainer.gradient_clip_val 1.0."
            )
        if factor is not None or math.isinf(self._suggested):
            self._suggested = min(self._suggested, below(self._lr * (0.1 if factor is None else factor)))
        return (
            f"The learning rate is too large: start again with --model.lr {self._suggested:.0e} (it is {self._lr:g}, and "
            "--model.lr_scale multiplies it for the stages below the head), or look for one with: resnet-finetune lr-find"
        )


def below(value: float) -> float:
    """Return the nearest of 1, 2 and 5 times a power of ten that is not above a positive number.

    >>> below(0.00049), below(0.02), below(3.7e-5)
    (0.0002, 0.02, 2e-05)
    """
    power = math.floor(math.log10(value) + 1e-9)
    return next(each * 10.0**power for each in (5, 2, 1) if each * 10.0**power <= value * (1 + 1e-9))


def _norms(stages: Iterable[str], flows: Mapping[str, Flow]) -> str:
    return ", ".join(f"{flows[stage].grad_norm:.2g} in {stage}" for stage in stages)


def why_it_rests(
    stage: str, named: Mapping[str, nn.Parameter], meant: Collection[str], optimized: Collection[int]
) -> str | None:
    """Return why a stage that should train cannot, or not as a whole; None if it can.

    Args:
        stage: Its name.
        named: Its parameters by name.
        meant: The names of those that the network's author lets train.
        optimized: The ids of the parameters that the optimizer has.
    """
    still = [name for name, parameter in named.items() if not parameter.requires_grad]
    if len(still) == len(named) or set(still) & set(meant):
        return (
            f"'{stage}' should train now, but requires_grad is False for {_some(still, len(named))}. If that is a mistake, "
            "remove what sets it; if not, freeze the stage by --model.freezing."
        )
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if all(parameter.grad is None for parameter in trained.values()):
        return (
            f"'{stage}' should train now, but no gradient reaches it: its output does not enter the loss. Look for detach() or "
            "torch.no_grad() behind it, or freeze it by --model.freezing."
        )
    left_out = [name for name, parameter in trained.items() if id(parameter) not in optimized]
    if left_out:
        return (
            f"'{stage}' should train now, but the optimizer lacks {_some(left_out, len(named))}: add them in "
            "param_groups() or configure_optimizers()."
        )
    return None


def _some(names: Collection[str], of: int) -> str:
    """Name some of the parameters of a stage.

    >>> _some(["conv1.weight"], of=3), _some(["fc.weight", "fc.bias"], of=2)
    ('1 of its 3 parameters (conv1.weight)', 'all of its parameters')
    """
    if len(names) == of:
        return "all of its parameters"
    shown = ", ".join(list(names)[:3])
    return f"{len(names)} of its {of} parameters ({shown}{', ...' if len(names) > 3 else ''})"
