"""What is wrong with the gradients of a run, in words that name the stage; each fault is told once per stage.

Gradients of different stages are compared with those of the stage that is nearest to the loss, at the same step: at the end of
a good run all of them are small. In the healthy runs that the limits were chosen by (ResNets of 18 to 56 layers, pretrained and
random) the ratio stayed between 1/140 and 20; in a network of 56 layers without shortcuts it went from 5,700 to 1/5,000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from finetune.stage_flow import Flow, finite

VANISHING = 1e-3
"""Below this share of the gradient norm nearest to the loss, a stage's gradient has vanished."""
EXPLODING = 1e3
"""Above this multiple of it, it has exploded."""
TOO_FAR = 2.0
"""An update of this many times the norm of the weights is none that training can follow."""
LASTING = 3
"""A fault that may pass, as while a new head is still zero, is one after so many measurements in a row."""


class FlowWarnings:
    """Judge measurements as they come.

    Args:
        scaled: Whether the loss is scaled (16-bit mixed precision), so that a step with infinite gradients now and then is part
            of finding the scale.
    """

    def __init__(self, scaled: bool = False) -> None:
        self._scaled = scaled
        self._told: set[tuple[str, str]] = set()
        self._in_a_row: Counter[tuple[str, str]] = Counter()

    def judge(self, step: int, flows: Mapping[str, Flow]) -> list[str]:
        """Return what there is to say about a measurement.

        Args:
            step: The optimizer step, counted from 0.
            flows: What the step did to each stage, in the order of the network.
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
        far = {stage: flow.update_ratio for stage, flow in trained.items() if (flow.update_ratio or 0) > TOO_FAR}
        return [text for text in (*said, self._too_far(step, far)) if text]

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

    def _too_far(self, step: int, ratio: Mapping[str, float | None]) -> str | None:
        stages = self._new("too far", ratio)
        if not stages:
            return None
        numbers = ", ".join(f"{stage} by {ratio[stage]:.3g} times" for stage in stages)
        return (
            f"the weights explode: step {step} changed {numbers} their own norm, where a thousandth is usual. The learning "
            "rate is too large: lower --model.lr, or add --model.warmup_epochs or --trainer.gradient_clip_val 1.0."
        )


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
