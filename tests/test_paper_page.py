"""The page of all tables in a real browser: light, dark, on a phone, sorted, with its chains open. Invented numbers."""

import json
import re
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.paper.render import index, write
from tests.paper_fixture import doses, invented, optimism
from tests.test_report_page import PROBE, assert_asks_nobody, browse

DARK = "--blink-settings=preferredColorScheme=0"
# What a reader does, and what is then on the page; `inner` is the page's window.
ACTS = """<script>document.getElementById("f").addEventListener("load", event => {
  const inner = event.target.contentWindow.document
  const rows = () => [...inner.querySelectorAll("#main > .scroll tbody:last-of-type tr:not(.group) th")]
    .map(one => one.textContent.slice(0, 5))
  const head = inner.querySelectorAll("#main > .scroll .sort")[1]
  head.click()
  const down = rows()
  head.click()
  const up = rows(), sorted = head.parentNode.getAttribute("aria-sort")
  inner.querySelector("#main .number").click()
  const open = [...inner.querySelectorAll(":popover-open h4")].map(one => one.textContent)
  document.body.dataset.said = JSON.stringify({ down, up, sorted, open })
})</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("tables")
    built = [invented(), doses(), optimism()]
    for one in built:
        write(one, place)
    return index(built, place, costs={"components": {"GPU hours": 12.25, "failed": 1.5}})[0]


def probed(page: Path, place: Path, width: int, more: str = "") -> Path:
    document = place / "probed.html"
    opened = page.read_text().replace("<details>", "<details open>")
    document.write_text(PROBE.format(width=width, page=escape(opened)) + more)
    return document


def test_page_asks_nobody_for_anything(page):
    assert_asks_nobody(page.read_text())


@pytest.mark.parametrize("width", [390, 1280])
def test_page_body_never_scrolls_sideways(page, tmp_path, width):
    dom = browse(probed(page, tmp_path, width), tmp_path / "profile", width, "--dump-dom")
    content, window = map(int, re.search(r'data-fits="(\d+)/(\d+)"', dom).groups())
    assert window == width
    assert content <= window


def test_a_heading_sorts_its_table_and_a_number_opens_its_chain(page, tmp_path):
    dom = browse(probed(page, tmp_path, 1280, ACTS), tmp_path / "profile", 1280, "--dump-dom")
    said = json.loads(unescape(re.search(r'data-said="([^"]*)"', dom).group(1)))
    by_mean = ["<scri", "CRM, ", "CRM", "plain"]
    assert said["down"] == by_mean
    assert said["up"] == by_mean[::-1]
    assert said["sorted"] == "ascending"
    assert said["open"] == ["Other methods: RTFNet / MF: mIoU"]


@pytest.mark.parametrize(("width", "flags", "bright"), [(390, (), True), (1280, (), True), (1280, (DARK,), False)])
def test_page_follows_the_theme(page, tmp_path, width, flags, bright):
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", width, *flags, f"--screenshot={picture}")
    with Image.open(picture) as shot:
        pixels = np.asarray(shot.convert("L"))
    assert len(np.unique(pixels)) > 20
    paper = float(np.median(pixels))
    assert paper > 200 if bright else paper < 60
