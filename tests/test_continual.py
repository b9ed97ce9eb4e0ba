"""Sparse updates of many tasks in one model: the sum is the sum of weights, in any order, read by class means."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import multitune as mt
from multitune.continual import Prototypes, cosine_of_updates, features, sparse_updates, sum_of_updates
from multitune.merging import merge_deltas
from multitune.plan import DeltaSet, Plan
from multitune.tasks import TaskData


@pytest.fixture
def adapters(bert, random_adapter):
    return [random_adapter(bert, mt.SoTU(density=0.2, mask_seed=seed), seed) for seed in range(3)]


def dense(bert, adapter):
    """By site, what merging one adapter adds to the weight."""
    merged = merge_deltas(bert, DeltaSet(adapter.method.deltas(adapter.params, bert)))
    pairs = {
        s.name: [b.model.get_submodule(s.module).weight for b in (merged, bert)] for s in bert.find_sites("linear")
    }
    return {name: (after - before).detach() for name, (after, before) in pairs.items()}


def test_the_sum_is_the_sum_of_the_dense_updates(bert, adapters, random_rows, close):
    changes = [dense(bert, a) for a in adapters]
    weights = dict(bert.model.state_dict())
    for site in bert.find_sites("linear"):
        name = f"{site.module}.weight"
        weights[name] = weights[name] + 0.5 * sum(c[site.name] for c in changes)
    expected = bert.with_weights(weights)
    ids = random_rows(bert, [6, 6]).padded()[0]
    for order in itertools.permutations(adapters):
        total = sum_of_updates(bert, order, scale=0.5)
        with torch.no_grad():
            close(bert.run(Plan([total, total]), ids), expected.run(Plan([None, None]), ids))
    assert max(len(deltas) for deltas in total.by_site.values()) == 1


def test_the_cosine_is_that_of_the_dense_updates(bert, adapters):
    flat = [torch.cat([t.flatten() for t in dense(bert, a).values()]) for a in adapters]
    for i, j in itertools.product(range(3), repeat=2):
        expected = float(torch.nn.functional.cosine_similarity(flat[i], flat[j], dim=0))
        assert cosine_of_updates(bert, adapters[i], adapters[j]) == pytest.approx(expected, abs=1e-4)


def test_independent_places_share_density_squared(bert, random_adapter):
    density = 0.25
    places = [
        {
            (site, i)
            for site, u in sparse_updates(bert, random_adapter(bert, mt.SoTU(density=density, mask_seed=s))).items()
            for i in u.indices.tolist()
        }
        for s in (1, 2)
    ]
    total = sum(s.in_features * s.out_features for s in mt.SoTU().sites(bert))
    assert len(places[0] & places[1]) / total == pytest.approx(density**2, rel=0.1)


def test_what_is_no_sparse_update_cannot_be_added(bert, random_adapter, adapters):
    other = random_adapter(bert, mt.LoRA(r=2), 1)
    with pytest.raises(mt.AdapterError, match="adapter 'lora-1' .LoRA. has a LowRank at layer.0.query"):
        sum_of_updates(bert, [adapters[0], other])


def test_features_do_not_depend_on_the_batch(bert, tasks, adapters, close):
    table = [{"text": "good film", "y": "good"}, {"text": "x", "y": "bad"}, {"text": "not the film", "y": "mixed"}]
    total = sum_of_updates(bert, adapters)
    found, labels = features(bert, total, tasks["classification"], table)
    assert labels == ["good", "bad", "mixed"] and found.shape == (3, bert.hidden_size)
    for row, one in zip(table, found, strict=True):
        close(features(bert, total, tasks["classification"], [row], batch_size=1)[0][0], one)
    bare = features(bert, None, tasks["classification"], table)[0]
    assert (bare - found).abs().max() > 1e-3
    with pytest.raises(mt.DataError, match="need a classification task, and 'score' is of kind regression"):
        features(bert, None, tasks["regression"], [])


def test_prototypes_are_class_means_and_the_nearest_by_cosine_wins():
    rows = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0]])
    first = Prototypes.of(rows, ["a", "a", "b"])
    assert first.labels == ("a", "b") and first.means.tolist() == [[3.0, 0.0], [0.0, 1.0]]
    both = first.extended(Prototypes.of(torch.tensor([[-1.0, -1.0]]), ["c"]))
    assert both.predict(torch.tensor([[0.1, 0.0], [5.0, 6.0], [-9.0, -1.0]])) == ["a", "b", "c"]
    with pytest.raises(mt.DataError, match=r"\['b'\] are there already"):
        first.extended(Prototypes.of(rows[:1], ["b"]))
    with pytest.raises(mt.DataError, match="no rows"):
        Prototypes.of(rows[:0], [])
    with pytest.raises(mt.DataError, match=r"features of shape \(3, 2\) do not go with 2 labels; give one label a row"):
        Prototypes.of(rows, ["a", "b"])
    with pytest.raises(mt.DataError, match=r"features of shape \(1, 3\) do not go with class means of 2 numbers"):
        both.predict(torch.ones(1, 3))
    with pytest.raises(mt.DataError, match=r"the later task's means of shape \(1, 3\) do not go with"):
        both.extended(Prototypes.of(torch.ones(1, 3), ["d"]))


def test_class_means_are_saved_and_loaded_and_damage_is_named(tmp_path):
    saved = Prototypes(("käse", "b"), torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    folder = saved.save(tmp_path / "means")
    again = Prototypes.load(folder)
    assert again.labels == saved.labels and torch.equal(again.means, saved.means)
    saved.extended(Prototypes(("c",), torch.ones(1, 3))).save(folder)  # what is there is replaced
    assert Prototypes.load(folder).labels == ("käse", "b", "c")

    names, means = folder / "prototypes.json", folder / "prototypes.safetensors"

    def refused(problem, text=None, tensors=None):
        saved.save(folder)
        if text is not None:
            names.write_text(text)
        if tensors is not None:
            save_file(tensors, means)
        with pytest.raises(mt.DataError, match=problem):
            Prototypes.load(folder)

    refused("no list of classes of format 1", '{"format": 2, "labels": ["a", "b"]}')
    refused("no list of classes of format 1", '{"format": 1, "labels": ["a", "b"], "more": 0}')
    refused("not names that differ", '{"format": 1, "labels": ["a", "a"]}')
    refused("3 names for 2 class means", '{"format": 1, "labels": ["a", "b", "c"]}')
    refused("are damaged", "{")
    refused("one float32 'means'", tensors={"means": saved.means.half()})
    refused("one float32 'means'", tensors={"means": saved.means, "other": saved.means.clone()})
    means.unlink()
    with pytest.raises(mt.DataError, match="is missing"):
        Prototypes.load(folder)
    (folder / "notes.txt").touch()
    with pytest.raises(mt.ConfigError, match=r"notes\.txt"):
        saved.save(folder)


def test_the_page_runs_as_it_stands(minilm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mt.Backbone, "load", lambda name, **settings: minilm)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "continual.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert code.count("epochs=1") == 1
    exec(compile(code.replace("epochs=1", "max_steps=1, progress=False"), "continual.md", "exec"), {})
    shown = capsys.readouterr().out.split()
    assert shown[0] == "14" and 0 <= float(shown[1]) <= 1
    assert len(Prototypes.load("adapters/means").labels) == 14


def test_the_benchmark_goes_on_where_it_was_stopped(script, bert, tmp_path, monkeypatch, capsys):
    """A stream in which the second domain had to be taken up again ends as one that was never stopped."""
    tables = {
        domain: [{"text": f"{word} film {i}", "y": "ab"[i % 2]} for i in range(8)]
        for domain, word in (("home", "good"), ("work", "bad"))
    }

    def load_task(name):
        rows = tables[name.removeprefix("intent/clinc_")]
        task = mt.Task(name=name, kind="classification", template=("{text}",), label="y", labels=("a", "b"))
        return TaskData(task=task, train=rows, validation=rows, test=rows)

    monkeypatch.setattr(mt, "load_task", load_task)
    monkeypatch.setattr(mt.Backbone, "load", lambda name, **settings: bert)

    def run(folder, *options):
        places = ["--store", str(tmp_path / folder), "--work", str(tmp_path / folder / "work"), "--epochs", "1"]
        monkeypatch.setattr(sys, "argv", ["x.py", "--domains", "home", "work", *places, *options])
        script("continual_intents").main()
        return capsys.readouterr().out

    def rows(folder):
        lines = (tmp_path / folder / "continual_intents.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "environment"} for line in lines]

    page = tmp_path / "page.md"
    page.write_text("<!-- continual_intents:begin -->\n<!-- continual_intents:end -->\n")
    shown = run("whole", "--write", str(page))
    assert "| home | 2 |" in shown and "| work | 4 |" in page.read_text()
    first = run("cut", "--tasks", "1")
    assert "| home | 2 |" in first and "work" not in first
    trained = []
    train = mt.train
    monkeypatch.setattr(mt, "train", lambda *args, **more: trained.append(args[1].task.name) or train(*args, **more))
    run("cut")
    assert trained == ["intent/clinc_work"] * 2
    assert rows("cut") == rows("whole")
    run("cut")
    assert len(trained) == 2 and len(rows("cut")) == 2
    assert "Not run yet" in run("none", "--table")
