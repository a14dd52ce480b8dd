"""What a module of this toolkit is made of: a backbone in stages and a head; where it is cut, and what of it is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.boundaries import Boundaries
from finetune.errors import ConfigError, DataError
from finetune.fold import folded
from finetune.freezing import Phase, frozen_line, hold_frozen, plan, set_trainable
from finetune.reuse import Kept, weights_hash
from finetune.stages import HEAD, Stage, norm_parameters
from finetune.transforms import InputSpec

_Own = TypeVar("_Own", bound="StagedModule")
_MANY = 10_000  # epochs, so that no phase lacks room
_DUMMY = 64  # pixels of the blank picture that passes the stages below a cut


class StagedModule(L.LightningModule):
    """A backbone, in stages, and a head; `FinetuneModule` builds and trains it.

    Attributes:
        backbone: The network without its classifier: pictures to features.
        stages: Its stages, in order.
        embedding: What features pass before the head sees them; the identity if nothing.
        head: Features to logits.
        dropout: What of the features the head does not see in training.
        input_spec: The input that the weights expect.
        mean: Mean per colour, (1, 3, 1, 1).
        std: Standard deviation per colour, (1, 3, 1, 1).
        memory_layout: Layout of pictures in memory.
    """

    backbone: nn.Module
    stages: tuple[Stage, ...]
    embedding: nn.Module
    head: nn.Module
    dropout: nn.Module
    input_spec: InputSpec
    mean: Tensor
    std: Tensor
    memory_layout: torch.memory_format
    _never_trained: set[str]
    _phase: Phase | None = None
    _hashed: tuple[str, Phase | None, str] | None = None

    # ---------------------------------------------------------------------------------------------- pictures to logits

    def expect(self, spec: InputSpec) -> None:
        """Take over the input that the weights expect, with the mean and standard deviation that `normalise` uses."""
        self.input_spec = spec
        for buffer, values in ((self.mean, spec.mean), (self.std, spec.std)):
            buffer.copy_(torch.tensor(values).view(1, 3, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Bring pictures to what the weights expect.

        Args:
            images: (N, 3, H, W), uint8, or float in [0, 1].

        Raises:
            DataError: If float pictures hold NaN, or leave [0, 1], as they do when they were normalised before.
        """
        if images.dtype == torch.uint8:
            return images.to(self.mean.dtype, memory_format=self.memory_layout).div_(255).sub_(self.mean).div_(self.std)
        low, high = (float(x) for x in images.aminmax())
        if math.isnan(low):
            bad = images.isnan().flatten(1).any(1).nonzero().flatten().tolist()
            raise DataError(
                "Expected pictures as uint8, or as float between 0 and 1; found NaN in "
                f"{len(bad)} of {len(images)} in a batch: number {', '.join(map(str, bad[:5]))} (counted from 0). Repair them."
            )
        if not (low >= -0.1 and high <= 1.1):  # resizing with bicubic overshoots a little
            raise DataError(
                f"Expected pictures as uint8, or as float between 0 and 1; found float between {low:.3g} and {high:.3g}. "
                "The module applies mean and standard deviation itself: leave Normalize out of your transforms."
            )
        normalised = images.sub(self.mean).div_(self.std)
        return normalised.to(self.mean.dtype).contiguous(memory_format=self.memory_layout)

    def features(self, images: Tensor | Kept) -> Tensor:
        """Map pictures (N, 3, H, W), or what was kept of them, to what the head sees (N, C)."""
        if isinstance(images, Kept):
            activation = images.activation.to(self.mean.dtype)
            return self.embedding(self.boundaries.upper(activation, images.stage).flatten(1))  # type: ignore[no-any-return]
        return self.embedding(self.backbone(self.normalise(images)).flatten(1))  # type: ignore[no-any-return]

    def lower(self, images: Tensor, stage: str) -> Tensor:
        """Run pictures (N, 3, H, W) through the stages up to and including one: → what the next stage gets."""
        return self.boundaries.lower(self.normalise(images), stage)

    def folded_lower(self) -> Callable[[Tensor, str], Tensor]:
        """Return `lower` of a copy of the backbone in eval mode with BatchNorm folded: quicker, equal up to rounding."""
        example = torch.zeros(2, 3, *2 * [self.boundaries.size], dtype=torch.uint8, device=self.device)
        example.random_(generator=torch.Generator(self.device).manual_seed(0))
        copy = folded(self.backbone, self.normalise(example)).to(memory_format=self.memory_layout)
        cuts = Boundaries(copy, self.stages, self.boundaries.size)
        return lambda images, stage: cuts.lower(self.normalise(images), stage)

    def forward(self, images: Tensor | Kept) -> Tensor:
        """Map pictures (N, 3, H, W), uint8 or float in [0, 1], to logits (N, num_classes)."""
        return self.head(self.dropout(self.features(images)))  # type: ignore[no-any-return]

    # --------------------------------------------------------------------------------------------------------- stages

    @property
    def stage_names(self) -> list[str]:
        """Names of all stages in the order of the network, the head last."""
        return [*(stage.name for stage in self.stages), HEAD]

    def stage_parameters(self) -> dict[str, list[str]]:
        """Map each stage to the names of its parameters; what a subclass added beside them goes by its attribute's name."""
        members = {stage.name: [f"backbone.{name}" for name in stage.parameters] for stage in self.stages}
        placed = {name for names in members.values() for name in names}
        for name, _ in self.named_parameters():
            if name not in placed:
                members.setdefault(name.partition(".")[0], []).append(name)
        return members

    @property
    def has_unused_parameters(self) -> bool:
        """Whether parameters that train have no gradient in some steps, as those of stages that thaw later.

        Several processes then have to look for them in every step. A subclass whose forward pass goes different ways, or whose
        loss leaves a part out at times, returns True.
        """
        return len(plan(self.hparams["freezing"], self.stage_names, _MANY)) > 1

    @property
    def never_trained(self) -> frozenset[str]:
        """The names of the parameters that the network itself keeps fixed, whatever the phase."""
        return frozenset(self._never_trained)

    def apply_phase(self, phase: Phase) -> None:
        """Let the stages of a phase train and freeze the others: their weights, gradients and statistics stay as they are."""
        self._set_trainable(phase)
        self._phase = phase
        self.train(self.training)

    @property
    def phase(self) -> Phase | None:
        """The freezing phase that training is in; None outside of training."""
        return self._phase

    @cached_property
    def boundaries(self) -> Boundaries:
        """The places where the backbone can be cut."""
        try:
            return Boundaries(self.backbone, self.stages, self._dummy_size)
        except ConfigError:  # some take multiples of their window only
            return Boundaries(self.backbone, self.stages, self.input_spec.size)

    @property
    def _dummy_size(self) -> int:
        fixed = hasattr(self.backbone, "patch_embed")  # a transformer takes pictures of one size only
        return self.input_spec.size if fixed else _DUMMY

    def frozen_line(self, phase: Phase) -> str | None:
        """Return the last stage up to which nothing changes during a phase, or None if even the first one does."""
        moving = [stage.name for stage in self.stages if self._has_batchnorm(stage)] if self.hparams["bn"] == "train" else []
        return frozen_line(phase, [stage.name for stage in self.stages], moving)

    def _has_batchnorm(self, stage: Stage) -> bool:
        parts = (part for outer in stage.modules for part in self.backbone.get_submodule(outer).modules())
        return any(isinstance(part, _BatchNorm) for part in parts)

    def why_nothing_is_frozen(self) -> str:
        """Return the reason, for a message, why no phase has stages up to which nothing changes."""
        if self.hparams["bn"] == "train" and self.hparams["freezing"] != "full":
            return "with model.bn train the BatchNorm statistics of all stages move"
        return f"with model.freezing {self.hparams['freezing']} even the first stage changes"

    def frozen_hash(self, stage: str) -> str:
        """Return a hash of all that the stages up to one depend on: their weights and the normalisation of pictures."""
        if self._hashed is None or self._hashed[:2] != (stage, self._phase):
            names = [s.name for s in self.stages]
            below = self.stages[: names.index(stage) + 1]
            tensors = {"mean": self.mean, "std": self.std} | {
                name: tensor
                for name, tensor in self.backbone.state_dict().items()
                if not name.endswith("num_batches_tracked") and any(s.holds(name) for s in below)
            }
            self._hashed = stage, self._phase, f"{type(self.backbone).__qualname__} {weights_hash(tensors)}"
        return self._hashed[2]

    def _set_trainable(self, phase: Phase) -> None:
        named = self.stage_parameters()
        members = {stage: [name for name in named[stage] if name not in self._never_trained] for stage in self.stage_names}
        set_trainable(self, phase, members, {f"backbone.{name}" for name in norm_parameters(self.backbone)})

    def train(self: _Own, mode: bool = True) -> _Own:
        """Set the mode of the module; frozen stages stay in eval mode, whoever calls this."""
        super().train(mode)
        if mode and self._phase is not None:
            hold_frozen(self.backbone, self.stages, self._phase, self.hparams["bn"])
            self.head.train(HEAD in self._phase.train)
        return self
