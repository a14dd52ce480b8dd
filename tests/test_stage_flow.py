"""What a step does to a stage, against numbers worked out by hand; and the weights that distances are measured from."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.stage_flow import Flow, Measurement, start_weights


def parameter(values, gradient=None, trains=True):
    made = nn.Parameter(torch.tensor(values), requires_grad=trains)
    if gradient is not None:
        made.grad = torch.tensor(gradient)
    return made


def measure(members, move=0.0, **options):
    measurement = Measurement(members, **options)
    with torch.no_grad():
        for named in members.values():
            for own in named.values():
                if own.requires_grad:
                    own += move
    return measurement.finish()


def test_numbers_worked_out_by_hand():
    stem = {"a": parameter([3.0, 0.0, 0.0], [0.6, 0.0, 0.0]), "b": parameter([[0.0, 4.0]], [[0.0, 0.8]])}
    start = {"a": torch.tensor([3.0, 1.0, 0.0]), "b": torch.tensor([[2.0, 2.0]])}
    flow = measure({"stem": stem}, move=0.1, start=start)["stem"]
    assert flow.grad_norm == pytest.approx(1.0)  # 0.36 + 0.64
    assert flow.weight_norm == pytest.approx(5.0)  # 9 + 16
    assert flow.rgn == pytest.approx(0.2)
    assert flow.update_ratio == pytest.approx(0.1 * 5**0.5 / 5)  # each of five values moved by 0.1
    assert flow.distance == pytest.approx(3.0)  # 1 + 4 + 4, before the step
    assert flow.dead_share == pytest.approx(3 / 5)
    assert flow.nonfinite == 0


def test_stages_are_apart_and_a_frozen_one_has_nothing():
    members = {
        "stem": {"s": parameter([1.0], trains=False)},
        "layer1": {"l": parameter([2.0], [4.0]), "fixed": parameter([100.0], [100.0], trains=False)},
        "head": {"h": parameter([8.0], [1.0])},
    }
    flows = measure(members, start={"l": torch.tensor([0.5])})
    assert flows["stem"] == Flow()
    assert flows["stem"].frozen
    assert (flows["layer1"].grad_norm, flows["layer1"].weight_norm, flows["layer1"].distance) == (4.0, 2.0, 1.5)
    assert (flows["head"].grad_norm, flows["head"].update_ratio) == (1.0, 0.0)
    assert flows["head"].distance is None  # where it started is not known
    assert list(flows) == ["stem", "layer1", "head"]
    assert measure({"stem": {"s": parameter([1.0], trains=False)}}) == {"stem": Flow()}


def test_no_gradient_is_one_of_zeros():
    assert measure({"stem": {"s": parameter([2.0])}})["stem"].dead_share == 1.0
    half = measure({"stem": {"s": parameter([2.0]), "t": parameter([2.0], [3.0])}})["stem"]
    assert (half.grad_norm, half.dead_share) == (3.0, 0.5)


def test_nothing_is_divided_by_zero_weights():
    flow = measure({"head": {"h": parameter([0.0, 0.0], [3.0, 4.0])}}, move=1.0)["head"]
    assert (flow.grad_norm, flow.weight_norm, flow.update_ratio, flow.rgn) == (5.0, 0.0, None, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(bad):
    flows = measure({"stem": {"s": parameter([1.0, 1.0, 1.0], [bad, bad, 0.0])}, "head": {"h": parameter([1.0], [1.0])}})
    assert flows["stem"].nonfinite == 2
    assert not torch.isfinite(torch.tensor(flows["stem"].grad_norm))
    assert flows["head"].nonfinite == 0


def test_gradients_of_a_scaled_loss_are_brought_back():
    flow = measure({"stem": {"s": parameter([2.0], [3.0 * 1024])}}, scale=1024.0)["stem"]
    assert (flow.grad_norm, flow.rgn) == (3.0, 1.5)


def test_half_precision_is_not_summed_in_half_precision():
    ones = nn.Parameter(torch.ones(3000, dtype=torch.bfloat16))
    ones.grad = torch.ones(3000, dtype=torch.bfloat16)
    flow = measure({"stem": {"s": ones}})["stem"]
    assert flow.grad_norm == pytest.approx(3000**0.5, rel=1e-6)
    assert flow.dead_share == 0.0


# -- the weights that training starts from ------------------------------------------------------------------------------------


def test_the_start_outlives_the_run(tmp_path):
    weights = {"conv": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last), "bias": nn.Parameter(torch.randn(4))}
    wanted = {name: weight.detach().clone() for name, weight in weights.items()}
    file = tmp_path / "new" / "start.safetensors"
    fresh = start_weights(weights, file, fresh=True)
    with torch.no_grad():
        for weight in weights.values():
            weight += 1
    later = start_weights(weights, file, fresh=False)
    for found in (fresh, later):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert [path.name for path in file.parent.iterdir()] == ["start.safetensors"]


def test_without_a_folder_the_start_is_known_to_this_process_alone():
    weight = torch.ones(2)
    found = start_weights({"w": weight}, None, fresh=True)
    weight += 1
    assert found["w"].tolist() == [1.0, 1.0]
    assert start_weights({"w": weight}, None, fresh=False) is None


def test_a_start_that_is_gone_is_not_made_up(tmp_path):
    assert start_weights({"w": torch.ones(2)}, tmp_path / "start.safetensors", fresh=False) is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_begins_anew_has_a_new_start(tmp_path):
    file = tmp_path / "start.safetensors"
    save_file({"w": torch.zeros(2)}, file)
    assert start_weights({"w": torch.ones(2)}, file, fresh=True)["w"].tolist() == [1.0, 1.0]
