"""`multitune claims`: the verdicts follow from the runs, and what was not run is said to be so."""

from __future__ import annotations

import json

import pytest
from invented import record
from scipy import stats
from typer.testing import CliRunner

from multitune.cli import app
from multitune.comparing.claims import judge
from multitune.comparing.papers import CLAIMS, COLLECTIONS, Claim, Part
from multitune.comparing.sources import recipe_of
from multitune.comparing.store import FILE, Store


def runs(scores, task="glue/rte", **more):
    """A run for every score, by method."""
    return [record(m, task, s, score, **more) for m, of in scores.items() for s, score in enumerate(of)]


def verdict(relation, mine, other, **more):
    """Of a claim that `ia3` stands so to `full`."""
    part = Part(method="ia3", other="full", relation=relation, **more)
    claim = Claim(number=0, statement="", source="", figure="", parts=(part,), suites=("glue",))
    (finding,) = judge(runs({"ia3": mine, "full": other}), claim)
    return finding


LOW, MIDDLE, HIGH = [0.60, 0.601, 0.602], [0.70, 0.701, 0.703], [0.80, 0.802, 0.801]


@pytest.mark.parametrize(
    ("relation", "mine", "other", "expected"),
    [
        ("beats", HIGH, LOW, "holds here"),
        ("beats", LOW, HIGH, "does not hold here"),
        ("beats", [0.7, 0.8, 0.75], [0.72, 0.74, 0.76], "cannot be told here"),
        ("on par", [0.697, 0.698, 0.700], MIDDLE, "holds here"),
        ("on par", LOW, MIDDLE, "does not hold here"),
        ("on par", [0.69, 0.692, 0.692], MIDDLE, "cannot be told here"),
        ("most of", [0.69, 0.692, 0.692], MIDDLE, "holds here"),
        ("most of", LOW, MIDDLE, "does not hold here"),
        ("beats", [0.8], [0.7], "cannot be told here"),  # one seed
        ("beats", [], HIGH, "not run yet"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(relation, mine, other, expected):
    assert verdict(relation, mine, other).verdict == expected


def test_the_figure_is_the_paired_difference_with_scipys_interval():
    mine, other = [0.70, 0.74, 0.71], [0.65, 0.66, 0.67]
    ends = stats.ttest_rel(mine, other).confidence_interval(0.95)
    text = verdict("beats", mine, other).ours
    assert f"difference 5.7 ({100 * ends.low:.1f} to {100 * ends.high:.1f})" in text
    assert "71.7 against 66.0" in text and "1 task, 3 seeds, minilm" in text


def test_too_many_parameters_break_a_claim_about_few():
    part = Part(method="bitfit", other="full", relation="most of", most_parameters=0.001)
    claim = Claim(number=0, statement="", source="", figure="", parts=(part,), suites=("glue",))
    for size, expected in ((999, "holds here"), (1000, "does not hold here")):
        records = runs({"bitfit": MIDDLE}, parameters=size) + runs({"full": MIDDLE}, parameters=1_000_000)
        (finding,) = judge(records, claim)
        assert finding.verdict == expected and f"{size / 10_000:.3f}%" in finding.ours


def test_a_task_that_one_method_lacks_leaves_the_claim_open():
    part = Part(method="ia3", other="full", relation="beats")
    claim = Claim(number=0, statement="", source="", figure="", parts=(part,), suites=("glue",))
    (finding,) = judge([*runs({"ia3": HIGH, "full": LOW}), *runs({"full": LOW}, "glue/sst2")], claim)
    assert finding.verdict == "not run yet" and "no score of ia3 on every task" in finding.ours


def test_suites_are_judged_apart():
    records = runs({"ptuning_v2": HIGH, "prompt": LOW}) + runs({"ptuning_v2": LOW, "prompt": HIGH}, "super_glue/cb")
    (claim,) = (c for c in CLAIMS if c.number == 4)
    found = {(f.suite, f.part.other): f.verdict for f in judge(records, claim)}
    assert found["glue", "prompt"] == "holds here" and found["superglue", "prompt"] == "does not hold here"
    assert found["glue", "full"] == found["superglue", "full"] == "not run yet"


def test_the_runs_of_a_suite_are_those_that_its_claims_are_judged_by():
    for suite, collection in COLLECTIONS.items():
        assert {entry.task.partition("/")[0] for entry in recipe_of(suite).tasks} == {collection}
    assert {suite for claim in CLAIMS for suite in claim.suites} <= set(COLLECTIONS)


def test_methods_on_different_backbones_are_not_compared():
    part = Part(method="ia3", other="full", relation="beats")
    claim = Claim(number=0, statement="", source="", figure="", parts=(part,), suites=("glue",))
    records = runs({"ia3": HIGH, "full": LOW}, backbone="a") + runs({"ia3": LOW, "full": MIDDLE}, backbone="b")
    one, other = judge(records, claim)
    assert (one.verdict, other.verdict) == ("holds here", "does not hold here")
    assert one.ours.endswith(" a") and other.ours.endswith(" b")
    apart = judge(runs({"ia3": HIGH}, backbone="a") + runs({"full": LOW}, backbone="b"), claim)
    assert [f.verdict for f in apart] == ["not run yet"] * 2
    assert "no score of full" in apart[0].ours and "no score of ia3" in apart[1].ours


def test_the_command_writes_the_document_and_prints_every_claim(tmp_path):
    store = Store(tmp_path / "done" / FILE)
    for each in runs({"ptuning_v2": HIGH, "prompt": LOW}):
        store.add(each)
    page = tmp_path / "claims.md"
    page.write_text("Before.\n<!-- claims:begin -->\nstale\n<!-- claims:end -->\nAfter.\n")
    result = CliRunner().invoke(app, ["claims", str(tmp_path / "done"), "--write", str(page)])
    assert result.exit_code == 0, result.stderr
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("-->\nAfter.\n") and "stale" not in text
    assert text.count("\n### ") == 8 and text.count("**holds here**") == 1 and text.count("Not run yet") == 5
    assert {line.split()[0] for line in result.stdout.splitlines()[2:]} == set("12345678")
    found = json.loads(CliRunner().invoke(app, ["claims", str(tmp_path / "done"), "--json"]).stdout)
    assert [c["number"] for c in found] == list(range(1, 9))


def test_a_document_without_markers_is_refused_before_the_work(tmp_path):
    page = tmp_path / "claims.md"
    page.write_text("nothing\n")
    for file, words in ((page, "needs the lines <!-- claims:begin -->"), (tmp_path / "claim.md", "Did you mean")):
        result = CliRunner().invoke(app, ["claims", str(tmp_path / "no-store"), "--write", str(file)])
        assert result.exit_code == 1 and words in result.stderr
