"""Routing is data of the call: threads, failures, recomputation and reused memory never let one call see another's."""

import contextlib
import gc
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import multitune.workspace
from multitune import (
    IA3,
    AoTFC,
    AoTKronecker,
    Bank,
    BitFit,
    DeltaSet,
    HeadOnly,
    Houlsby,
    LayerNormTuning,
    LoRA,
    Pfeiffer,
    Plan,
    PlanError,
    PromptTuning,
    PTuningV2,
    get_method,
    method_names,
)
from multitune.call import Call
from multitune.current import _CURRENT, active, current_call
from multitune.deltas import Bias, LowRank
from multitune.deltas.token_rows import FactorRows
from multitune.inputs import Batch
from multitune.workspace import Buffer, Workspace

METHODS = [
    LoRA(r=3),
    IA3(),
    BitFit(),
    LayerNormTuning(),
    Houlsby(bottleneck=3),
    Pfeiffer(),
    PromptTuning(length=3),
    PTuningV2(length=3),
    AoTFC(r=2),
    HeadOnly(),
]
TEXTS = ["good film", "not the very bad film", "x", "the film not good"]
MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]


@pytest.fixture(scope="module")
def bank(bert, random_adapter):
    bank = Bank(bert)
    for i, method in enumerate(METHODS):
        bank.add(method.name, random_adapter(bert, method, i))
    return bank


@pytest.fixture(scope="module")
def answers(bank):
    """What every adapter says to every text when asked alone."""
    found = {}
    for name in (*bank.names, None):
        for text in TEXTS:
            (p,) = bank.predict([(name, text)])
            found[name, text] = p.embedding if name is None else p.logits
    assert len({tuple(v.tolist()) for v in found.values()}) == len(found)
    return found


def value(prediction):
    return prediction.embedding if prediction.adapter is None else prediction.logits


def draw(rng, names):
    return [(rng.choice([*names, None]), rng.choice(TEXTS)) for _ in range(rng.randint(1, 4))]


# ---- threads


def test_eight_threads_two_hundred_mixed_calls_each(bank, answers, close):
    def work(seed):
        rng = random.Random(seed)
        for _ in range(200):
            rows = draw(rng, bank.names)
            for row, got in zip(rows, bank.predict(rows), strict=True):
                close(value(got), answers[row])
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(work, range(8))) == list(range(8))


def test_adapters_come_and_go_and_calls_fail_while_others_are_served(bert, answers, random_adapter, close):
    bank = Bank(bert)
    for i, method in enumerate(METHODS):
        bank.add(method.name, random_adapter(bert, method, i))
    done = threading.Event()
    too_high = torch.full((1, 3), bert.vocab_size)

    def churn():
        count = 0
        while not done.is_set():
            bank.add("guest", random_adapter(bert, LoRA(r=count % 5 + 1), 99))
            bank.predict([("guest", "good film"), ("lora", "x")])
            with pytest.raises(PlanError, match="outside the vocabulary"):
                bert.run(bank.plan(["guest"]), too_high)
            bank.remove("guest")
            count += 1
        return count

    def serve(seed):
        rng = random.Random(seed)
        for _ in range(40):
            rows = draw(rng, [m.name for m in METHODS])
            for row, got in zip(rows, bank.predict(rows), strict=True):
                close(value(got), answers[row])

    with ThreadPoolExecutor(4) as pool:
        churned = pool.submit(churn)
        served = [pool.submit(serve, seed) for seed in range(3)]
        try:
            for future in served:
                future.result()
        finally:
            done.set()
        assert churned.result() > 1


def test_a_clone_is_made_while_others_are_served(make_backbone, random_adapter, close):
    backbone = make_backbone("deberta-v2/v3")
    bank = Bank(backbone)
    bank.add("a", random_adapter(backbone, LoRA(), 0))
    bank.add("b", random_adapter(backbone, PTuningV2(length=3), 1))
    rows = [("a", "good film"), ("b", "the film"), (None, "x")]
    expected = [value(p) for p in bank.predict(rows)]
    started, done = threading.Event(), threading.Event()

    def serve():
        count = 0
        while not done.is_set():
            for got, wanted in zip(bank.predict(rows), expected, strict=True):
                close(value(got), wanted)
            count += 1
            started.set()
        return count

    with ThreadPoolExecutor(2) as pool:
        serving = [pool.submit(serve) for _ in range(2)]
        assert started.wait(60)
        try:
            clones = [backbone.clone() for _ in range(12)]
        finally:
            done.set()
        assert all(s.result() > 0 for s in serving)
    assert len({c.fingerprint for c in clones}) == 1


# ---- failures


def leftover():
    return _CURRENT.get(None)


@pytest.mark.parametrize("method", [AoTFC(r=2), AoTKronecker(r=2)], ids=lambda m: m.name)
def test_a_mixed_batch_evaluates_the_distinct_tokens_of_each_slot(bert, delta_set, close, monkeypatch, method):
    evaluated, rows_of = [], FactorRows.rows
    monkeypatch.setattr(FactorRows, "rows", lambda s, ids, *rest: (evaluated.append(ids), rows_of(s, ids, *rest))[1])
    one, two = (delta_set(bert, method, seed, fused=True) for seed in (1, 2))
    sets = [one, two, None, one, two]
    ids = torch.tensor([[7, 7, 9, 7, 0], [8, 6, 8, 0, 0], [5] * 5, [9, 9, 0, 0, 0], [6, 8, 11, 12, 6]])
    mask = (ids > 0).long()
    with torch.no_grad():
        mixed = bert.run(Plan(sets), ids, mask)
    (found,) = evaluated  # once for all layers; the rows have 20 tokens, of which one has 3 and two has 5
    assert {frozenset(of_slot) for of_slot in found.tolist()} == {frozenset({0, 7, 9}), frozenset({0, 6, 8, 11, 12})}
    assert found.shape == (2, 5)
    for i, own in enumerate(sets):
        length = int(mask[i].sum())
        with torch.no_grad():
            close(mixed[i, :length], bert.run(Plan([own]), ids[i : i + 1, :length])[0])


def test_a_bad_token_id_then_a_right_answer(bank, bert, answers, close):
    row = ("lora", "good film")
    for bad in (bert.vocab_size, -1):
        ids = torch.tensor([[5, 6, 7], [5, bad, 7]])
        with pytest.raises(PlanError, match=rf"row 1: token id {bad} at position 1 is outside the vocabulary 0\.\.96"):
            bert.run(bank.plan(["lora", "ia3"]), ids)
        assert leftover() is None
        close(bank.predict([row])[0].logits, answers[row])


def test_an_exception_inside_the_forward_then_a_right_answer(bank, bert, answers, close):
    class Broken(Exception):
        pass

    seen = []

    def fail(module, args, output):
        seen.append(current_call())
        raise Broken

    rows = [(name, "good film") for name in (*bank.names, None)]
    for path in ("embeddings.word_embeddings", "encoder.layer.1.attention.self", "encoder.layer.2.output.dropout"):
        handle = bert.model.get_submodule(path).register_forward_hook(fail)
        try:
            with pytest.raises(Broken):
                bank.predict(rows)
        finally:
            handle.remove()
        assert leftover() is None
        for row, got in zip(rows, bank.predict(rows), strict=True):
            close(value(got), answers[row])
    assert len({id(call) for call in seen}) == 3


def test_the_model_called_without_a_plan_raises(backbone):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(PlanError, match=r"called without a plan; call Backbone\.run\(plan, \.\.\.\)"):
        backbone.model(input_ids=ids)
    with ThreadPoolExecutor(1) as pool, pytest.raises(PlanError, match="called without a plan"):
        pool.submit(backbone.model, input_ids=ids).result()
    with torch.no_grad():
        backbone.run(Plan([None]), ids)
    with pytest.raises(PlanError, match="called without a plan"):
        backbone.model(input_ids=ids)


def test_a_thread_does_not_inherit_the_call_of_its_parent(bert):
    call = Call(bert, Plan([None]), Batch(input_ids=torch.tensor([[5]])))
    with active(call):
        assert current_call() is call
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(leftover).result() is None
        inner = Call(bert, Plan([None]), Batch(input_ids=torch.tensor([[6]])))
        with pytest.raises(KeyError), active(inner):
            raise KeyError
        assert current_call() is call
    assert leftover() is None


def test_a_detached_backbone_refuses_a_plan(make_backbone, random_adapter):
    backbone = make_backbone()
    bank = Bank(backbone)
    bank.add("a", random_adapter(backbone, LoRA(), 0))
    (before,) = bank.predict([("a", "good film")])
    backbone.detach()
    with pytest.raises(PlanError, match=r"is detached, .*attach\(\) first"):
        bank.predict([("a", "good film")])
    backbone.attach()
    assert torch.equal(bank.predict([("a", "good film")])[0].logits, before.logits)


def test_a_plan_that_does_not_fit_the_batch_or_the_backbone(bert, delta_set):
    with pytest.raises(PlanError, match=r"the plan is for 2 rows, but input_ids has shape \(3, 4\)"):
        bert.run(Plan([None, None]), torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(PlanError, match=r"the plan is for 1 rows, but input_ids has shape \(4,\)"):
        bert.run(Plan([None]), torch.ones(4, dtype=torch.long))
    (query,) = delta_set(bert, LoRA(), 1).by_site["layer.0.query"]
    misspelt = Plan([DeltaSet({"layer.0.qeury": [query]})])
    with pytest.raises(PlanError, match=r"'layer\.0\.qeury'.* no such site\. Did you mean 'layer\.0\.query'"):
        bert.run(misspelt, torch.tensor([[5]]))


# ---- recomputation


def trained(backbone, random_params, seed=0):
    """Trainable tensors of one adapter per method, and a set of deltas for each."""
    made = []
    for i, name in enumerate(MIXABLE):
        method = get_method(name)()
        params = {k: t.requires_grad_(method.trains(k)) for k, t in random_params(backbone, method, seed + i).items()}
        deltas = DeltaSet(method.deltas(params, backbone))
        made.append(({k: t for k, t in params.items() if t.requires_grad}, deltas))
    return made


def backward_here(loss, other):
    loss.backward()


def backward_on_another_thread(loss, other):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()


def backward_inside_another_call(loss, other):
    with active(other):
        loss.backward()
        assert current_call() is other


def backward_on_another_thread_inside_another_call(loss, other):
    def work():
        with active(other):
            loss.backward()

    with active(other), ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


@pytest.mark.parametrize(
    "backward",
    [
        backward_here,
        backward_on_another_thread,
        backward_inside_another_call,
        backward_on_another_thread_inside_another_call,
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "bert/eager",
        "roberta",
        "electra",
        "distilbert",
        "deberta-v2/v3",
        "deberta-v2/conv",
        "albert",
        "mpnet",
        "bart",
        "t5",
    ],
)
def test_recomputation_gives_the_same_gradients(
    name, backward, make_backbone, random_params, random_rows, close, monkeypatch
):
    monkeypatch.setattr("multitune.plan.SPLIT_POSITIONS", 10**6)  # one piece, however many methods there are
    lengths = [3 + i % 4 for i in range(len(MIXABLE))]
    gradients, outputs, counts = [], [], []
    for checkpointing in (False, True):
        backbone = make_backbone(name)
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        backbone.model.train()
        made = trained(backbone, random_params)
        others = [s for _, s in trained(backbone, random_params, seed=50)]
        ids, mask = random_rows(backbone, lengths).padded()
        forwards = []
        first = next(s for s in backbone.sites if s.name == "layer.0.ffn_in")
        handle = backbone.model.get_submodule(first.module).register_forward_hook(lambda *_: forwards.append(1))  # noqa: B023
        hidden = backbone.run(Plan([s for _, s in made]), ids, mask)
        handle_count = len(forwards)
        other = Call(backbone, Plan(others[::-1]), Batch(input_ids=ids, attention_mask=mask))
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
        loss = (hidden * weights * mask.unsqueeze(-1)).sum()
        backward(loss, other)
        handle.remove()
        assert leftover() is None
        counts.append((handle_count, len(forwards)))
        outputs.append(hidden.detach())
        gradients.append([{k: t.grad for k, t in params.items()} for params, _ in made])
    passes = counts[0][0]  # of one module, which may run as several layers
    assert counts == [(passes, passes), (passes, 2 * passes)]  # so the layer really ran again
    close(outputs[1], outputs[0])
    for plain, again in zip(*gradients, strict=True):
        for key, gradient in plain.items():
            close(again[key], gradient)
    assert max(g.abs().max() for g in gradients[0][MIXABLE.index("lora")].values()) > 1e-3


# ---- modes

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": contextlib.nullcontext}


@pytest.mark.parametrize("made_in", MODES)
@pytest.mark.parametrize("run_in", MODES)
def test_no_grad_and_inference_mode(made_in, run_in, bert, random_adapter, random_rows, close):
    lengths = [3 + i % 3 for i in range(len(METHODS))]
    ids, mask = random_rows(bert, lengths).padded()
    expected = None
    for maker, runner in (("no_grad", "no_grad"), (made_in, run_in), (made_in, run_in)):
        with MODES[maker]():
            bank = Bank(bert)
            for i, method in enumerate(METHODS):
                bank.add(method.name, random_adapter(bert, method, i))
            plan = bank.plan(bank.names)
        with MODES[runner]():
            hidden = [bert.run(plan, ids, mask) for _ in range(2)]
        assert torch.equal(*hidden)
        assert not hidden[0].requires_grad
        expected = hidden[0] if expected is None else expected
        for i, n in enumerate(lengths):
            close(hidden[0][i, :n], expected[i, :n])
    with MODES[run_in]():
        assert torch.isfinite(bank.predict([("lora", "good film")])[0].logits).all()


# ---- reused memory


def flat_of(plan):
    return plan.steps["layer.0.query"][0].delta.A.untyped_storage().data_ptr()


@pytest.fixture
def loras(bert, delta_set):
    return [delta_set(bert, LoRA(r=4), seed, fused=True) for seed in range(6)]


def test_a_plan_that_is_alive_keeps_its_memory(bert, loras, random_rows, close):
    ids, mask = random_rows(bert, [4, 4, 4]).padded()
    workspace = Workspace()
    with torch.no_grad():
        first = Plan(loras[:3], workspace)
        before = bert.run(first, ids, mask)
        kept = before.clone()
        second = Plan(loras[3:], workspace)
        other = bert.run(second, ids, mask)
        assert flat_of(second) != flat_of(first)
        assert torch.equal(bert.run(first, ids, mask), kept)
        assert torch.equal(before, kept)
        close(other, bert.run(Plan(loras[3:]), ids, mask))
        assert not torch.allclose(other, kept)


def test_memory_of_a_dropped_plan_is_used_again(bert, loras, random_rows):
    ids, mask = random_rows(bert, [4, 4, 4]).padded()
    workspace = Workspace()
    with torch.no_grad():
        first = Plan(loras[:3], workspace)
        address, hidden = flat_of(first), bert.run(first, ids, mask)
        kept, gone = hidden.clone(), weakref.ref(first)
        del first
        gc.collect()
        assert gone() is None
        second = Plan(loras[3:], workspace)
        assert flat_of(second) == address
        expected = bert.run(Plan(loras[3:]), ids, mask)
        assert torch.equal(bert.run(second, ids, mask), expected)
        assert torch.equal(hidden, kept)  # an answer never lives in lent memory


def test_plans_for_training_never_share_memory(bert, loras):
    workspace = Workspace()
    first = Plan(loras[:3], workspace)
    address = flat_of(first)
    del first
    gc.collect()
    assert workspace.free_bytes == 0
    with torch.no_grad():
        assert flat_of(Plan(loras[3:], workspace)) != 0
    gc.collect()
    assert workspace.free_bytes > 0
    assert address != 0


class Owner:
    """Something a buffer can be lent to."""


class Slot:
    """One vector, to be stacked."""

    def __init__(self, *values):
        self.pieces = (torch.tensor([values]),)


def stacked(workspace, slots, owner):
    (piece,) = workspace.lend("vectors", slots, owner).fill(slots)
    return piece[0].tolist()


def test_the_next_batch_copies_only_the_adapters_that_are_new(bert, loras, random_rows, close, monkeypatch):
    ids, mask = random_rows(bert, [4, 4, 4]).padded()
    workspace, copied = Workspace(), []
    original = Buffer.fill

    def fill(buffer, slots):
        held = buffer.held()
        copied.extend(s for g, s in enumerate(slots) if s is not held[g])
        return original(buffer, slots)

    monkeypatch.setattr(Buffer, "fill", fill)
    with torch.no_grad():
        for rows, num_new in (([0, 1, 2], 3), ([2, 0, 1], 0), ([1, 3, 0], 1), ([4, 0, 3], 1), ([5, 2, 1], 3)):
            before = len(copied)
            plan = Plan([loras[i] for i in rows], workspace)
            close(bert.run(plan, ids, mask), bert.run(Plan([loras[i] for i in rows]), ids, mask))
            assert len(copied) - before == num_new, rows
            del plan
            gc.collect()


def run_site(plan, x, module):
    """What comes out of a lone site, in the caller's order of rows."""
    order = torch.arange(len(x)) if plan.order is None else plan.order
    y = module(x[order])
    for step in plan.steps.get("a", []):
        y = step(x[order], y, module)
    return y[order.argsort()]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 7), min_size=2, max_size=9), min_size=2, max_size=8), st.booleans())
def test_batches_that_follow_each_other_in_one_workspace_are_as_in_none(batches, small):
    """Any adapters, repeated or not, any number of rows; what is left in a buffer never shows."""
    sets = []
    for i in range(8):
        deltas = [LowRank(A=torch.full((2, 1), i + 1.0), B=torch.full((1, 3), i + 0.5))]
        if i % 2:
            deltas.append(Bias(b=torch.full((3,), 10.0 * i)))
        sets.append(DeltaSet({"a": deltas}))
    workspace = Workspace()
    module = torch.nn.Linear(2, 3)
    x = torch.randn(9, 4, 2)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(multitune.workspace, "SMALL_BYTES", 10**6 if small else 0)
        for batch in batches:
            rows = [None if i < 0 else sets[i] for i in batch]
            lent, fresh = Plan(rows, workspace), Plan(rows)
            assert torch.equal(run_site(lent, x[: len(rows)], module), run_site(fresh, x[: len(rows)], module))


def test_what_is_in_its_place_is_not_copied_again(monkeypatch):
    monkeypatch.setattr(multitune.workspace, "SMALL_BYTES", 0)
    workspace, owner = Workspace(), Owner()
    a, b, c = Slot(1.0), Slot(2.0), Slot(3.0)
    buffer = workspace.lend("vectors", [a, b], owner)
    buffer.fill([a, b])[0].fill_(7.0)  # what a second copy would put right
    assert buffer.fill([a, c])[0].tolist() == [[[7.0], [3.0]]]


def test_a_dropped_adapter_is_never_taken_for_a_new_one_in_its_place():
    workspace, owner = Workspace(), Owner()
    a, b = Slot(1.0), Slot(2.0)
    assert stacked(workspace, [a, b], owner) == [[1.0], [2.0]]
    del a, owner
    gc.collect()
    for value in range(3, 20):  # one of these may well get the address of the dropped one
        owner, fresh = Owner(), Slot(float(value))
        assert stacked(workspace, [fresh, b], owner) == [[value], [2.0]]
        del owner, fresh
        gc.collect()


@pytest.mark.parametrize("small", [True, False])
def test_after_a_copy_that_broke_off_nothing_half_written_is_taken_as_there(monkeypatch, small):
    monkeypatch.setattr(multitune.workspace, "SMALL_BYTES", 10**6 if small else 0)
    workspace, owner = Workspace(), Owner()
    a, b, broken = Slot(1.0), Slot(2.0), Slot(3.0)
    for slot in (a, b, broken):
        slot.pieces *= 2
    broken.pieces = (broken.pieces[0], torch.zeros(1, 7))
    workspace.lend("vectors", [a, b], owner).fill([a, b])
    del owner
    gc.collect()
    owner = Owner()
    with pytest.raises(RuntimeError):
        workspace.lend("vectors", [broken, b], owner).fill([broken, b])
    del owner
    gc.collect()
    owner = Owner()
    assert [p[0].tolist() for p in workspace.lend("vectors", [a, b], owner).fill([a, b])] == [[[1.0], [2.0]]] * 2


def test_a_workspace_keeps_no_more_than_it_may():
    workspace = Workspace(max_bytes=1000)
    owners = [Owner() for _ in range(4)]
    slot = Slot(*range(50))  # 400 bytes
    for number, owner in enumerate(owners):
        workspace.lend(number, [slot], owner).fill([slot])
    del owner
    while owners:
        del owners[0]
        gc.collect()
    assert workspace.free_bytes == 800
    asked = [Owner() for _ in range(4)]
    held = [workspace.lend(number, [slot], owner).held() for number, owner in enumerate(asked)]
    assert held == [[None], [None], [slot], [slot]]  # those given back first were freed


def test_the_garbage_collector_may_drop_a_plan_at_any_moment():
    """A plan in a cycle dies when the collector runs, which can be while this very thread takes a buffer."""
    workspace = Workspace()
    owner = Owner()
    owner.myself = owner
    workspace.lend("vectors", [Slot(1.0)], owner)

    def collect_inside():
        nonlocal owner
        with workspace._lock:
            owner = None
            gc.collect()

    thread = threading.Thread(target=collect_inside, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert workspace.free_bytes > 0
