"""The verb `export`: a checkpoint → ONNX, torch.export or a timm folder, each run and compared before it counts as written."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from finetune import checkpoints
from finetune.backbones import create_model
from finetune.console import say
from finetune.errors import ConfigError, DataError, did_you_mean
from finetune.files import MARK, Unmarked, inside, new_folder, require_free_folder
from finetune.labelled import data_of, why_no_images
from finetune.model_card import write_model_card
from finetune.module import FinetuneModule
from finetune.predictor import Predictor
from finetune.runs import run_of
from finetune.sample import BUILT_IN
from finetune.schema import decode_json
from finetune.staged import StagedModule
from finetune.trained import INSTALL_EXPORT, ONNX_KEY, TIMM_KEY, Facts, Trained, describe_trained, facts, open_trained
from finetune.walk import Pictures

Format = Literal["onnx", "torch_export", "timm"]

TOLERANCE = 1e-4
"""How far a probability of the export may be from that of the checkpoint."""

_OPSET = 18
_MOST = 128  # pictures to compare on
_OLDER = [
    Unmarked(frozenset({"README.md", *files}), "README.md", "\n\nWritten by resnet-finetune ")
    for files in (["model.onnx"], ["model.pt2"], ["config.json", "model.safetensors"])
]


class Comparison(NamedTuple):
    """How an export and its checkpoint compare on the same pictures.

    Attributes:
        pictures: How many pictures.
        difference: The largest difference of a probability.
        agreement: On how many pictures both name the same class.
    """

    pictures: int
    difference: float
    agreement: int

    def __str__(self) -> str:
        return (
            f"compared with the checkpoint on {self.pictures} pictures: largest difference of a probability "
            f"{self.difference:.1e}, the same class for {self.agreement} of {self.pictures}"
        )


class Deployed(nn.Module):
    """What an export computes: normalisation, network, temperature and softmax in one.

    Args:
        trained: A model of a checkpoint.
    """

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.module = trained.require_module()
        self.temperature = trained.temperature
        self.plain = type(self.module).forward is StagedModule.forward  # otherwise its logits are no function of features alone

    @property
    def outputs(self) -> list[str]:
        """Names of what `forward` returns."""
        return ["probabilities", "features"] if self.plain else ["probabilities"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map uint8 pictures (N, 3, H, W) to probabilities (N, C) and, where the head sees them, features (N, D)."""
        if not self.plain:
            return ((self.module(images) / self.temperature).softmax(1),)
        features = self.module.features(images)
        return (self.module.head(features) / self.temperature).softmax(1), features


def export(
    model: str,
    format: str = "onnx",
    out: str | None = None,
    pictures: Sequence[str] = (),
    temperature: float | None = None,
    overwrite: bool = False,
) -> Path:
    """Do what `resnet-finetune export` does.

    Args:
        model: A checkpoint, a run's folder (its best checkpoint), or `last`.
        format: onnx; torch_export (a .pt2 archive); timm (a folder that `timm.create_model("local-dir:...")` loads).
        out: The folder to write into, <run>/export/<format> if None.
        pictures: Pictures to compare on; if empty, the validation pictures of the run, or the built-in digits.
        temperature: What logits are divided by; if None, what calibration stored, or 1.
        overwrite: Replace the folder if it exists.

    Returns:
        The folder.

    Raises:
        ConfigError: If the model cannot be expressed in the format, the folder exists, or export and checkpoint differ.
    """
    if format not in get_args(Format):
        kinds = get_args(Format)
        raise ConfigError(f"Unknown format '{format}'.{did_you_mean(format, kinds)} Expected {', '.join(kinds)}.")
    trained = open_trained(model, "cpu", temperature)
    module = trained.require_module()
    say(describe_trained(trained))
    folder = Path(out) if out else inside(run_of(trained.path) or trained.path.parent, "export", format)
    require_free_folder(folder, overwrite, _OLDER)
    files, where = _pictures_of(trained, pictures)
    with new_folder(folder, overwrite, _OLDER) as partial:
        write: Callable[[Trained, FinetuneModule, Path], Path] = _WRITERS[format]
        comparison = _compare(trained, write(trained, module, partial), files)
        _require_equal(comparison, folder)
        write_model_card(partial / "README.md", trained, format, f"{comparison} ({where})")
    say(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir() if path.name != MARK))}\n{comparison} ({where})")
    return folder


# ---------------------------------------------------------------------------------------------------------- the formats


def _write_onnx(trained: Trained, module: FinetuneModule, folder: Path) -> Path:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"Export to ONNX needs {', '.join(missing)}. Install it with: {INSTALL_EXPORT}")
    network = Deployed(trained).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program: Any = torch.onnx.export(
            network,
            (_example(trained),),
            dynamo=True,
            verbose=False,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=network.outputs,
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    program.model.metadata_props[ONNX_KEY] = facts(trained)
    path = folder / "model.onnx"
    program.save(str(path), external_data=False)
    return path


def _write_torch_export(trained: Trained, module: FinetuneModule, folder: Path) -> Path:
    network = Deployed(trained).eval()
    with torch.no_grad():
        program = torch.export.export(
            network, (_example(trained),), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, strict=False
        )
    path = folder / "model.pt2"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found in the group")  # of weights with channels last
        torch.export.save(program, path, extra_files={"resnet-finetune.json": facts(trained)})
    return path


def _write_timm(trained: Trained, module: FinetuneModule, folder: Path) -> Path:
    from timm.models import save_for_hf

    options = module.hparams
    found = {name: options[name] for name in ("bn_eps", "bottleneck") if options[name] is not None}
    if type(module) is not FinetuneModule or "." in options["backbone"] or found:
        also = "".join(f" and {name} {value}" for name, value in found.items())
        raise ConfigError(
            "timm cannot rebuild this model: expected a plain FinetuneModule with a backbone of timm, its own bn_eps and no "
            f"bottleneck, found {type(module).__name__} with {options['backbone']}{also}. Export to onnx or torch_export."
        )
    network: Any = create_model(options["backbone"], len(trained.classes), **(options["backbone_args"] or {}))
    state = {
        name.removeprefix("backbone."): value for name, value in module.state_dict().items() if name.startswith("backbone.")
    }
    for part in ("weight", "bias"):
        name = f"{module.classifier_name}.{part}"
        state[name] = module.head.get_parameter(part).reshape(network.get_parameter(name).shape)
    network.load_state_dict(state)
    spec = trained.input_spec
    network.pretrained_cfg.update(
        input_size=(3, spec.size, spec.size), mean=spec.mean, std=spec.std, interpolation=spec.interpolation, crop_pct=spec.crop
    )
    own = {"input": checkpoints.plain(asdict(spec)), "temperature": trained.temperature}
    config = {"num_classes": len(trained.classes), "label_names": list(trained.classes), TIMM_KEY: own}
    save_for_hf(network, str(folder), model_config=config, model_args=options["backbone_args"] or {}, safe_serialization=True)
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # it comes out for its owner alone
    return folder


_WRITERS = {"onnx": _write_onnx, "torch_export": _write_torch_export, "timm": _write_timm}


def _example(trained: Trained) -> Tensor:
    size = trained.input_spec.size
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- the comparison


def _pictures_of(trained: Trained, places: Sequence[str]) -> tuple[list[str], str]:
    """Return pictures to compare on, and what they are."""
    if places:
        found, where = Pictures(places).all(), ", ".join(places)
    elif (data := data_of(trained.path)) is not None:
        found, where = [str(path) for path in data.files("val")], f"validation images of {data.hparams['root']}"
    elif unlabelled := _unlabelled(trained):
        found, where = unlabelled, "images that it was distilled on"
    else:
        found = Pictures([BUILT_IN["digits"]()]).all()
        where = f"the built-in digits. {why_no_images(trained.path)}; to compare on images of yours: --pictures FOLDER"
    step = max(1, len(found) // _MOST)
    return found[::step][:_MOST], where


def _unlabelled(trained: Trained) -> list[str]:
    """Return the images that a student was distilled on, as far as they are still there."""
    places = (checkpoints.read_own(trained.path).get("datamodule_hyper_parameters") or {}).get("pictures")
    try:
        return Pictures([BUILT_IN[place]() if place in BUILT_IN else place for place in places or ()]).all() if places else []
    except DataError:
        return []


def _compare(trained: Trained, written: Path, files: Sequence[str]) -> Comparison:
    """Run both on the same pictures."""
    ours, theirs = Predictor(trained), Predictor(_open_own(written))
    pairs = [
        (a.values, b.values)
        for one, other in zip(ours.stream(files, workers=0), theirs.stream(files, workers=0), strict=True)
        for a, b in zip(one, other, strict=True)
        if a.values is not None and b.values is not None
    ]
    difference = max((float(np.abs(a - b).max()) for a, b in pairs), default=float("nan"))
    return Comparison(len(pairs), difference, sum(int(a.argmax() == b.argmax()) for a, b in pairs))


def _open_own(written: Path) -> Trained:
    """Open what was just written; a torch.export archive, too, as nobody else has touched it."""
    if written.suffix != ".pt2":
        return open_trained(written, "cpu")
    inside: dict[str, Any] = {"resnet-finetune.json": ""}
    network: Any = torch.export.load(written, extra_files=inside).module()
    own = decode_json(inside["resnet-finetune.json"], Facts, "the metadata of an exported model", where=str(written))
    return Trained.from_facts(written, own, lambda images: network(images)[0])


def _require_equal(comparison: Comparison, folder: Path) -> None:
    if not (comparison.pictures and comparison.difference <= TOLERANCE and comparison.agreement == comparison.pictures):
        raise ConfigError(
            f"{folder} was not written, as the export does not do what the checkpoint does: {comparison}; expected at most "
            f"{TOLERANCE:g} and the same class for all. Try another format."
        )
