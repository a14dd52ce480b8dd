"""Where a backbone can be cut: run it up to a stage, or from a stage on, and describe what lies between the cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from finetune.backbones import create_model, input_spec_of
from finetune.errors import ConfigError
from finetune.layouts import ActivationLayout, Probe, Shape, at_size, best_layout, layout_from_probe, layout_from_shape
from finetune.stages import HEAD, Stage, require_stage, split_head


class _ReachedError(Exception):
    """Carries the activation out of a forward pass that need not go on."""

    def __init__(self, activation: Tensor) -> None:
        self.activation = activation


_STEP = 64  # pixels: a multiple of every usual stride, so that growth by as many shows it exactly
_OWN, _NEXT = "own", "next"


class Output(NamedTuple):
    """What a stage hands on.

    Attributes:
        tap: `next` if it is the input of the next stage; `own` if it is the output of the stage's last module, as where that
            is pooled before the next one gets it, or the next one works on something else.
        layout: What its axes mean.
    """

    tap: str
    layout: ActivationLayout


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
        self._modules = {stage.name: stage.modules for stage in stages}
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
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{type(self.backbone).__name__} does not take images of {self.size} x {self.size} pixels: {error}"
            ) from error
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
        return self._run_blank(1, self.size, self.size)

    @contextmanager
    def tapping(self, see: Callable[[str, str, Tensor], Tensor | None]) -> Iterator[None]:
        """Show what stages hand on during a forward pass.

        Args:
            see: Is called with the name of a stage, `own` or `next` (see `Output`), and the activation; the pass goes on with
                the tensor that it returns, if it does.
        """

        def output(stage: str) -> Callable[..., Tensor | None]:
            return lambda _module, _inputs, found: see(stage, _OWN, found) if isinstance(found, Tensor) else None

        def entry(stage: str) -> Callable[..., tuple[Any, ...] | None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
                other = see(stage, _NEXT, inputs[0]) if inputs and isinstance(inputs[0], Tensor) else None
                return None if other is None else (other, *inputs[1:])

            return hook

        handles = [
            self.backbone.get_submodule(module).register_forward_hook(output(stage))
            for stage, modules in self._modules.items()
            for module in modules
        ]
        for stage, module in zip(self.stages, self._entries[1:], strict=False):
            handles.append(module.register_forward_pre_hook(entry(stage)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @cached_property
    def outputs(self) -> dict[str, Output]:
        """What each stage hands on, and in which layout."""
        found: dict[str, Output] = {}
        depends = self._depending()
        for stage, layouts in self._layouts().items():
            candidates = {tap: layouts[tap] for tap in (_NEXT, _OWN) if tap in layouts and (tap == _OWN or stage in depends)}
            tap = best_layout(candidates or layouts)
            found[stage] = Output(tap, layouts[tap])
        return found

    def _layouts(self) -> dict[str, dict[str, ActivationLayout]]:
        only = self._shapes(1, self.size, self.size)
        for side in dict.fromkeys((-(-self.size // _STEP) * _STEP, self.size)):
            try:
                square, tall, wide = (
                    self._shapes(*sizes) for sizes in ((1, side, side), (2, 2 * side, side), (1, side, 2 * side))
                )
            except Exception:  # whatever a network raises for images of a size that it does not take
                continue
            return {
                stage: {
                    tap: at_size(
                        layout_from_probe(Probe(side, square[stage][tap], tall[stage][tap], wide[stage][tap])), shape, self.size
                    )
                    for tap, shape in taps.items()
                }
                for stage, taps in only.items()
            }
        return {
            stage: {tap: layout_from_shape(shape, self.size, self.backbone) for tap, shape in taps.items()}
            for stage, taps in only.items()
        }

    def _shapes(self, number: int, height: int, width: int) -> dict[str, dict[str, Shape]]:
        shapes: dict[str, dict[str, Shape]] = {stage: {} for stage in self.stages}
        with self.tapping(lambda stage, tap, found: shapes[stage].update({tap: tuple(found.shape)})):
            self._run_blank(number, height, width)
        return shapes

    def _depending(self) -> set[str]:
        """Return the stages whose output the input of the next one is made of; of two branches side by side neither is."""
        own: dict[str, Tensor] = {}
        reached: set[str] = set()

        def see(stage: str, tap: str, found: Tensor) -> Tensor | None:
            if tap == _OWN:
                own[stage] = found.detach().requires_grad_()
                return own[stage].clone()  # the next layer may write into it
            if stage in own and found.requires_grad:
                (gradient,) = torch.autograd.grad(found.sum(), own[stage], retain_graph=True, allow_unused=True)
                reached.update(() if gradient is None else (stage,))
            return None

        with evaluating(self.backbone), torch.enable_grad(), self.tapping(see):
            self._run(self._dummy())
        return reached

    def _run_blank(self, number: int, height: int, width: int) -> Tensor:
        like = next(self.backbone.parameters())
        with evaluating(self.backbone), torch.no_grad():
            return self._run(torch.zeros(number, 3, height, width, device=like.device, dtype=like.dtype))

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
        layout = boundaries.outputs[stage.name].layout
        rows.append(
            {
                "stage": stage.name,
                "modules": _count_leaves(backbone, stage),
                "parameters": parameters,
                "share": parameters / total,
                "stride": layout.stride,
                "channels": layout.channels,
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
