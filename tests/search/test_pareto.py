"""The front as one file: the picture shows something, and the table lists every point with all its choices."""

from __future__ import annotations

import base64
import html
import io
import re

import numpy as np
import pytest

from modicum.search.pareto import draw, front, page
from modicum.search.study import Point

MAXIMIZED = {"token_accuracy": True, "parameters": False, "macs": False}


def point(number, accuracy, cost, **over):
    choices = {"0.rank.q_proj+k_proj": number, "0.width.<mlp>": 10 * number}
    return Point(number, choices, {"token_accuracy": accuracy, "parameters": cost, "macs": 2 * cost}, over)


POINTS = [point(3, 0.9, 90.0), point(5, 0.5, 95.0), point(7, 0.7, 50.0), point(9, 0.99, 99.0, macs=0.25)]


def image_of(text):
    from matplotlib.image import imread

    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return imread(io.BytesIO(base64.b64decode(data)), "png")[..., :3]


def pixels(image, colour):
    wanted = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return int((np.abs(image - wanted).max(-1) < 0.02).sum())


def shown(points):
    best = front(points, MAXIMIZED)
    return page(draw(points, best, MAXIMIZED, "mine"), points, best, "a < b")


def test_every_point_is_a_row_with_its_choices_and_the_front_comes_first():
    text = shown(POINTS)
    rows = re.findall(r'<tr class="(\w*)">(.*?)</tr>', text)
    cells = [re.findall(r"<td>(.*?)</td>", row) for _, row in rows]
    assert [(kind, cell[0]) for (kind, _), cell in zip(rows, cells, strict=True)] == [
        ("front", "3"), ("front", "7"), ("", "5"), ("over", "9")
    ]  # fmt: skip
    assert cells[0][1:4] == ["0.9", "90", "180"]
    for cell in cells:
        choices = html.unescape(cell[-1])
        assert f"0.rank.q_proj+k_proj={cell[0]}, 0.width.<mlp>={10 * int(cell[0])}" in choices
    heads = re.findall(r"<th>(.*?)</th>", text)
    assert heads == ["trial", "token_accuracy", "parameters", "macs", "choices"]
    assert "<title>a &lt; b</title>" in text
    assert "<mlp>" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text), "it loads nothing from elsewhere"


@pytest.mark.parametrize(
    ("left_out", "colour"),
    [({3, 7}, "#cc3311"), ({5}, "#7799bb"), ({9}, "#999999")],
    ids=["front", "evaluated", "over"],
)
def test_the_picture_shows_each_kind_of_point(left_out, colour):
    everything = image_of(shown(POINTS))
    assert min(everything.shape[:2]) > 300
    less = [one for one in POINTS if one.number not in left_out]
    best = [one for one in front(POINTS, MAXIMIZED) if one in less]
    without = image_of(page(draw(less, best, MAXIMIZED, "mine"), less, best, "t"))
    # grey letters and lines have edges of any grey
    assert pixels(everything, colour) > pixels(without, colour) + 20
