"""Curves show the values that they were given, phases where they are, and a frozen stage as nothing."""

import numpy as np

from finetune.curve_figures import learning_rates, metric_curves, named_curves, stage_heatmap
from finetune.run_files import Curve, Span

SPANS = [Span(0, 2, "head"), Span(2, 6, "everything")]


def curve(*values, start=1.0):
    return Curve(np.arange(start, start + len(values)), np.array(values, float))


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].lines}


def test_metrics_with_phases_and_the_best_checkpoint():
    curves = {"val/loss": curve(3, 2, 1, 2, 3, 4), "train/loss": curve(5, 4, 3, 2, 1, 1)}
    figure = metric_curves("Loss", curves, spans=SPANS, best=3)
    shown = lines(figure)
    np.testing.assert_array_equal(shown["val/loss"].get_ydata(), [3, 2, 1, 2, 3, 4])
    np.testing.assert_array_equal(shown["train/loss"].get_xdata(), [1, 2, 3, 4, 5, 6])
    assert shown["val/loss"].get_color() == shown["train/loss"].get_color()
    assert shown["val/loss"].get_linestyle() != shown["train/loss"].get_linestyle()
    assert list(shown["best checkpoint"].get_xdata()) == [3, 3]
    assert [text.get_text() for text in figure.axes[0].texts] == ["head", "everything"]
    figure.canvas.draw()


def test_one_point_and_no_number_can_be_drawn():
    for values in ((0.5,), (float("nan"),), (float("inf"), 1.0)):
        metric_curves("Loss", {"val/loss": curve(*values)}, spans=SPANS).canvas.draw()


def test_rates_are_logarithmic_and_a_frozen_stage_has_none():
    rates = {"stem": curve(0, 0, 1e-4), "layer1": curve(0, 0, 1e-4), "head": curve(1e-2, 1e-3, 1e-3)}
    figure = learning_rates(rates, spans=SPANS)
    assert figure.axes[0].get_yscale() == "log"
    shown = lines(figure)
    assert list(shown) == ["stem to layer1", "head"]
    np.testing.assert_array_equal(shown["stem to layer1"].get_ydata(), [np.nan, np.nan, 1e-4])
    figure.canvas.draw()
    learning_rates({"head": curve(0, 0)}).canvas.draw()


def test_a_heat_map_has_a_row_per_stage_and_a_column_per_step():
    flow = {"stem": Curve(np.array([2.0, 3.0]), np.array([0.5, 0.25])), "head": curve(1, 2, np.nan, 4, start=0)}
    figure = stage_heatmap("Gradients", flow, broken={"head": curve(0, 0, 1, 0, start=0)})
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown.filled(-1), [[-1, -1, 0.5, 0.25], [1, 2, -1, 4]])
    assert axes.images[0].get_extent() == [0, 4, 1.5, -0.5]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["stem", "head"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[2]]
    figure.canvas.draw()


def test_many_steps_are_put_together_by_their_geometric_mean():
    flow = {"head": Curve(np.arange(1200.0), np.tile([1.0, 100.0], 600))}
    shown = stage_heatmap("Gradients", flow).axes[0].images[0].get_array()
    assert shown.shape == (1, 200)
    np.testing.assert_allclose(shown, 10.0)


def test_steps_between_two_measurements_are_no_gap():
    places = np.array([0.0, 1, 2, 3, 3.5, 4, 10])
    shown = stage_heatmap("Gradients", {"head": Curve(places, np.ones(7))}).axes[0].images[0].get_array()
    assert not np.ma.getmaskarray(shown).any()


def test_runs_over_each_other():
    figure = named_curves("val/acc", {"small/1": curve(0.1, 0.2), "$large$/2": curve(0.3)})
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[0.1, 0.2], [0.3]]
    figure.canvas.draw()
