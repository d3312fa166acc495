"""Figures: names that do not overlap, colours of the page, every script without a warning, captions that are true."""

import itertools
import re
import warnings

import pytest
from matplotlib.text import Annotation
from scipy.stats import binomtest

from rayjobs.reporting import canvas, palette, plots
from rayjobs.reporting.canvas import spread
from rayjobs.reporting.figures import figure_svg

ROWS = [{"step": step, "loss": 2.0 - step / 9, "lr": 0.1} for step in range(1, 9)]


@pytest.mark.parametrize(
    ("heights", "sizes"),
    [
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.1]),
        ([0.99, 0.98, 0.1], [0.2, 0.2, 0.2]),
        ([0.0, 1.0], [0.5, 0.5]),
        ([0.3], [0.1]),
    ],
)
def test_names_keep_their_order_and_do_not_overlap(heights: list[float], sizes: list[float]) -> None:
    places = spread(heights, sizes)
    order = sorted(range(len(heights)), key=heights.__getitem__)
    assert all(size / 2 - 1e-9 <= place <= 1 - size / 2 + 1e-9 for place, size in zip(places, sizes, strict=True))
    for low, high in itertools.pairwise(order):
        assert places[high] - places[low] >= (sizes[low] + sizes[high]) / 2 - 1e-9
    if len(heights) == 1:
        assert places == heights, "a name with room stands at its line"


def test_every_line_is_named_beside_it_in_its_colour() -> None:
    accuracies = plots.Accuracies({f"method {i}": {1: [60.0 + i / 9], 4: [70.0]} for i in range(6)}, {"zero": 50.0}, 97)
    figure, _ = plots.accuracy_over_shots({"": accuracies}, {"CaFo, published": {4: 71.0, 8: 72.0}})
    (axes,) = figure.axes
    names = {text.get_text().replace("\n", " "): text for text in axes.texts if isinstance(text, Annotation)}
    assert set(names) == {*accuracies.few_shot, "zero", "CaFo, published"}
    assert axes.get_legend() is None
    heights = sorted(text.xyann[1] for text in names.values())
    room = 0.125 / (figure.get_figheight() - 0.75)
    assert all(high - low > room for low, high in itertools.pairwise(heights))
    assert names["method 0"].get_color() == axes.containers[0].lines[0].get_color() == palette.LINES[0]


def test_of_many_curves_those_that_end_lowest_are_named() -> None:
    runs = {f"run {i}": [{**row, "loss": row["loss"] + i} for row in ROWS] for i in range(20)}
    title, (figure, caption) = next(plots.training_curves(runs))
    named = {text.get_text().replace("\n", " ") for text in figure.axes[0].texts}
    assert (title, named) == ("loss", {f"run {i}, training" for i in range(12)})
    assert "The 12 of 20 curves that end lowest are named. 8 steps, 20 runs." in caption


def test_an_svg_takes_the_colours_of_the_page() -> None:
    figure, _ = next(iter(dict(plots.training_curves({"a": ROWS, "b": ROWS})).values()))
    drawn = figure_svg(figure, "loss")
    assert "var(--c0, #1a6fb0)" in drawn
    assert "currentColor" in drawn
    assert "#000000" not in drawn
    variables = {name for rule in re.findall(r"\{([^{}]*)\}", palette.css()) for name in re.findall(r"--(\w+):", rule)}
    assert set(re.findall(r"var\(--(\w+)", drawn)) <= variables


def test_a_script_that_the_font_lacks_is_drawn_without_a_warning() -> None:
    classes = ["犬", "кошка", "$5 > $3", "\U00012000"]
    drawing = plots.class_accuracy(classes, [1, 2, 3, 4], [4, 4, 4, 4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = figure_svg(drawing.figure, "classes")
    assert all(name.replace(">", "&gt;") in drawn for name in classes)


def test_the_font_that_has_the_most_of_what_is_lacking_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts = {"DejaVu Sans": "abc", "Small": "犬", "Large": "犬猫", "Last Resort": "犬猫鳥", "Other": "鳥"}
    listed = [type("Font", (), {"name": name, "fname": name}) for name in fonts]
    monkeypatch.setattr(canvas, "_installed_fonts", lambda: listed)
    monkeypatch.setattr(canvas.font_manager, "findfont", lambda name, **_: name)
    monkeypatch.setattr(canvas, "_known", lambda file: frozenset(map(ord, fonts[file])))
    assert canvas._other_families.__wrapped__(frozenset("ab犬猫鳥x")) == ("Large", "Other")


def test_bars_have_wilsons_interval_and_captions_say_of_how_many_images() -> None:
    figure, caption = plots.class_accuracy(["cat", "dog", "none"], [9, 5, 0], [10, 20, 0])
    assert "Wilson's 95% interval. 30 images." in caption
    low, high = binomtest(5, 20).proportion_ci(0.95, method="wilson")
    drawn = figure.axes[0].containers[1].lines[2][0].get_segments()
    worst = drawn[-1]  # on top
    assert worst[:, 0].tolist() == pytest.approx([100 * low, 100 * high])
    classes = [f"class {i}" for i in range(40)]
    assert (
        "Shown are 25 of 40 classes, those with the lowest accuracy."
        in plots.class_accuracy(classes, [9] * 40, [10] * 40).caption
    )
    accuracies = plots.Accuracies({"CaFo": {1: [60.0, 61.0, 62.0]}}, {}, 1000)
    caption = plots.accuracy_over_shots({"": accuracies}).caption
    assert caption.startswith(
        "Points are means over 3 seeds, and bars one sample standard deviation over them. 1,000 test"
    )
    low, high = binomtest(610, 1000).proportion_ci(0.95, method="wilson")
    assert f"an accuracy of 61% has a 95% interval (Wilson) of {100 * low:.1f} to {100 * high:.1f}%" in caption
    figure, caption = plots.search_landscape([1.0, 2.0], [3.0, 4.0], [[1, 2], [3, 4]], 5, (2.0, 4.0))
    assert "on the 5 images of the choice at each of 2 × 2 values" in caption
    assert "the best has 80.0%" in caption
