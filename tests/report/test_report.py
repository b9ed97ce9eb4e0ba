"""The report: what stands in it, that its parts agree, and that a browser shows it."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from invented import ENVIRONMENT, comparison, failed, record
from markdown_it import MarkdownIt
from PIL import Image

from multitune.comparing.gathering import summarise
from multitune.comparing.overhead import OverheadRow
from multitune.comparing.report import write_report
from multitune.comparing.report.content import _COLUMNS
from multitune.comparing.report.rerun import recipes_of
from multitune.errors import DataError

VOID = {"meta", "link", "br"}
METHODS = {"lora": (0.2, 73_728), "bitfit": (0.15, 51_072), "prompt": (0.05, 7_680), "head": (0.0, 0)}
TASKS = {"glue/rte": 0.5, "glue/sst2": 0.7}


class Page(HTMLParser):
    """A page as a browser reads it: its elements with their attributes, its text, and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.said, self.data, self.bold = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "data":
            self.data.append((dict(attributes), ""))
            cell = next(a for t, a in reversed(self.elements) if t == "td")
            if "best" in cell.get("class", "") and dict(attributes)["data-column"] == "score":
                self.bold.append(self.data[-1])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.said.append(text)
        if "data" in self.open:
            self.data[-1] = (self.data[-1][0], self.data[-1][1] + text)


def read(files):
    """The CSV's rows by candidate and task, and the page."""
    rows = csv.DictReader(io.StringIO(files.csv.read_text("utf-8")))
    return {(r["candidate"], r["task"]): r for r in rows}, Page(files.html.read_text("utf-8"))


def check(files, records):
    """What holds for every report."""
    table, page = read(files)
    say = {c.name: c.say for c in _COLUMNS} | {c.also: c.say for c in _COLUMNS if c.also}
    say["sd"] = say["score"]
    for attributes, shown in page.data:
        name = attributes["data-column"]
        value = table[attributes["data-of"], attributes["data-task"]][name]
        assert attributes["value"] == value
        assert shown == say[name](value)
    ids = [a["id"] for _, a in page.elements if a.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "img", "object"), tag
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
        if attributes.get("href", "").startswith("#") and len(attributes["href"]) > 1:
            assert attributes["href"][1:] in ids
        for named in attributes.get("aria-labelledby", "").split():
            assert named in ids
        if tag == "svg":
            assert attributes["role"] == "img"
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", files.html.read_text("utf-8"))
    assert len(table) >= len({r.trial.method for r in records})
    return table, page


def test_every_number_of_the_page_is_the_csvs(tmp_path):
    records = comparison(METHODS, TASKS)
    table, page = check(write_report(records, tmp_path), records)
    cells = {(a["data-of"], a["data-task"], a["data-column"]) for a, _ in page.data}
    assert {(m, t, "score") for m in METHODS for t in (*TASKS, "all tasks")} <= cells
    numbers = [o.outcome.score for o in records if o.trial.method == "lora" and o.trial.task == "glue/rte"]
    assert float(table["lora", "glue/rte"]["score"]) == pytest.approx(sum(numbers) / 3)
    assert table["lora", "all tasks"]["parameters"] == "73728" and table["head", "all tasks"]["merges"] == "yes"


def test_the_best_of_a_task_is_bold_and_ranks_are_those_of_the_scores(tmp_path):
    files = write_report(comparison(METHODS, TASKS), tmp_path)
    table, page = read(files)
    bold = {(a["data-of"], a["data-task"]) for (a, _) in page.bold}
    for task in TASKS:
        scores = {m: float(table[m, task]["score"]) for m in METHODS}
        assert {m for m, t in bold if t == task} == {max(scores, key=scores.get)}
        by_score = sorted(scores, key=scores.get, reverse=True)
        assert [float(table[m, task]["rank"]) for m in by_score] == [1, 2, 3, 4]
        lines = [
            line for line in files.markdown.read_text("utf-8").splitlines() if line.startswith(f"| {by_score[0]} |")
        ]
        assert any(f"**{100 * scores[by_score[0]]:.1f}**" in line for line in lines)
    for m in METHODS:
        assert float(table[m, "all tasks"]["rank"]) == sum(float(table[m, t]["rank"]) for t in TASKS) / len(TASKS)


def test_thirty_methods_on_ten_tasks(tmp_path):
    methods = {f"method-{i:02}": (0.01 * i, 500 * (i + 1) ** 2) for i in range(30)}
    records = comparison(methods, {f"suite/task-{i}": 0.4 + 0.02 * i for i in range(10)}, num_rows=60)
    files = write_report(records, tmp_path)
    table, _ = check(files, records)
    assert len(table) == 30 * 11 and files.html.stat().st_size < 1_500_000


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([record(peak_memory=None)], ["There is one seed", "nothing to compare it with"]),
        ([record(seed=s, score=0.7 + 0.01 * s) for s in range(3)], ["3 seeds", "71.0", "68.5 to 73.5"]),
        ([record(), record("ia3", score=0.7)], ["There is one seed", "nothing to test a difference by"]),
        ([failed(), failed("ia3")], ["none of the 2 runs finished", "it ran out of memory"]),
        ([record(), record("ia3", "other")], ["none has a score on each of the 2 tasks"]),
        ([record(purpose="search")], ["No final run has finished yet"]),
        ([record(parameters=None, file_bytes=None, seconds=None), record("ia3", parameters=0)], ["–"]),
        ([record("method-of-another-package"), record("ia3")], ["method-of-another-package"]),
    ],
)
def test_a_report_of_little_says_what_is_missing(records, words, tmp_path):
    files = write_report(records, tmp_path)
    _, page = check(files, records)
    text = " ".join("".join(page.said).split())
    for word in words:
        assert word in text
        assert word in files.markdown.read_text("utf-8") or word in ("71.0", "–", "it ran out of memory")


HOSTILE = '</title><script>alert("1")</script> & \'"> {{ 7 * 7 }} $x_1$ | `code` <!--'


def test_names_and_messages_are_text_whatever_they_hold(tmp_path):
    records = [
        *comparison({"lora": (0.1, 1000), "ia3": (0.0, 100)}, {HOSTILE: 0.5, "b" * 90: 0.6}, num_rows=20),
        *[record("head", HOSTILE, s, budget=HOSTILE, parameters=5) for s in (0, 1)],
        *[record("head", "b" * 90, s, budget=HOSTILE, parameters=5) for s in (0, 1)],
        failed("bitfit", HOSTILE, error=HOSTILE),
    ]
    files = write_report(records, tmp_path, recipe_text=HOSTILE, title=HOSTILE)
    _, page = check(files, records)
    text = "".join(page.said)
    assert text.count(HOSTILE) > 6
    rendered = MarkdownIt("commonmark").enable("table").render(files.markdown.read_text("utf-8"))
    document = Page(rendered)
    assert {tag for tag, _ in document.elements} <= MARKDOWN_TAGS
    assert "".join(document.said).count(HOSTILE) > 6
    cells = re.findall(r"(?s)<t[dh][^>]*>(.*?)</t[dh]>", rendered)
    named = [unescape(cell) for cell in cells if "alert(" in cell]
    assert len(named) >= 6 and all(HOSTILE in cell for cell in named)  # no name ends its cell


MARKDOWN_TAGS = {"h1", "h2", "p", "strong", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "pre", "code",
                 "details", "summary"}  # fmt: skip


def test_runs_that_failed_are_listed_with_their_message_and_marked(tmp_path):
    records = [
        *comparison(METHODS, TASKS),
        failed("lora", "glue/rte", 7, settings={"size": 8}, error="the disk is full"),
    ]
    files = write_report(records, tmp_path)
    table, page = check(files, records)
    assert table["lora", "glue/rte"]["failed"] == "1" and "†" in "".join(page.said)
    for text in ("".join(page.said), files.markdown.read_text("utf-8")):
        assert "the disk is full" in text


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="no records to report; run `multitune compare"):
        write_report([], tmp_path)


def test_the_same_records_give_the_same_files(tmp_path):
    records = comparison(METHODS, TASKS, num_rows=40)
    one, other = write_report(records, tmp_path / "a"), write_report(records[::-1], tmp_path / "b")
    assert one.csv.read_bytes() == other.csv.read_bytes()
    again = write_report(records, tmp_path / "c")
    assert one.html.read_bytes() == again.html.read_bytes()


def test_overhead_is_drawn_and_listed(tmp_path):
    overhead = [
        OverheadRow(
            method=m, form=form, rows=b, length=16, ratio=ratio, milliseconds=3.0, rounds=9, settings={"size": 8}
        )
        for m, ratio in (("lora", 1.07), ("bitfit", 1.03))
        for form in ("alone", "mixed")
        for b in (1, 16)
    ]
    records = comparison(METHODS, TASKS, num_rows=40)
    table, page = check(write_report(records, tmp_path, overhead=overhead), records)
    assert table["lora", "all tasks"]["overhead_mixed"] == "1.07"
    text = "".join(page.said)
    assert "Inference, in a mixed batch" in text and "Without a value, so not drawn: prompt and head." in text


def test_a_time_of_serving_with_other_settings_is_none_and_the_report_says_so(tmp_path):
    times = {8: 1.25, 64: 1.75}
    overhead = [
        OverheadRow(method="lora", form="alone", rows=1, length=16, ratio=ratio, milliseconds=3.0, rounds=9,
                    settings={"r": r})
        for r, ratio in times.items()
    ]  # fmt: skip
    records = [record("lora", seed=s, settings={"r": 64}) for s in (0, 1)]
    table, page = check(write_report(records, tmp_path, overhead=overhead), records)
    assert table["lora", "all tasks"]["overhead_alone"] == "1.75"
    assert {"lora, r=8", "lora, r=64"} <= set(page.said)
    table, page = check(write_report(records, tmp_path, overhead=overhead[:1]), records)
    assert table["lora", "all tasks"]["overhead_alone"] == ""
    assert "other settings than these have, so they have no time of it: lora." in "".join(page.said)


def test_texts_that_were_judged_at_the_end_alone_have_curves_of_perplexity(tmp_path):
    history = tuple({"step": float(k), "eval_perplexity": 10.0 / k} for k in (1, 2))
    records = [record("lora", "nlg/e2e", s, 0.3, metric="bleu", history=history) for s in (0, 1)]
    said = "".join(check(write_report(records, tmp_path), records)[1].said)
    assert "Validation perplexity, lower is better, on nlg/e2e" in said and "At the last step: lora 5." in said
    judged = tuple({"step": float(k), "eval_perplexity": 10.0 / k, "eval_bleu": 20.0 * k} for k in (1, 2))
    records = [record("lora", "nlg/e2e", s, 0.4, metric="bleu", history=judged) for s in (0, 1)]
    said = "".join(check(write_report(records, tmp_path), records)[1].said)
    assert "Validation score, points, on nlg/e2e" in said and "At the last step: lora 40.0." in said


def test_the_command_that_is_shown_is_the_one_that_was_given(tmp_path):
    files = write_report([record()], tmp_path, command="multitune compare mine/recipe.yaml --out mine")
    for file in (files.html, files.markdown):
        assert "multitune compare mine/recipe.yaml --out mine" in file.read_text("utf-8")
    assert "command" not in write_report([record()], tmp_path).markdown.read_text("utf-8")


def test_the_recipe_of_a_row_holds_all_that_its_trials_depend_on():
    targets = ["query", "value"]
    records = [
        record("lora", "glue/rte", s, settings={"r": 4, "targets": targets, "layers": None}, data={"train_rows": 100})
        for s in (0, 2)
    ] + [
        record("lora", "mine", s, settings={"r": 8}, data={"task": None, "data": "mine.csv", "label": "intent"})
        for s in (0, 2)
    ]
    (candidate,) = summarise(records).candidates
    first, other = sorted(map(yaml.safe_load, recipes_of(candidate)), key=lambda r: r["methods"]["lora"]["r"])
    assert first["tasks"] == [{"task": "glue/rte", "train_rows": 100}] and first["seeds"] == [0, 2]
    assert first["methods"] == {"lora": {"r": 4, "targets": [targets]}}  # a list would be a grid
    assert first["training"] == {"learning_rate": 1e-3, "epochs": 3.0, "batch_size": 16, "packing": False}
    assert other["tasks"] == [{"data": "mine.csv", "label": "intent"}]


def test_page_and_document_have_the_recipe_of_every_row(tmp_path):
    files = write_report(comparison(METHODS, TASKS, num_rows=20), tmp_path)
    rendered = MarkdownIt("commonmark").render(files.markdown.read_text("utf-8"))
    for text in (rendered, files.html.read_text("utf-8")):
        blocks = re.findall(r"(?s)<details><summary>([^<]*)</summary>\s*<pre>(?:<code[^>]*>)?(.*?)</", text)
        recipes = {name: yaml.safe_load(unescape(recipe)) for name, recipe in blocks}
        assert {name: list(r["methods"]) for name, r in recipes.items()} == {name: [name] for name in METHODS}
        assert "multitune compare again.yaml --out again" in text


def test_a_row_runs_again_on_the_kind_of_device_it_had():
    cards = {"cpu": ["cpu"], "mps:0": ["mps"], "NVIDIA H100 80GB HBM3": ["cuda"]}
    for device, expected in cards.items():
        (candidate,) = summarise([record(environment={**ENVIRONMENT, "device": device})]).candidates
        assert [yaml.safe_load(text)["device"] for text in recipes_of(candidate)] == expected
    both = [record(seed=s, environment={**ENVIRONMENT, "device": d}) for s, d in enumerate(cards)]
    (candidate,) = summarise(both).candidates
    found = [yaml.safe_load(text) for text in recipes_of(candidate)]
    assert {r["device"]: r["seeds"] for r in found} == {"cpu": [0], "mps": [1], "cuda": [2]}


def test_every_draw_of_a_task_is_in_the_recipes_of_a_row():
    drawn = [(100, 0), (200, 0), (100, 1)]
    records = [record("lora", "glue/rte", data={"train_rows": n, "subset_seed": seed}) for n, seed in drawn]
    (candidate,) = summarise(records).candidates
    recipes = [yaml.safe_load(text)["tasks"] for text in recipes_of(candidate)]
    assert sorted((t["train_rows"], t["subset_seed"]) for tasks in recipes for t in tasks) == sorted(drawn)
    assert all(len({t["train_rows"] for t in tasks}) == len(tasks) for tasks in recipes)  # a recipe has each name once


def test_times_of_serving_on_other_backbones_are_told_apart(tmp_path):
    times = {"large": 1.5, "minilm": 1.25, "small": 1.75}
    overhead = [
        OverheadRow(method="lora", form="alone", rows=1, length=16, ratio=r, milliseconds=3.0, rounds=9, backbone=b)
        for b, r in times.items()
    ]

    def listed(*backbones):
        records = [record("lora", backbone=b) for b in backbones]
        text = write_report(records, tmp_path, overhead=overhead).html.read_text("utf-8")
        return re.findall(r'<th scope="row">([^<]*)</th><td>alone</td><td class="n">([^<]*)</td>', text)

    assert listed("minilm") == [("lora", "1.25")]
    assert listed("large", "minilm") == [("lora on large", "1.50"), ("lora on minilm", "1.25")]


# ------------------------------------------------------------------------ in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


#: How good, and the size on minilm.
EIGHT = {
    "houlsby": (0.145, 601_344), "lora": (0.14, 73_728), "aot_fc": (0.13, 449_280), "bitfit": (0.125, 51_072),
    "ia3": (0.11, 13_824), "ptuning_v2": (0.06, 92_160), "prompt": (0.03, 7_680), "head": (0.0, 0),
}  # fmt: skip
FOUR = {"glue/cola": 0.6, "glue/mrpc": 0.64, "glue/rte": 0.52, "glue/sst2": 0.7}


def shoot(page: Path, image: Path, profile: Path, *, width=1200, height=2400, dark=False):
    """Write a screenshot of a page; what the page wrote to the console, and the addresses the browser asked for."""
    log = profile.with_suffix(".json")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={profile}", f"--window-size={width},{height}", f"--screenshot={image}",
               f"--log-net-log={log}", "--enable-logging=stderr", "--v=0"]  # fmt: skip
    command += ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert image.exists(), done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    lines = [line.rstrip(",") for line in log.read_text("utf-8").splitlines() if '"initiator"' in line]
    found = [(e["params"]["initiator"], e["params"]["url"]) for e in map(json.loads, lines)]
    # What the browser wants for itself (its time, its dictionary) has no page as its origin.
    return console, {url for initiator, url in found if initiator != "not an origin"}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, so nothing can show the page")
@pytest.mark.parametrize(
    ("name", "width", "dark"), [("light", 1200, False), ("dark", 1200, True), ("phone", 500, False)]
)
def test_a_browser_shows_the_page_and_asks_for_nothing(name, width, dark, tmp_path):
    page = write_report(comparison(EIGHT, FOUR), tmp_path / "out", title="A comparison of invented numbers").html
    image = Path(os.environ.get("MULTITUNE_SCREENSHOTS", tmp_path)) / f"report-{name}.png"
    console, asked = shoot(page, image, tmp_path / "profile", width=width, dark=dark)
    assert console == [] and asked == set()
    picture = Image.open(image).convert("RGB")
    assert picture.size == (width, 2400)
    colours = picture.getcolors(maxcolors=1 << 24)
    background = max(colours)[1]
    assert (sum(background) < 150) == dark  # the page follows the reader's choice
    inked = sum(n for n, colour in colours if colour != background) / (width * 2400)
    assert 0.02 < inked < 0.7 and len(colours) > 100
    blue = (86, 180, 233) if dark else (0, 114, 178)  # a colour that only the figures have
    assert any(sum(abs(a - b) for a, b in zip(colour, blue, strict=True)) < 12 for _, colour in colours)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, so nothing can show the page")
def test_the_browser_would_have_told(tmp_path):
    page = tmp_path / "faulty.html"
    page.write_text('<img src="http://127.0.0.1:9/report.png"><script>console.error("told"); nothing()</script>')
    console, asked = shoot(page, tmp_path / "faulty.png", tmp_path / "profile", height=300)
    assert any("told" in line for line in console) and "http://127.0.0.1:9/report.png" in asked
