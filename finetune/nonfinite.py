"""A loss that is not finite: stop, or leave the step out, and say which pictures it was and in which stage it began.

Looking costs next to nothing: whether the loss is finite is copied to the host while the backward pass is computed, and read
before the optimizer's step, so the device never waits; the weights are not touched by a step that went wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from finetune.console import tell
from finetune.errors import TrainingError
from finetune.reuse import Kept
from finetune.staged import StagedModule
from finetune.stages import HEAD

OnNonFinite = Literal["stop", "skip"]
_IN_A_ROW = 10  # steps left out; more are no accident
_NAMED = 5  # pictures of a batch that a message names


class NonFiniteLoss(Callback):
    """Watch the training loss.

    Args:
        then: What to do about a loss that is not finite: stop, or skip the step, which leaves weights, momentum and BatchNorm
            statistics as they were. Ten in a row stop the run all the same.

    Attributes:
        skipped: How many steps were left out.
    """

    def __init__(self, then: OnNonFinite = "stop") -> None:
        self.then = then
        self.skipped = 0
        self._row = 0
        self._batch: Any = None
        self._window: list[tuple[Any, Tensor, Tensor]] = []  # batches of the step; is the loss wrong anywhere, here
        self._ready: torch.cuda.Event | None = None
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make room for a copy of what a forward pass changes by itself."""
        buffers = [b for b in pl_module.buffers() if b.is_floating_point()] if self.then == "skip" else []
        self._statistics = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, and the statistics as they are before it."""
        self._batch = batch
        if self._statistics and not self._window:
            torch._foreach_copy_([copy for _, copy in self._statistics], [buffer for buffer, _ in self._statistics])

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Ask whether the loss is finite, without waiting for the answer."""
        here = wrong = loss.detach().isfinite().logical_not().any().to(torch.uint8)
        if trainer.world_size > 1:
            wrong = here.clone()
            torch.distributed.all_reduce(wrong, torch.distributed.ReduceOp.MAX)
        if wrong.is_cuda:
            there = torch.empty_like(wrong, device="cpu", pin_memory=True)
            wrong = there.copy_(wrong, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record()
        self._window.append((self._batch, wrong, here))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Read the answer; leave the step out, or stop, if it is no."""
        if self._ready is not None:
            self._ready.synchronize()
        window, self._window = self._window, []
        if not any(wrong for _, wrong, _ in window):
            self._row = 0
            return
        optimizer.zero_grad(set_to_none=True)  # what has no gradient is passed over
        for buffer, copy in self._statistics:
            buffer.copy_(copy)
        self.skipped, self._row = self.skipped + 1, self._row + 1
        broken = _broken_weights(pl_module)
        what = self._together(trainer, pl_module, [batch for batch, _, here in window if here], broken)
        if self.then == "stop" or broken or self._row >= _IN_A_ROW:
            raise TrainingError(f"{what}{_remedy(self.then, self._row)}")
        tell(pl_module, f"warning: {what} The step is left out ({self.skipped} so far).")

    @staticmethod
    def _together(trainer: L.Trainer, module: L.LightningModule, batches: list[Any], broken: list[str]) -> str:
        """Return what the processes whose loss was wrong say of it."""
        said = [describe(trainer, module, batches, broken) if batches else ""]
        if trainer.world_size > 1:
            gathered: list[Any] = [""] * trainer.world_size
            torch.distributed.all_gather_object(gathered, said[0])
            said = gathered
        return next((text for text in said if text), "The training loss is not finite.")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never let weights that are not finite replace a checkpoint that was good."""
        if broken := _broken_weights(pl_module):
            raise TrainingError(
                f"The weights of {', '.join(broken)} are not finite after step {trainer.global_step}. "
                f"No checkpoint is written.{_remedy('stop', 1)}"
            )


def describe(trainer: L.Trainer, module: L.LightningModule, batches: list[Any], broken: list[str]) -> str:
    """Say in which step the loss was not finite, in which stage it began, and which pictures it was.

    Args:
        trainer: The trainer.
        module: The module.
        batches: The batches of the step, on this process, whose loss was not finite.
        broken: Stages whose weights are not finite.
    """
    where = f"The training loss is not finite in epoch {trainer.current_epoch + 1}, step {trainer.global_step + 1}"
    if broken:
        where += f": the weights of {', '.join(broken)} are not finite already"
    elif isinstance(module, StagedModule):
        stage = next((found for batch in batches if (found := first_stage(module, batch))), None)
        where += f": it began in {stage}" if stage else ": the logits are finite, so it began in the loss"
    files = [name for batch in batches for name in _files(trainer, batch)]
    names = ", ".join(files[:_NAMED]) + (f" and {len(files) - _NAMED} more" if len(files) > _NAMED else "")
    return f"{where}." + (f" Pictures: {names}." if files else "")


def first_stage(module: L.LightningModule, batch: Any) -> str | None:
    """Return the first stage whose activations are not finite, `input` if the pictures are not; None if all are.

    The batch passes once more, as it did in training but without a trace.
    """
    if not isinstance(module, StagedModule):
        return None
    unpack: Any = getattr(module, "unpack", None)
    images = unpack(batch)[0] if callable(unpack) else batch
    inputs = images.activation if isinstance(images, Kept) else images
    if isinstance(inputs, Tensor) and not inputs.isfinite().all():
        return "the input"
    found: list[str] = []
    with _untouched(module), torch.no_grad(), _watching(module, found):
        logits = module(images)
    return found[0] if found else (HEAD if not logits.isfinite().all() else None)


@contextmanager
def _watching(module: StagedModule, found: list[str]) -> Iterator[None]:
    """Note the stages of modules whose output is not finite, in the order in which they are called."""

    def watch(stage: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(stage)

        return look

    parts = [(module.backbone.get_submodule(name), stage.name) for stage in module.stages for name in stage.modules]
    handles = [inner.register_forward_hook(watch(stage)) for part, stage in parts for inner in part.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Put buffers and random numbers back as they were."""
    before = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _broken_weights(module: L.LightningModule) -> list[str]:
    """Return the stages (of other modules, the parameters) with weights that are not finite."""
    parameters = dict(module.named_parameters())
    members = module.stage_parameters() if isinstance(module, StagedModule) else {name: [name] for name in parameters}
    names = [name for own in members.values() for name in own if parameters[name].is_floating_point()]
    if not names:
        return []
    norms = torch._foreach_norm([parameters[name].detach() for name in names], ord=float("inf"))
    if torch.stack([norm.float() for norm in norms]).isfinite().all():
        return []
    wrong = {name for name, norm in zip(names, norms, strict=True) if not norm.isfinite()}
    return [stage for stage, own in members.items() if wrong & set(own)]


def _files(trainer: L.Trainer, batch: Any) -> list[str]:
    """Return the names of a batch's pictures, as far as the data module knows them."""
    index = batch.get("index") if isinstance(batch, Mapping) else None
    files: Any = getattr(getattr(trainer, "datamodule", None), "files", None)
    if index is None or not callable(files):
        return []
    known = files("train")
    return [os.path.relpath(known[number]) for number in index.tolist() if number < len(known)]


def _remedy(then: str, row: int) -> str:
    many = f" {row} steps in a row were left out." if then == "skip" and row >= _IN_A_ROW else ""
    skip = "" if then == "skip" else " To leave out single steps of this kind: --run.on_nonfinite skip."
    return (
        f"{many} The last checkpoint is from before. What helps: a smaller --model.lr, a longer --model.warmup_epochs, "
        f"--trainer.gradient_clip_val 1, --trainer.precision 32-true.{skip}"
    )
