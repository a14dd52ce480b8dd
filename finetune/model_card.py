"""The card of an exported model: what it knows, from where, how well, and where its limits are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from finetune import checkpoints
from finetune.averaging import describe_average
from finetune.errors import DataError
from finetune.outcomes import read_outcome
from finetune.runs import run_of
from finetune.scores import metrics, per_class
from finetune.trained import Trained
from finetune.version import __version__
from finetune.weight_list import licence_of
from finetune.weight_report import Report

_USE = {
    "onnx": """```python
import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
facts = json.loads(session.get_modelmeta().custom_metadata_map["resnet-finetune"])  # classes, input, temperature
size, crop, kind = (facts["input"][name] for name in ("size", "crop", "interpolation"))
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
zoom = int(size / crop) / min(image.size)  # the shorter side; then the centre is cut out
image = image.resize([int(side * zoom) for side in image.size], getattr(Image.Resampling, kind.upper()))
left, top = (round((side - size) / 2) for side in image.size)
pixels = np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)[None]  # uint8 (1, 3, size, size)
probabilities = session.run(["probabilities"], {{"images": pixels}})[0][0]
print(facts["classes"][probabilities.argmax()], probabilities.max())
```""",
    "torch_export": """```python
import torch
network = torch.export.load("model.pt2").module()  # runs pickled code: load files that you trust
images = torch.zeros(1, 3, {size}, {size}, dtype=torch.uint8)  # RGB pictures, resized and cropped to {size} pixels
probabilities = network(images)[0]
```""",
    "timm": """```python
import timm
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # FOLDER holds this file
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(transform(image)[None])  # image: a Pillow image in RGB
```""",
}
_INSIDE = {
    "onnx": "Normalisation, temperature and softmax are inside the graph; the number of pictures per batch is free.",
    "torch_export": "Normalisation, temperature and softmax are inside the program; the number of pictures per batch is free.",
    "timm": "The folder holds weights alone: timm normalises, and its logits are divided by no temperature.",
}


def write_model_card(path: Path, trained: Trained, format: str, comparison: str) -> None:
    """Write the card of an exported model, in Markdown with the header that model hubs read.

    Args:
        path: Where to.
        trained: The model of the checkpoint.
        format: The format that it was exported to.
        comparison: What the comparison of the two gave.
    """
    backbone = trained.require_module().hparams["backbone"]
    sections = [
        _header(format),
        f"# {_title(trained)}\n\nA {backbone} that tells {len(trained.classes)} classes apart.",
        f"## Use\n\n{_USE[format].format(size=trained.input_spec.size)}\n\n{_INSIDE[format]} The export was {comparison}.",
        f"## Classes and data\n\n{_data(trained)}",
        f"## Training\n\n{_training(trained)}",
        "## Metrics\n\n" + "\n\n".join(_metrics(trained)),
        f"## Limits\n\n{_limits(trained)}",
        f"Written by resnet-finetune {__version__}.",
    ]
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8", errors="backslashreplace")


def _header(format: str) -> str:
    library = {"onnx": "onnx", "torch_export": "pytorch", "timm": "timm"}[format]
    return (
        f"---\npipeline_tag: image-classification\nlibrary_name: {library}\ntags: [image-classification, resnet-finetune]\n---"
    )


def _title(trained: Trained) -> str:
    run = run_of(trained.path)
    return f"{run.parent.name} {run.name}" if run else trained.path.stem


def _data(trained: Trained) -> str:
    content = checkpoints.read_own(trained.path)
    options = content.get("datamodule_hyper_parameters") or {}
    names = ", ".join(_plain(name) for name in trained.classes[:100])
    more = f", and {len(trained.classes) - 100} more" if len(trained.classes) > 100 else ""
    where = f"Trained on pictures in a folder called `{Path(options['root']).name}`. " if "root" in options else ""
    size = trained.input_spec.size
    return f"{where}Pictures are shown at {size} x {size} pixels.\n\n{len(trained.classes)} classes: {names}{more}."


def _training(trained: Trained) -> str:
    module = trained.require_module()
    content = checkpoints.read_own(trained.path)
    report, options = module.weights_report, module.hparams
    rows = [
        ("backbone", options["backbone"]),
        ("pretrained weights", _origin(report)),
        ("their licence", licence_of(report.source, options["backbone"])),
        ("freezing", options["freezing"]),
        ("BatchNorm statistics", options["bn"]),
        ("head before training", options["head_init"]),
        ("optimizer", f"{options['optimizer']}, {_rates(options)}"),
        ("average of weights", describe_average(content) or "none"),
        ("epochs", int(content["epoch"]) + 1),
        ("optimizer steps", int(content["global_step"])),
        ("temperature", f"{trained.temperature:.4g}"),
    ]
    return tabulate([(name, _plain(str(value))) for name, value in rows], ["", ""], tablefmt="github", disable_numparse=True)


def _rates(options: Mapping[str, Any]) -> str:
    """Return the learning rates of head and stages as they were given: factors, or else a decay per stage."""
    scale = options["lr_scale"]
    rate = f"rate {options['lr']:g}"
    if isinstance(scale, int | float):
        return f"{rate}, factor of all stages before the head {scale:g}"
    named = "".join(f", factor of {stage} {factor:g}" for stage, factor in (scale or {}).items())
    return f"{rate}, decay per stage {options['lr_decay']:g}{named}"


def _origin(report: Report) -> str:
    if report.source == "none":
        return "none: trained from random values"
    location = (
        Path(report.location).name
        if report.location and report.source in ("file", "checkpoint", "package")
        else report.location
    )
    return f"{report.source} {location or ''} (sha256 {(report.sha256 or '')[:12]}){' ' + report.note if report.note else ''}"


def _metrics(trained: Trained) -> Iterator[str]:
    """Yield a table for each split that was measured, with 95 % intervals."""
    found = False
    for split in ("test", "val"):
        run = run_of(trained.path)
        file = run / f"predictions.{split}.csv" if run else None
        if file is None or not file.is_file():
            continue
        try:
            outcome = read_outcome(file)
        except DataError:
            continue
        found = True
        rows = [(name, f"{v.value:.4f}", f"{v.low:.4f} to {v.high:.4f}") for name, v in metrics(outcome).items()]
        chosen = ", which the checkpoint was chosen by" if split == "val" else ""
        yield f"On {len(outcome)} pictures of the split {split}{chosen}:\n\n" + tabulate(
            rows, ["metric", "value", "95 % interval"], tablefmt="github", disable_numparse=True
        )
        yield _weakest(outcome.classes, per_class(outcome))
    if not found:
        yield "Not measured. `resnet-finetune evaluate` measures a checkpoint on any labelled folder."


def _weakest(classes: tuple[str, ...], scores: Any) -> str:
    seen = [label for label in range(len(classes)) if scores["support"][label]]
    worst = sorted(seen, key=lambda label: scores["recall"][label])[:5]
    return "Least often recognised: " + ", ".join(f"{_plain(classes[i])} ({scores['recall'][i]:.0%})" for i in worst) + "."


def _limits(trained: Trained) -> str:
    lines = [
        "- It names one of its classes for every picture, also for one that shows none of them.",
        "- Its metrics hold for pictures like those it was measured on; other cameras, places or times can be harder.",
    ]
    if trained.temperature == 1:
        lines.append("- Its probabilities were not calibrated: see `resnet-finetune evaluate --calibrate`.")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Keep names from being read as Markdown or HTML."""
    kept = " ".join(text.split())
    for character in "\\`*_[]<>|#":
        kept = kept.replace(character, f"\\{character}" if character not in "<>" else {"<": "&lt;", ">": "&gt;"}[character])
    return kept
