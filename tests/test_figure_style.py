"""The look of figures: names that anyone may have given, and colours that differ without their hue."""

import pytest
from matplotlib.colors import to_rgb

from finetune.figure_style import COLOURS, label, new_axes, style_of


def lightness(colour):
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in to_rgb(colour)]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("tabby cat", "tabby cat"),
        ("a\tb\nc", "a b c"),
        ("a\x00\x1bb", "a\ufffd\ufffdb"),
        ("\udcff.jpg", "\ufffd.jpg"),
        ("abc\u202edef", "abcdef"),
        ("5$ or 6$", r"5\$ or 6\$"),
        ("x" * 50, "x" * 10 + "…" + "x" * 10),
        ("ü" * 21, "ü" * 21),
    ],
)
def test_a_name_is_short_visible_and_no_mathematics(name, shown):
    assert label(name, 21) == shown


def test_more_lines_than_colours_have_other_dashes():
    styles = [tuple(style_of(number).values()) for number in range(4 * len(COLOURS))]
    assert len(set(styles)) == len(styles)


def test_every_colour_is_seen_on_paper_and_on_a_dark_page():
    for colour in COLOURS:
        assert 1.05 / (lightness(colour) + 0.05) > 2
        assert (lightness(colour) + 0.05) / (lightness("#111418") + 0.05) > 3


def test_figures_leave_no_trace_in_pyplot():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure, _ = new_axes(3.0, "title", "x", "y")
    figure.canvas.draw()
    assert plt.get_fignums() == before
    assert figure.get_suptitle() == "title"
