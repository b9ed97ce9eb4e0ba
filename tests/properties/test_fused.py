"""Law 2: fusing changes nothing. Law 4: memory grows by the deltas alone, and for AoT by the rows in use."""

import ctypes
import gc
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multitune import (
    AdapterError,
    AoTFC,
    AoTKronecker,
    Backbone,
    Bank,
    DeltaSet,
    Plan,
    PTuningV2,
    get_method,
    method_names,
)
from multitune.deltas import TableRows, TokenBias, build_table
from multitune.merging import merge_deltas
from multitune.tables import map_table, write_table

SMAPS = Path("/proc/self/smaps_rollup")
LIBC = ctypes.CDLL(None)
MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]
AOT = [name for name in MIXABLE if get_method(name).fuses_to_table]


@pytest.fixture(params=MIXABLE)
def method(request):
    return get_method(request.param)()


def run(backbone, sets, rows, order=None):
    with torch.no_grad():
        return backbone.run(Plan(sets), *rows.padded(order))


# ---- trainable form and fused form


@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 7, 1]], ids=["unpadded", "padded"])
def test_fused_equals_unfused(backbone, method, random_params, random_rows, close, lengths):
    params = random_params(backbone, method, 1)
    trained = DeltaSet(method.deltas(params, backbone))
    fused = trained.fused(backbone.dtype, backbone.device)
    rows = random_rows(backbone, lengths)
    for mix in ([0, 0, 0], [0, None, 0]):
        one = run(backbone, [trained if m == 0 else None for m in mix], rows)
        two = run(backbone, [fused if m == 0 else None for m in mix], rows)
        for i, n in enumerate(lengths):
            close(two[i, :n], one[i, :n])
    assert all(torch.equal(t, params[k]) for k, t in random_params(backbone, method, 1).items())


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_a_memory_of_any_length_is_padded_without_a_trace(backbone, delta_set, random_rows, close, length):
    rows = random_rows(backbone, [4, 4])
    trained, fused = (delta_set(backbone, PTuningV2(length=length), 1, fused) for fused in (False, True))
    close(run(backbone, [fused, fused], rows), run(backbone, [trained, trained], rows))
    close(run(backbone, [fused, None], rows)[0], run(backbone, [trained, trained], rows)[0])


def test_fused_tensors_are_held_once_and_detached(backbone, method, random_params):
    params = {k: t.requires_grad_(method.trains(k)) for k, t in random_params(backbone, method, 1).items()}
    fused = DeltaSet(method.deltas(params, backbone)).fused(backbone.dtype, backbone.device)
    packed = {t.untyped_storage().data_ptr() for p in fused.packs.values() for t in p.pieces}
    total = 0
    for deltas in fused.by_site.values():
        for delta in deltas:
            for tensor in delta.tensors().values():
                assert not tensor.requires_grad
                assert tensor.dtype == (backbone.dtype if tensor.is_floating_point() else torch.int32)
                if delta.kind != "Prompt":
                    assert tensor.untyped_storage().data_ptr() in packed
                total += tensor.numel() * tensor.element_size()
    assert fused.nbytes() == total
    if method.name != "head":
        assert total > 0


@pytest.mark.parametrize("name", MIXABLE)
def test_bfloat16_serves_what_float32_trained(name, make_model, random_params, random_rows, tolerances):
    method = get_method(name)()
    exact, half = Backbone(make_model("bert")), Backbone(make_model("bert").bfloat16())
    params = random_params(exact, method, 1)
    rows = random_rows(exact, [5, 5])
    outputs = []
    for backbone in (exact, half):
        fused = DeltaSet(method.deltas(params, backbone)).fused(backbone.dtype, backbone.device)
        outputs.append(run(backbone, [fused, None], rows).float())
    difference = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    print(f"{name}: bfloat16 differs by {float(difference):.4f} (relative)")
    assert 0 < difference < tolerances[torch.bfloat16]["rtol"]


# ---- merged into the weights


def merged_model(backbone, sets):
    """A plain transformers model with the deltas in its weights."""
    merged = merge_deltas(backbone, sets)
    merged.detach()
    return merged.running


def test_merged_equals_attached_or_merging_is_refused(backbone, method, random_params, random_rows, close):
    sets = DeltaSet(method.deltas(random_params(backbone, method, 1), backbone))
    frozen = {site: backbone.frozen(site) for site in sets.by_site}
    reasons = [d.why_not_merge(frozen[site]) for site, deltas in sets.by_site.items() for d in deltas]
    if any(reasons):
        with pytest.raises(AdapterError, match=next(filter(None, reasons))):
            merged_model(backbone, sets)
        return
    shared = {site.name for site in backbone.sites if site.shared}
    if shared & sets.by_site.keys():
        with pytest.raises(AdapterError, match="at layer.0.* other layers run with the same weights"):
            merge_deltas(backbone, sets)
        return
    before = {k: t.clone() for k, t in backbone.model.state_dict().items()}
    rows = random_rows(backbone, [5, 3, 6])
    ids, mask = rows.padded()
    model = merged_model(backbone, sets)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    other = DeltaSet(method.deltas(random_params(backbone, method, 2), backbone))
    alone, mixed = run(backbone, [sets] * 3, rows), run(backbone, [sets, other, sets], rows)
    for i, n in enumerate([5, 3, 6]):
        close(alone[i, :n], expected[i, :n])
        if i != 1:
            close(mixed[i, :n], expected[i, :n])
    assert all(torch.equal(t, before[k]) for k, t in backbone.model.state_dict().items())


# ---- AoT tables


@pytest.mark.parametrize("name", AOT)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_factors_ram_and_mmap_give_the_same(backbone, random_params, random_rows, close, tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("tables")
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    owners = data.draw(st.lists(st.one_of(st.none(), st.integers(0, len(ranks) - 1)), min_size=2, max_size=6))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=len(owners), max_size=len(owners)))
    stores = {"factors": [], "ram": [], "mmap": []}
    for i, r in enumerate(ranks):
        method = get_method(name)(r=r)
        factors = DeltaSet(method.deltas(random_params(backbone, method, i), backbone))
        ((delta,),) = factors.by_site.values()
        table = build_table(delta.source, backbone.vocab_size, torch.float32).table
        write_table(folder / f"{i}.safetensors", table)
        sources = {"ram": TableRows(table=table), "mmap": map_table(folder / f"{i}.safetensors")}
        stores["factors"].append(factors.fused(backbone.dtype, backbone.device))
        for store, source in sources.items():
            made = DeltaSet({"layers": [TokenBias(source=source)]}).fused(backbone.dtype, backbone.device)
            stores[store].append(made)
        assert stores["mmap"][-1].nbytes() == 0
        assert stores["ram"][-1].nbytes() == table.numel() * 4
    rows = random_rows(backbone, lengths)
    outputs = {
        store: run(backbone, [None if o is None else sets[o] for o in owners], rows) for store, sets in stores.items()
    }
    for i, n in enumerate(lengths):
        close(outputs["ram"][i, :n], outputs["factors"][i, :n])
        assert torch.equal(outputs["mmap"][i, :n], outputs["ram"][i, :n])


@pytest.mark.parametrize("name", AOT)
def test_a_bfloat16_table_costs_half_the_bytes_and_a_bounded_error(bert, name, random_adapter, tmp_path, tolerances):
    adapter = random_adapter(bert, get_method(name)(r=3), 1).save(tmp_path / "a")
    rows = [("a", text) for text in ("good film", "not the very bad film", "x")]
    logits, sizes = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        fused = adapter.fuse(bert, dtype)
        assert fused.table["dtype"] == str(dtype).removeprefix("torch.")
        sizes[dtype] = (tmp_path / "a" / "table.safetensors").stat().st_size
        for store in ("factors", "ram", "mmap"):
            bank = Bank(bert, aot_store=store)
            bank.add("a", fused)
            logits[dtype, store] = torch.stack([p.logits for p in bank.predict(rows)])
    assert sizes[torch.bfloat16] < 0.55 * sizes[torch.float32]
    exact = logits[torch.float32, "factors"]
    for store in ("ram", "mmap"):
        torch.testing.assert_close(logits[torch.float32, store], exact, **tolerances[torch.float32])
        error = (logits[torch.bfloat16, store] - exact).abs().max() / exact.abs().max()
        print(f"{name}, {store}: a bfloat16 table moves the logits by {float(error):.4f} (relative)")
        assert 0 < error < tolerances[torch.bfloat16]["rtol"]


def test_tables_of_several_dtypes_share_a_batch(bert, random_adapter, tmp_path, close):
    bank = Bank(bert, aot_store="mmap")
    for seed, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
        bank.add(str(dtype), random_adapter(bert, AoTFC(r=2), seed).save(tmp_path / str(seed)).fuse(bert, dtype))
    rows = [(name, "good film") for name in bank.names for _ in range(2)]
    alone = [bank.predict([row])[0].logits for row in rows]
    for order in (rows, rows[::-1]):
        together = bank.predict(order)
        for got, row in zip(together, order, strict=True):
            close(got.logits, alone[rows.index(row)])


def test_fusing_on_a_bfloat16_backbone(make_model, random_adapter, tmp_path):
    half = Backbone(make_model("bert").bfloat16())
    for seed, method in enumerate((AoTFC(r=2), AoTKronecker(r=2))):
        fused = random_adapter(half, method, seed).save(tmp_path / method.name).fuse(half)
        table = map_table(tmp_path / method.name / "table.safetensors").table
        assert table.shape == (half.vocab_size, half.num_layers, half.hidden_size)
        assert fused.delta_set(half, aot_store="ram").nbytes() == table.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_finer_table_is_rounded_to_the_states_type_where_it_is_added(make_model, random_params, random_rows, dtype):
    half = Backbone(make_model("bert").bfloat16())
    ((delta,),) = DeltaSet(AoTFC(r=2).deltas(random_params(half, AoTFC(r=2), 1), half)).by_site.values()
    table = build_table(delta.source, half.vocab_size, dtype).table
    finer, rounded = (
        DeltaSet({"layers": [TokenBias(source=TableRows(table=t))]}).fused(half.dtype, half.device)
        for t in (table, table.bfloat16())
    )
    assert finer.nbytes() == table.nbytes
    rows = random_rows(half, [4, 4])
    for mix in ([True, True], [True, False]):
        one, two = (run(half, [sets if mine else None for mine in mix], rows) for sets in (finer, rounded))
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, two)
    assert not torch.equal(one[0], run(half, [None, None], rows)[0])


# ---- memory


def anonymous_bytes():
    """Memory of this process that no file backs: what a table costs when it is in RAM."""
    gc.collect()
    LIBC.malloc_trim(0)  # hands free memory back, which earlier tests left, so that using it again is seen
    (line,) = (x for x in SMAPS.read_text().splitlines() if x.startswith("Anonymous:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(
    not SMAPS.exists() or not hasattr(LIBC, "malloc_trim"), reason="needs /proc/self/smaps_rollup and glibc"
)
def test_two_hundred_mapped_tables_are_not_in_memory(make_backbone, random_adapter, tmp_path, close):
    backbone = make_backbone("bert", vocab_size=1000)
    count, in_ram, different = 200, 40, 20
    for seed in range(different):
        random_adapter(backbone, AoTFC(r=1), seed).save(tmp_path / f"{seed}").fuse(backbone)
    for i in range(different, count):  # files of their own; writing each of them safely would take the disk long
        shutil.copytree(tmp_path / f"{i % different}", tmp_path / f"{i}")
    table_bytes = backbone.vocab_size * backbone.num_layers * backbone.hidden_size * 4
    assert (tmp_path / "0" / "table.safetensors").stat().st_size > table_bytes

    def growth(store, chosen):
        """Anonymous bytes that a bank adds once every one of its adapters has answered, and the bank."""
        before = anonymous_bytes()
        bank = Bank(backbone, aot_store=store)
        for i in chosen:
            bank.add(str(i), tmp_path / str(i))
        answers = bank.predict([(str(i), "good film") for i in chosen], batch_size=64)
        return anonymous_bytes() - before, bank, answers

    growth("factors", range(in_ram))  # buffers that any bank needs are there from here on
    mapped, bank, answers = growth("mmap", range(count))
    ram, ram_bank, ram_answers = growth("ram", range(in_ram))
    print(f"a table is {table_bytes} bytes; mapped it costs {mapped // count}, in memory {ram // in_ram}")
    assert ram > 0.5 * in_ram * table_bytes  # so the measure does see a table
    assert mapped < 0.1 * count * table_bytes
    head_bytes = 4 * sum(t.numel() for t in random_adapter(backbone, AoTFC(r=1), 0).head_params.values())
    assert bank.resident_bytes == count * head_bytes
    assert ram_bank.resident_bytes == in_ram * (table_bytes + head_bytes)
    for got, wanted in zip(answers[:in_ram], ram_answers, strict=True):
        close(got.logits, wanted.logits)
    for i, got in enumerate(answers):
        close(got.logits, answers[i % different].logits)
    assert len({tuple(p.logits.tolist()) for p in answers[:different]}) == different
