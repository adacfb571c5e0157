"""Charts that a browser can show whatever the numbers are."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from openwork.recipes.charts import Line, line_chart


def labels(chart: str) -> list[str]:
    return re.findall(r'text-anchor="end">([^<]*)<', chart)


@pytest.mark.parametrize("top", [3e-7, 1.23456e-4, 0.7, 12.0, 54321.0, 9.8e9])
@pytest.mark.parametrize("percent", [False, True])
def test_labels_fit_beside_the_axis_and_still_differ(top, percent):
    found = labels(line_chart("x", [Line("a", 0, [(0, 0.0), (5, top)])], percent=percent, floor=0))
    assert len(set(found)) == len(found) >= 3
    assert max(len(each.removesuffix(" %")) for each in found) <= 8


def test_one_point_is_drawn():
    chart = line_chart("x", [Line("a", 3, [(4, 2.0)])])
    (circle,) = ElementTree.fromstring(chart).iter("circle")
    assert (circle.get("class"), circle.find("title").text) == ("line c3", "a")
    assert 0 < float(circle.get("cx")) < 460
    assert 0 < float(circle.get("cy")) < 260


def test_no_records_are_said():
    assert "no records" in line_chart("x", [Line("a", 0, [])])
