"""A method of domain adaptation of one's own in twenty lines: features whose norm grows step by step (Xu et al. 2019, AFN).

    cd examples && resnet-finetune adapt --model.adaptation own_adaptation.FeatureNorm --model.adaptation.weight 0.1 --compare
    python examples/own_adaptation.py

The first line is what a project types that keeps its methods in a module of its own; the second trains from Python.
"""

import argparse

import lightning as L
from torch import Tensor

from finetune import Adaptation, AdaptDataModule, AdaptModule, DomainBatch


class FeatureNorm(Adaptation):
    """Let the norm of the features grow by a step in both domains: features of large norm carry over better.

    Args:
        weight: Weight of the loss.
        step: By how much the norm of each picture's features is to grow.
    """

    def __init__(self, weight: float = 0.05, step: float = 1.0) -> None:
        super().__init__()
        self.weight, self.step = weight, step  # a checkpoint keeps them under these names

    def loss(self, batch: DomainBatch) -> Tensor:
        """Return the distance to a norm that is a step larger; its value is constant, its gradient is not."""
        norms = [features.norm(dim=1) for features in (batch.source_features, batch.target_features)]
        return self.weight * sum((norm - norm.detach() - self.step).square().mean() for norm in norms)


def main() -> None:
    """Train on the built-in digits and print what is measured on the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="training steps of an epoch (default: one pass through the larger domain)")
    options = parser.parse_args()
    L.seed_everything(0)
    data = AdaptDataModule("digits", "digits_m", steps_per_epoch=options.steps)
    given = {"num_classes": data.num_classes, "backbone": options.backbone, "weights": options.weights}
    model = AdaptModule(FeatureNorm(weight=0.1), **given, bn="train", lr_scale=0.1)
    trainer = L.Trainer(max_epochs=options.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items() if "target" in name})


if __name__ == "__main__":
    main()
