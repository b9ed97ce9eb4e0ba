"""Law 1: a row's output does not depend on which other tasks share its batch. Random mixes, every architecture."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from multitune import (
    DRA,
    DSEE,
    IA3,
    MAM,
    SIFT,
    AdaLoRA,
    AoTFC,
    AoTKronecker,
    AttnScale,
    Bank,
    BitFit,
    Combined,
    Compacter,
    CompacterPP,
    DeltaSet,
    DoRA,
    HeadOnly,
    Houlsby,
    LayerNormTuning,
    LoRA,
    LoRAPlus,
    ParallelAdapter,
    Pfeiffer,
    PiSSA,
    Plan,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
    RsLoRA,
    SoTU,
    UTuning,
    VeRA,
    get_method,
    method_names,
    plan,
)

LINEARS = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out", "ffn_gate")
NORMS = ("attention_norm", "ffn_norm", "embedding_norm", "attention_post_norm", "final_norm")
SUBLAYERS = ("attention", "ffn", "block")
MAX_TOKENS = 12


def draws(examples):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)


# ---- any method with any hyper-parameters

roles = st.lists(st.sampled_from(LINEARS), min_size=1, max_size=4, unique=True).map(tuple)
layers = st.sampled_from([None, (0,), (1,), (1, 0)])
words_too = st.lists(st.sampled_from((*LINEARS, "embedding")), min_size=1, max_size=4, unique=True).map(tuple)
activations = st.sampled_from(["gelu", "relu", "silu", "tanh"])


@st.composite
def low_rank(draw, cls):
    """With the word embeddings too; by themselves they have no layers to choose."""
    targets = draw(words_too)
    chosen = draw(layers) if targets != ("embedding",) else None
    return cls(r=draw(st.integers(1, 9)), alpha=draw(st.floats(1, 8)), targets=targets, layers=chosen)


@st.composite
def ia3(draw):
    outputs = draw(roles)
    inputs = tuple(role for role in draw(roles) if role not in outputs)
    return IA3(outputs=outputs, inputs=inputs, layers=draw(layers))


@st.composite
def u_tuning(draw):
    tuner = draw(st.sampled_from(["bottleneck", "low_rank", "prefix"]))
    operations = draw(st.lists(st.sampled_from(SUBLAYERS), min_size=1, unique=True).map(tuple))
    own = {"activation": draw(activations)} if tuner == "bottleneck" else {}
    return UTuning(operations=operations, tuner=tuner, width=draw(st.integers(1, 5)), layers=draw(layers), **own)


def serial(cls, **sizes):
    """A serial adapter; what it reads, and whether norms are trained beside it, exclude each other in part."""
    norms = st.sampled_from([("output", False), ("output", True), ("norm", False)])
    return st.builds(
        lambda norm, **rest: cls(reads=norm[0], layer_norms=norm[1], **rest),
        norms,
        activation=activations,
        layers=layers,
        **sizes,
    )


def compacters(cls):
    sizes = st.sampled_from([(4, 8), (2, 6), (8, 8), (1, 3)])

    def make(size, **rest):
        return cls(phm_dim=size[0], bottleneck=size[1], **rest)

    return serial(make, size=sizes, rank=st.integers(1, 3))


STRATEGIES = {
    "lora": low_rank(LoRA),
    "rslora": low_rank(RsLoRA),
    "lora_plus": st.builds(LoRAPlus, r=st.integers(1, 9), targets=roles, layers=layers),
    "pissa": st.builds(
        PiSSA, r=st.integers(1, 9), alpha=st.none() | st.floats(1, 8), niter=st.none() | st.just(1), targets=roles
    ),
    "dora": st.builds(DoRA, r=st.integers(1, 9), targets=roles, layers=layers),
    "vera": st.builds(VeRA, r=st.integers(1, 20), seed=st.integers(0, 2), targets=roles, layers=layers),
    "adalora": st.builds(AdaLoRA, r=st.integers(2, 9), target_r=st.integers(1, 2), targets=roles),
    "ia3": ia3(),
    "bitfit": st.builds(BitFit, subset=st.lists(st.sampled_from(LINEARS + NORMS), min_size=1, unique=True).map(tuple)),
    "layernorm": st.builds(LayerNormTuning, layers=layers, embedding_norm=st.booleans()),
    "houlsby": serial(Houlsby, bottleneck=st.integers(1, 9)),
    "pfeiffer": serial(Pfeiffer, reduction_factor=st.integers(4, 40)),
    "prompt": st.builds(PromptTuning, length=st.integers(1, 7), position=st.integers(-1, MAX_TOKENS + 2)),
    "prefix": st.builds(
        PrefixTuning, length=st.integers(1, 9), hidden=st.integers(1, 9), layers=layers, reparametrise=st.booleans()
    ),
    "ptuning_v1": st.builds(
        PTuningV1,
        pattern=st.sampled_from(["{p*3} {text} {p*6}", "{p} good {text}", "{text} not {p*2} bad", "the {text} {p}"]),
        position=st.integers(0, MAX_TOKENS + 2),
        reparametrise=st.booleans(),
    ),
    "ptuning_v2": st.builds(PTuningV2, length=st.integers(1, 9), layers=layers, shift_positions=st.booleans()),
    "aot_fc": st.builds(AoTFC, r=st.integers(1, 5), activation=activations),
    "aot_kronecker": st.builds(AoTKronecker, r=st.integers(1, 4)),
    "sift": st.builds(SIFT, density=st.sampled_from([0.002, 0.02, 0.05, 0.7]), targets=roles, layers=layers),
    "sotu": st.builds(SoTU, density=st.sampled_from([0.01, 0.3]), targets=roles, mask_seed=st.integers(0, 3)),
    "dsee": st.builds(
        DSEE, r=st.integers(1, 5), num_sparse=st.integers(1, 20), pruned_heads=st.sampled_from([0.0, 0.5])
    ),
    "head": st.just(HeadOnly()),
    "parallel": st.builds(
        ParallelAdapter,
        bottleneck=st.integers(1, 9),
        scale=st.floats(0.5, 2),
        learn_scale=st.booleans(),
        activation=activations,
        sublayers=st.lists(st.sampled_from(SUBLAYERS), min_size=1, unique=True).map(tuple),
        layers=layers,
    ),
    "mam": st.builds(
        MAM, prefix_length=st.integers(1, 9), bottleneck=st.integers(1, 9), scale=st.floats(0.5, 2), layers=layers
    ),
    "compacter": compacters(Compacter),
    "compacter_pp": compacters(CompacterPP),
    "u_tuning": u_tuning(),
    "dra": st.builds(DRA, layers=layers),
    "attn_scale": st.builds(AttnScale, layers=layers),
}
#: A method that has no strategy of its own yet takes part with its defaults.
LATER = [n for n in method_names() if n not in STRATEGIES and not get_method(n).changes_weights]

#: Several methods in one adapter: any of those whose deltas add up, and at most one that wants a site for itself.
ADD_UP = ("lora", "ia3", "bitfit", "layernorm", "dra", "attn_scale")
ALONE = ("houlsby", "parallel", "compacter", "u_tuning", "mam", "ptuning_v2", "prompt", "aot_fc", "aot_kronecker")


@st.composite
def combined(draw):
    parts = draw(st.lists(st.one_of([STRATEGIES[n] for n in ADD_UP]), min_size=1, max_size=3))
    parts += draw(st.lists(st.one_of([STRATEGIES[n] for n in ALONE]), min_size=len(parts) == 1, max_size=1))
    return Combined(methods=tuple(draw(st.permutations(parts))))


any_method = st.one_of([*STRATEGIES.values(), *(st.builds(get_method(name)) for name in LATER), combined()])


def fitting(method, backbone):
    """The method with no role that the backbone lacks."""
    if isinstance(method, Combined):
        return Combined(methods=tuple(fitting(part, backbone) for part in method.methods))
    have = {site.role for site in backbone.sites}
    changes = {}
    for field in ("targets", "outputs", "inputs", "subset"):
        given = getattr(method, field, None)
        if given is not None and not set(given) <= have:
            kept = tuple(role for role in given if role in have)
            changes[field] = kept or (() if field == "inputs" else ("key",))
    if changes.get("targets") == ("embedding",):
        changes["layers"] = None
    if getattr(method, "embedding_norm", False) and "embedding_norm" not in have:
        changes["embedding_norm"] = False
    if getattr(method, "reads", "output") == "norm" and not backbone.architecture.post_norm:
        changes["reads"] = "output"
    if getattr(method, "shift_positions", False) and not backbone.takes_position_ids:
        changes["shift_positions"] = False
    if isinstance(method, IA3) and "key" in changes.get("outputs", ()):
        changes["inputs"] = tuple(role for role in changes.get("inputs", method.inputs) if role != "key")
    method = dataclasses.replace(method, **changes)
    if isinstance(method, BitFit) and not any(s.bias for s in backbone.sites if s.role in (method.subset or have)):
        return BitFit(subset=("key",))
    return method


#: Which of the backbones of a fixture an example takes.
any_backbone = st.integers(0, 99)


@st.composite
def mixes(draw, max_tasks=5, max_rows=7):
    """(methods of the tasks, per row its task or `None`, lengths of the rows)."""
    tasks = draw(st.lists(any_method, min_size=1, max_size=max_tasks))
    task_of_row = st.one_of(st.none(), st.integers(0, len(tasks) - 1))
    rows = draw(st.lists(st.tuples(task_of_row, st.integers(1, MAX_TOKENS)), min_size=2, max_size=max_rows))
    return tasks, [t for t, _ in rows], [n for _, n in rows]


def make(backbone, delta_set, tasks, fused):
    """One set of deltas per task, each with tensors of its own."""
    return [delta_set(backbone, fitting(task, backbone), seed, fused) for seed, task in enumerate(tasks)]


def run(backbone, sets, rows, order=None):
    with torch.no_grad():
        return backbone.run(Plan(sets), *rows.padded(order))


@pytest.mark.parametrize("form", ["trainable", "fused", "fused, in pieces"])
@draws(25)
@given(which=any_backbone, mix=mixes())
def test_each_row_equals_the_row_alone(backbones, delta_set, random_rows, close, monkeypatch, form, mix, which):
    backbone = backbones[which % len(backbones)]
    tasks, owners, lengths = mix
    fused = form != "trainable"
    if form == "fused, in pieces":
        monkeypatch.setattr(plan, "SPLIT_POSITIONS", 0)
    made = make(backbone, delta_set, tasks, fused)
    sets = [None if o is None else made[o] for o in owners]
    rows = random_rows(backbone, lengths)
    mixed = run(backbone, sets, rows)
    for i, n in enumerate(lengths):
        close(mixed[i, :n], run(backbone, [sets[i]], rows, [i])[0])


@draws(12)
@given(which=any_backbone, mix=mixes(), gradients=st.booleans())
def test_with_gradients_on_the_same_rows_come_out(backbones, delta_set, random_rows, close, mix, gradients, which):
    backbone = backbones[which % len(backbones)]
    tasks, owners, lengths = mix
    made = make(backbone, delta_set, tasks, fused=gradients)
    sets = [None if o is None else made[o] for o in owners]
    rows = random_rows(backbone, lengths)
    with torch.enable_grad():
        out = backbone.run(Plan(sets), *rows.padded()).detach()
    serving = run(backbone, sets, rows)
    for i, n in enumerate(lengths):
        close(out[i, :n], serving[i, :n])


@draws(12)
@given(which=any_backbone, mix=mixes(), data=st.data())
def test_permuting_rows_permutes_results(backbones, delta_set, random_rows, close, mix, data, which):
    backbone = backbones[which % len(backbones)]
    tasks, owners, lengths = mix
    made = make(backbone, delta_set, tasks, fused=True)
    sets = [None if o is None else made[o] for o in owners]
    rows = random_rows(backbone, lengths)
    order = data.draw(st.permutations(range(len(sets))))
    straight = run(backbone, sets, rows)
    permuted = run(backbone, [sets[i] for i in order], rows, order)
    for place, i in enumerate(order):
        close(permuted[place, : lengths[i]], straight[i, : lengths[i]])


@draws(12)
@given(which=any_backbone, mix=mixes(max_tasks=3, max_rows=9))
def test_packing_per_row_or_per_slot_gives_the_same(backbones, delta_set, random_rows, close, monkeypatch, mix, which):
    backbone = backbones[which % len(backbones)]
    tasks, owners, lengths = mix
    # Several tasks of one shape with different numbers of rows: only then do the two ways of packing differ.
    tasks = [task for task in tasks for _ in range(2)]
    made = make(backbone, delta_set, tasks, fused=True)
    sets = [None if o is None else made[(2 * o + (i % 3 == 0)) % len(made)] for i, o in enumerate(owners)]
    rows = random_rows(backbone, lengths)
    results, groups = [], []
    for limit in (0, 2**40):
        monkeypatch.setattr(plan, "PER_ROW_BYTES", limit)
        made_plan = Plan(sets)
        groups.append([(s.group.num_slots, s.group.rows_per_slot) for steps in made_plan.steps.values() for s in steps])
        with torch.no_grad():
            results.append(backbone.run(made_plan, *rows.padded()))
    for i, n in enumerate(lengths):
        close(results[0][i, :n], results[1][i, :n])
    assert len(groups[0]) >= len(groups[1])


def test_the_limit_does_change_how_rows_are_packed(bert, delta_set, monkeypatch):
    one, two = delta_set(bert, LoRA(r=2), 1, True), delta_set(bert, LoRA(r=2), 2, True)
    shapes = {}
    for limit in (0, 2**40):
        monkeypatch.setattr(plan, "PER_ROW_BYTES", limit)
        steps = Plan([one, two, one, one]).steps["layer.0.query"]
        shapes[limit] = sorted((s.group.num_slots, s.group.rows_per_slot) for s in steps)
    assert shapes == {0: [(1, 1), (1, 3)], 2**40: [(4, 1)]}


# ---- one task's NaN stays in its own rows


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@draws(6)
@given(which=any_backbone, mix=mixes(max_tasks=4), sick=any_method)
def test_nan_stays_in_its_own_rows(backbones, delta_set, random_rows, close, poison, mix, sick, which):
    backbone = backbones[which % len(backbones)]
    assume(not isinstance(sick, HeadOnly))
    tasks, owners, lengths = mix
    made = make(backbone, delta_set, tasks, fused=True)
    healthy = make(backbone, delta_set, [sick], fused=False)[0]

    def poisoned(delta):
        return delta.map(lambda t: torch.full_like(t, poison) if t.is_floating_point() else t)

    ill = DeltaSet({site: [poisoned(d) for d in deltas] for site, deltas in healthy.by_site.items()})
    sets = [None if o is None else made[o] for o in owners]
    where = len(sets) // 2
    lengths = [*lengths[:where], 4, *lengths[where:]]
    rows = random_rows(backbone, lengths)
    with_ill = run(backbone, [*sets[:where], ill, *sets[where:]], rows)
    with_healthy = run(backbone, [*sets[:where], healthy, *sets[where:]], rows)
    assert not torch.isfinite(with_ill[where, :4]).all()
    for i, n in enumerate(lengths):
        if i != where:
            close(with_ill[i, :n], with_healthy[i, :n])


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "head"])
def test_nan_next_to_the_same_method(backbone, name, random_params, random_rows):
    """The nearest neighbour, packed into the very same product: not one bit of the other row changes."""
    method = get_method(name)()
    params = random_params(backbone, method, 1)

    def filled(value):
        full = {k: torch.full_like(t, value) if method.trains(k) else t for k, t in params.items()}
        return DeltaSet(method.deltas(full, backbone))

    own = DeltaSet(method.deltas(params, backbone))
    rows = random_rows(backbone, [5, 5, 3])
    results = [run(backbone, [own, filled(value), own], rows) for value in (0.1, float("nan"), float("inf"))]
    for poisoned in results[1:]:
        assert torch.equal(poisoned[0], results[0][0])
        assert torch.equal(poisoned[2, :3], results[0][2, :3])
        assert torch.isnan(poisoned[1]).any()


# ---- heads

KINDS = ("classification", "regression", "multilabel", "multiple_choice", "tagging")
TEXTS = ("good film", "not the very bad film", "x", "the film not good", "bad " * 9)
ROWS = {
    "classification": lambda a, b: {"text": a},
    "regression": lambda a, b: {"a": a, "b": b},
    "multilabel": lambda a, b: {"text": a},
    "multiple_choice": lambda a, b: {"text": a, "one": b, "two": "bad", "three": "good film"},
    "tagging": lambda a, b: {"words": a.split()},
}
texts = st.sampled_from(TEXTS)


@pytest.fixture(scope="module")
def served(backbones, random_adapter):
    """A bank with every kind of head, in several ways of pooling, each on another method."""
    backbone = backbones[-1]
    bank = Bank(backbone)
    methods = [LoRA(r=3), PromptTuning(length=3), PTuningV2(length=3), AoTFC(r=2), Houlsby(bottleneck=3), IA3()]
    ways = ["cls", "mean", "last"] + (["pooler"] if backbone.pooler is not None else [])
    kinds = {}
    for i, (kind, way) in enumerate((kind, way) for kind in KINDS for way in ways):
        bank.add(f"{kind}/{way}", random_adapter(backbone, methods[i % len(methods)], i, kind=kind, pooling=way))
        kinds[f"{kind}/{way}"] = kind
    return bank, kinds


@draws(15)
@given(data=st.data())
def test_heads_of_every_kind_and_size_in_one_batch(served, close, data):
    bank, kinds = served
    names = data.draw(st.lists(st.sampled_from([None, *kinds]), min_size=2, max_size=8))
    rows = []
    for name in names:
        a, b = data.draw(texts), data.draw(texts)
        rows.append((name, a if name is None else ROWS[kinds[name]](a, b)))
    together = bank.predict(rows, batch_size=data.draw(st.integers(1, 40)))
    assert [p.adapter for p in together] == names
    for row, got in zip(rows, together, strict=True):
        (alone,) = bank.predict([row])
        if row[0] is None:
            close(got.embedding, alone.embedding)
            continue
        unit = bank.adapter(row[0]).head.target_std  # of a regression, whose answers have the unit of its targets
        close(got.logits / unit, alone.logits / unit)
        assert got.probabilities == pytest.approx(alone.probabilities, rel=1e-3, abs=1e-4)
        if kinds[row[0]] != "regression":
            assert got.label == alone.label


def test_heads_have_different_sizes(served):
    bank, kinds = served
    sizes = {bank.adapter(name).head.num_outputs for name in kinds}
    assert sizes == {1, 3, 4}
    assert {bank.adapter(name).head.kind for name in kinds} == set(KINDS)
