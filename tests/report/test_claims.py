"""`multitune claims`: the verdicts follow from the runs, and what was not run is said to be so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from invented import failed, record
from scipy import stats
from typer.testing import CliRunner

from multitune import method_names
from multitune.cli import app
from multitune.comparing.claims import judge
from multitune.comparing.evidence import read_results
from multitune.comparing.overhead import FORMS, OverheadRow, read_overhead
from multitune.comparing.papers import CLAIMS, Claim
from multitune.comparing.parts import COLLECTIONS, Part, Side, Size, Stored, Timed, Untested
from multitune.comparing.sources import recipe_of
from multitune.comparing.store import FILE, Store

ROOT = Path(__file__).parents[2]


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
    assert "71.7 against 66.0" in text and "1 of 9 tasks, 3 seeds, minilm" in text


def test_what_failed_is_counted_and_what_failed_altogether_is_not_called_not_run():
    part = Part(method="ia3", other="full", relation="beats")
    records = [*runs({"ia3": HIGH[:2], "full": [*LOW[:2], 0.9]}), failed("ia3", seed=2)]
    (finding,) = judge(records, of(part))
    assert finding.ours.endswith("1 of 9 tasks, 2 seeds, minilm, 1 run of ia3 failed")
    assert finding.ours.startswith("80.1 against 60.")  # both over the two seeds that both have
    for purpose in ("final", "search"):
        gone = [replace(records[-1], purpose=purpose), *runs({"full": LOW})]
        (finding,) = judge(gone, of(part))
        assert (finding.verdict, finding.ours) == (
            "cannot be told here",
            "every run of ia3 on glue/rte failed, minilm",
        )


def test_a_whole_suite_is_counted_without_the_number_it_could_have():
    tasks = [entry.task for entry in recipe_of("glue").tasks]
    records = [r for task in tasks for r in runs({"ia3": HIGH, "full": LOW}, task)]
    (finding,) = judge(records, of(Part(method="ia3", other="full", relation="beats")))
    assert f", {len(tasks)} tasks, 3 seeds, minilm" in finding.ours


def test_weights_that_changed_under_a_name_are_judged_apart():
    later = [replace(r, trial=replace(r.trial, backbone_fingerprint="f00dcafe")) for r in runs({"full": LOW})]
    found = judge(runs({"ia3": HIGH}) + later, of(Part(method="ia3", other="full", relation="beats")))
    assert [f.verdict for f in found] == ["not run yet"] * 2 and "minilm (weights beef)" in found[0].ours


def of(part, suites=("glue",)):
    """A claim of one part."""
    return Claim(number=0, statement="", source="", figure="", parts=(part,), suites=suites)


@pytest.mark.parametrize(
    ("mine", "paper_size", "expected"),
    [
        (999, 1_000_000, "holds here"),
        (1000, 1_000_000, "does not hold here"),
        (1000, 1_000_001, "cannot be tested here"),  # a narrow backbone says nothing against a share on a wide one
    ],
)
def test_a_share_of_parameters_is_judged_on_a_backbone_as_large_as_the_papers(mine, paper_size, expected):
    records = runs({"bitfit": MIDDLE}, parameters=mine) + runs({"full": MIDDLE}, parameters=1_000_000)
    (finding,) = judge(records, of(Size(method="bitfit", most=0.001, paper_size=paper_size)))
    assert finding.verdict == expected and f"{mine / 10_000:.3f}%" in finding.ours


def test_methods_at_one_budget_are_compared_at_that_budget_alone():
    part = Part(method="sift", other="lora", relation="beats", budget="0.25%")
    records = runs({"sift": MIDDLE, "lora": LOW}, budget="0.25%") + runs({"lora": HIGH}, budget="1%")
    (finding,) = judge(records, of(part))
    assert finding.verdict == "holds here"


# ------------------------------------------------------------------- times of serving


def times(method, ratios, form="alone", **more):
    """A row for every ratio, each of another length."""
    return [
        OverheadRow(method=method, form=form, rows=1, length=16 * i, ratio=r, milliseconds=1.0, rounds=9, **more)
        for i, r in enumerate(ratios, start=1)
    ]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([1.00, 1.01, 1.02], "holds here"),
        ([1.09, 1.11, 1.10], "does not hold here"),
        ([0.95, 1.05, 1.20], "cannot be told here"),
        ([1.0], "cannot be told here"),
        ([], "not run yet"),
    ],
)
def test_times_beyond_the_bare_backbones_are_negligible_up_to_five_percent(ratios, expected):
    (finding,) = judge([], of(Timed(method="lora", form="merged")), overhead=times("lora", ratios, "merged"))
    assert finding.verdict == expected and "benchmarks/overhead.py" in finding.command


def test_times_of_two_methods_are_compared_on_the_shapes_that_both_have():
    part = Timed(method="aot_fc", form="fused", other=("lora", "alone"))
    rows = times("aot_fc", [1.1, 2.2, 3.3, 9.9], "fused") + times("lora", [1.3, 2.5, 3.9])
    (finding,) = judge([], of(part), overhead=rows)
    assert finding.verdict == "holds here"
    logs = [np.log(1.1 / 1.3), np.log(2.2 / 2.5), np.log(3.3 / 3.9)]
    low, high = np.exp(stats.t.interval(0.95, 2, np.mean(logs), stats.sem(logs)))
    assert (
        f"2.00 × the bare backbone's time against 2.33 × ({low:.2f} to {high:.2f} times it), 3 shapes" in finding.ours
    )
    (turned,) = judge([], of(Timed(method="lora", form="alone", other=("aot_fc", "fused"))), overhead=rows)
    assert turned.verdict == "does not hold here"


def test_times_of_two_machines_are_judged_apart(tmp_path):
    slow = times("lora", [1.2, 1.21, 1.22], "merged", environment={"machine": "slow", "threads": 1, "device": "cpu"})
    fast = times("lora", [1.0, 1.01, 1.02], "merged", environment={"machine": "fast", "threads": 1, "device": "cpu"})
    file = tmp_path / "overhead.jsonl"
    file.write_text("".join(json.dumps(row.to_dict()) + "\n" for row in [*slow, *fast, *slow[:1]]), "utf-8")
    rows = read_overhead(file)
    assert len(rows) == 6
    found = judge([], of(Timed(method="lora", form="merged")), overhead=rows)
    assert [f.verdict for f in found] == ["holds here", "does not hold here"]
    assert [f.ours.partition("minilm")[2] for f in found] == [f", {m}, threads 1, cpu" for m in ("fast", "slow")]


# ------------------------------------------------------------------- rows of benchmarks

CHAINS = Stored(
    store="chains",
    one=Side(title="many", cell={"rows": "many"}, score="scores.*.3.right", per="scores.*.3.asked"),
    other=Side(title="single", cell={"rows": "single"}, score="scores.*.1.right", per="scores.*.1.asked"),
    alike=("backbone", "questions"),
    seed="training.seed",
    command="python benchmarks/chains.py",
)


def chains(rows, seed, right, k, questions=10):
    cell = {"rows": rows, "backbone": "b", "questions": questions, "training": {"seed": seed, "rate": len(rows)}}
    return {"cell": cell, "scores": {name: {str(k): {"right": n, "asked": 10}} for name, n in right.items()}}


def test_rows_of_a_benchmark_are_paired_by_seed_where_they_are_alike(tmp_path):
    rows = [chains("many", s, {"x": 8 + s, "y": 7}, 3) for s in (0, 1, 2)]
    rows += [chains("single", s, {"x": 4, "y": 5}, 1) for s in (2, 0, 1)]
    stale = chains("many", 0, {"x": 0, "y": 0}, 3)
    other = [chains(rows, 0, {"x": 1, "y": 1}, k, questions=2) for rows, k in (("many", 3), ("single", 1))]
    lines = [json.dumps(row) for row in (stale, *rows)]
    (tmp_path / "chains-1of2.jsonl").write_text("\n".join(lines) + '\n{"cell": {"ro', "utf-8")
    (tmp_path / "chains-2of2.jsonl").write_text(json.dumps(other[0]) + "\n" + json.dumps(other[1]), "utf-8")
    (tmp_path / "others.jsonl").write_text("[1, 2]\n", "utf-8")
    full, quick = judge([], of(CHAINS), results=read_results(tmp_path))
    assert full.verdict == "holds here" and quick.verdict == "cannot be told here"
    assert full.ours.startswith("80.0 against 45.0; difference 35.0 (22.6 to 47.4), 3 seeds, backbone b, questions 10")
    assert quick.ours.endswith("1 seed, backbone b, questions 2")


def test_rows_without_a_seed_are_compared_with_those_of_every_seed(tmp_path):
    rows = [chains("many", s, {"x": 8 + s}, 3) for s in (0, 1)] + [chains("single", None, {"x": 4}, 1)]
    del rows[-1]["cell"]["training"]
    (finding,) = judge([], of(CHAINS), results={"chains": rows})
    assert "85.0 against 40.0" in finding.ours and "2 seeds" in finding.ours


def test_rows_of_another_list_are_not_pooled_and_told_apart():
    part = replace(CHAINS, same=("learnt",))
    rows = [chains("many", s, {"x": 8}, 3) for s in (0, 1)] + [chains("single", s, {"x": 4}, 1) for s in (0, 1)]
    old = [{**row, "cell": {**row["cell"], "learnt": ["a", "b"]}} for row in rows]
    new = [{**row, "cell": {**row["cell"], "learnt": ["a", "c"]}} for row in rows[1:]]
    (alone,) = judge([], of(part), results={"chains": new})
    assert alone.ours.endswith("1 seed, backbone b, questions 10")
    one, other = judge([], of(part), results={"chains": [*old, *new]})
    assert one.ours.endswith("2 seeds, backbone b, questions 10 (1 of 2, which differ in learnt)")
    assert other.ours.endswith("1 seed, backbone b, questions 10 (2 of 2, which differ in learnt)")


def test_two_rows_of_one_seed_are_no_two_seeds():
    rows = [chains("many", s, {"x": 8}, 3) for s in (0, 1)] + [chains("single", s, {"x": 4}, 1) for s in (0, 1)]
    longer = [{**row, "cell": {**row["cell"], "training": {**row["cell"]["training"], "steps": 9}}} for row in rows[:2]]
    one, other = judge([], of(CHAINS), results={"chains": [*rows, *longer]})
    assert one.ours.endswith("2 seeds, backbone b, questions 10 (1 of 2, which differ in training)")
    assert other.ours.endswith("2 seeds, backbone b, questions 10 (2 of 2, which differ in training)")


def test_the_tasks_of_a_benchmark_are_named():
    part = replace(CHAINS, alike=("backbone", "task"))
    rows = [chains(side, s, {"x": n}, k) for side, n, k in (("many", 8, 3), ("single", 4, 1)) for s in (0, 1)]
    rows = [{**row, "cell": {**row["cell"], "task": task}} for row in rows for task in ("one", "two")]
    (finding,) = judge([], of(part), results={"chains": rows})
    assert finding.ours.endswith(", one and two, 2 seeds, backbone b")


def test_rows_that_lack_a_field_are_not_alike():
    stale = [chains(rows, s, {"x": 4}, k) for rows, k in (("many", 3), ("single", 1)) for s in (0, 1)]
    for row in stale:
        del row["cell"]["questions"]
    (finding,) = judge([], of(CHAINS), results={"chains": stale})
    assert finding.verdict == "not run yet"


def stored(store):
    """What the claims read from a benchmark."""
    (part,) = (p for claim in CLAIMS for p in claim.parts if isinstance(p, Stored) and p.store == store)
    return part


def test_the_continual_claim_is_judged_by_the_last_stage_of_each_stream():
    part = stored("continual_intents")
    domains = part.one.cell["domains"]
    settings = {"backbone": "b", "density": 0.1, "targets": ["query"], "rate": 1e-3, "full_rate": 1e-4, "epochs": 3.0}
    rows = []
    for seed, rows_used in ((0, None), (1, None), (0, 60)):
        for n in range(1, 11):
            cell = {**settings, "rows": rows_used, "seed": seed, "domains": domains[:n]}
            rows.append({"cell": cell, "accuracy": {"sotu": 1.0 - 0.05 * n, "sequential": 0.3 + 0.01 * seed}})
    full, few = judge([], of(part), results={"continual_intents": rows})
    assert full.ours.startswith("50.0 against 30.5") and ", 2 seeds, backbone b, density 0.1, epochs 3.0" in full.ours
    assert full.verdict == "holds here"
    assert few.ours.endswith("1 seed, backbone b, density 0.1, epochs 3.0, rows 60")


def test_where_to_cut_is_judged_on_equal_rows():
    """The benchmark draws as many rows as it is told, and a store keeps runs on all and on few."""
    rows = [
        {"cell": {"backbone": "b", "task": "t", "rows": n, "seed": seed, "trained": trained}, "score": score}
        for n, found in ((400, {"semantic": 0.5, "upper half": 0.25}), (9000, {"semantic": 0.75, "upper half": 0.75}))
        for trained, score in found.items()
        for seed in (0, 1)
    ]
    few, full = judge([], of(stored("frozen_layers")), results={"frozen_layers": rows})
    assert few.ours.startswith("50.0 against 25.0") and few.ours.endswith("rows 400")
    assert full.ours.startswith("75.0 against 75.0") and full.ours.endswith("rows 9000")


def test_a_quick_run_of_chains_leaves_the_claim_open():
    cell = {"backbone": "b", "questions": 4, "test_questions": 2, "k": [1, 2], "training": {"seed": 0}}
    cell |= {"settings": {}, "learnt": ["a"], "tested": ["a"]}
    scores = {"a": {k: {"right": 1, "questions": 2} for k in ("1", "2")}}
    rows = [{"cell": {**cell, "training_rows": name}, "scores": scores} for name in ("dcot", "cot")]
    (finding,) = judge([], of(stored("dcot")), results={"dcot": rows})
    assert finding.verdict == "not run yet"


def test_every_claim_says_what_decides_it():
    for claim in CLAIMS:
        for finding in judge([], claim):
            assert finding.verdict == ("cannot be tested here" if isinstance(finding.part, Untested) else "not run yet")
            assert finding.ours and (finding.command or isinstance(finding.part, Untested))
            if "--methods" in finding.command:  # the suite's own store, recipe and report stay what they are
                assert not any(
                    f"--out compare-{suite} " in finding.command for suite in finding.part.suites or ("glue",)
                )
            if finding.command.startswith("python "):
                assert (ROOT / finding.command.split()[1]).is_file()
    parts = [part for claim in CLAIMS for part in claim.parts]
    assert {p.form for p in parts if isinstance(p, Timed)} <= set(FORMS)
    for part in parts:
        if isinstance(part, (Part, Size)):
            assert {part.method, getattr(part, "other", "full")} <= set(method_names())
        elif isinstance(part, Stored):  # the cells of its benchmark have these fields
            text = (ROOT / "benchmarks" / f"{part.store}.py").read_text("utf-8")
            fields = {*part.alike, *part.same, *part.one.cell, *part.other.cell}
            assert all(f'"{field}"' in text for field in fields), part.store
            values = [v for side in (part.one, part.other) for v in side.cell.values()]
            names = [n for v in values for n in (v if isinstance(v, list) else [v])]
            assert all(json.dumps(name) in text for name in names), part.store
            cells = (ROOT / "benchmarks" / "_cells.py").read_text("utf-8")
            options = text + (cells if "from _cells import" in text else "")
            flags = [word for word in part.command.split() if word.startswith("--")]
            assert all(f'"{flag}"' in options for flag in flags), part.command


def test_a_task_that_one_method_lacks_leaves_the_claim_open():
    part = Part(method="ia3", other="full", relation="beats")
    claim = Claim(number=0, statement="", source="", figure="", parts=(part,), suites=("glue",))
    (finding,) = judge([*runs({"ia3": HIGH, "full": LOW}), *runs({"full": LOW}, "glue/sst2")], claim)
    assert finding.verdict == "not run yet" and "no score of ia3 on every task" in finding.ours


def test_suites_are_judged_apart():
    records = runs({"ptuning_v2": HIGH, "prompt": LOW}) + runs({"ptuning_v2": LOW, "prompt": HIGH}, "super_glue/cb")
    (claim,) = (c for c in CLAIMS if c.number == 4)
    found = {(f.runs, f.part.other): f.verdict for f in judge(records, claim)}
    assert found["glue", "prompt"] == "holds here" and found["superglue", "prompt"] == "does not hold here"
    assert found["glue", "full"] == found["superglue", "full"] == "not run yet"


def test_the_runs_of_a_suite_are_those_that_its_claims_are_judged_by():
    for suite, collection in COLLECTIONS.items():
        assert {entry.task.partition("/")[0] for entry in recipe_of(suite).tasks} == {collection}
    assert {suite for claim in CLAIMS for suite in claim.suites} == set(COLLECTIONS)


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
    assert text.count("\n### ") == 8 and text.count("**holds here**") == 1
    assert text.count("**cannot be tested here**") == 3
    assert {line.split()[0] for line in result.stdout.splitlines()[2:]} == set("12345678")
    assert "nothing given here" not in result.stderr
    other = Store(tmp_path / "mine" / FILE)
    for each in runs({"lora": HIGH}, task="tickets"):
        other.add(each)
    nothing = CliRunner().invoke(app, ["claims", str(tmp_path / "mine")])
    assert "nothing given here is what a claim is about (tasks: tickets); `multitune compare glue`" in nothing.stderr
    found = json.loads(CliRunner().invoke(app, ["claims", str(tmp_path / "done"), "--json"]).stdout)
    assert [c["number"] for c in found] == list(range(1, 9))


def test_the_command_reads_times_and_benchmarks_and_wants_something_to_judge_by(tmp_path):
    (tmp_path / "overhead.jsonl").write_text(
        "".join(json.dumps(row.to_dict()) + "\n" for row in times("lora", [1.0, 1.01, 1.02], "merged")), "utf-8"
    )
    row = {"cell": {"backbone": "b", "task": "t", "num_train": 9, "num_judged": 9}, "scores": {"accuracy": 0.75}}
    rows = [
        {**row, "cell": {**row["cell"], "system": s, "seed": seed}, "scores": {"accuracy": 0.5 + 0.25 * (s == "tfew")}}
        for s in ("tfew", "few")
        for seed in (0, 1)
    ]
    (tmp_path / "few_shot_language.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    told = CliRunner().invoke(
        app, ["claims", "--overhead", str(tmp_path / "overhead.jsonl"), "--results", str(tmp_path), "--json"]
    )
    verdicts = {
        (c["number"], f["runs"]): f["verdict"] for c in json.loads(told.stdout) for f in reversed(c["findings"])
    }
    assert verdicts[5, "overhead"] == verdicts[6, "few_shot_language"] == "holds here"
    nothing = CliRunner().invoke(app, ["claims"])
    assert nothing.exit_code == 1 and "--results FOLDER" in nothing.stderr


def test_a_document_without_markers_is_refused_before_the_work(tmp_path):
    page = tmp_path / "claims.md"
    page.write_text("nothing\n")
    for file, words in ((page, "needs the lines <!-- claims:begin -->"), (tmp_path / "claim.md", "Did you mean")):
        result = CliRunner().invoke(app, ["claims", str(tmp_path / "no-store"), "--write", str(file)])
        assert result.exit_code == 1 and words in result.stderr
