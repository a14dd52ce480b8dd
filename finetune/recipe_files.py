"""Recipes: YAML files that ship with the package, found by name from any folder. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.errors import ConfigError, did_you_mean

SWEEP = "sweep"  # beside the recipes, but for `wandb sweep`, which then starts `fit` many times


def recipes_folder() -> Path:
    """Return the folder of the built-in recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "recipes", package.parent / "recipes") if folder.is_dir())


def recipe_names() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted({path.stem for path in recipes_folder().glob("*.yaml")} - {SWEEP})


def find_recipe(name: str) -> Path:
    """Return the file that `--config NAME` means: a file of that path, or a built-in recipe of that name.

    Raises:
        ConfigError: If there is neither; the message names the nearest file or recipe.
    """
    path = Path(name)
    if os.path.isfile(name):  # no error for a name that no file can have
        return path
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if stem in recipe_names() and path.parent in (Path(), Path("recipes")):
        return recipes_folder() / f"{stem}.yaml"
    if name == SWEEP:
        raise ConfigError(
            "'sweep' is no recipe of fit: W&B starts fit many times by it. Copy it, then: resnet-finetune recipes --copy sweep "
            "sweep.yaml && wandb sweep sweep.yaml (docs/tracking.md)"
        )
    beside = {str(path.parent / p.name): None for p in path.parent.glob("*.y*ml")} if os.path.isdir(path.parent) else {}
    hint = did_you_mean(name, [*recipe_names(), *beside]) or did_you_mean(stem, recipe_names())
    raise ConfigError(
        f"There is no file or recipe '{name}'.{hint} Expected a YAML file or one of the recipes: {', '.join(recipe_names())}."
    )


def header(path: Path) -> list[str]:
    """Return the comment lines that open a recipe, without the `#`."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def list_recipes() -> str:
    """Return the list of recipes with the purpose that each states in the first two lines of its header."""
    names = [*recipe_names(), SWEEP]
    width = max(map(len, names))
    entries = []
    for name in names:
        first, second = [*header(recipes_folder() / f"{name}.yaml"), "", ""][:2]
        entries.append(f"{name:<{width}}  {first}\n{'':<{width}}  {second}".rstrip())
    return "\n".join(entries)


def copy_recipe(name: str, target: Path) -> str:
    """Copy a recipe so that it can be edited; return the command that uses it.

    Raises:
        ConfigError: If the recipe is not known or the target exists.
    """
    names = [*recipe_names(), SWEEP]
    if name not in names:
        raise ConfigError(f"There is no recipe '{name}'.{did_you_mean(name, names)} There are: {', '.join(names)}.")
    if os.path.lexists(target):  # also a link to nothing, which would be written through
        raise ConfigError(f"{target} exists already and is not overwritten: choose another name or remove it.")
    if not target.parent.is_dir():
        raise ConfigError(f"The folder {target.parent} does not exist: make it first.")
    content = (recipes_folder() / f"{name}.yaml").read_bytes()
    try:
        with target.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}. Choose another name.") from error
    return f"wandb sweep {target}" if name == SWEEP else f"resnet-finetune fit --config {target}"
