"""Charts and heat maps of a page: to scale, readable, explained."""

import base64
import io
import math
import re
from importlib import resources

import pytest
from PIL import Image

from lit_diffusion import CosineSchedule, EDMWeighting, ELBOWeighting, EpsPrediction
from lit_diffusion.objective import Objective
from lit_diffusion.training.reporting.chart import POINTS, Line, Shade, chart
from lit_diffusion.training.reporting.heat_map import heat_map
from lit_diffusion.training.reporting.objective_charts import objective_charts
from lit_diffusion.training.run.figures import PALETTE


def places(svg):
    found = re.findall(r'points="([^"]*)"', svg)
    return [[tuple(map(float, p.split(","))) for p in line.split()] for line in found]


def labels(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_chart_is_to_scale():
    (line,) = places(chart("a", [Line("a", [(0, 1.0), (5, 2.0), (10, 3.0)])], "steps"))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2  # up is more


def test_a_wide_range_is_logarithmic_and_ticks_say_so():
    svg = chart("a", [Line("a", [(0, 1e-3), (5, 1e-1), (10, 10.0)])], "λ")
    ((_, y0), (_, y1), (_, y2)) = places(svg)[0]
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert {"0.001", "0.1", "10"} <= set(labels(svg))
    with_zero = chart("a", [Line("a", [(0, 0.0), (5, 1e-1), (10, 10.0)])], "λ")
    assert "0.001" not in labels(with_zero)


@pytest.mark.parametrize(
    "values", [[1.0], [2.0, 2.0], [0.0, 0.0], [-3.0, 5.0], [1e-30, 2e-30], [1e9, 3e9]]
)
def test_every_point_is_on_the_chart(values):
    svg = chart("a", [Line("a", list(enumerate(values)))], "steps")
    for x, y in places(svg)[0]:
        assert 40 <= x <= 426
        assert 8 <= y <= 204.1
    assert len(labels(svg)) >= 3


@pytest.mark.parametrize(
    "values", [[1000.0, 1000.5], [1e-7, 1.5e-7], [-12345.0, -12340.0], [1.0, 1.9], [0.0, 1e6]]
)
def test_no_label_is_cut_or_the_same_as_another(values):
    svg = chart("a", [Line("a", [(0.0, values[0]), (1.25e6, values[1])])], "steps")
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)<', svg)
    width = 8.6  # of a character, on a phone
    for x, _, anchor, said in found:
        left = float(x) - len(said) * width * {"end": 1, "middle": 0.5}[anchor]
        assert left >= -0.1
        assert left + len(said) * width <= 440.1
    up = [said for _, _, anchor, said in found if anchor == "end"]
    assert len(set(up)) == len(up) >= 2


def test_a_shade_and_a_dashed_line_are_explained():
    lines = [Line("one", [(0, 1.0), (10, 2.0)]), Line("two", [(0, 1.0), (10, 2.0)], dashed=True)]
    svg = chart("a", lines, "λ", shade=Shade("grey: <no>", [(-5.0, 2.5), (20.0, 30.0)]))
    assert '<li class="shade">grey: &lt;no&gt;</li>' in svg
    ((begin, width),) = re.findall(r'<rect x="([\d.]+)" y="8" width="([\d.]+)"', svg)
    (across, _), (end, _) = places(svg)[0]
    assert float(begin) == across
    assert float(width) == pytest.approx((end - across) / 4, abs=0.1)
    assert svg.count(' dashed"') == 2  # the line and its key
    assert "shade" not in chart("a", lines, "λ", shade=Shade("none", []))


def test_a_heat_map_has_a_cell_for_each_value():
    values = [[1.0, 10.0, math.nan], [100.0, 1000.0, 0.0]]
    svg = heat_map("a <b>", [0.0, 1.0, 2.0, 3.0], [0.0, 10.0, 30.0], values, "λ", "steps")
    data = re.search(r'href="data:image/png;base64,([^"]*)"', svg)[1]
    cells = Image.open(io.BytesIO(base64.b64decode(data)))
    assert cells.size == (3, 200)
    assert [cells.getpixel((2, y))[3] for y in (0, 199)] == [0, 0]  # empty cells are transparent
    first, second = cells.getpixel((0, 199)), cells.getpixel((0, 0))
    assert first == (68, 1, 84, 255)  # the lowest value has the darkest colour of viridis
    assert first != second
    # The second record fills two thirds of the steps.
    assert [cells.getpixel((0, y)) for y in (132, 134)] == [second, first]
    assert "1 to 1000" in svg
    assert "a &lt;b&gt;" in svg
    assert heat_map("a", [0.0, 1.0], [0.0, 1.0], [[math.nan]], "λ", "steps") == ""


def test_the_objective_is_four_charts_that_say_where_it_is_no_elbo():
    schedule = CosineSchedule()
    edm = objective_charts(Objective(schedule, EDMWeighting(), EpsPrediction()))
    assert len(edm) == 4
    assert all("w(λ) increases: no ELBO" in svg for svg in edm)
    assert "below 0" in edm[3]
    elbo = objective_charts(Objective(schedule, ELBOWeighting(), EpsPrediction()))
    assert not any("no ELBO" in svg for svg in elbo)
    assert "clean data, a share of 1<" in elbo[3]


def test_figures_in_files_have_the_colours_of_the_page():
    css = (
        resources.files("lit_diffusion.training.reporting")
        .joinpath("templates/style.css")
        .read_text()
    )
    light = css.partition("@media")[0]
    assert tuple(re.findall(r"--s\d: (#\w{6})", light)) == PALETTE


def test_what_is_not_finite_is_left_out():
    points = [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)]
    assert len(places(chart("a", [Line("a", points)], "steps"))[0]) == 2
    assert chart("a", [Line("a", points[1:3]), Line("b", [])], "steps") == ""


def test_many_points_are_means_of_neighbours():
    values = [(float(i), float(i % 2)) for i in range(10 * POINTS)]
    svg = chart("a", [Line("a", values)], "steps")
    (line,) = places(svg)
    assert len(line) == POINTS
    assert len({y for _, y in line}) == 1
    assert "<b>0.5</b>" in svg
