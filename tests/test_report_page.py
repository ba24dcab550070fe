"""The report in a real browser: it fits a phone and a desktop and asks nobody for anything."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis.report import report
from crm.sweep import Sweep
from experiments.synthetic_small import config
from tests.analysis_fixture import Invented, fabricate

SMALL = replace(config, data=replace(config.data, size=(48, 64), crop=(48, 64), test_images=6))
LONG = "a variant with a rather long name, w/o L_SDC and_one_word_that_does_not_end_soon_enough"
SWEEP = Sweep(title="Invented?", base=SMALL, variants={"plain": {"loss.rgb": 0.5}, LONG: {}}, seeds=(0, 1))
# The page stands in a frame: Chromium's own window is never narrower than 500 pixels.
PROBE = """<!doctype html><body><iframe id="f" style="width:{width}px;height:844px;border:0" srcdoc="{page}"></iframe>
<script>document.getElementById("f").onload = event => {{
  const inner = event.target.contentWindow
  document.body.dataset.fits = inner.document.documentElement.scrollWidth + "/" + inner.innerWidth
}}</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("page")
    invented = {"plain": Invented(0.85, 0.6, 0.1), LONG: Invented(0.88, 0.2, 0.3)}
    fabricate(place / "runs", SWEEP, invented, skip={"plain/1"})
    return report("invented", SWEEP, place / "runs", place / "reports")


def browse(page: Path, profile: Path, width: int, *wanted: str) -> str:
    """What headless Chromium prints for a page at this width."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        assert "chromium" not in os.environ.get("CRM_REQUIRE", ""), "CRM_REQUIRE names chromium, but there is none"
        pytest.skip("there is no Chromium here")
    still = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet = "--disable-component-update --disable-sync --hide-scrollbars"
    command = [browser, *still.split(), *quiet.split(), f"--user-data-dir={profile}", f"--window-size={width},844"]
    done = subprocess.run([*command, *wanted, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


def test_page_asks_nobody_for_anything(page):
    assert_asks_nobody(page.read_text())


def assert_asks_nobody(text: str) -> None:
    """The page loads nothing from elsewhere, its policy forbids it, and its only script is the one that sorts."""
    sources = re.findall(r'[\s:](?:src|href|srcset|action|data)\s*=\s*"([^"]*)"', text) + re.findall(
        r"url\(([^)]*)\)", text
    )
    assert sources
    assert [source for source in sources if not source.startswith(("data:", "#"))] == []
    assert text.count("<script") == 1
    assert "fetch(" not in text and "XMLHttpRequest" not in text
    assert "default-src 'none'" in text
    assert "@import" not in text


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_page_body_never_scrolls_sideways(page, tmp_path, width):
    probed = tmp_path / "probed.html"
    opened = page.read_text().replace("<details>", "<details open>")
    probed.write_text(PROBE.format(width=width, page=escape(opened)))
    dom = browse(probed, tmp_path / "profile", width, "--dump-dom")
    content, window = map(int, re.search(r'data-fits="(\d+)/(\d+)"', dom).groups())
    assert window == width
    assert content <= window


@pytest.mark.parametrize("width", [390, 1280])
def test_page_shows_something(page, tmp_path, width):
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", width, f"--screenshot={picture}")
    with Image.open(picture) as shot:
        pixels = np.asarray(shot.convert("L"))
    assert pixels.shape[1] == width
    assert len(np.unique(pixels)) > 20


def test_every_number_of_the_table_opens_the_runs_behind_it(page):
    text = page.read_text()
    targets = set(re.findall(r'popovertarget="([^"]+)"', text))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert targets
    assert targets <= set(ids)
    assert len(ids) == len(set(ids))
    first = text.partition('<div popover class="chain"')[2].partition("</div>\n</div>")[0]
    for word in ("seed", "value", "run", "commit", "checkpoint", "done"):
        assert f">{word}<" in first
