"""Continuous prompts: where they start, where they stand, and that dropping their networks changes nothing."""

from collections import defaultdict

import pytest
import torch
from transformers import DynamicCache

from multitune import (
    Adapter,
    Backbone,
    Bank,
    BitFit,
    Combined,
    ConfigError,
    DeltaSet,
    Plan,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
    Task,
    train,
)
from multitune.tasks import TaskData

GENERATOR = 3


def fresh(method, backbone):
    return method.init(backbone, torch.Generator().manual_seed(GENERATOR))


def ids_of(backbone, text):
    return backbone.tokenizer(text, add_special_tokens=False)["input_ids"]


def run(backbone, sets, ids, mask=None):
    with torch.no_grad():
        return backbone.run(Plan(sets), ids, mask)


# ---- starts of prompt tuning


@pytest.mark.parametrize(
    ("length", "words"), [(2, "good film"), (5, "good film good film good"), (3, "good film good")]
)
def test_a_prompt_starts_from_the_words_of_a_text(bert, length, words):
    vectors = fresh(PromptTuning(length=length, start="text", text="good film"), bert)["vectors"]
    assert torch.equal(vectors, bert.word_embeddings[ids_of(bert, words)])


def test_a_prompt_starts_from_labels_and_random_words(bert):
    """A label of one word, one of two words (their mean), one of unknown letters; the rest from the vocabulary."""
    labels = ("good", "not bad", "xy")
    vectors = fresh(PromptTuning(length=5, start="labels", labels=labels), bert)["vectors"]
    for vector, label in zip(vectors, labels, strict=False):
        ids = ids_of(bert, label)
        assert len(ids) == (1 if label == "good" else 2)
        torch.testing.assert_close(vector, sum(bert.word_embeddings[i] for i in ids) / len(ids))
    assert torch.equal(vectors[3:], fresh(PromptTuning(length=5), bert)["vectors"][3:])


def test_in_training_a_prompt_starts_from_the_labels_of_the_task(make_backbone):
    backbone = make_backbone("bert")
    task = Task(name="mood", kind="classification", template=("{text}",), label="y", labels=("good", "not bad"))
    rows = [{"text": "film", "y": 0}, {"text": "the film", "y": 1}]
    data = TaskData(task=task, train=rows, validation=rows, test=None)
    asking, given = (PromptTuning(length=3, start="labels", labels=labels) for labels in (None, task.labels))
    settings = dict(max_steps=1, batch_size=2, pooling="mean", progress=False)
    found, expected = (train(backbone, data, method, **settings).adapter for method in (asking, given))
    assert found.method == given and torch.equal(found.params["vectors"], expected.params["vectors"])
    both = train(backbone, data, Combined(methods=(asking, BitFit())), **settings).adapter
    assert both.method.methods[0] == given
    assert PromptTuning().with_labels(task.labels) == PromptTuning()
    with pytest.raises(ConfigError, match="has no labels to start from; give labels=..., or train a task that has"):
        fresh(asking.with_labels(()), backbone)


@pytest.mark.parametrize(
    "method",
    [
        PromptTuning(start="text", text="good"),
        PromptTuning(start="labels", labels=("good",)),
        PrefixTuning(start_text="good"),
        PTuningV1(pattern="good {text} {p}"),
    ],
    ids=["text", "labels", "prefix", "pattern"],
)
def test_a_start_from_text_needs_a_tokenizer(make_model, method):
    with pytest.raises(
        ConfigError, match=r"needs a tokenizer, which backbone 'x' lacks; give it one, Backbone\(model, t"
    ):
        fresh(method, Backbone(make_model("bert"), name="x"))


# ---- prefix-tuning from the activations of a text


def keys_and_values(backbone, ids):
    """Keys and values of a bare copy `[T, H·K]`: from a decoder's cache, else its projections by plain torch hooks."""
    copied = backbone.clone()
    copied.detach()
    if copied.architecture.causal:
        with torch.no_grad():
            cache = DynamicCache()  # without a configuration it drops nothing behind a window
            copied.model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
        found = [(layer.keys, layer.values) for layer in cache.layers]
        return {
            f"layer.{i}.attention.{key}": t[0].transpose(0, 1).flatten(1)
            for i, pair in enumerate(found)
            for key, t in zip(("keys", "values"), pair, strict=True)
        }
    waiting = defaultdict(list)  # a module that runs as several layers (ALBERT) has a site for each
    for site in copied.find_sites("linear", ("key", "value")):
        waiting[site.module, site.role].append(site)
    found = {}

    def note(out, sites):
        if sites:  # else DeBERTa projects its relative embeddings as well
            site = sites.pop(0)
            found[f"layer.{site.layer}.attention.{site.role}s"] = own_part(copied, site, out[0])

    for (path, _), sites in waiting.items():
        module = copied.model.get_submodule(path)
        module.register_forward_hook(lambda _, __, out, sites=sites: note(out, sites))
    with torch.no_grad():
        copied.running(input_ids=torch.tensor([ids]))
    return found


def own_part(backbone, site, out):
    """A site's share of what its module gives out."""
    if backbone.model.config.model_type == "deberta":  # head by head query, key and value, biases added later
        attention = backbone.model.get_submodule(site.module.removesuffix(".in_proj"))
        share = out.unflatten(-1, (attention.num_attention_heads, 3, -1))[:, :, 1 if site.role == "key" else 2]
        return share.flatten(1) + (0 if site.role == "key" else attention.v_bias)
    return out[:, slice(*site.part)] if site.part else out


def test_a_prefix_starts_from_the_activations_of_a_text(backbone):
    plain = fresh(PrefixTuning(length=5, start_text="the film", reparametrise=False), backbone)
    expected = keys_and_values(backbone, ids_of(backbone, "the film the film the"))
    assert plain.keys() == expected.keys() and len(plain) == 2 * backbone.num_layers
    for name, t in plain.items():
        rotated = backbone.name == "modernbert" and name.endswith("keys")  # behind the projection; keeps the norm
        mine, theirs = (v.norm(dim=-1) if rotated else v for v in (t, expected[name]))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert t.is_contiguous()


def test_a_network_over_a_start_begins_at_the_start(bert, random_rows):
    settings = dict(length=4, start_text="not very good film", layers=(0, 2))
    network, plain = (PrefixTuning(**settings, hidden=6, reparametrise=flag) for flag in (True, False))
    made = fresh(network, bert)
    assert {n for n in made if not network.trains(n)} == {f"{name}.start" for name in fresh(plain, bert)}
    rows = random_rows(bert, [5, 5])
    ids, _ = rows.padded()
    expected = run(bert, [DeltaSet(plain.deltas(fresh(plain, bert), bert))] * 2, ids)
    assert torch.equal(run(bert, [DeltaSet(network.deltas(made, bert))] * 2, ids), expected)
    trained = {n: t.requires_grad_(network.trains(n)) for n, t in made.items()}
    hidden = bert.run(Plan([DeltaSet(network.deltas(trained, bert))] * 2), ids)
    hidden.square().sum().backward()
    assert trained["layer.0.attention.keys.weight"].grad.abs().max() > 0
    assert trained["layer.0.attention.keys.start"].grad is None


def test_shapes_of_a_start_from_text_need_no_forward_pass(bert, make_model):
    for method in (
        PrefixTuning(length=3, start_text="the film", hidden=5),
        PrefixTuning(length=3, start_text="the film", reparametrise=False),
        PromptTuning(length=3, start="text", text="the film"),
    ):
        shapes = method.shapes(Backbone(make_model("bert")))  # no tokenizer
        assert shapes == {name: t.shape for name, t in fresh(method, bert).items()}


# ---- the prompt encoder of P-tuning, written from its equations


def slow_encoder(params):
    """`MLP([LSTM→ ; LSTM←])` over two layers, gate by gate and token by token."""
    rows = params["vectors"]
    for layer in range(2):
        ways = []
        for suffix, order in (("", list(rows)), ("_reverse", list(rows.flip(0)))):
            w, u, b, c = (
                params[f"lstm.{n}_l{layer}{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            state = cell = torch.zeros(u.shape[1], dtype=rows.dtype)
            out = []
            for x in order:
                i, f, g, o = (w @ x + b + u @ state + c).chunk(4)
                cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                state = torch.sigmoid(o) * torch.tanh(cell)
                out.append(state)
            ways.append(out if not suffix else out[::-1])
        rows = torch.stack([torch.cat(pair) for pair in zip(*ways, strict=True)])
    inner = (rows @ params["mlp.0.weight"].T + params["mlp.0.bias"]).clamp(min=0)
    return inner @ params["mlp.2.weight"].T + params["mlp.2.bias"]


def test_the_prompt_encoder_is_what_its_equations_say(bert, random_params, close):
    method = PTuningV1(pattern="{p*2} {text} {p*3}", position=1)
    params = {n: t.double() for n, t in random_params(bert, method, 1).items()}
    (prompt,) = method.deltas(params, bert)["embedding"]
    assert prompt.at == (1, 1, -1, -1, -1)
    close(prompt.vectors, slow_encoder(params))


@pytest.mark.parametrize("position", [0, 1, 3])
@pytest.mark.parametrize(
    ("pattern", "front", "back"),
    [
        ("{p*3} {text} {p*6}", "ppp", "pppppp"),
        ("the {p} film {text}", "the p film", ""),
        ("{text} {p} not very {p*2} bad", "", "p not very pp bad"),
        ("good {text} {p}", "good", "p"),
    ],
)
def test_a_pattern_is_the_row_with_its_tokens_written_out(backbone, random_rows, close, position, pattern, front, back):
    """Where pseudo tokens are real words' embeddings, the prompted row is the row of all those words."""
    method = PTuningV1(pattern=pattern, position=position, reparametrise=False)
    params = fresh(method, backbone)
    generator = torch.Generator().manual_seed(0)
    pseudo = torch.randint(5, backbone.vocab_size, (len(params["vectors"]),), generator=generator)
    params["vectors"] = backbone.embed(pseudo)
    used = iter(pseudo.tolist())

    def written(side):
        words = side.replace("p", " p ") if set(side) <= set("p ") else side
        out = []
        for word in words.split():
            out += [next(used) for _ in word] if set(word) == {"p"} else ids_of(backbone, word)
        return out

    row = random_rows(backbone, [4]).one(0)[0].tolist()
    ahead, behind = written(front), written(back)
    ids = torch.tensor([row[:position] + ahead + row[position:] + behind])
    ours = run(backbone, [DeltaSet(method.deltas(params, backbone)), None], torch.tensor([row, row]))[0]
    theirs = run(backbone, [None], ids)[0]
    places = [i if i < position else i + len(ahead) for i in range(4)]
    close(ours, theirs[places])


def test_words_of_a_pattern_are_saved_and_not_trained(bert, random_adapter, tmp_path, make_model):
    method = PTuningV1(pattern="{p*2} {text} good ? {p}", reparametrise=False)
    adapter = random_adapter(bert, method)
    unknown = bert.tokenizer.unk_token_id
    assert adapter.params["layout"].tolist() == [-1, -1, -2, *ids_of(bert, "good"), unknown, -1]
    assert not method.trains("layout") and adapter.num_method_parameters == 3 * 32
    assert method.num_parameters(bert) == 3 * 32
    adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a", bert)
    bank = Bank(bert)
    bank.add("before", adapter)
    bank.add("after", loaded)
    first, second, bare = bank.predict([("before", "the film"), ("after", "the film"), (None, "the film")])
    assert torch.equal(first.logits, second.logits) and bare.logits is None


# ---- finishing

FINISHING = [
    PrefixTuning(length=3, hidden=5),
    PrefixTuning(length=3, hidden=5, start_text="good film", layers=(1,)),
    PTuningV2(length=3, hidden=5, reparametrise=True),
    PTuningV1(),
    PTuningV1(pattern="{p*2} the {text} film {p}"),
]


@pytest.mark.parametrize("method", FINISHING, ids=lambda m: m.name)
def test_finishing_drops_the_network_and_changes_nothing(bert, random_params, random_rows, method):
    params = random_params(bert, method, 1)
    finished, kept = method.finish(params, bert)
    assert not finished.reparametrise
    assert {n: t.shape for n, t in kept.items()} == bert.shapes_of(finished)
    assert all(n.endswith((".keys", ".values")) or n in ("vectors", "layout") for n in kept)
    assert finished.num_parameters(bert) < method.num_parameters(bert)
    rows = random_rows(bert, [5, 3])
    before = run(bert, [DeltaSet(method.deltas(params, bert)), None], *rows.padded())
    after = run(bert, [DeltaSet(finished.deltas(kept, bert)), None], *rows.padded())
    assert torch.equal(before, after)
    assert finished.finish(kept, bert) == (finished, kept)  # nothing is left to drop


def test_a_run_saves_the_finished_form(make_backbone, tasks, tmp_path):
    """Scored before it is finished, and again from its file: the answers are the same."""
    backbone = make_backbone("bert")
    table = [{"text": text, "y": label} for text, label in (("good film", "good"), ("bad film", "bad")) * 4]
    data = TaskData(task=tasks["classification"], train=table, validation=table)
    settings = dict(max_steps=3, batch_size=4, learning_rate=1e-2, progress=False)
    for method in FINISHING:
        out = tmp_path / f"{FINISHING.index(method)}"
        result = train(backbone, data, method, out, **settings)
        saved = Adapter.load(out, backbone)
        assert saved.method == method.finish(fresh(method, backbone), backbone)[0]
        assert saved.num_method_parameters == saved.method.num_parameters(backbone)
        bank = Bank(backbone)
        bank.add("saved", saved)
        answers = bank.predict([("saved", row["text"]) for row in table])
        right = sum(a.label == row["y"] for a, row in zip(answers, table, strict=True)) / len(table)
        assert right == pytest.approx(result.best_metric)
