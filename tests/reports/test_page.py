"""The page: complete, harmless whatever the texts say, equal for equal input, there for runs that went wrong."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import example_run
import pytest

from peftcli.config.checks import CHECKS
from peftcli.reports import page

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)> & {{ 7 * 7 }} "
    + "w" * 3000
)
VOID = {"meta", "input", "img", "br", "hr", "link"}


class Reader(HTMLParser):
    """Collects elements, attributes and visible text, and checks that tags nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.seen)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def written(run: Path) -> tuple[str, Reader]:
    html = page.write(run).read_text(encoding="utf-8")
    return html, Reader(html)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[str, Reader]:
    """The page of a finished run, for tests that only look."""
    return written(example_run.make(tmp_path_factory.mktemp("finished") / "run"))


def test_shows_every_part_of_a_finished_run(finished):
    html, reader = finished
    headings = re.findall(r'<h2 id="([^"]+)"', html)
    parts = ["quality", "cost", "checks", "training", "method", "parameters", "data", "examples-title", "use", "origin"]
    assert headings == parts
    for title in ("Loss", "Gradient norm", "Learning rate", "Throughput (tokens/s)", "Memory (GB)"):
        assert f"<h3>{title}</h3>" in html
    for text in (
        "460,800",
        "0.34 % of 134,975,808",
        "1.55 GB",
        "3 min 28 s",
        "1.85 MB",
        "merge-drift",
        "92,311",
        "2.70 %",
    ):
        assert text in reader.text
    assert "Adapted modules" in reader.text
    assert "F1 (macro): the mean over the classes" in reader.text
    assert f'<code title="What it looks for: {CHECKS["merge-drift"]}">merge-drift</code>' in html
    assert "r: 8" in reader.text
    assert "2.13.0+cpu" in reader.text
    assert "peft train smollm2/reuters-r8_lora optim.lr=0.002 seed=3" in reader.text
    assert "peft merge runs/run --to merged" in reader.text


def test_asks_nothing_of_the_network(finished):
    html, reader = finished
    assert not re.search(r"https?:|//[a-z]", re.sub(r"<pre.*?</pre>", "", html.replace("// Filters", "")))
    for tag, attributes in reader.seen:
        assert tag not in {"link", "img", "iframe", "object", "image"}
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "default-src 'none'" in html


def test_is_readable_without_eyes(finished):
    _, reader = finished
    drawings = [attributes for tag, attributes in reader.seen if tag == "svg" and "aria-hidden" not in attributes]
    assert len(drawings) == 7
    assert all(drawing["role"] == "img" and len(drawing["aria-label"]) > 20 for drawing in drawings)
    assert reader.count("table") == reader.count("caption")
    assert reader.count("h1") == 1
    ids = [attributes["id"] for _, attributes in reader.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for _, a in reader.seen if "href" in a] + [
        a["aria-labelledby"] for _, a in reader.seen if "aria-labelledby" in a
    ]
    assert set(targets) <= set(ids)


def test_text_in_figures_is_text_in_the_colours_of_the_page(finished):
    html, _ = finished
    assert re.search(r"<text[^>]*>step</text>", html)
    assert "var(--tuned)" in html
    assert not re.search(r"#00000[1-6]", html)


def test_hostile_texts_stay_texts(run):
    report = json.loads((run / "report.json").read_text())
    report["run"]["name"] = report["checks"][0]["detail"] = report["data"]["notes"][0] = HOSTILE
    report["examples"][0] = dict.fromkeys(("row", "input", "expected", "base", "tuned"), HOSTILE) | {"correct": False}
    report["figures"] = [{"title": HOSTILE, "x": [HOSTILE, "$b_{$"], "y": [1, 2]}]
    report["quality"]["rows"][2]["name"] = report["parameters"]["by_role"][0]["role"] = HOSTILE
    (run / "report.json").write_text(json.dumps(report))
    (run / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n")
    (run / "overrides.txt").write_text(f"name='{HOSTILE}'\n")
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    html, reader = written(run)
    assert reader.count("script") == 1
    assert reader.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in reader.seen for name in attributes)
    assert "alert(1)" in reader.text
    assert "{{ 7 * 7 }}" in reader.text
    assert html.count("<script>alert") == 0


def test_svg_of_a_method_is_cleaned(run):
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" onload="alert(1)">'
        "<script>alert(2)</script><style>*{display:none}</style><foreignObject><b/></foreignObject>"
        '<defs><path id="p" d="M0 0"/></defs><use xlink:href="#p"/><use xlink:href="http://evil.example/a.svg#p"/>'
        '<rect style="fill: url(http://evil.example/x)"/><text>kept &lt;b&gt;</text></svg>'
    )
    example_run.edit(
        run, figures=[{"title": "ours", "svg": svg}, {"title": "broken", "svg": "<svg"}, {"title": "empty"}]
    )
    html, reader = written(run)
    for gone in ("alert", "evil", "display:none", "foreignObject", "xlink"):
        assert gone not in html
    assert 'href="#method-0-p"' in html
    assert "kept &lt;b&gt;" in html
    assert reader.text.count("could not be drawn") == 2


def test_equal_input_gives_equal_bytes(run, tmp_path):
    first = page.write(run).read_bytes()
    assert page.write(run).read_bytes() == first
    copy = shutil.copytree(run, tmp_path / "elsewhere" / "run")
    assert page.write(copy).read_bytes() == first


def test_reader_settings_do_not_change_the_bytes(run):
    import matplotlib

    first = page.write(run).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert page.write(run).read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_wrong_examples_come_first_and_tell_what_tuning_changed(run):
    html, reader = written(run)
    kinds = re.findall(r'<li data-kind="(\w+) (\w*)"', html)
    assert [kind for kind, _ in kinds] == ["wrong"] * 36 + ["right"] * 364
    examples = json.loads((run / "report.json").read_text())["examples"]
    mended = sum(row["correct"] and row["base"] != row["expected"] for row in examples)
    broken = sum(not row["correct"] and row["base"] == row["expected"] for row in examples)
    assert sum(change == "mended" for _, change in kinds) == mended
    assert sum(change == "broken" for _, change in kinds) == broken
    assert f"mended by tuning ({mended})" in reader.text
    assert "wrong (36)" in reader.text


def test_many_examples_are_cut_and_counted(run):
    row = {"row": 1, "input": "a", "expected": "b", "base": "b", "tuned": "b", "correct": True}
    example_run.edit(run, examples=[row] * 700 + [{**row, "correct": False, "tuned": "zz"}])
    html, reader = written(run)
    assert html.count("<li data-kind") == 500
    assert html.count('<li data-kind="wrong') == 1
    assert "201 more examples are in report.json" in reader.text


@pytest.mark.parametrize(
    "missing", ["config.yaml", "metrics.jsonl", "report.json", "environment.json", "overrides.txt"]
)
def test_a_missing_file_costs_only_its_part(run, missing):
    (run / missing).unlink()
    _, reader = written(run)
    assert reader.count("h1") == 1
    assert ("No step was logged." in reader.text) == (missing == "metrics.jsonl")


@pytest.mark.parametrize(
    "part", ["run", "quality", "parameters", "memory", "time", "data", "checks", "adapter", "examples", "figures"]
)
def test_a_missing_part_of_the_report_costs_only_itself(run, part):
    (run / "metrics.jsonl").unlink()  # the figures do not depend on report.json
    example_run.edit(run, **{part: None})
    assert written(run)[1].count("h1") == 1
    example_run.edit(run, **{part: [] if part in ("checks", "examples", "figures") else {}})
    assert written(run)[1].count("h1") == 1


def test_an_empty_folder_gets_a_page_that_says_so(tmp_path):
    _, reader = written(tmp_path)
    assert "has not logged a step yet" in reader.text
    assert "was not measured" in reader.text


def test_a_failed_run_says_why_on_top(run):
    check = {"name": "non-finite-loss", "passed": False, "detail": "loss is nan at step 57; lower `optim.lr`"}
    example_run.edit(
        run, run={"name": "r", "status": "failed"}, quality=None, adapter=None, examples=None, checks=[check]
    )
    lines = [json.dumps({"step": step, "loss": 1.0 if step < 57 else float("nan")}) for step in range(1, 58)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 58, "lo')
    html, reader = written(run)
    assert "This run failed at step 57. non-finite-loss: loss is nan at step 57" in reader.text
    assert "1 step without a finite loss" in reader.text
    assert "1 unreadable line left out" in reader.text
    assert "<code>optim.lr</code>" in html
    assert "peft train --resume runs/run" in reader.text
    assert "peft merge" not in reader.text


def test_a_stopped_run_can_be_continued(run):
    example_run.edit(run, run={"name": "r", "status": "stopped"})
    assert "was stopped at step 240 and can be continued" in written(run)[1].text


def test_a_method_that_saves_a_model_is_not_called_an_adapter(run):
    (run / "adapter" / "adapter_config.json").unlink()
    example_run.edit(run, adapter={"path": "model", "bytes": 270_000_000})
    _, reader = written(run)
    assert "Model on disk" in reader.text
    assert "AutoModelForCausalLM.from_pretrained('runs/run/model')" in reader.text
    assert "peft merge" not in reader.text


def test_generated_answers_tell_how_they_were_asked_for(run):
    protocol = {"prompt": "Q: {q}\nA:", "shots": 0, "decoding": "greedy", "max_new_tokens": 64, "scoring": "number"}
    rows = [{"name": "tuned", "metrics": {"bleu": 20.5, "loss": 2.5}, "intervals": {"bleu": [18.25, 22.75]}}]
    told = {"metric": "bleu", "split": "test", "rows_measured": 90, "rows_generated": 40, "protocol": protocol}
    example = {"row": 0, "input": "a", "expected": "b", "tuned": ["first", "second"], "correct": False}
    example_run.edit(run, quality={**told, "rows": rows}, examples=[example])
    _, reader = written(run)
    assert '40 of 90 rows answered after the prompt "Q: {q}\\nA:" with no shots; greedy' in reader.text
    assert "18.250 to 22.750" in reader.text
    assert "Below a number: the 95 % interval" in reader.text
    assert "1. first 2. second" in reader.text
