"""What users of other libraries ran into (docs/field.md, section 5), as tests of this one.

Those that whole files are about stand there: threads, failed calls and recomputation in test_routing.py; each
row its own adapter, of any method, in test_methods.py and properties/test_isolation.py.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch

from multitune import (
    Adapter,
    AdapterError,
    Bank,
    ConfigError,
    DeltaSet,
    Head,
    HeadOnly,
    LoRA,
    Plan,
    PromptTuning,
    PTuningV2,
    Task,
    get_method,
    method_names,
)


@pytest.mark.parametrize("name", [n for n in method_names() if not get_method(n).changes_weights])
def test_no_row_silently_gets_its_neighbours_adapter(bert, name, random_adapter, close):
    """peft 1.3, adapters 2: rows answered by the active adapter, or by the first of the batch, without a word."""
    bank = Bank(bert)
    for seed in range(3):
        bank.add(str(seed), random_adapter(bert, get_method(name)(), seed))
    rows = [(adapter, "not the bad film") for adapter in ("0", "1", "2", "1")]
    alone = {adapter: bank.predict([(adapter, text)])[0].logits for adapter, text in rows}
    for (adapter, _), got in zip(rows, bank.predict(rows), strict=True):
        close(got.logits, alone[adapter])
        for other in alone.keys() - {adapter}:
            assert (got.logits - alone[other]).abs().max() > 0.01


def test_heads_with_different_numbers_of_labels(bert, random_adapter):
    """vllm#57766, peft: heads of other sizes in one batch raise."""
    bank = Bank(bert)
    for count in (2, 3, 77):
        task = Task(name="t", kind="classification", template=("{text}",), labels=tuple(f"l{i}" for i in range(count)))
        adapter = random_adapter(bert, LoRA(), count)
        fields = {k: getattr(adapter, k) for k in ("name", "method", "params", "backbone")}
        head_params = {"weight": torch.randn(count, 32), "bias": torch.randn(count)}
        bank.add(str(count), Adapter(**fields, task=task, head=Head.for_task(task), head_params=head_params))
    answers = bank.predict([(name, "good film") for name in ("77", "2", "3")])
    assert [len(p.probabilities) for p in answers] == [77, 2, 3]
    assert [p.logits.shape for p in answers] == [(77,), (2,), (3,)]


def test_rows_without_an_adapter_among_the_others(bert, random_adapter, close):
    """adapters#566."""
    bank = Bank(bert)
    bank.add("a", random_adapter(bert, PTuningV2(length=3), 1))
    (alone,) = bank.predict([(None, "good film")])
    mixed = bank.predict([("a", "x"), (None, "good film"), ("a", "the film")])
    close(mixed[1].embedding, alone.embedding)
    assert [p.embedding is None for p in mixed] == [True, False, True]


def test_a_prompt_and_low_rank_updates_in_one_adapter(bert, random_params, random_rows, close):
    """peft#2307: prompt tuning and LoRA together are refused."""
    lora, prompt, prefix = LoRA(r=2), PromptTuning(length=3, position=1), PTuningV2(length=2)
    both = {}
    for seed, method in enumerate((lora, prompt, prefix)):
        both |= method.deltas(random_params(bert, method, seed), bert)
    together = DeltaSet(both)
    assert together.prompt_length == 3
    rows = random_rows(bert, [5, 4])
    with torch.no_grad():
        alone = bert.run(Plan([together]), rows.one(0))
        mixed = bert.run(Plan([together, None]), *rows.padded())
        fused = bert.run(Plan([together.fused(bert.dtype, bert.device), None]), *rows.padded())
        bare = bert.run(Plan([None]), rows.one(0))
    close(mixed[0], alone[0])
    close(fused[0], alone[0])
    assert (alone - bare).abs().max() > 0.1


def test_a_zero_prefix_is_no_identity_and_we_say_so(bert):
    """P-tuning-v2#65: keys and values of zero still take attention from the text."""
    assert not PTuningV2.identity_at_init and not PromptTuning.identity_at_init
    method = PTuningV2(length=4, std=0.0)
    params = method.init(bert, torch.Generator())
    assert not any(t.any() for t in params.values())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        prefixed = bert.run(Plan([DeltaSet(method.deltas(params, bert))]), ids)
        assert (prefixed - bert.run(Plan([None]), ids)).abs().max() > 0.01


def test_a_head_comes_back_trained(bert, random_adapter, tmp_path):
    """peft#310, #602, sentence-transformers#3980: the head is random, or another copy, after loading."""
    for kind in ("classification", "tagging", "regression"):
        adapter = random_adapter(bert, HeadOnly(), 1, kind=kind)
        loaded = Adapter.load(adapter.save(tmp_path / kind).path, bert)
        assert all(torch.equal(loaded.head_params[k], t) for k, t in adapter.head_params.items())


def test_settings_of_a_newer_library_are_named(bert, random_adapter, tmp_path):
    """peft#2275: "unexpected keyword argument", and from where it came nobody knows."""
    folder = random_adapter(bert, LoRA(), 1).save(tmp_path / "a").path
    file = folder / "adapter.json"
    text = file.read_text().replace('"rank_stabilised"', '"corda_config"')
    file.write_text(json.dumps(json.loads(text) | {"multitune": "9.9"}))
    with pytest.raises(
        AdapterError, match=r"adapter\.json \(written by multitune 9\.9.*\): method 'lora' has no hyper-param"
    ):
        Adapter.load(folder, bert)


class Malicious:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["adapter.safetensors", "table.safetensors", "adapter_model.bin", "adapter.json"])
def test_a_pickle_is_never_opened(bert, random_adapter, tmp_path, name):
    """TensorRT-LLM#13391: a path reachable by a request is unpickled."""
    folder = random_adapter(bert, LoRA(), 1).save(tmp_path / "a").path
    mark = tmp_path / "mark"
    (folder / name).write_bytes(pickle.dumps(Malicious(mark)))
    if name in ("adapter.safetensors", "adapter.json"):
        with pytest.raises(AdapterError):
            Adapter.load(folder, bert)
    else:
        Adapter.load(folder, bert)
    assert not mark.exists()
    pickle.loads((folder / name).read_bytes())
    assert mark.exists()  # so the test would have seen it


def test_an_unknown_target_is_not_dropped(bert):
    """Mixed-in names that match no module must not train nothing in silence."""
    for targets in (("q_proj",), ("query", "q_proj")):
        with pytest.raises(ConfigError, match="no linear site has the role 'q_proj'"):
            LoRA(targets=targets).init(bert, torch.Generator())
