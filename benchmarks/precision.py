"""Every precision with every clipping of gradients, optimizer and accumulation: two steps train, or a sentence refuses them.

    python benchmarks/precision.py

A cell trains if the loss is finite, parameters move, and gradients are not larger than the clipping allows when the optimizer
gets them. Every optimizer is tried as the toolkit makes it and with `optimizer_args {fused: true}`. It ends with 1 if any cell
ends otherwise: in an error of a library, say.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import lightning as L
import torch
from common import machine, quiet
from lightning.pytorch.plugins import MixedPrecision
from tabulate import tabulate
from torch.utils.data import DataLoader, TensorDataset

from finetune import FinetuneModule
from finetune.errors import FinetuneError

SCALED = "16-mixed"  # on a CPU Lightning would take bf16-mixed in its place, which does not scale the loss
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", SCALED, "16-true", "64-true")
CLIPPING: dict[str, dict[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "norm"},
    "value": {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
}
OPTIMIZERS = ("sgd", "adamw", "lamb")
ACCUMULATED = (1, 3)


class Watch(L.Callback):
    """What the optimizer gets in each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.largest: list[float] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]
        trainer.optimizers[0].register_step_post_hook(lambda optimizer, *_: self.look(optimizer))

    def look(self, optimizer: torch.optim.Optimizer) -> None:
        grads = [p.grad.double().flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(torch.cat(grads).norm()))
        self.largest.append(float(torch.cat(grads).abs().max()))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def cell(precision: str, clip: str, optimizer: str, accumulated: int, fused: bool) -> str:
    """Train two steps and return what came of them."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8 * accumulated, 3, 32, 32), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % 3), batch_size=4)
    watch = Watch()
    try:
        with quiet():
            module = FinetuneModule(
                "test_resnet",
                num_classes=3,
                weights="none",
                lr=0.05,
                optimizer=optimizer,
                optimizer_args={"fused": True} if fused else None,
            )
            trainer = L.Trainer(
                max_epochs=1,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                precision=None if precision == SCALED else precision,  # type: ignore[arg-type]
                plugins=MixedPrecision(SCALED, "cpu", torch.amp.GradScaler("cpu", 2.0**8)) if precision == SCALED else None,
                accumulate_grad_batches=accumulated,
                callbacks=[watch],
                **CLIPPING[clip],
            )
            trainer.fit(module, loader)
    except FinetuneError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"[:110]
    moved = any(not torch.equal(a, b) for a, b in zip(watch.before, module.parameters(), strict=True))
    finite = all(torch.tensor(watch.losses).isfinite())
    small = {"none": True, "norm": max(watch.norms, default=0) <= 0.0101, "value": max(watch.largest, default=0) <= 0.00101}[
        clip
    ]
    if trainer.global_step != 2 or not finite or not moved or not small:
        return f"FAILED: steps {trainer.global_step}, loss finite {finite}, parameters moved {moved}, clipped {small}"
    return "trains"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    rows, refused = [], set()
    for precision, clip, optimizer in itertools.product(PRECISIONS, CLIPPING, OPTIMIZERS):
        found = [cell(precision, clip, optimizer, *rest) for rest in itertools.product(ACCUMULATED, (False, True))]
        refused |= {text for text in found if text.startswith("refused")}
        rows.append(
            [precision, clip, optimizer, *(text if text.startswith("FAILED") else text.split(":")[0] for text in found)]
        )
    headers = ["precision", "clipping", "optimizer", *(f"{n} batches{f}" for n in ACCUMULATED for f in ("", ", fused asked"))]
    print(machine())
    print(tabulate(rows, headers=headers))
    print("\n".join(sorted(refused)))
    cells = [text for row in rows for text in row[3:]]
    print(f"{len(cells)} cells: {cells.count('trains')} train, {cells.count('refused')} are refused")
    sys.exit(any(text.startswith("FAILED") for text in cells))


if __name__ == "__main__":
    main()
