"""A freezing policy is a list of phases: a pure function of the epoch, so that it is right after a resume by construction.

    full               everything trains
    head               the head alone (linear probe)
    last:N             the head and the N stages before it
    gradual[:K]        one more stage every K epochs, from the head down (ULMFiT, Howard & Ruder 2018); K is 1 unless given
    lp_ft[:L]          the head alone for the length L, then everything (Kumar et al. 2022); L is 0.3 of the run unless given
    surgical:A,B       the named stages and the head (Lee et al. 2023)
    norm               all normalisation layers and the head

A length is a number of epochs (3) or a share of the run (0.3). A recipe may spell the list out:

    freezing:
      - {train: head, share: 0.3}
      - {train: [layer3, layer4, head], epochs: 5}
      - {train: full}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.errors import ConfigError, did_you_mean
from finetune.stages import HEAD, Stage, require_stage

POLICIES = ("full", "head", "last", "gradual", "lp_ft", "surgical", "norm")
_FORMS = "full, head, last:N, gradual[:K], lp_ft[:LENGTH], surgical:STAGE[,STAGE], norm, or a list of phases"


@dataclass(frozen=True)
class Phase:
    """What trains from one epoch to another.

    Attributes:
        train: The stages that train, in the order of the network.
        norms: Whether the normalisation layers of all other stages train too.
        start: First epoch, counted from 0.
        end: The epoch before which it ends.
    """

    train: tuple[str, ...]
    norms: bool
    start: int
    end: int


@dataclass(frozen=True)
class _Part:
    """A phase whose length is not worked out yet; without a length it takes what is left."""

    train: tuple[str, ...]
    norms: bool
    length: int | float | None


def plan(policy: str | Sequence[Mapping[str, Any]], stages: Sequence[str], epochs: int) -> tuple[Phase, ...]:
    """Work out the phases of a run.

    Args:
        policy: A short name or a list of phases, see the module's text.
        stages: The names of all stages in the order of the network, the head last.
        epochs: Length of the run.

    Returns:
        Phases that cover the epochs without a gap.

    Raises:
        ConfigError: If a name matches nothing, nothing would train, or a phase would never run.

    >>> for phase in plan("lp_ft:2", ["stem", "layer1", "head"], epochs=5):
    ...     print(phase.start, phase.end, *phase.train)
    0 2 head
    2 5 stem layer1 head
    """
    parts = _parse_name(policy, stages) if isinstance(policy, str) else _parse_list(policy, stages)
    if epochs < len(parts):
        raise ConfigError(
            f"The freezing policy {policy!r} has {len(parts)} phases, but the run has {epochs} epoch{'s' * (epochs != 1)}: the "
            f"last would never run. Set trainer.max_epochs to at least {len(parts)} or choose a policy with fewer phases."
        )
    starts = [0]
    for number, part in enumerate(parts[:-1], start=1):
        begin, left = starts[-1], len(parts) - number  # each phase that follows needs an epoch
        length = part.length if part.length is not None else epochs - begin - left
        if isinstance(length, float):
            length = min(max(1, round(length * epochs)), epochs - begin - left)
        starts.append(begin + length)
    if starts[-1] >= epochs:
        never = next(i for i, start in enumerate(starts) if start >= epochs)
        raise ConfigError(
            f"Phase {never + 1} of the freezing policy {policy!r} would start at epoch {starts[never]}, but the run has only "
            f"{epochs} epochs. Shorten the phases before it or set trainer.max_epochs to at least {starts[-1] + 1}."
        )
    ends = [*starts[1:], epochs]
    return tuple(Phase(p.train, p.norms, start, end) for p, start, end in zip(parts, starts, ends, strict=True))


def phase_at(phases: Sequence[Phase], epoch: int) -> Phase:
    """Return the phase of an epoch; after the last epoch it is the last phase."""
    return next((phase for phase in phases if phase.start <= epoch < phase.end), phases[-1])


def started(phases: Sequence[Phase], stage: str, epoch: int) -> int | None:
    """Return the epoch from which a stage has been training without a break, or None if it is frozen at the epoch."""
    since = None
    for phase in phases:
        trains = stage in phase.train or phase.norms
        since = None if not trains else phase.start if since is None else since
        if epoch < phase.end:
            break
    return since


def frozen_line(phase: Phase, stages: Sequence[str], moving: Collection[str] = ()) -> str | None:
    """Return the last stage up to which nothing changes during a phase, or None if even the first one does.

    Args:
        phase: The phase.
        stages: The stages before the head, in the order of the network.
        moving: The stages whose BatchNorm statistics move though they are frozen.

    >>> frozen_line(Phase(("layer4", "head"), False, 0, 1), ["stem", "layer1", "layer2", "layer3", "layer4"])
    'layer3'
    """
    changes = [stage in phase.train or stage in moving or phase.norms for stage in stages]
    below = changes.index(True) if True in changes else len(stages)
    return stages[below - 1] if below else None


def set_trainable(module: nn.Module, phase: Phase, members: Mapping[str, Collection[str]], norms: Collection[str]) -> None:
    """Toggle `requires_grad` for a phase, and drop the gradients of what is frozen.

    Args:
        module: What holds the parameters.
        phase: The phase.
        members: The names of the parameters of each stage.
        norms: The names of the affine parameters of normalisation layers.
    """
    parameters = dict(module.named_parameters())
    for stage, names in members.items():
        for name in names:
            trains = stage in phase.train or (phase.norms and name in norms)
            parameters[name].requires_grad_(trains)
            if not trains:
                parameters[name].grad = None  # a stale gradient would still move the weight (momentum, decay)


def hold_frozen(backbone: nn.Module, stages: Sequence[Stage], phase: Phase, bn: str) -> None:
    """Set the mode of the frozen stages of a network in train mode, and of BatchNorm everywhere.

    Args:
        backbone: The network without its classifier.
        stages: Its stages.
        phase: The phase.
        bn: `auto`: BatchNorm statistics move where the layer trains; `frozen`: nowhere; `train`: everywhere.
    """
    moving = phase.norms or bn == "train"
    for stage in stages:
        if stage.name not in phase.train:
            for part in (part for outer in stage.modules for part in backbone.get_submodule(outer).modules()):
                part.training = moving and isinstance(part, _BatchNorm)
    if bn == "frozen":
        for part in backbone.modules():
            if isinstance(part, _BatchNorm):
                part.training = False


def _parse_name(policy: str, stages: Sequence[str]) -> list[_Part]:
    name, _, argument = policy.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"Unknown freezing policy '{policy}'.{did_you_mean(name, POLICIES)} Expected {_FORMS}.")
    if name in ("last", "surgical") and not argument:
        raise ConfigError(f"The freezing policy '{policy}' needs an argument: expected {_FORMS}.")
    if name == "gradual":
        every = _positive_int(argument or "1", policy)
        return [_Part(tuple(stages[-n:]), False, every) for n in range(1, len(stages) + 1)]
    if name == "lp_ft":
        length = _length(argument or "0.3", policy)
        return [_Part((HEAD,), False, length), _Part(tuple(stages), False, None)]
    return [_Part(*_trained(policy, stages), None)]


def _trained(spec: str | Sequence[str], stages: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Return the stages that a phase trains, and whether all normalisation layers train beside them."""
    if not isinstance(spec, str):
        wanted = {require_stage(str(name), stages) for name in spec}
        return tuple(s for s in stages if s in wanted), False
    name, _, argument = spec.partition(":")
    if name == "full":
        return tuple(stages), False
    if name == "last":
        number = _positive_int(argument, spec)
        if number > len(stages) - 1:
            raise ConfigError(f"'{spec}' asks for more stages than there are before the head: {', '.join(stages[:-1])}.")
        return tuple(stages[-number - 1 :]), False
    if name == "surgical":
        return _trained([*argument.split(","), HEAD], stages)
    if name in (HEAD, "norm"):
        return (HEAD,), name == "norm"
    return _trained([spec], stages)


def _parse_list(phases: Sequence[Mapping[str, Any]], stages: Sequence[str]) -> list[_Part]:
    if not phases:
        raise ConfigError(f"The freezing policy is an empty list: nothing would train. Expected {_FORMS}.")
    parts = []
    for number, phase in enumerate(phases, start=1):
        unknown = set(phase) - {"train", "epochs", "share"}
        if unknown or "train" not in phase or {"epochs", "share"} <= set(phase):
            hint = "".join(did_you_mean(key, ["train", "epochs", "share"]) for key in sorted(unknown))
            raise ConfigError(
                f"Phase {number} of the freezing policy is {dict(phase)}.{hint} Expected the key 'train' (a policy name or a "
                "list of stages) and at most one of 'epochs' (a number) and 'share' (of the run, between 0 and 1)."
            )
        train, norms = _trained(phase["train"], stages)
        if not train:
            raise ConfigError(f"Phase {number} of the freezing policy trains nothing: {dict(phase)}.")
        length: int | float | None = None
        if "epochs" in phase:
            length = _positive_int(str(phase["epochs"]), f"epochs of phase {number}")
        elif "share" in phase:
            length = _length(str(float(phase["share"])), f"share of phase {number}")
        if length is None and number < len(phases):
            raise ConfigError(f"Phase {number} of the freezing policy needs 'epochs' or 'share': only the last may go without.")
        parts.append(_Part(train, norms, length))
    return parts


def _positive_int(text: str, where: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"Expected a whole number of at least 1 in '{where}', found '{text}'.")
    return int(text)


def _length(text: str, where: str) -> int | float:
    if text.isdigit():
        return _positive_int(text, where)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ConfigError(f"Expected a number of epochs or a share between 0 and 1 in '{where}', found '{text}'.")
    return share
