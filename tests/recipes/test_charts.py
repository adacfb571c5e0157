"""Charts and pictures for the report: well-formed, small, the same each time, and loading nothing."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from openwork.recipes.charts import COLORS, image_uri, line_chart, mask_picture


def parsed(svg: str) -> ElementTree.Element:
    text = re.sub(r"base64,[\s\w+/=]+", "", svg).replace("</", "<")
    assert not re.search(r"https?:|//|<script|@import|url\((?!#)", text)
    return ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="x"', 1))


@pytest.mark.parametrize("top", [3e-7, 0.7, 54321.0, 9.8e9])
@pytest.mark.parametrize("percent", [False, True])
def test_a_chart_has_a_line_per_run_and_labels_that_differ(top: float, percent: bool) -> None:
    lines = [(0, [(0, 0.0), (5, top)]), (9, [(3, top / 2)])]
    chart = line_chart("x", lines, percent=percent, floor=0)
    assert chart.count('<g class="run">') == 2
    assert COLORS[0] in chart
    assert COLORS[1] in chart  # colours repeat after eight
    labels = [element.text for element in parsed(chart).iter("text")]
    assert "step" in labels
    assert ("%" in labels) == percent
    assert len(set(labels)) >= 6


def test_no_records_are_said() -> None:
    assert "no records" in line_chart("x", [(0, [])])


def test_the_same_chart_is_the_same_text() -> None:
    lines = [(0, [(0, 0.0), (5, 1.0)])]
    assert line_chart("x", lines) == line_chart("x", lines)


def test_a_mask_is_a_picture_of_its_kinds() -> None:
    picture = mask_picture("x", np.arange(5)[None].repeat(8, 0), 4)
    parsed(picture)
    assert picture.count("data:image/png;base64,") == 1


def test_an_image_is_scaled_down() -> None:
    small, large = (image_uri(np.zeros((side, side, 3), np.uint8)) for side in (320, 1280))
    assert small == large
    assert small.startswith("data:image/jpeg;base64,")
