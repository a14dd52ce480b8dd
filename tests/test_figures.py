"""Which figures a run has, and how they become part of a page."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from finetune.figures import of_run, png, svg
from finetune.outcomes import read_outcome

TRAINING = ["loss", "metrics", "learning_rates"]
GRADIENTS = ["weight_distance", "gradient_flow", "update_ratio"]
OUTCOME = ["confusion", "confusion_normalised", "per_class", "reliability", "confused_pairs"]


def test_all_figures_of_a_whole_run(past_run):
    run = past_run()
    Image.new("RGB", (40, 30)).save(run / "augmented.jpg")
    figures = of_run(run)
    assert list(figures) == TRAINING + GRADIENTS + OUTCOME + ["augmented", "mistakes"]
    assert all(png(figure).startswith(b"\x89PNG") for figure in figures.values())
    flow = figures["gradient_flow"].axes[0].images[0].get_array()
    np.testing.assert_allclose(flow.filled(0), [[0, 0, 0.1, 0.1], [0, 0, 0.2, 0.2], [0.3, 0.3, 0.3, 0.3]])


@pytest.mark.parametrize(
    ("missing", "left"),
    [
        ("metrics.csv", GRADIENTS + OUTCOME),
        ("gradients.csv", TRAINING + OUTCOME),
        ("predictions.val.csv", TRAINING + GRADIENTS),
        ("record.json", TRAINING + GRADIENTS + OUTCOME),
    ],
)
def test_what_a_run_lacks_is_left_out(past_run, missing, left):
    run = past_run()
    (run / missing).unlink()
    assert list(of_run(run, pictures=False)) == left


def test_mistakes_are_drawn_with_what_they_are_and_what_was_said(past_run):
    run = past_run(pictures=200)
    found = read_outcome(run / "predictions.val.csv")
    wrong = [i for i in np.argsort(-found.probabilities.max(1)) if found.predicted[i] != found.labels[i]][:12]
    cells = of_run(run)["mistakes"].axes
    shown = [axes.get_title() for axes in cells]
    assert shown == [
        f"{found.classes[found.labels[i]]}\n→ {found.classes[found.predicted[i]]} {100 * found.probabilities[i].max():.0f} %"
        for i in wrong
    ]
    for axes, i in zip(cells, wrong, strict=True):
        there = i < 195
        assert bool(axes.images) == there
        if there:
            np.testing.assert_array_equal(axes.images[0].get_array()[0, 0], [i % 256, 99, 50])


def test_an_empty_folder_has_no_figures(tmp_path):
    assert of_run(tmp_path) == {}


def test_figures_of_one_page_share_no_ids_and_refer_to_nothing_outside(past_run):
    figures = of_run(past_run(classes=("<b>cat</b>", 'a"&id="x', "$y$")))
    texts = [svg(figure, name) for name, figure in figures.items()]
    elements = [element for text in texts for element in ElementTree.fromstring(text).iter()]
    ids = [element.get("id") for element in elements if element.get("id")]
    assert len(ids) == len(set(ids))
    for text in texts:
        root = ElementTree.fromstring(text)
        for element in root.iter():
            for key, value in element.attrib.items():
                if key == "href":
                    assert value.startswith(("#", "data:image/png;base64,"))
                    assert not value.startswith("#") or value[1:] in ids
                for target in re.findall(r"url\(#(.*?)\)", value):
                    assert target in ids
        assert "http" not in text
        assert "<b>" not in text
        assert "<style" not in text


def test_ink_is_that_of_the_page_and_text_stays_text(past_run):
    text = svg(of_run(past_run())["confusion"], "confusion")
    assert "currentColor" in text
    assert "#1b1f24" not in text
    shown = [element.text for element in ElementTree.fromstring(text).iter("text")]
    assert shown.count("cat") == shown.count("dog") == 2


def test_a_figure_is_the_same_text_each_time(past_run):
    run = past_run()
    assert [svg(figure, name) for name, figure in of_run(run).items()] == [
        svg(figure, name) for name, figure in of_run(run).items()
    ]
