"""Adapters as files: what was saved comes back to the bit, and whatever is damaged is named, not loaded."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from multitune import (
    Adapter,
    AdapterError,
    AoTFC,
    AoTKronecker,
    BackboneError,
    Bank,
    ConfigError,
    DeltaSet,
    FullFineTuning,
    LoRA,
    MultituneError,
    Plan,
    PromptTuning,
    get_method,
    method_names,
)
from multitune.deltas import TableRows, TokenBias
from multitune.files import sha256

KINDS = ("classification", "regression", "multilabel", "multiple_choice", "tagging")


@pytest.fixture
def folder(bert, random_adapter, tmp_path):
    """A saved LoRA adapter."""
    return random_adapter(bert, LoRA(r=2), 1).save(tmp_path / "adapter").path


def read(folder):
    return json.loads((folder / "adapter.json").read_text())


def write(folder, config):
    (folder / "adapter.json").write_text(json.dumps(config))


def rewrite(folder, change):
    """Change the tensors and write a checksum that fits, as somebody with an editor would."""
    file = folder / "adapter.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    write(folder, read(folder) | {"tensors_sha256": sha256(file)})


# ---- what was saved comes back


@pytest.mark.parametrize("name", method_names())
def test_save_then_load_is_bit_equal(bert, random_adapter, tmp_path, name):
    adapter = random_adapter(
        bert,
        get_method(name)(),
        1,
        metrics={"accuracy": 0.5},
        recipe={"learning_rate": 1e-3, "epochs": 3},
        max_length=48,
    )
    adapter = dataclasses.replace(adapter, seed=7)
    saved = adapter.save(tmp_path / "a")
    assert saved.path == tmp_path / "a"
    assert dataclasses.replace(saved, path=None, digest=None) == adapter
    for loaded in (Adapter.load(tmp_path / "a", bert), Adapter.load(str(tmp_path / "a"))):
        for one, two in ((loaded.params, adapter.params), (loaded.head_params, adapter.head_params)):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in two)
        for field in dataclasses.fields(Adapter):
            if field.name not in ("params", "head_params", "path", "digest"):
                assert getattr(loaded, field.name) == getattr(adapter, field.name), field.name
        assert loaded.path == tmp_path / "a"
        assert loaded.num_method_parameters == sum(
            t.numel() for k, t in adapter.params.items() if adapter.method.trains(k)
        )
        assert loaded.num_head_parameters == 3 * 32 + 3
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter.json", "adapter.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == {"a"}  # nothing temporary is left


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_every_head_and_task_comes_back(bert, random_adapter, tmp_path, kind, pooling):
    adapter = random_adapter(bert, LoRA(), 1, kind=kind, pooling=pooling)
    loaded = Adapter.load(adapter.save(tmp_path / "a").path, bert)
    assert (loaded.head, loaded.task) == (adapter.head, adapter.task)


def test_save_replaces_and_saving_again_gives_the_same_bytes(bert, random_adapter, tmp_path):
    one, two = random_adapter(bert, AoTFC(r=2), 1), random_adapter(bert, LoRA(), 2)
    one.save(tmp_path / "a").fuse(bert)
    (tmp_path / "a" / "stray").write_text("x")
    with pytest.raises(ConfigError, match="stray"):
        two.save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a", bert).method == AoTFC(r=2)
    (tmp_path / "a" / "stray").unlink()
    two.save(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter.json", "adapter.safetensors"}
    assert Adapter.load(tmp_path / "a", bert).method == LoRA()
    two.save(tmp_path / "deep" / "down" / "b")
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "deep" / "down" / "b" / name).read_bytes()


def test_what_a_run_left_stays_beside_the_tensors_it_made(bert, random_adapter, tmp_path):
    adapter = random_adapter(bert, LoRA(), 1).save(tmp_path / "a")
    for name in ("history.json", "curve.png", "job.json"):
        (tmp_path / "a" / name).write_text(name)
    dataclasses.replace(adapter, metrics={"accuracy": 0.5}).save(tmp_path / "a")
    assert {p.name: p.read_text() for p in (tmp_path / "a").iterdir() if p.stem != "adapter"} == {
        name: name for name in ("history.json", "curve.png", "job.json")
    }
    assert Adapter.load(tmp_path / "a", bert).metrics == {"accuracy": 0.5}
    random_adapter(bert, LoRA(), 2).save(tmp_path / "a")  # other tensors, of which that run says nothing
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_nothing_is_pickled(folder):
    config = read(folder)
    assert config["format"] == 1
    assert config["tensors_sha256"] == sha256(folder / "adapter.safetensors")
    assert set(load_file(folder / "adapter.safetensors")) >= {"head.weight", "head.bias", "method.layer.0.query.A"}
    assert config["parameters"] == {"method": 6 * 2 * 2 * 32, "head": 99}


def test_full_fine_tuning_may_hold_only_what_changed(bert, random_adapter, tmp_path, close):
    adapter = random_adapter(bert, FullFineTuning(), 1)
    few = dict(list(adapter.params.items())[-3:])
    partial = dataclasses.replace(adapter, params=few).save(tmp_path / "a")
    assert Adapter.load(partial.path, bert).params.keys() == few.keys()
    rewrite(partial.path, lambda t: t.pop("head.bias"))
    with pytest.raises(AdapterError, match=r"'head\.bias' \(3,\) is missing"):
        Adapter.load(partial.path, bert)


# ---- damaged files


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_missing_file_is_named(bert, folder, name):
    (folder / name).unlink()
    words = {"adapter.json": "is not an adapter folder: it has no adapter.json", "adapter.safetensors": "is missing: "}
    with pytest.raises(AdapterError, match=f"{folder}.*{words[name]}"):
        Adapter.load(folder, bert)


@pytest.mark.parametrize("keep", [0, 4, 8, 9, 100, 0.3, 0.5, 0.9, -1])
def test_truncated_tensors_are_named(bert, folder, keep):
    file = folder / "adapter.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    for backbone in (bert, None):
        with pytest.raises(AdapterError, match=r"adapter\.safetensors is damaged or truncated: .* Copy the fold"):
            Adapter.load(folder, backbone)


@pytest.mark.parametrize("where", [0.0, 0.001, 0.02, 0.5, 0.9999])
def test_a_flipped_bit_is_named(bert, folder, where):
    file = folder / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 4
    file.write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter\.safetensors is (damaged|not the file that was saved)"):
        Adapter.load(folder, bert)


def test_a_foreign_file_of_tensors_is_named(bert, folder, random_adapter, tmp_path):
    other = random_adapter(bert, LoRA(r=2), 2).save(tmp_path / "other").path
    (folder / "adapter.safetensors").write_bytes((other / "adapter.safetensors").read_bytes())
    with pytest.raises(AdapterError, match="its checksum differs"):
        Adapter.load(folder, bert)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("method.layer.0.query.A"), r"'method\.layer\.0\.query\.A' \(32, 2\) is missing"),
        (lambda t: t.pop("head.bias"), r"'head\.bias' \(3,\) is missing"),
        (lambda t: t.update({"extra": torch.ones(2)}), r"'extra' \(2,\) is not expected"),
        (
            lambda t: t.update({"method.layer.0.qeury.A": t.pop("method.layer.0.query.A")}),
            r"query\.A' \(32, 2\) is missing; .*qeury\.A' \(32, 2\) is not expected Did you mean .*query\.A'",
        ),
        (
            lambda t: t.update({"method.layer.0.query.A": torch.ones(32, 3)}),
            r"'method\.layer\.0\.query\.A' has shape \(32, 3\) where \(32, 2\) is expected",
        ),
        (
            lambda t: t.update({"head.weight": torch.ones(2, 32)}),
            r"'head\.weight' has shape \(2, 32\) where \(3, 32\) is expected",
        ),
        (lambda t: t["head.bias"].fill_(float("nan")), r"'head\.bias' holds values that are not finite"),
        (lambda t: t["method.layer.1.value.B"][0].fill_(float("inf")), r"'method\.layer\.1\.value\.B' holds values"),
    ],
)
def test_tensors_that_do_not_fit_are_named(bert, folder, change, words):
    rewrite(folder, change)
    with pytest.raises(AdapterError, match=rf"adapter\.safetensors does not fit its configuration: .*{words}"):
        Adapter.load(folder, bert)


def test_many_problems_are_counted(bert, folder):
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if k.startswith("method.")])
    with pytest.raises(AdapterError, match=r"is missing; .*\(and 7 more\)"):
        Adapter.load(folder, bert)


def test_settings_and_tensors_that_disagree_are_named(bert, folder):
    config = read(folder)
    config["method"]["settings"]["r"] = 3
    write(folder, config)
    with pytest.raises(AdapterError, match=r"has shape \(32, 2\) where \(32, 3\) is expected"):
        Adapter.load(folder, bert)


# ---- the configuration


def changed(path, value):
    def change(config):
        *parents, last = path
        for key in parents:
            config = config[key]
        if value is None:
            del config[last]
        else:
            config[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(["format"], 2), "has format 2, written by multitune .*which reads format 1. Install the version"),
        (changed(["format"], "1"), "has format 1, written by"),
        (changed(["format"], None), "is not a multitune adapter: it has no 'format'"),
        (changed(["colour"], "red"), r": unknown keys 'colour'\. Copy the folder again, or put back"),
        (changed(["seed"], None), r": missing keys 'seed'\. Copy the folder again"),
        (changed(["method", "name"], "lroa"), "no method is called 'lroa'. Did you mean 'lora'"),
        (
            changed(["method", "name"], "lora+my_gain"),
            "If it is a method of your own, import the module that defines it",
        ),
        (changed(["method", "settings", "rank"], 3), "has no hyper-parameter 'rank'"),
        (changed(["method", "settings", "r"], 0), "r=0 is not possible"),
        (changed(["method", "name"], None), "'name'"),
        (changed(["method"], "lora"), "'method' is 'lora', where a mapping is expected"),
        (changed(["method", "settings"], []), r"'method.settings' is \[\], where a mapping is expected"),
        (changed(["head", "size"], 3), "unexpected keyword argument 'size'"),
        (changed(["head", "pooling"], "max"), "pooling 'max' is unknown"),
        (changed(["head", "num_outputs"], None), "num_outputs"),
        (changed(["head", "target_std"], "3"), "'head.target_std' is '3', where a number is expected"),
        (changed(["head", "target_mean"], True), "'head.target_mean' is True, where a number is expected"),
        (changed(["task", "kind"], "regresion"), "no kind of task 'regresion'.*regression"),
        (changed(["task", "colour"], "red"), "a task has no field 'colour'"),
        (changed(["task", "template"], None), "a task needs template"),
        (changed(["backbone", "fingerprint"], None), "'backbone' does not say 'fingerprint'"),
        (changed(["backbone"], []), r"'backbone' is \[\], where a mapping is expected"),
        (changed(["backbone", "quantized"], {"original": 3}), "'backbone.quantized.original' is 3, where a text"),
        (changed(["max_length"], "128"), "'max_length' is '128', where a whole number is expected"),
        (changed(["max_length"], True), "'max_length' is True, where a whole number is expected"),
        (changed(["max_length"], 0), "'max_length' is 0, where at least 1 is expected"),
        (lambda c: c.update(recipe=None), "'recipe' is None, where a mapping is expected"),
        (changed(["recipe"], [1]), r"'recipe' is \[1\], where a mapping is expected"),
        (changed(["metrics"], [0.5]), r"'metrics' is \[0.5\], where a mapping is expected"),
        (changed(["metrics"], {"f1": "0.5"}), "'metrics.f1' is '0.5', where a number is expected"),
        (changed(["table"], "float32"), "'table' is 'float32', where a mapping or none is expected"),
        (changed(["table"], {"dtype": "float32"}), "'table' does not say 'dtype' and 'sha256'"),
        (changed(["table"], {"dtype": 3, "sha256": "x"}), "'table.dtype' is 3, where a text is expected"),
        (changed(["seed"], "7"), "'seed' is '7', where a whole number is expected"),
        (changed(["name"], 3), "'name' is 3, where a text is expected"),
        (changed(["head", "dropout"], "0.1"), "'head.dropout' is '0.1', where a number is expected"),
        (changed(["head", "pooling"], 3), "'head.pooling' is 3, where a text is expected"),
        (changed(["head", "num_outputs"], "3"), "'head.num_outputs' is '3', where a whole number is expected"),
        (
            changed(["head", "num_outputs"], 2),
            r": a head .* with 2 outputs does not fit task 'mood' .*with 3\. Copy the f",
        ),
        (changed(["head", "kind"], "multilabel"), "kind multilabel with 3 outputs does not fit task 'mood'"),
        (
            changed(["task", "labels"], ["bad", "good"]),
            r"with 3 outputs .* with the labels bad, good, .* with 2\. Copy the folder again",
        ),
    ],
)
def test_a_configuration_that_cannot_be_read_is_named(bert, folder, change, words):
    config = read(folder)
    change(config)
    write(folder, config)
    for backbone in (bert, None):
        with pytest.raises(AdapterError, match=f"adapter.json.*{words}"):
            Adapter.load(folder, backbone)


@pytest.mark.parametrize("keep", [0, 1, 0.1, 0.5, 0.9, -3])
def test_half_a_configuration_is_named(bert, folder, keep):
    file = folder / "adapter.json"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(AdapterError, match=r"adapter\.json is damaged"):
        Adapter.load(folder, bert)


@pytest.mark.parametrize("content", [b"[]", b"3", b'"format"', b"\xff\xfe", b"null"])
def test_another_kind_of_json_is_named(bert, folder, content):
    (folder / "adapter.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter\.json is (damaged|not a multitune adapter)"):
        Adapter.load(folder, bert)


def test_a_folder_of_adapters_shows_what_is_inside(bert, random_adapter, tmp_path):
    for name in ("topic", "mood"):
        random_adapter(bert, LoRA(), 1).save(tmp_path / name)
    with pytest.raises(AdapterError, match=r"has no adapter\.json\. It holds the adapters mood, topic: name one of th"):
        Adapter.load(tmp_path, bert)
    with pytest.raises(AdapterError, match=r"is not an adapter folder: it has no adapter\.json\.$"):
        Adapter.load(tmp_path / "mood" / "adapter.json", bert)
    with pytest.raises(AdapterError, match=r"there is no folder .*nothing\.$"):
        Adapter.load(tmp_path / "nothing", bert)
    with pytest.raises(AdapterError, match=r"there is no folder .*moot\. Did you mean 'mood'\?$"):
        Adapter.load(tmp_path / "moot", bert)


# ---- the backbone it belongs to


def test_a_foreign_backbone_is_refused_and_the_difference_shown(bert, make_backbone, folder):
    same_shape, other = make_backbone("bert", seed=5), make_backbone("roberta")
    words = (
        r"'lora-1' was trained on backbone 'bert' with fingerprint (\w+), not on 'bert' with fingerprint "
        r"(?!\1)\w+ \(same shape, other weights\)\. (?!.*Backbone\.load)"
    )
    with pytest.raises(BackboneError, match=words):
        Adapter.load(folder, same_shape)
    with pytest.raises(
        BackboneError, match=r"not on 'roberta' .*\(name 'bert' there and 'roberta' here, architecture "
    ):
        Adapter.load(folder, other)
    with pytest.raises(BackboneError, match=r"2 here\)\. .*Backbone\.load\('bert'\), or --backbone bert"):
        Adapter.load(folder, other)
    loaded = Adapter.load(folder)  # without a backbone there is nothing to compare with, until it is used
    with pytest.raises(BackboneError):
        loaded.delta_set(other)
    assert loaded.delta_set(bert).nbytes() > 0


# ---- a write that fails


class Unwritable:
    """json cannot write this: the tensors are on disk already when the configuration fails."""


@pytest.mark.parametrize("damage", ["config", "tensors"])
def test_a_save_that_fails_midway_leaves_the_old_adapter(bert, folder, random_adapter, damage):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    new = random_adapter(bert, LoRA(r=2), 2)
    if damage == "config":
        new = dataclasses.replace(new, recipe={"x": Unwritable()})
    else:
        new = dataclasses.replace(new, head_params={"weight": torch.ones(3, 32), "bias": torch.ones(3).to_sparse()})
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
        new.save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]
    Adapter.load(folder, bert)


def test_a_fuse_that_fails_midway_leaves_the_old_adapter(bert, random_adapter, tmp_path):
    adapter = random_adapter(bert, AoTFC(r=2), 1).save(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in adapter.path.iterdir()}
    broken = dataclasses.replace(adapter, recipe={"x": Unwritable()})
    with pytest.raises(TypeError):
        broken.fuse(bert)
    after = {p.name: p.read_bytes() for p in adapter.path.iterdir()}
    assert {k: after[k] for k in before} == before
    assert set(after) - set(before) <= {"table.safetensors"}
    assert Adapter.load(adapter.path, bert).table is None


# ---- tables


@pytest.fixture
def fused(bert, random_adapter, tmp_path):
    return random_adapter(bert, AoTKronecker(r=2), 1).save(tmp_path / "a").fuse(bert)


def test_a_fused_adapter_says_so(bert, fused):
    loaded = Adapter.load(fused.path, bert)
    assert loaded.table == fused.table == {
        "dtype": "float32",
        "sha256": sha256(fused.path / "table.safetensors"),
        "max_error": 0.0,
        "relative_error": 0.0,
    }  # fmt: skip
    table = load_file(fused.path / "table.safetensors")["table"]
    assert table.shape == (bert.vocab_size, bert.num_layers, bert.hidden_size)
    assert all(torch.equal(loaded.params[k], fused.params[k]) for k in fused.params)
    assert fused.save(fused.path.parent / "copy").table is None


@pytest.mark.parametrize("store", ["ram", "mmap"])
def test_an_int8_table_serves_beside_the_others(bert, random_adapter, random_rows, tmp_path, store):
    one, two = (random_adapter(bert, AoTKronecker(r=2), i).save(tmp_path / str(i)) for i in range(2))
    one, two = one.fuse(bert, torch.int8), two.fuse(bert)
    assert Adapter.load(one.path, bert).table == one.table
    sets = [a.delta_set(bert, aot_store=store) for a in (one, two)]
    if store == "ram":
        assert sets[0].nbytes() < sets[1].nbytes() / 3
    # What is served are the rounded rows, next to another adapter's exact ones.
    held = load_file(one.path / "table.safetensors")
    rounded = DeltaSet({"layers": [TokenBias(source=TableRows(table=held["table"] * held["scale"]))]})
    rows = random_rows(bert, (6, 5, 4))
    with torch.no_grad():
        found, expected = (
            bert.run(Plan([of_one, of_two, of_one]), *rows.padded())
            for of_one, of_two in (sets, (rounded, two.delta_set(bert)))
        )
    for i, length in enumerate((6, 5, 4)):
        torch.testing.assert_close(found[i, :length], expected[i, :length], rtol=1e-4, atol=1e-5)
    # Each of D values is off by max |row| / 254 at most, and a row's norm is max |row| at least.
    assert 0 < one.table["relative_error"] < bert.hidden_size**0.5 / 254


def test_a_table_of_another_number_type_is_refused(bert, random_adapter, tmp_path):
    with pytest.raises(ConfigError, match="choose float32, bfloat16, float16, int8"):
        random_adapter(bert, AoTKronecker(r=2), 1).save(tmp_path / "a").fuse(bert, torch.float64)


@pytest.mark.parametrize(
    "tensors",
    [
        {"table": torch.zeros(97, 3, 32).to(torch.int8)},
        {"table": torch.zeros(97, 3, 32), "scale": torch.zeros(97, 3, 1)},
        {"table": torch.zeros(97, 3, 32).to(torch.int8), "scale": torch.zeros(97, 1, 1)},
    ],
)
def test_a_table_without_its_scale_is_named(bert, fused, tensors):
    save_file(tensors, fused.path / "table.safetensors")
    with pytest.raises(AdapterError, match="is not a table of token rows.*scale"):
        fused.delta_set(bert, aot_store="mmap")


def test_fusing_what_has_no_table_is_refused(bert, random_adapter, tmp_path):
    with pytest.raises(AdapterError, match="is not on disk yet; save it first"):
        random_adapter(bert, AoTFC(r=2), 1).fuse(bert)
    for method in (LoRA(), PromptTuning()):
        saved = random_adapter(bert, method, 1).save(tmp_path / method.name)
        with pytest.raises(AdapterError, match=f"uses {re.escape(method.title)}.* there is nothing to fuse"):
            saved.fuse(bert)


@pytest.mark.parametrize("store", ["ram", "mmap"])
def test_a_table_that_is_missing_or_was_never_made_is_named(bert, fused, random_adapter, store):
    never = random_adapter(bert, AoTFC(r=2), 1)
    with pytest.raises(AdapterError, match=r"has no table of token rows on disk; run `multitune fuse ADAPTER` first"):
        never.delta_set(bert, aot_store=store)
    (fused.path / "table.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"table\.safetensors is not a table of token rows: .*multitune fuse"):
        Bank(bert, aot_store=store).add("a", fused)
    Bank(bert).add("a", fused)  # the factors are still there


@pytest.mark.parametrize("store", ["ram", "mmap"])
@pytest.mark.parametrize("keep", [0, 4, 8, 50, 0.5, -1])
def test_a_truncated_table_is_named(bert, fused, store, keep):
    file = fused.path / "table.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(AdapterError, match=r"table\.safetensors is not a table of token rows: .*multitune fuse"):
        fused.delta_set(bert, aot_store=store)


@pytest.mark.parametrize("store", ["ram", "mmap"])
@pytest.mark.parametrize(
    "tensors", [{"table": torch.zeros(96, 3, 32)}, {"table": torch.zeros(97, 2, 32)}, {"table": torch.zeros(5)}]
)
def test_a_table_of_another_shape_is_named(bert, fused, store, tensors):
    save_file(tensors, fused.path / "table.safetensors")
    shape = re.escape(str(tuple(tensors["table"].shape)))
    with pytest.raises(AdapterError, match=rf"has shape {shape} where \(97, 3, 32\) is expected.*multitune fuse"):
        fused.delta_set(bert, aot_store=store)


@pytest.mark.parametrize("tensors", [{"other": torch.zeros(97, 3, 32)}, {"table": torch.zeros(97, 3, 32).int()}])
def test_a_file_that_is_no_table_is_named(bert, fused, tensors):
    save_file(tensors, fused.path / "table.safetensors")
    with pytest.raises(AdapterError, match="is not a table of token rows"):
        fused.delta_set(bert, aot_store="mmap")


def test_a_flipped_bit_in_a_table_is_named_where_all_of_it_is_read(bert, fused):
    file = fused.path / "table.safetensors"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(AdapterError, match=r"is not the file that was fused \(its checksum differs\).*multitune fuse"):
        fused.delta_set(bert, aot_store="ram")


def test_every_fault_is_one_of_ours(bert, folder):
    """Whatever single byte of the configuration is lost, the error is ours or the adapter is whole."""
    file = folder / "adapter.json"
    content = file.read_bytes()
    failed = 0
    for i in range(0, len(content), 7):
        file.write_bytes(content[:i] + content[i + 1 :])
        try:
            Adapter.load(folder, bert)
        except MultituneError:
            failed += 1
    assert failed > len(content) / 7 / 4


def test_fusing_what_was_replaced_on_disk_is_refused(bert, random_adapter, tmp_path):
    first = random_adapter(bert, AoTKronecker(r=2), 1).save(tmp_path / "a")
    second = random_adapter(bert, AoTKronecker(r=2), 2).save(tmp_path / "a")
    with pytest.raises(AdapterError, match="was replaced since adapter 'aot_kronecker-1' was loaded"):
        first.fuse(bert)
    assert second.fuse(bert).table is not None


def test_a_relative_folder_is_found_from_another_one(bert, random_adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = random_adapter(bert, LoRA(), 1).save("a")
    loaded = Adapter.load("a", bert)
    monkeypatch.chdir("/")
    assert saved.path == loaded.path == tmp_path / "a"
    assert loaded.reload(bert).digest == saved.digest
