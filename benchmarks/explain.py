"""Does explain point at the right place, and say what predict says? A row per family of backbones.

    python benchmarks/explain.py                              # random weights: layouts, probabilities, single hot places
    python benchmarks/explain.py PHOTOS                       # and objects planted in a quadrant, with pretrained weights
    python benchmarks/explain.py PHOTOS --weights mobilenetv2_100=FILE.safetensors

Stages are compared with timm's description of the network wherever both look at the same activation. A single hot place is put
into a stage's output, all gradients being 1, and the map must be highest there. PHOTOS is a folder {train,val}/<class>/: a
linear head is fitted on its training images, an image of val is pasted at half its size into a quadrant of a plain or noisy
background, and the map of its class must be highest in that quadrant.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.transforms import v2

from finetune import FinetuneModule, FolderDataModule
from finetune.boundaries import Boundaries, describe
from finetune.errors import FinetuneError
from finetune.explain import see
from finetune.grad_cam import grad_cam, look
from finetune.head_start import ridge
from finetune.images import read_image
from finetune.predictor import Predictor
from finetune.trained import Trained, probabilities_of

FAMILIES = """
resnet18 resnet34 resnet50 resnet101 resnet152 resnetv2_50 resnext50_32x4d res2net50_26w_4s efficientnet_b0
efficientnet_cc_b0_4e resnet50_clip skresnet18 resnest14d resnet50_gn swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 vit_tiny_patch16_224 vit_small_patch14_dinov2 deit3_small_patch16_224 convnext_atto
convnextv2_atto mobilenetv2_100 mobilenetv3_small_100 densenet121 regnetx_002 regnety_002 vgg11 vgg11_bn
mambaout_femto test_maxvit tf_efficientnet_lite0
"""
PRETRAINED = {"resnet18": "bundled", "tf_efficientnet_lite0": "package"}
HEAT = 2.0


class Uniform(FinetuneModule):
    """Its first logit is the sum of a stage's output, by which all gradients are 1."""

    stage = ""

    def forward(self, images: Any) -> Tensor:
        """Return the sum and 0."""
        total = self.boundaries.lower(self.normalise(images), self.stage).flatten(1).sum(1)
        return torch.stack([total, torch.zeros_like(total)], 1)


def described(module: FinetuneModule, size: int) -> tuple[int, int]:
    """Return how many of the activations that timm describes have its channels and stride, and how many were compared."""
    network: Any = module.backbone
    info = network.feature_info.info if hasattr(network.feature_info, "info") else network.feature_info
    boundaries = Boundaries(module.backbone, module.stages, size)
    rows = {row["stage"]: row for row in describe(module.backbone, module.stages, nn.Linear(1, 1), size)}
    seen: dict[str, Tensor] = {}
    taps: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(each["module"]).register_forward_hook(
            lambda _m, _i, out, name=each["module"]: seen.update({name: out.clone()})
        )
        for each in info
    ]

    def tap(stage: str, where: str, activation: Tensor) -> None:
        if where == boundaries.outputs[stage].tap:
            taps[stage] = activation.clone()

    boundaries.outputs  # noqa: B018  # found before the pass that is watched
    with torch.no_grad(), boundaries.tapping(tap):
        network(torch.rand(1, 3, size, size))
    for handle in handles:
        handle.remove()
    pairs = [
        ((rows[stage]["channels"], rows[stage]["stride"]), (each["num_chs"], each["reduction"]))
        for each in info
        for stage, activation in taps.items()
        if activation.shape == seen[each["module"]].shape and torch.equal(activation, seen[each["module"]])
    ]
    return sum(mine == theirs for mine, theirs in pairs), len(pairs)


def hot_places(name: str, size: int) -> tuple[int, int]:
    """Return how many hot places the map has its highest value at, and how many were tried."""
    model = Uniform(backbone=name, num_classes=2, weights="none").eval()
    hits = tried = 0
    for index, stage in enumerate(model.stages[:-1]):
        output = model.boundaries.outputs[stage.name]
        if not output.layout.spatial or output.tap != "next" or output.layout.stride is None:
            continue
        model.stage, grid = stage.name, size // output.layout.stride
        for row, column in ((0, grid - 1), (grid - 1, grid // 3)):

            def plant(
                _: Any, inputs: Any, row: int = row, column: int = column, grid: int = grid, layout: Any = output.layout
            ) -> Any:
                hot = torch.full_like(inputs[0], 0.1)
                if layout.kind == "nchw":
                    hot[:, :, row, column] = 10
                elif layout.kind == "nhwc":
                    hot[:, row, column] = 10
                else:
                    hot[:, layout.prefix + row * grid + column] = 10
                return (hot, *inputs[1:])

            handle = model.boundaries._entries[index + 1].register_forward_pre_hook(plant)
            heat = grad_cam(model, torch.zeros(1, 3, size, size), stage.name, torch.tensor([0]))[0]
            handle.remove()
            peak = divmod(int(heat.argmax()), size)
            hits += tuple(place * grid // size for place in peak) == (row, column)
            tried += 1
    return hits, tried


def compared(module: FinetuneModule, files: Sequence[str]) -> tuple[int, float]:
    """Return how often explain and predict name the same class, and how far their probabilities are apart at most."""
    names = tuple(map(str, range(module.hparams["num_classes"])))
    trained = Trained(
        Path("model"), names, module.input_spec, HEAT, lambda images: probabilities_of(module(images), HEAT), None, module
    )
    predictor = Predictor(trained)
    pairs = list(zip(see(predictor, files).predictions, predictor(list(files)), strict=True))
    return sum(a.labels == b.labels for a, b in pairs), max(abs(a.probabilities[0] - b.probabilities[0]) for a, b in pairs)


def family(name: str, files: Sequence[str]) -> list[str]:
    """Return the row of a family."""
    torch.manual_seed(0)
    module = FinetuneModule(name, num_classes=5, weights="none").eval()
    with torch.no_grad():
        nn.init.normal_(module.head.weight)  # type: ignore[arg-type]
    size = module.input_spec.size
    right, all_compared = described(module, size)
    same, apart = compared(module, files)
    hits, tried = hot_places(name, size)
    stage = look(module, torch.rand(1, 3, size, size)).stage
    layout = module.boundaries.outputs[stage].layout
    shown = f"{stage} ({layout.kind}, stride {layout.stride})"
    return [name, shown, f"{right} of {all_compared}", f"{same} of {len(files)}", f"{apart:.1e}", f"{hits} of {tried}"]


def planted(name: str, weights: str, root: str, number: int, train: int) -> list[str]:
    """Return the row of a backbone with pretrained weights."""
    data = FolderDataModule(root, workers=0)
    module = FinetuneModule(name, num_classes=data.num_classes, weights=weights).eval()
    spec = module.input_spec = replace(module.input_spec, size=224, crop=1.0)
    trained = Trained(
        Path(name), tuple(data.classes), spec, 1.0, lambda images: module(images).softmax(1), module.features, module
    )
    predictor = Predictor(trained)
    every = np.random.default_rng(0).permutation(len(data.files("train")))[:train]
    features = predictor.features([data.files("train")[i] for i in every])
    solution = ridge(features.astype(np.float64), np.array(data.labels("train"))[every], data.num_classes)
    with torch.no_grad():
        module.head.weight.copy_(torch.from_numpy(solution.weight))  # type: ignore[operator, union-attr]
        module.head.bias.copy_(torch.from_numpy(solution.bias))  # type: ignore[operator, union-attr]
    shrink = v2.Compose([v2.Resize(112, antialias=True), v2.CenterCrop(112)])
    chosen = np.random.default_rng(1).permutation(len(data.files("val")))[:number]
    counts = {"plain": [0, 0, 0, 0], "noise": [0, 0, 0, 0]}
    for turn, index in enumerate(chosen):
        top, left = 112 * (turn // 2 % 2), 112 * (turn % 2)
        for background, count in counts.items():
            canvas = torch.full((3, 224, 224), 124, dtype=torch.uint8)
            if background == "noise":
                canvas = torch.randint(64, 192, canvas.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(turn))
            canvas[:, top : top + 112, left : left + 112] = shrink(read_image(data.files("val")[index]))
            found = look(module, canvas[None], labels=torch.tensor([data.labels("val")[index]]))
            row, column = divmod(int(found.maps[0].argmax()), 224)
            known = int(found.logits.argmax()) == data.labels("val")[index]
            hit = (row // 112, column // 112) == (top // 112, left // 112)
            count[0] += hit
            count[1] += 1
            count[2] += hit and known
            count[3] += known
    cells = [f"{hit} of {tried} ({sure} of {known} recognised)" for hit, tried, sure, known in counts.values()]
    return [f"{name} ({Path(weights).name})", *cells]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Compare explain with predict, and its maps with known places.")
    parser.add_argument("photos", nargs="?", help="a folder {train,val}/<class>/ to plant objects from")
    parser.add_argument(
        "--families", nargs="*", default=FAMILIES.split(), help="backbones (default: one or more of each family)"
    )
    parser.add_argument(
        "--weights", nargs="*", default=[], metavar="BACKBONE=SOURCE", help="more backbones with pretrained weights"
    )
    parser.add_argument("--objects", type=int, default=60, help="objects to plant (default: 60)")
    parser.add_argument("--train", type=int, default=400, help="images that the head is fitted on (default: 400)")
    options = parser.parse_args()
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, f"{number}.png")) for number in range(3)]
        numbers = np.random.default_rng(0)
        for file, shape in zip(files, ((500, 300), (240, 400), (333, 333)), strict=True):
            Image.fromarray(numbers.integers(0, 256, (*(side // 20 for side in shape), 3), dtype=np.uint8)).resize(shape).save(
                file
            )
        for name in options.families:
            try:
                rows.append(family(name, files))
            except FinetuneError as error:
                failed.append(f"{name}: {error}")
            print((rows or failed)[-1], flush=True, file=sys.stderr)
    print(tabulate(rows, ["backbone", "explained at", "as timm says", "class as predict", "apart", "hot places"]))
    print(*failed, sep="\n")
    if options.photos:
        sources = PRETRAINED | dict(each.split("=", 1) for each in options.weights)
        rows = [planted(name, source, options.photos, options.objects, options.train) for name, source in sources.items()]
        print(tabulate(rows, ["backbone (weights)", "object on a plain background", "on noise"]))


if __name__ == "__main__":
    main()
