"""Where tensors are: whatever makes one makes it where the backbone is, and what leaves the device is brought off it.

There may be no GPU here: a pretended one (`pretended_gpu`) refuses what CUDA refuses, and computes what the CPU does,
so that every answer must be the very one of the CPU.
"""

import dataclasses
import gc
import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from pretended_gpu import GPU, OnGPU

import multitune as mt
from multitune import Bank, DeltaSet, Plan, TrainJob, get_method, method_names, train_many
from multitune.comparing.runners import make_runner
from multitune.continual import Prototypes, cosine_of_updates, features, sum_of_updates
from multitune.convert.heads import SEQUENCE, model_with_head
from multitune.tasks import TaskData
from multitune.workspace import Workspace

MIXABLE = [name for name in method_names() if not get_method(name).changes_weights]
#: A method of every kind of delta.
KINDS = ("lora", "ia3", "sotu", "bitfit", "layernorm", "houlsby", "parallel", "ptuning_v2", "vera", "prompt", "aot_fc")
MOOD = mt.Task(name="mood", kind="classification", template=("{text}",), label="y", labels=("bad", "good"))
ROWS = [{"text": text, "y": label} for text, label in (("good film", "good"), ("bad", "bad"), ("not good", "bad"))]
DATA = TaskData(task=MOOD, train=ROWS, validation=ROWS, test=None)
DEVICES = ("cpu", "cuda")


def is_there(backbone):
    return all(isinstance(t, OnGPU) for t in (*backbone.model.parameters(), *backbone.model.buffers()))


# ---- the pretended device


def test_a_pretended_device_refuses_what_cuda_refuses(gpu):
    here, there = torch.ones(2), torch.ones(2, device="cuda")
    assert there.device == GPU and (there + 1).device == GPU and (there * torch.tensor(2.0)).tolist() == [2, 2]
    for wrong in (
        lambda: here + there,
        lambda: torch.cat([there, here]),
        lambda: torch.nn.functional.linear(there, torch.ones(3, 2)),
        lambda: here[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match=r"device|CPU"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert type(there.cpu() + here) is torch.Tensor and torch.equal(here.to(there), there)
    before = gpu.waits
    assert bool((there[torch.zeros(1, dtype=torch.long)] > 0).all()) and gpu.waits == before + 1


def test_a_module_moves_there_with_its_ties_and_its_gradients(gpu):
    module = torch.nn.Linear(3, 3)
    weight = module.weight
    module.to("cuda")
    assert module.weight is weight and weight.device == GPU and isinstance(weight, torch.nn.Parameter)
    module(torch.ones(1, 3, device="cuda")).sum().backward()
    assert weight.grad.device == GPU
    torch.optim.AdamW(module.parameters()).step()
    assert not torch.equal(weight.cpu(), torch.nn.Linear(3, 3).weight)


@pytest.mark.parametrize("name", ["bart/writes", "llama"])
def test_a_backbone_is_loaded_there_with_all_that_belongs_to_it(gpu, name, make_model, make_backbone, tmp_path):
    make_model(name, class_name="LlamaForCausalLM" if name == "llama" else "").save_pretrained(tmp_path)
    make_backbone("gpt2").tokenizer.save_pretrained(tmp_path)
    decoder = "+decoder" if name == "bart/writes" else ""
    here, there = (mt.Backbone.load(f"{tmp_path}{decoder}", device=device, dtype="bfloat16") for device in DEVICES)
    assert is_there(there) and there.device == GPU and there.fingerprint == here.fingerprint
    assert (there.lm_head.bias is None) == (name == "llama")
    assert all(isinstance(t, OnGPU) for t in (there.lm_head.weight, there.lm_head.bias) if t is not None)


# ---- serving


def test_every_method_is_served_in_one_batch(gpu, make_backbone, on_gpu, random_adapter):
    answers = []
    for move in (lambda backbone: backbone, on_gpu):
        backbone = move(make_backbone("bert"))
        bank = Bank(backbone)
        for i, name in enumerate(MIXABLE):
            bank.add(name, random_adapter(backbone, get_method(name)(), i))
        answers.append(bank.predict([*((name, "good film") for name in bank.names), (None, "bad"), ("lora", "not")]))
    assert is_there(backbone)
    for here, there in zip(*answers, strict=True):
        assert here.label == there.label and type(there.embedding) is type(here.embedding)
        torch.testing.assert_close(there.logits, here.logits, rtol=0, atol=0)


def test_every_architecture_runs_a_mixed_plan(gpu, backbone_names, make_backbone, on_gpu, random_params, random_rows):
    for name in backbone_names:
        found = []
        for device, move in zip(DEVICES, (lambda backbone: backbone, on_gpu), strict=True):
            backbone = move(make_backbone(name))
            sets = [served(backbone, method, random_params) for method in KINDS]
            ids, mask = random_rows(backbone, [3 + i % 5 for i in range(len(sets) + 1)]).padded()
            with torch.no_grad():
                found.append(backbone.run(Plan([*sets, None]), ids.to(device), mask.to(device)))
        assert found[1].device == GPU, name
        torch.testing.assert_close(found[1].cpu()[mask > 0], found[0][mask > 0], rtol=0, atol=0, msg=name)


def served(backbone, method, random_params):
    params = {k: t.to(backbone.device) for k, t in random_params(backbone, get_method(method)(), 0).items()}
    return DeltaSet(get_method(method)().deltas(params, backbone)).fused(backbone.dtype, backbone.device)


@pytest.fixture(scope="session")
def backbone_names():
    """A model of every way to compute attention and to count positions."""
    return ("bert", "roberta", "deberta-v2/v3", "deberta", "mpnet", "albert", "t5", "modernbert", "gpt2", "gemma3_text")


@pytest.mark.parametrize("name", ["llama", "t5/writes", "bart/writes"])
def test_text_is_written(gpu, name, make_backbone, make_model, on_gpu, random_params):
    settings = [dict(max_new_tokens=4) | more for more in ({}, {"num_beams": 2}, {"temperature": 0.7, "seed": 1}, {})]
    settings[3] |= {"repetition_penalty": 1.3, "temperature": 0.9, "top_k": 5, "top_p": 0.9, "seed": 2}
    tokenizer, found = make_backbone("gpt2").tokenizer, []
    for move in (lambda backbone: backbone, on_gpu):
        model = make_model(name, class_name="LlamaForCausalLM" if name == "llama" else "", pad_token_id=0)
        backbone = move(mt.Backbone(model, tokenizer, name=name))
        sets = [served(backbone, method, random_params) for method in ("lora", "ptuning_v2", "aot_fc")]
        bank = Bank(backbone)
        ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0], [12, 13, 0, 0], [14, 15, 16, 17]])
        found.append(backbone.generate(Plan([*sets, None]), ids, (ids > 0).long(), settings))
        shared = list(range(5, 38))  # a front that prompts share is read once
        found[-1] += bank.generate([(None, [*shared, i]) for i in range(3)], {"max_new_tokens": 2})
    assert is_there(backbone)
    assert [g.token_ids for g in found[1]] == [g.token_ids for g in found[0]]


@pytest.mark.parametrize("kind", ["norm", "lsh", "block_stride"])
def test_long_inputs_are_read(gpu, kind, make_backbone, on_gpu, random_rows, random_params):
    found = []
    for device, move in zip(DEVICES, (lambda backbone: backbone, on_gpu), strict=True):
        settings = dict(max_length=120, block=8, sparse=4, sparsity=2, kind=kind, num_global=2)
        original = make_backbone("bert")
        original.tokenizer.mask_token = "[MASK]"
        backbone = move(mt.convert_to_lsg(original, **settings))
        ids, mask = random_rows(backbone, (60, 23, 40)).padded()
        sets = [served(backbone, method, random_params) for method in ("ptuning_v2", "prompt")]
        with torch.no_grad():
            found.append(backbone.run(Plan([*sets, None]), ids.flip(1).to(device), mask.flip(1).to(device)).cpu())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_tables_are_fused_and_read_from_memory_and_from_disk(gpu, make_backbone, on_gpu, random_adapter, tmp_path):
    backbone = on_gpu(make_backbone("bert"))
    adapter = random_adapter(backbone, mt.AoTFC(r=2)).save(tmp_path / "aot").fuse(backbone, torch.int8)
    answers = []
    for store in ("ram", "mmap"):
        bank = Bank(backbone, aot_store=store)
        bank.add("aot", adapter)
        bank.add("lora", random_adapter(backbone, mt.LoRA(r=2)))
        answers.append([a.logits for a in bank.predict([("aot", "good film"), ("lora", "bad"), ("aot", "not")])])
    torch.testing.assert_close(*answers)


# ---- training


def test_every_method_trains_together_and_leaves_tensors_of_the_cpu(gpu, make_backbone, on_gpu, tmp_path):
    backbone = on_gpu(make_backbone("bert", hidden_dropout_prob=0.1, num_hidden_layers=1))
    jobs = [TrainJob(data=DATA, method=name) for name in MIXABLE]
    for result in train_many(backbone, jobs, token_budget=4000, progress=False, max_steps=1, batch_size=2):
        assert isinstance(result, mt.TrainResult), result
        assert all(type(t) is torch.Tensor for t in result.adapter.params.values()), result.adapter.name
    saved = result.adapter.save(tmp_path / "last")
    assert mt.Adapter.load(tmp_path / "last", backbone).digest == saved.digest


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        (mt.LoRA(layers=(1,)), {"cache_frozen": "memory", "max_steps": 3}),
        (mt.SIFT(), {"gradient_accumulation": 2, "max_steps": 1}),
        (mt.FullFineTuning(), {"max_steps": 1}),
        (mt.PTuningV1(), {"max_steps": 1}),
    ],
)
def test_a_run_trains_where_the_backbone_is(gpu, method, settings, make_backbone, on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("multitune.backbone.check_weights", lambda model, sites: None)  # which knows no pretended ones
    found = []
    for move in (lambda backbone: backbone, on_gpu):
        backbone = move(make_backbone("bert", num_hidden_layers=2))
        result = mt.train(backbone, DATA, method, progress=False, batch_size=2, **settings)
        found.append(result.adapter.params)
    assert all(type(t) is torch.Tensor for t in found[1].values())
    for name, here in found[0].items():
        torch.testing.assert_close(found[1][name], here, rtol=0, atol=0, msg=name)


def test_an_interrupted_run_goes_on_there(gpu, make_backbone, on_gpu, tmp_path, monkeypatch):
    settings = dict(progress=False, batch_size=2, epochs=2, keep_checkpoints=True)
    backbone = on_gpu(make_backbone("bert", num_hidden_layers=1))
    whole = mt.train(backbone, DATA, mt.LoRA(r=2), tmp_path / "whole", **settings)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("multitune.training.setup.publish", stop)
        mt.train(backbone, DATA, mt.LoRA(r=2), tmp_path / "cut", **settings)
    resumed = mt.train(backbone, DATA, mt.LoRA(r=2), tmp_path / "cut", **settings)
    for name, t in whole.adapter.params.items():
        torch.testing.assert_close(resumed.adapter.params[name], t, rtol=0, atol=0)


def test_answers_as_text_are_ranked_and_texts_judged(gpu, make_model, make_backbone, on_gpu):
    task = dataclasses.replace(MOOD, pattern=mt.Pattern("{text} is :", {"good": "good", "bad": "very bad"}))
    write = mt.Task(name="w", kind="generation", template=("{text} :",), label="y", metric="exact_match")
    model = make_model("llama", class_name="LlamaForCausalLM", pad_token_id=0)
    backbone = on_gpu(mt.Backbone(model, make_backbone("gpt2").tokenizer, name="llama"))
    settings = dict(progress=False, max_steps=1, batch_size=2)
    for data, more in (
        (TaskData(task=task, train=ROWS, validation=ROWS, test=None), {"distill_examples": 1, "distill_weight": 0.5}),
        (TaskData(task=write, train=ROWS, validation=ROWS, test=None), {"eval_texts": 2, "eval_new_tokens": 2}),
    ):
        result = mt.train(backbone, data, mt.LoRA(r=2), **settings, **more)
        bank = Bank(backbone)
        bank.add("a", result.adapter)
        if data.task is write:
            assert bank.generate([("a", ROWS[0])], {"max_new_tokens": 2})[0].token_ids
        else:
            assert bank.predict([("a", ROWS[0])])[0].label


# ---- what is built on both


def test_updates_are_summed_and_read(gpu, make_backbone, on_gpu, random_adapter):
    backbone = on_gpu(make_backbone("bert"))
    adapters = [random_adapter(backbone, mt.SoTU(density=0.2, mask_seed=seed), seed) for seed in range(2)]
    total = sum_of_updates(backbone, adapters)
    vectors, labels = features(backbone, total, MOOD, ROWS)
    assert len(Prototypes.of(vectors, labels).predict(vectors)) == len(ROWS)
    assert abs(cosine_of_updates(backbone, *adapters)) < 1
    with pytest.raises(mt.AdapterError, match="only adapters made of one sparse update"):
        sum_of_updates(backbone, [random_adapter(backbone, mt.DoRA(r=2))])


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
def test_checkpoints_of_peft_are_compared_where_the_backbone_is(gpu, make_backbone, on_gpu, tmp_path, monkeypatch):
    import peft

    monkeypatch.setattr("multitune.backbone.check_weights", lambda model, sites: None)
    backbone = make_backbone("bert")
    modules = [s.module for s in backbone.find_sites("linear", ("query", "ffn_in"))]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules, task_type=SEQUENCE, init_lora_weights=False)
    peft.get_peft_model(model_with_head(backbone, SEQUENCE, 2), config).eval().save_pretrained(tmp_path / "theirs")
    on_gpu(backbone)
    by_peft = mt.import_adapter(tmp_path / "theirs", backbone, labels=("a", "b")).check
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a))
    folded = mt.import_adapter(tmp_path / "theirs", backbone, labels=("a", "b")).check
    assert "PEFT" in by_peft.by and "folded" in folded.by
    assert all(check.max_difference <= 1e-4 * check.max_magnitude for check in (by_peft, folded))


def test_a_merged_model_is_what_was_served(gpu, make_backbone, on_gpu, random_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("multitune.backbone.check_weights", lambda model, sites: None)
    backbone = on_gpu(make_backbone("bert"))
    report = mt.merge(random_adapter(backbone, mt.LoRA(r=2)), backbone, tmp_path / "merged")
    assert report.max_difference < 1e-4 and transformers.AutoModel.from_pretrained(tmp_path / "merged")


# ---- waiting


@pytest.mark.parametrize("name", ["bert", "t5/writes"])
def test_no_layer_waits_for_the_device(gpu, name, make_backbone, make_model, on_gpu, random_params, random_rows):
    """How often the host waits must not grow with the layers."""
    waits = []
    for layers in (2, 5):
        names = ("num_layers", "num_decoder_layers") if name == "t5/writes" else ("num_hidden_layers",)
        model = make_model(name, **dict.fromkeys(names, layers))
        backbone = on_gpu(mt.Backbone(model, make_backbone("bert").tokenizer, name=name))
        sets = [served(backbone, method, random_params) for method in KINDS if method != "prompt"]
        lengths = [4] * len(sets) if name == "bert" else [3 + i % 5 for i in range(len(sets))]
        ids, mask = random_rows(backbone, lengths).padded()
        with torch.no_grad():
            before = gpu.waits
            if name == "bert":  # without a mask, so that the memories decide whether there is one
                backbone.run(Plan(sets), ids.to("cuda"))
            else:
                backbone.generate(Plan(sets), ids, mask, {"max_new_tokens": 3, "stop_at_eos": False})
            waits.append(gpu.waits - before)
    assert waits[0] == waits[1]


def test_answers_of_all_rows_come_off_the_device_together(gpu, make_backbone, on_gpu, random_adapter):
    backbone, waits = on_gpu(make_backbone("bert")), []
    bank = Bank(backbone)
    for i, kind in enumerate(("classification", "tagging")):
        bank.add(kind, random_adapter(backbone, mt.LoRA(r=2), i, kind=kind))
    rows = [("classification", "good film"), ("tagging", {"words": ["not", "bad"]}), (None, "very good")]
    for count in (1, 4):
        before = gpu.waits
        bank.predict([(name, text) for name, text in rows for _ in range(count)])
        waits.append(gpu.waits - before)
    assert waits[0] == waits[1]


def test_a_stream_gets_no_buffer_that_another_may_still_read(gpu, make_backbone, on_gpu, random_params, monkeypatch):
    backbone = on_gpu(make_backbone("bert"))
    sets, workspace = [served(backbone, "lora", random_params) for _ in range(3)], Workspace()
    buffers = []
    for stream in (1, 2, 1):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, s=stream: SimpleNamespace(cuda_stream=s))
        with torch.no_grad():
            plan = Plan(sets, workspace)
        buffers.append({s.delta.A.data_ptr() for steps in plan.steps.values() for s in steps})
        del plan
        gc.collect()
    assert buffers[0] == buffers[2] and not buffers[0] & buffers[1]


def test_an_adapter_is_whole_before_another_stream_can_use_it(gpu, make_backbone, on_gpu, random_adapter, monkeypatch):
    waited = []
    stream = SimpleNamespace(cuda_stream=1, synchronize=lambda: waited.append(len(bank)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    backbone = on_gpu(make_backbone("bert"))
    bank = Bank(backbone)
    bank.add("a", random_adapter(backbone, mt.LoRA(r=2)))
    assert waited == [0]  # before it can be asked for


def test_by_default_one_process_loads_its_backbone_onto_a_gpu(gpu, make_backbone, on_gpu):
    settings = dict(workers=None, max_jobs=None, token_budget=None, passes=None)
    counts = [
        make_runner("processes", b, "bert", **settings)._count for b in (make_backbone(), on_gpu(make_backbone()))
    ]
    assert counts == [os.cpu_count() or 1, 1]


def test_a_batch_that_is_elsewhere_is_refused_by_name(gpu, make_backbone, on_gpu):
    backbone, ids = on_gpu(make_backbone("bert")), torch.full((1, 4), 7)
    with pytest.raises(
        mt.PlanError, match=r"input_ids is on cpu, but backbone 'bert' is on cuda:0; .*to\(backbone.dev"
    ):
        backbone.run(Plan([None]), ids)
    with pytest.raises(mt.PlanError, match="attention_mask is on cpu"):
        backbone.run(Plan([None]), ids.to("cuda"), torch.ones_like(ids))
