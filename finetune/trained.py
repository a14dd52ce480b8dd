"""A trained model as what it is good for, pictures to probabilities, whatever file it is in: checkpoint, ONNX, timm folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec
import timm
import torch
from msgspec import Meta
from torch import Tensor, nn

from finetune import checkpoints, hardware
from finetune.backbones import import_path, input_spec_of
from finetune.calibration import stored_temperature
from finetune.errors import CheckpointError, ConfigError, FinetuneError
from finetune.escaping import shown
from finetune.finite import finite_temperature, require_finite
from finetune.module import FinetuneModule
from finetune.runs import CHECKPOINTS, as_typed, find_checkpoint, run_of
from finetune.saving import LAST
from finetune.schema import convert, decode_json, read_json
from finetune.transforms import InputSpec
from finetune.trusted_code import guarding, require_trusted

ONNX_KEY = "resnet-finetune"
"""Under this name class names, input and temperature stand in the metadata of an exported ONNX file, as JSON."""

TIMM_KEY = "resnet_finetune"
"""Under this name the same stands in `config.json` of an exported timm folder."""


@dataclass
class Facts:
    """What an export says of itself, see `facts`."""

    classes: Annotated[list[str], Meta(min_length=1)]
    input: InputSpec
    temperature: Any  # see `finite_temperature`


@dataclass
class _TimmFacts:
    input: InputSpec | None = None
    temperature: Any = 1.0


@dataclass
class _TimmConfig:
    """The entries of timm's `config.json` that are used, and ours."""

    architecture: str
    num_classes: Annotated[int, Meta(ge=1)] | None = None
    label_names: list[str] | None = None
    model_args: dict[str, Any] | None = None
    pretrained_cfg: dict[str, Any] | None = None
    resnet_finetune: _TimmFacts | None = None


_MOST_TRIED = 1024  # pixels of a side
_MOST_NAMED = 10  # classes in a line on the console

INSTALL_EXPORT = 'pip install "resnet-finetune[export]"'


class Trained:
    """A model that names classes.

    Args:
        path: The file or folder it was read from.
        classes: Names of the classes.
        input_spec: The input it was trained with.
        temperature: What its logits are divided by.
        probabilities: uint8 pictures (N, 3, H, W) -> probabilities (N, C).
        features: uint8 pictures (N, 3, H, W) -> what the head sees (N, D); None if the file does not hold it.
        module: The module of a checkpoint; None for an export.
    """

    def __init__(
        self,
        path: Path,
        classes: tuple[str, ...],
        input_spec: InputSpec,
        temperature: float,
        probabilities: Callable[[Tensor], Tensor],
        features: Callable[[Tensor], Tensor] | None = None,
        module: FinetuneModule | None = None,
    ) -> None:
        self.path = path
        self.classes = classes
        self.input_spec = input_spec
        self.temperature = temperature
        self.probabilities = probabilities
        self.features = features
        self.module = module

    @classmethod
    def from_facts(
        cls,
        path: Path,
        own: Facts,
        probabilities: Callable[[Tensor], Tensor],
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> Trained:
        """Return an export by what `facts` wrote into it."""
        return cls(path, tuple(own.classes), own.input, own.temperature, probabilities, features)

    def require_module(self) -> FinetuneModule:
        """Return the module.

        Raises:
            ConfigError: If this is an exported model.
        """
        if self.module is None:
            raise ConfigError(
                f"{self.path} is an exported model, and this needs the stages of a checkpoint: give the run it is from."
            )
        return self.module


def open_trained(model: str | os.PathLike[str], device: str = "auto", temperature: float | None = None) -> Trained:
    """Open a checkpoint, a run's folder (its best checkpoint), an exported .onnx file or an exported timm folder.

    Nothing in them is unpickled, and the network is not used.

    Args:
        model: The file or folder, or `last`.
        device: A torch device, or `auto`.
        temperature: What logits are divided by; if None, what `evaluate --calibrate` stored beside the checkpoint, or 1.

    Raises:
        CheckpointError: If it is missing, unreadable, or of another kind.
        ConfigError: If the device cannot be used, or the model names no classes.
    """
    path = Path(model)
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"Expected a finite temperature above 0, found {temperature}.")
    if path.suffix == ".pt2":
        raise CheckpointError(
            f"{path} is a torch.export archive, and loading one runs pickled code: load it yourself with torch.export.load if "
            "you trust it. Predict with the checkpoint, or with an export to ONNX or timm."
        )
    if path.suffix == ".onnx":
        return _open_onnx(path, _device(device), temperature)
    if os.path.isfile(path / "config.json"):
        return _open_timm(path, _device(device), temperature)
    return _open_checkpoint(find_checkpoint(os.fspath(model), Path("runs")), _device(device), temperature)


def probabilities_of(logits: Tensor, temperature: float) -> Tensor:
    """Return the probabilities (N, C) that logits (N, C) stand for."""
    return (logits.float() / temperature).softmax(1)


def load_model(checkpoint: str | os.PathLike[str]) -> FinetuneModule:
    """Load the module of a checkpoint, ready for prediction, without running pickled code and without the network.

    Args:
        checkpoint: A .ckpt file, a run's folder (its best checkpoint), or `last`.

    Raises:
        CheckpointError: If it is missing, unreadable, or not from this toolkit.
    """
    path = find_checkpoint(os.fspath(checkpoint), Path("runs"))
    return _load(path, checkpoints.read_own(path))


def _load(path: Path, content: Mapping[str, Any]) -> FinetuneModule:
    require_finite(content["state_dict"], str(path))
    class_path = content[checkpoints.KEY]["class_path"]
    own = class_path == f"{FinetuneModule.__module__}.{FinetuneModule.__qualname__}"
    with guarding():
        try:
            require_trusted(class_path)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        try:
            kind = FinetuneModule if own else import_path(class_path)
        except ConfigError as error:
            raise CheckpointError(
                f"{path} was written by {class_path}, which cannot be imported here. Run this in the folder of its project."
            ) from error
    if not (isinstance(kind, type) and issubclass(kind, FinetuneModule)):
        raise CheckpointError(f"{path} names the class {class_path}, which is no FinetuneModule.")
    _check_options(kind, content.get("hyper_parameters"), path)
    try:
        module = kind.load_from_checkpoint(path).eval()
        if kind is FinetuneModule:
            _run_once(module.backbone, module.input_spec.size, torch.device("cpu"))
        return module
    except FinetuneError as error:
        raise type(error)(f"{path}: {error}") from error
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        if kind is not FinetuneModule:
            raise  # somebody's own code, of which the traceback tells more
        raise CheckpointError(f"{path} cannot be built from its options: {shown(str(error))[:200]}.") from error


def _check_options(kind: type[FinetuneModule], options: Any, path: Path) -> None:
    """Compare the options in a checkpoint with the types that the class asks for, as far as they are plain ones."""
    if not isinstance(options, dict):
        raise CheckpointError(f"{path} holds no options of its model. It is damaged.")
    hints = get_type_hints(kind.__init__)
    for name in options.keys() & hints.keys():
        try:
            plain = "CustomType" not in repr(msgspec.inspect.type_info(hints[name]))
        except TypeError:  # such as a callable
            continue
        if plain:
            convert(options[name], hints[name], f"a model's option '{name}'", where=str(path), finite=False)


def class_names(module: FinetuneModule) -> tuple[str, ...]:
    """Return the names of a module's classes, or their numbers if it does not know them."""
    return tuple(module.class_names or (str(index) for index in range(module.hparams["num_classes"])))


def describe_trained(trained: Trained) -> str:
    """Return the line that says which model a command took, and what it can name: `last` alone says neither."""
    names, more = [shown(name) for name in trained.classes[:_MOST_NAMED]], len(trained.classes) - _MOST_NAMED
    listed = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    run = run_of(trained.path)
    best = run is not None and trained.path.name == LAST and (run / CHECKPOINTS / "best.ckpt").is_file()
    other = f"; this is the last epoch, and {as_typed(run)} means the best" if run is not None and best else ""
    return f"model  {shown(as_typed(trained.path))} ({len(trained.classes)} classes: {listed}{other})"


def facts(trained: Trained) -> str:
    """Return what an export has to say of itself beside its weights, as JSON."""
    own = {"classes": list(trained.classes), "input": asdict(trained.input_spec), "temperature": trained.temperature}
    return json.dumps(checkpoints.plain(own))


def _open_checkpoint(path: Path, device: torch.device, temperature: float | None) -> Trained:
    content = checkpoints.read_own(path)
    module = _load(path, content).to(device)
    if not module.classifies:
        raise ConfigError(
            f"The head of {path} was not trained, so it names no classes: expected a run that was trained on classes, or "
            "distilled with --model.logits_weight above 0. Train a head on it with: fit --model.weights CHECKPOINT"
        )
    heat = stored_temperature(path, int(content["global_step"])) if temperature is None else temperature

    def probabilities(images: Tensor) -> Tensor:
        return probabilities_of(module(images.to(device)), heat)

    def features(images: Tensor) -> Tensor:
        found: Tensor = module.features(images.to(device))
        return found.float()

    return Trained(path, class_names(module), module.input_spec, heat, probabilities, features, module)


def _open_onnx(path: Path, device: torch.device, temperature: float | None) -> Trained:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(f"Running {path} needs onnxruntime. Install it with: {INSTALL_EXPORT}") from error
    if not os.path.isfile(path):
        raise CheckpointError(f"There is no file {path}.")
    kinds = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=kinds)
    except Exception as error:  # onnxruntime raises classes of its own without a common base
        raise CheckpointError(f"{path} cannot be read as an ONNX model: {error}") from error
    try:
        metadata = session.get_modelmeta().custom_metadata_map
    except ValueError as error:  # bytes that are no text
        raise CheckpointError(f"{path} has metadata that are no text: it is damaged. Export it again.") from error
    own = _own_facts(metadata.get(ONNX_KEY), path)
    own.temperature = finite_temperature(own.temperature, str(path))
    _refuse_other_temperature(own.temperature, temperature, path)
    outputs = {output.name: output.shape for output in session.get_outputs()}
    if [one.name for one in session.get_inputs()] != ["images"] or "probabilities" not in outputs:
        raise CheckpointError(
            f"{path} was not exported by this toolkit: expected the input 'images' and the output 'probabilities', found "
            f"{', '.join(outputs)}. Export it with: resnet-finetune export RUN"
        )
    _require_as_many(own.classes, outputs["probabilities"][-1], path)

    def run(output: str) -> Callable[[Tensor], Tensor]:
        return lambda images: torch.from_numpy(session.run([output], {"images": images.numpy(force=True)})[0])

    return Trained.from_facts(path, own, run("probabilities"), run("features") if "features" in outputs else None)


def _open_timm(path: Path, device: torch.device, temperature: float | None) -> Trained:
    advice = "Expected config.json and model.safetensors, as export writes them."
    try:
        config = read_json(path / "config.json", _TimmConfig, "the configuration of a timm model", finite=False)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read as a timm model: {error} {advice}") from error
    own = config.resnet_finetune or _TimmFacts()
    if not timm.is_model(config.architecture):
        raise CheckpointError(f"{path} names the architecture '{config.architecture}', which timm does not have. {advice}")
    try:
        model: Any = timm.create_model(f"local-dir:{path}", pretrained=True).to(device).eval()
        require_finite(model.state_dict(), str(path))
        spec = own.input or InputSpec.from_plain(asdict(input_spec_of(model)))
        _run_once(model, spec.size, device)
    except FinetuneError:
        raise
    except Exception as error:  # what a wrong argument or damaged weights raise differs by architecture
        reason = shown(str(error).partition("\n")[0])[:200]
        raise CheckpointError(f"{path} cannot be read as a timm model: {reason}. {advice}") from error
    inside = finite_temperature(own.temperature, f"{path / 'config.json'}")
    heat = inside if temperature is None else temperature
    names = config.label_names or [str(index) for index in range(model.num_classes)]
    _require_as_many(names, model.num_classes, path)
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (spec.mean, spec.std))

    def normalise(images: Tensor) -> Tensor:
        return images.to(device).float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)

    def features(images: Tensor) -> Tensor:
        found: Tensor = model.forward_head(model.forward_features(normalise(images)), pre_logits=True)
        return found.flatten(1)

    network: nn.Module = model.to(memory_format=torch.channels_last)
    return Trained(path, tuple(names), spec, heat, lambda images: probabilities_of(network(normalise(images)), heat), features)


def _run_once(network: nn.Module, size: int, device: torch.device) -> None:
    """Let a network answer one image: some arguments of a wrong kind are found only then."""
    if size <= _MOST_TRIED:
        with torch.inference_mode():
            network(torch.zeros(1, 3, size, size, device=device))


def _require_as_many(names: Sequence[str], outputs: Any, path: Path) -> None:
    if isinstance(outputs, int) and outputs != len(names):
        raise CheckpointError(f"{path} names {len(names)} classes and has {outputs} outputs. It is damaged: export it again.")


def _own_facts(text: str | None, path: Path) -> Facts:
    if text is None:
        raise CheckpointError(
            f"{path} was not exported by this toolkit: its metadata lack '{ONNX_KEY}' with class names and input size. Export "
            "it with: resnet-finetune export RUN"
        )
    advice = "It is damaged: export it again with: resnet-finetune export RUN"
    return decode_json(text, Facts, "the metadata of an exported model", where=str(path), advice=advice, finite=False)


def _refuse_other_temperature(inside: float, wanted: float | None, path: Path) -> None:
    if wanted is not None and abs(wanted - inside) > 1e-9:
        raise ConfigError(
            f"The temperature of {path} is {inside:g} and part of its graph: leave --temperature out, or export it anew."
        )


def _device(name: str) -> torch.device:
    try:
        device = hardware.best_device() if name == "auto" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"The device '{name}' cannot be used: {str(error).splitlines()[0]} Give --device auto or cpu."
        ) from error
    return device
