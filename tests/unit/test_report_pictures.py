"""PNG copies of charts: the page's own drawing, in its colours and places, with text on a machine without fonts."""

import io

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image, ImageColor

from ee_megatron.report import charts
from ee_megatron.report.charts import Axes, Chart, Dot, Effect, Line
from ee_megatron.report.palette import LIGHT, SERIES, scale
from ee_megatron.report.pictures import MARGIN, ZOOM, multiples, picture
from ee_megatron.report.svg import Frame, legend_mark


def pixels(png: bytes) -> np.ndarray:
    """[height, width, 3] over white; fails if anything is transparent."""
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))
    assert (image[..., 3] == 255).all()
    return image[..., :3].astype(int)


def at(image: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    """The colour at a place of the drawing."""
    return tuple(image[round((MARGIN + y) * ZOOM), round((MARGIN + x) * ZOOM)])


def inked(image: np.ndarray, left: float, top: float, right: float, bottom: float) -> bool:
    part = image[round(top * ZOOM) : round(bottom * ZOOM), round(left * ZOOM) : round(right * ZOOM)]
    return bool((part.max(axis=2) < 128).sum() > 20)


@pytest.fixture
def chart() -> Chart:
    axes, drawn = Axes("steps", "value", unit=True), [Line(2, 0, "one", [Dot(0.5, 0.5), Dot(0.8, 0.2)])]
    return Chart("x", "X", charts.lines(drawn, axes, "X"), legend=[(legend_mark(2, 0), "one")])


def test_marks_stand_where_the_page_has_them_in_the_colour_of_their_series(chart: Chart) -> None:
    image, frame = pixels(picture(chart, 5)), Frame(460, 330, (0.0, 1.0), (0.0, 1.0))
    for value in ((0.5, 0.5), (0.8, 0.2)):
        assert at(image, frame.x(value[0]), frame.y(value[1])) == ImageColor.getrgb(SERIES[2])
    assert ZOOM >= 2 and image.shape[1] == ZOOM * (460 + 2 * MARGIN)
    assert at(image, -MARGIN / 2, 10) == (255, 255, 255)


def test_labels_and_legend_are_written_without_a_font_of_the_system(chart: Chart) -> None:
    image = pixels(picture(chart, 5))
    assert inked(image, MARGIN + 200, MARGIN + 316, MARGIN + 300, MARGIN + 330), "the label of the x axis"
    assert inked(image, MARGIN + 40, MARGIN + 338, MARGIN + 70, MARGIN + 352), "the legend's word"


def test_shares_have_the_colours_of_the_depth_scale_and_fill_the_bar() -> None:
    strips = charts.histogram({"a": {"2": 50, "4": 50}}, [2, 4], 4)
    image = pixels(picture(Chart("x", "X", strips), 2))
    row = image[(MARGIN + 3) * ZOOM]
    for colour in scale(2, LIGHT):
        assert (row == ImageColor.getrgb(colour)).all(axis=1).sum() == pytest.approx(200 * ZOOM, abs=2 * ZOOM)


def test_an_effect_that_is_no_fair_comparison_is_hollow() -> None:
    effects = [Effect("fair", 0.1, 0.05, 0.15, True, ""), Effect("not", 0.1, 0.05, 0.15, False, "")]
    image = pixels(picture(Chart("x", "X", charts.forest(effects)), 2))
    blue = (image == ImageColor.getrgb("#0063a0")).all(axis=2)
    solid, hollow = blue[: (MARGIN + 20) * ZOOM].sum(), blue[(MARGIN + 26) * ZOOM :].sum()
    assert 0 < hollow < 0.5 * solid


def test_small_drawings_stand_four_to_a_row_under_their_titles() -> None:
    panels = [(f"metric {i}", charts.curve("m", [("", 0, [(1, 1.0), (2, 3.0)])])) for i in range(5)]
    one, five = (pixels(multiples(panels[:count], [])) for count in (1, 5))
    assert five.shape[1] > 4 * one.shape[1] * 0.9 and five.shape[0] > 1.8 * one.shape[0]


def test_what_xml_refuses_is_left_out_of_the_picture(chart: Chart) -> None:
    evil = 'a\x01\x0c"<b>\ufffe'
    line = Line(0, 0, evil, [Dot(0.5, 0.5, tip=evil, word=evil)])
    drawn = charts.lines([line], Axes(evil, evil, unit=True), evil)
    pixels(picture(Chart("x", evil, drawn, legend=[(Markup(), evil)]), 2))
