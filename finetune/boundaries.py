"""Where a backbone can be cut: run it up to a stage, or from a stage on, and describe what lies between the cuts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.backbones import create_model, input_spec_of
from finetune.errors import ConfigError
from finetune.stages import HEAD, Stage, require_stage, split_head


class _ReachedError(Exception):
    """Carries the activation out of a forward pass that need not go on."""

    def __init__(self, activation: Tensor) -> None:
        self.activation = activation


class Boundaries:
    """The places where a backbone can be cut: `upper(lower(x, stage), stage) == backbone(x)`.

    The boundary after a stage is the input of the first module of the next one; the last boundary is the features.

    Args:
        backbone: The network without its classifier.
        stages: Its stages, in order.
        size: Side of the square dummy picture in pixels; it must be a size that the network accepts.
    """

    def __init__(self, backbone: nn.Module, stages: Sequence[Stage], size: int = 64) -> None:
        self.backbone = backbone
        self.stages = [stage.name for stage in stages]
        self._parts = [nn.ModuleList(backbone.get_submodule(name) for name in stage.modules) for stage in stages]
        self.size = size
        self._entries = self._find_entries(stages)

    def _dummy(self) -> Tensor:
        like = next(self.backbone.parameters())
        return torch.zeros(1, 3, self.size, self.size, device=like.device, dtype=like.dtype)

    def _run(self, images: Tensor) -> Tensor:
        return self.backbone._call_impl(images)  # type: ignore[no-any-return, no-untyped-call]  # compiled, it would pass hooks by

    def _find_entries(self, stages: Sequence[Stage]) -> list[nn.Module]:
        """Return for each stage the first of its modules that a forward pass calls."""
        called: dict[str, nn.Module] = {}

        stage_of = {
            name: stage.name
            for stage in stages
            for name, _ in self.backbone.named_modules()
            if any(name == outer or name.startswith(f"{outer}.") for outer in stage.modules)
        }
        handles = [
            module.register_forward_pre_hook(lambda module, _, name=name: called.setdefault(stage_of[name], module) and None)
            for name, module in self.backbone.named_modules()
            if name in stage_of
        ]
        try:
            self.forward_dummy()
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.stages if name not in called]
        if missing:
            raise ConfigError(f"The stages {', '.join(missing)} are never called in a forward pass: they cannot be cut at.")
        return [called[name] for name in self.stages]

    def lower(self, images: Tensor, stage: str) -> Tensor:
        """Run the network up to and including a stage: (N, 3, H, W) → the activation at the boundary above it."""
        index = self.stages.index(require_stage(stage, self.stages))
        if index == len(self.stages) - 1:
            return self._run(images)

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _ReachedError(inputs[0])

        handle = self._entries[index + 1].register_forward_pre_hook(stop)
        try:
            self._run(images)
        except _ReachedError as reached:
            return reached.activation
        finally:
            handle.remove()
        raise ConfigError(f"The boundary after '{stage}' was not reached.")

    def upper(self, activation: Tensor, stage: str) -> Tensor:
        """Run the rest of the network on the activation at the boundary above a stage: → features (N, C)."""
        index = self.stages.index(require_stage(stage, self.stages))
        if index == len(self.stages) - 1:
            return activation
        handle = self._entries[index + 1].register_forward_pre_hook(lambda _, inputs: (activation, *inputs[1:]))
        below = nn.ModuleList(self._parts[: index + 1])  # the blank picture that passes there must leave no trace
        try:
            with evaluating(below):
                return self._run(self._dummy())
        finally:
            handle.remove()

    def forward_dummy(self) -> Tensor:
        """Run a blank picture through the network in eval mode: → features (1, C)."""
        with evaluating(self.backbone), torch.no_grad():
            return self._run(self._dummy())

    def output_shape(self, stage: Stage) -> tuple[int, ...]:
        """Return the shape of what a stage hands on; the last one's before it is pooled to features."""
        shapes: list[tuple[int, ...]] = []
        if stage.name != self.stages[-1]:
            with evaluating(self.backbone), torch.no_grad():
                return tuple(self.lower(self._dummy(), stage.name).shape)
        handles = [
            part.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)) if isinstance(out, Tensor) else None)
            for name in stage.modules
            for part in self.backbone.get_submodule(name).modules()
        ]
        try:
            shapes.append(tuple(self.forward_dummy().shape))
        finally:
            for handle in handles:
                handle.remove()
        return next((shape for shape in reversed(shapes) if len(shape) == 4), shapes[-1])

    def check(self) -> dict[str, bool]:
        """Say for each stage whether the network can be cut above it without changing one bit of the result."""
        like = self._dummy()
        images = torch.rand(2, *like.shape[1:], generator=torch.Generator().manual_seed(0)).to(like)
        with evaluating(self.backbone), torch.no_grad():
            whole = self.backbone(images)
            return {s: torch.equal(self.upper(self.lower(images, s), s), whole) for s in self.stages}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a network into eval mode and restore the mode of every sub-module afterwards."""
    modes = {part: part.training for part in module.modules()}
    nn.Module.eval(module)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def describe(backbone: nn.Module, stages: Sequence[Stage], head: nn.Linear, size: int) -> list[dict[str, Any]]:
    """Describe each stage and the head as a row of a table.

    Args:
        backbone: The network without its classifier.
        stages: Its stages, in order.
        head: The linear layer on the features.
        size: Side of the input picture in pixels, at which stride and multiply-adds are counted.

    Returns:
        Rows with the keys stage, modules, parameters, share, stride, channels, multiply-adds.
    """
    boundaries = Boundaries(backbone, stages, size)
    sizes = {name: p.numel() for name, p in backbone.named_parameters()}
    in_head = sum(p.numel() for p in head.parameters())
    total = sum(sizes.values()) + in_head
    with FlopCounterMode(display=False) as counter:
        boundaries.forward_dummy()
    flops = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items() if "." in name}
    rows: list[dict[str, Any]] = []
    for stage in stages:
        parameters = sum(sizes[name] for name in stage.parameters)
        shape = boundaries.output_shape(stage)
        rows.append(
            {
                "stage": stage.name,
                "modules": _count_leaves(backbone, stage),
                "parameters": parameters,
                "share": parameters / total,
                "stride": size // shape[-1] if len(shape) == 4 else None,
                "channels": shape[1],
                "multiply-adds": sum(_flops_of(flops, backbone, name) for name in stage.modules) // 2,
            }
        )
    return [
        *rows,
        {
            "stage": HEAD,
            "modules": 1,
            "parameters": in_head,
            "share": in_head / total,
            "stride": None,
            "channels": head.out_features,
            "multiply-adds": head.in_features * head.out_features,
        },
    ]


def _count_leaves(backbone: nn.Module, stage: Stage) -> int:
    outer = [backbone.get_submodule(name) for name in stage.modules]
    return sum(1 for module in outer for part in module.modules() if any(True for _ in part.parameters(recurse=False)))


def _flops_of(flops: Mapping[str, int], backbone: nn.Module, name: str) -> int:
    """Sum what a module did; a container that is not called itself is the sum of its children."""
    if name in flops:
        return flops[name]
    children = backbone.get_submodule(name).named_children()
    return sum(_flops_of(flops, backbone, f"{name}.{child}") for child, _ in children)


def stage_table(backbone: str, num_classes: int, size: int | None = None) -> str:
    """Return the table that `resnet-finetune stages` prints.

    Args:
        backbone: A timm model name or the dotted path of a network.
        num_classes: Classes of the head.
        size: Side of the input picture in pixels; what the weights expect if None.
    """
    model = create_model(backbone, num_classes)
    size = input_spec_of(model).size if size is None else size
    if size < 1:
        raise ConfigError(f"Expected --input to be at least 1, found {size}.")
    classifier, stages = split_head(model)
    rows = describe(model, stages, nn.Linear(classifier.in_features, num_classes), size)
    total = {"parameters": sum(r["parameters"] for r in rows), "multiply-adds": sum(r["multiply-adds"] for r in rows)}
    cells = [
        [
            row["stage"],
            row["modules"],
            f"{row['parameters']:,}",
            f"{row['share']:.1%}",
            row["stride"] or "-",
            row["channels"],
            f"{row['multiply-adds'] / 1e6:,.1f} M",
        ]
        for row in rows
    ]
    cells.append(["total", "", f"{total['parameters']:,}", "100.0%", "", "", f"{total['multiply-adds'] / 1e6:,.1f} M"])
    headers = ["stage", "modules", "parameters", "share", "output stride", "output channels", f"multiply-adds at {size} px"]
    table = tabulate(cells, headers=headers, disable_numparse=True, colalign=("left", *("right" for _ in headers[1:])))
    return f"{backbone}\n{table}"
