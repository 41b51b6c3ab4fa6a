"""The page in a real browser: it fits phone and desk, in light and dark, and asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import example_run
import numpy as np
import pytest
from PIL import Image

from peftcli.reports import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)"),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# A window is never narrower than 500 pixels, so the page stands in a frame; what it finds goes into the frame's title.
FRAME = """<!doctype html><title>nothing</title><body style="margin: 0">
<script>addEventListener("message", (event) => { document.title = event.data; });</script>
<iframe src="probe.html" style="border: 0; width: %dpx; height: 1200px"></iframe>"""
PROBE = """
<script>
addEventListener("load", () => {
  const root = document.documentElement;
  const inside = (element) => element.closest(".scroll, pre, svg, .skip, .outcome");
  const out = [...document.querySelectorAll("body *")].filter(
    (element) => !inside(element) && element.getBoundingClientRect().right > innerWidth + 1);
  const shown = () => [...document.querySelectorAll("#examples > li")].filter((row) => !row.hidden).length;
  const all = shown();
  const form = document.querySelector("#filter");
  form.elements.kind.value = "wrong";
  form.dispatchEvent(new Event("input"));
  const small = [...document.querySelectorAll("figure text")].map((text) => text.getBoundingClientRect().height);
  parent.postMessage(JSON.stringify({
    inner: innerWidth, scroll: root.scrollWidth, out: out.slice(0, 5).map((element) => element.outerHTML.slice(0, 80)),
    all, wrong: shown(), told: form.querySelector("output").textContent, smallest: Math.min(...small),
    loaded: performance.getEntriesByType("resource").length,
  }), "*");
});
</script>
</body>"""


def browse(profile: Path, *arguments: str) -> str:
    """Run headless Chromium once and return what it printed."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def probe(run: Path, width: int) -> dict:
    """Open the page with the probe in it at a width and return what the probe found."""
    html = page.write(run).read_text(encoding="utf-8")
    html = re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", PROBE)
    (run.parent / "probe.html").write_text(html, encoding="utf-8")
    frame = run.parent / "frame.html"
    frame.write_text(FRAME % width, encoding="utf-8")
    printed = browse(run.parent / "profile", "--window-size=1400,1300", "--dump-dom", frame.as_uri())
    found = re.search(r"<title>(\{.*?\})</title>", printed)
    assert found, printed[:2000]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.mark.parametrize("width", [375, 1280])
def test_fits_the_width_and_filters(run, width):
    found = probe(run, width)
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["out"] == []
    assert found["loaded"] == 0
    assert (found["all"], found["wrong"]) == (400, 36)
    assert found["told"] == "36 of 400 shown"
    assert found["smallest"] >= 10


def test_its_own_script_runs_under_its_own_policy_and_no_other_does(run):
    html = page.write(run).read_text(encoding="utf-8")
    (run / "report.html").write_text(html.replace("</body>", "<script>document.title = 'stranger'</script></body>"))
    printed = browse(run.parent / "profile", "--dump-dom", (run / "report.html").as_uri())
    assert "400 of 400 shown" in printed
    assert "<title>stranger" not in printed


def test_very_long_words_do_not_push_the_page_wide(run):
    word = "w" * 4000
    report = json.loads((run / "report.json").read_text())
    example = {"row": 1, "input": word, "expected": word, "base": word, "tuned": word, "correct": False}
    report["run"].update(name=word, status="failed")
    report["quality"]["rows"][2]["name"] = word
    example_run.edit(
        run,
        run=report["run"],
        quality=report["quality"],
        checks=[{"name": word, "passed": False, "detail": word}],
        examples=[example],
        figures=[{"title": word, "x": [word, "b"], "y": [1, 2]}],
        data={"notes": [word]},
    )
    (run / "config.yaml").write_text(f"name: {word}\nmodel: {{name: {word}}}\n")
    (run / "overrides.txt").write_text(f"name={word}\n")
    found = probe(run, 375)
    assert found["scroll"] <= 375
    assert found["out"] == []


@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_both_schemes_are_painted_with_contrast(run, scheme, dark):
    picture = run.parent / "page.png"
    browse(
        run.parent / "profile",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1280,2400",
        f"--screenshot={picture}",
        page.write(run).as_uri(),
    )
    grey = np.asarray(Image.open(picture).convert("L"), dtype=float)
    ground = np.median(grey)
    assert (ground < 60) == dark
    assert (np.abs(grey - ground) > 100).mean() > 0.01  # text and curves stand out
    assert 1280 in grey.shape
