"""Channels and places of activations, against timm's description of its networks and places worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from finetune import ConfigError, FinetuneModule
from finetune.backbones import create_model
from finetune.boundaries import Boundaries, describe
from finetune.explain import see
from finetune.grad_cam import class_map, grad_cam, look
from finetune.head_start import ridge
from finetune.layouts import ActivationLayout, Probe, layout_from_probe, layout_from_shape
from finetune.predictor import Predictor
from finetune.stages import split_head
from finetune.trained import Trained, probabilities_of

SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}
VGG = {"cfg": [8, "M", 16, "M", 16, 16, "M", 24, 24, "M", 32, 32, "M"], "mlp_ratio": 0.01}
# name: options, pixels, layout, tokens before the patches, stages that timm describes at the same place
FAMILIES = {
    "test_resnet": ({}, 64, "nchw", 0, 4),
    "test_convnext": ({}, 64, "nchw", 0, 4),
    "test_efficientnet": ({}, 64, "nchw", 0, 4),
    "test_maxvit": ({}, 160, "nchw", 0, 4),
    "test_byobnet": ({}, 64, "nchw", 0, 5),
    "test_nfnet": ({}, 64, "nchw", 0, 4),
    "mobilenetv2_035": ({}, 64, "nchw", 0, 4),
    "mobilenetv3_small_050": ({}, 64, "nchw", 0, 4),
    "regnetx_002": ({}, 64, "nchw", 0, 5),
    "densenet121": ({"growth_rate": 4, "block_config": (2, 2, 2, 2)}, 64, "nchw", 0, 1),
    "timm.models.vgg.VGG": (VGG, 64, "nchw", 0, 1),
    "swin_tiny_patch4_window7_224": (SWIN, 64, "nhwc", 0, 4),
    "test_mambaout": ({}, 64, "nhwc", 0, 4),
    "test_vit": ({}, 160, "tokens", 1, 5),
    "test_vit_relpos": ({}, 160, "tokens", 0, 9),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def network(name):
    torch.manual_seed(0)
    model = create_model(name, 3, **FAMILIES[name][0]).eval()
    described = [(each["module"], each["num_chs"], each["reduction"]) for each in timm_info(model)]
    classifier, stages = split_head(model)
    return model, stages, classifier, described


def timm_info(model):
    return model.feature_info.info if hasattr(model.feature_info, "info") else model.feature_info


@every_family
def test_channels_and_strides_are_those_that_timm_describes(name):
    _, size, kind, prefix, enough = FAMILIES[name]
    model, stages, classifier, described = network(name)
    boundaries = Boundaries(model, stages, size)
    outputs, taps, seen = boundaries.outputs, {}, {}
    rows = {row["stage"]: row for row in describe(model, stages, nn.Linear(classifier.in_features, 3), size)}
    for module, *_ in described:
        model.get_submodule(module).register_forward_hook(lambda _m, _i, out, module=module: seen.update({module: out.clone()}))

    def tap(stage, where, activation):
        if where == outputs[stage].tap:
            taps[stage] = activation.clone()

    images = torch.rand(1, 3, size, size)
    with torch.no_grad(), boundaries.tapping(tap):
        model(images)
    compared = 0
    for module, channels, reduction in described:
        for stage, activation in taps.items():
            if activation.shape == seen[module].shape and torch.equal(activation, seen[module]):
                assert (rows[stage]["channels"], rows[stage]["stride"]) == (channels, reduction), (stage, module)
                compared += 1
    assert compared >= enough
    spatial = [output.layout for output in outputs.values() if output.layout.spatial]
    assert {layout.kind for layout in spatial} == {kind}
    assert {layout.prefix for layout in spatial} <= {prefix, 0}
    assert spatial[-1].prefix == prefix


class Uniform(FinetuneModule):
    """Its first logit is the sum of a stage's output, by which all gradients are 1."""

    stage = ""

    def forward(self, images):
        total = self.boundaries.lower(self.normalise(images), self.stage).flatten(1).sum(1)
        return torch.stack([total, torch.zeros_like(total)], 1)


def hot_output(shape, kind, prefix, row, column, grid):
    """Return an activation that is 0.1 everywhere and 10 at one place: the index of the place, by hand."""
    activation = torch.full(shape, 0.1)
    if kind == "nchw":
        activation[:, :, row, column] = 10.0
    elif kind == "nhwc":
        activation[:, row, column, :] = 10.0
    else:
        activation[:, prefix + row * grid + column, :] = 10.0
    return activation


@every_family
def test_a_single_hot_place_is_where_the_map_is_highest(name):
    options, size, kind, prefix, _ = FAMILIES[name]
    model = Uniform(backbone=name, num_classes=2, weights="none", backbone_args=options).eval()
    model.input_spec = replace(model.input_spec, size=size)
    images = torch.zeros(1, 3, size, size)
    outputs = model.boundaries.outputs
    named = [stage for stage in model.stages[1:-1] if outputs[stage.name].layout.spatial and outputs[stage.name].tap == "next"]
    for stage in (named[0], named[-1]):
        grid = size // outputs[stage.name].layout.stride
        for row, column in {(0, grid - 1), (grid - 1, grid // 3), (grid // 2, 0)}:
            model.stage = stage.name
            entry = model.boundaries._entries[model.boundaries.stages.index(stage.name) + 1]

            def plant(_module, inputs, row=row, column=column, grid=grid):
                return (hot_output(inputs[0].shape, kind, prefix, row, column, grid), *inputs[1:])

            handle = entry.register_forward_pre_hook(plant)
            heat = grad_cam(model, images, stage.name, torch.tensor([0]))[0]
            handle.remove()
            peak = divmod(int(heat.argmax()), size)
            assert tuple(place * grid // size for place in peak) == (row, column), stage.name


@every_family
def test_explain_says_what_predict_says(name, tmp_path):
    options, size, *_ = FAMILIES[name]
    torch.manual_seed(0)
    model = FinetuneModule(name, num_classes=3, weights="none", backbone_args=options).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    spec = model.input_spec = replace(model.input_spec, size=size, crop=0.8)
    trained = Trained(tmp_path, ("a", "b", "c"), spec, 2.0, lambda images: probabilities_of(model(images), 2.0), None, model)
    predictor = Predictor(trained)
    files = []
    for number, shape in enumerate([(2 * size, size, 3), (size, size + 9, 3), (50, 70, 3)]):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels.numpy()).save(files[-1])
    seen, said = see(predictor, files), predictor(files)
    assert [each.labels for each in seen.predictions] == [each.labels for each in said]
    for mine, theirs in zip(seen.predictions, said, strict=True):
        assert mine.probabilities == pytest.approx(theirs.probabilities, abs=1e-6)
    assert seen.maps.shape == (3, size, size)
    assert 0 <= float(seen.maps.min()) <= float(seen.maps.max()) <= 1


def test_where_the_class_token_alone_is_read_the_block_before_shows_the_patches():
    model = FinetuneModule("test_vit", num_classes=2, weights="none").eval()
    images = torch.rand(1, 3, 160, 160)
    assert look(model, images).stage == "blocks.4"
    with pytest.raises(ConfigError, match=r"class token alone.*--stage blocks\.4"):
        grad_cam(model, images, "blocks.5")
    relative = FinetuneModule("test_vit_relpos", num_classes=2, weights="none").eval()  # which averages the patches
    assert look(relative, images).stage == "blocks.8"


def pasted(quadrant, number, side=128):
    """Return a noisy image with a digit of 48 pixels in a quadrant, or with none."""
    noise = np.random.default_rng(number).integers(90, 150, (side, side))
    if quadrant is not None:
        top, left = (8 + side // 2 * (quadrant // 2), 8 + side // 2 * (quadrant % 2))
        noise[top : top + 48, left : left + 48] = np.kron(load_digits().images[number] * 15, np.ones((6, 6)))
    return torch.from_numpy(noise.astype(np.uint8)).expand(3, side, side)


def test_the_map_of_an_object_is_highest_where_it_was_pasted():
    model = FinetuneModule("resnet18", num_classes=2, weights="bundled").eval()
    images = torch.stack([pasted(number // 2 % 4 if number % 2 else None, number) for number in range(32)])
    with torch.no_grad():
        features = model.features(images).double().numpy()
        solution = ridge(features, np.arange(32) % 2, 2)  # whether there is a digit
        model.head.weight.copy_(torch.from_numpy(solution.weight))
        model.head.bias.copy_(torch.from_numpy(solution.bias))
    quadrants = [number % 4 for number in range(8)]
    found = look(model, torch.stack([pasted(quadrant, 100 + number) for number, quadrant in enumerate(quadrants)]))
    assert found.logits.argmax(1).tolist() == [1] * 8
    peaks = [divmod(int(heat.argmax()), 128) for heat in found.maps]
    assert [row // 64 * 2 + column // 64 for row, column in peaks] == quadrants


# ---------------------------------------------------------------------------------------------------- networks of one's own


class Branches(nn.Module):
    """Two branches side by side on one stem, of other strides and widths."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.fine = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(8, 20, 3, 4, 1), nn.ReLU())
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images):
        stem = self.stem(images)
        return self.fc(torch.cat([self.fine(stem).mean((2, 3)), self.coarse(stem).mean((2, 3))], 1))


def test_branches_have_their_own_strides():
    model = Branches()
    classifier, stages = split_head(model)
    rows = describe(model, stages, nn.Linear(classifier.in_features, 2), 64)
    table = [(row["stage"], row["stride"], row["channels"]) for row in rows]
    assert table == [("stem", 2, 8), ("fine", 4, 12), ("coarse", 8, 20), ("head", None, 2)]


def test_what_is_pooled_has_no_stride_and_what_comes_before_it_has():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 6, 3, 4, 1)
            self.neck = nn.Linear(6 * 4, 10)
            self.fc = nn.Linear(10, 2)

        def forward(self, images):
            return self.fc(self.neck(nn.functional.adaptive_avg_pool2d(self.features(images), 2).flatten(1)))

    model = Pooled()
    _, stages = split_head(model)
    rows = describe(model, stages, nn.Linear(10, 2), 32)
    assert [(row["stride"], row["channels"]) for row in rows] == [(4, 6), (None, 10), (None, 2)]


def test_an_image_of_a_size_that_the_network_refuses_is_a_sentence():
    model = create_model("test_vit_relpos", 2)
    _, stages = split_head(model)
    with pytest.raises(ConfigError, match="does not take images of 64 x 64 pixels"):
        Boundaries(model, stages, 64)


# -------------------------------------------------------------------------------------------- shapes, by hand: side 64, doubled


@pytest.mark.parametrize(
    ("shapes", "kind", "channels", "stride", "prefix"),
    [
        (((1, 8, 4, 4), (2, 8, 8, 4), (1, 8, 4, 8)), "nchw", 8, 16, 0),
        (((1, 4, 4, 4), (2, 4, 8, 4), (1, 4, 4, 8)), "nchw", 4, 16, 0),  # as many channels as rows and columns
        (((1, 4, 4, 4), (2, 8, 4, 4), (1, 4, 8, 4)), "nhwc", 4, 16, 0),
        (((1, 4, 8, 4), (2, 8, 8, 4), (1, 4, 8, 8)), "nhwc", 8, 16, 0),  # (N, H, C, W) is read rightly, too
        (((1, 16, 8), (2, 32, 8), (1, 32, 8)), "tokens", 8, 16, 0),
        (((1, 21, 8), (2, 37, 8), (1, 37, 8)), "tokens", 8, 16, 5),
        (((1, 8, 17), (2, 8, 33), (1, 8, 33)), "tokens", 8, 16, 1),  # (N, C, tokens)
        (((1, 8), (2, 8), (1, 8)), "vector", 8, None, 0),
        (((1, 8, 1, 1), (2, 8, 1, 1), (1, 8, 1, 1)), "vector", 8, None, 0),
        (((1, 1, 1, 8), (2, 1, 1, 8), (1, 1, 1, 8)), "vector", 8, None, 0),
        (((16, 1, 8), (32, 2, 8), (32, 1, 8)), "unknown", 1, None, 0),  # the sequence first
        (((1, 8, 7, 7), (2, 8, 7, 7), (1, 8, 7, 7)), "unknown", 8, None, 0),  # pooled to a fixed grid
        (((4, 16, 8), (16, 16, 8), (8, 16, 8)), "unknown", 16, None, 0),  # windows in the place of images
    ],
)
def test_axes_are_told_apart_by_how_they_grow(shapes, kind, channels, stride, prefix):
    found = layout_from_probe(Probe(64, *shapes))
    assert (found.kind, found.channels, found.stride, found.prefix) == (kind, channels, stride, prefix)


class Described(nn.Module):
    def __init__(self, **facts):
        super().__init__()
        for name, value in facts.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("shape", "facts", "kind", "channels", "stride", "prefix"),
    [
        ((1, 8, 4, 4), {}, "nchw", 8, 16, 0),
        ((1, 4, 4, 8), {}, "nhwc", 8, 16, 0),
        ((1, 4, 4, 4), {}, "unknown", 4, None, 0),
        ((1, 4, 4, 4), {"output_fmt": "NHWC"}, "nhwc", 4, 16, 0),
        ((1, 17, 8), {}, "tokens", 8, 16, 1),
        ((1, 17, 16), {}, "unknown", 17, None, 0),  # both axes could be tokens
        ((1, 16, 16), {"num_prefix_tokens": 1}, "tokens", 16, 16, 0),
        ((1, 20, 16), {"num_prefix_tokens": 4}, "tokens", 16, 16, 4),
        ((1, 8, 1, 1), {}, "vector", 8, None, 0),
    ],
)
def test_where_one_size_is_all_shape_and_description_decide(shape, facts, kind, channels, stride, prefix):
    found = layout_from_shape(shape, 64, Described(**facts))
    assert (found.kind, found.channels, found.stride, found.prefix) == (kind, channels, stride, prefix)


def test_maps_have_the_place_of_each_value():
    values = torch.arange(2 * 3 * 2 * 4.0).view(2, 3, 2, 4)  # N, C, H, W
    tokens = torch.cat([torch.full((2, 5, 3), -1.0), values.flatten(2).movedim(1, 2)], 1)
    assert torch.equal(ActivationLayout(3, 1, (2, 3), 8).maps(values, 16, 32), values)
    assert torch.equal(ActivationLayout(3, 3, (1, 2), 8).maps(values.movedim(1, 3), 16, 32), values)
    assert torch.equal(ActivationLayout(3, 2, (1,), 8, prefix=5).maps(tokens, 16, 32), values)
    with pytest.raises(ConfigError, match="grid of patches"):
        ActivationLayout(3, 2, (1,), 8).maps(tokens, 32, 32)
    with pytest.raises(ConfigError, match="no height and width"):
        ActivationLayout(3).maps(torch.zeros(1, 3), 32, 32)


def test_a_map_is_the_weighted_sum_by_hand():
    activation = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]]])  # 2 channels, 1 x 2 places
    gradient = torch.tensor([[[[1.0, 3.0]], [[-1.0, 0.0]]]])  # means 2 and -0.5: 2 * 1 - 0 = 2 and 2 * 2 - 0.5 * 4 = 2
    torch.testing.assert_close(class_map(activation, gradient, (1, 2)), torch.ones(1, 1, 2))
    assert not class_map(activation, -gradient.abs(), (1, 2)).any()
