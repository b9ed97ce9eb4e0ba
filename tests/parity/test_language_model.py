"""Law 3 in training: loss and gradients are those of transformers' causal language model and Hugging Face PEFT."""

import copy
import json

import pytest
import torch
import transformers

from multitune import Adapter, AdapterError, Backbone, Bank, LoRA, Pattern, Plan, Task, export_adapter, get_method
from multitune.heads import Head
from multitune.training.data import Collator, TaskRows
from multitune.training.model import TuningModel

peft = pytest.importorskip("peft", reason="PEFT is not installed; pip install 'multitune[parity]'")

MODELS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM"}
TASK = Task(name="w", kind="generation", template=("{text}",), label="y")
ROWS = [
    {"text": "good film", "y": "very good"},
    {"text": "the bad bad film a", "y": "bad"},
    {"text": "x", "y": "1 2 3"},
]


@pytest.fixture(scope="module", params=[(name, tied) for name in MODELS for tied in (True, False)], ids=str)
def pair(request, make_model, make_backbone):
    """transformers' own model with its head, and our backbone around a copy of it."""
    name, tied = request.param
    body = make_model(name, tie_word_embeddings=tied, eos_token_id=3)
    torch.manual_seed(7)
    whole = getattr(transformers, MODELS[name])(body.config).eval()
    whole.base_model.load_state_dict(body.state_dict())
    if not tied:
        with torch.no_grad():
            whole.lm_head.weight.normal_(std=0.3)
    return whole, Backbone(copy.deepcopy(whole), make_backbone("gpt2").tokenizer, name=name)


def batch_of(backbone):
    rows = TaskRows(backbone, TASK, ROWS, max_length=40, split="train")
    return Collator("generation", backbone.pad_id)(rows.items)


def as_labels(batch):
    """The batch under transformers' names: the same tokens count, -100 elsewhere."""
    return {"labels" if name == "targets" else name: t for name, t in batch.items()}


def test_lora_has_pefts_loss_and_gradients(pair):
    whole, backbone = pair
    batch = batch_of(backbone)
    method = LoRA(
        r=4, targets=("query", "value") if whole.config.model_type != "gpt2" else ("attention_output", "ffn_out")
    )
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(t.shape, generator=generator) * 0.2 for k, t in method.init(backbone, generator).items()}
    sites = {s.name: s for s in backbone.find_sites("linear", method.targets)}
    names = sorted({s.module.rsplit(".", 1)[-1] for s in sites.values()})
    if whole.config.model_type == "gpt2":
        names = ["attn.c_proj", "mlp.c_proj"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=method.alpha,
        target_modules=names,
        task_type="CAUSAL_LM",
        fan_in_fan_out="gpt2" in str(type(whole)),
    )
    theirs = peft.get_peft_model(copy.deepcopy(whole), config).eval()
    at = {}
    for name, p in theirs.named_parameters():
        site = next((s for s in sites if f".{sites[s].module}." in name), None) if "lora_" in name else None
        if site is not None:
            ours = f"{site}.{'A' if 'lora_A' in name else 'B'}"
            at[ours] = p
            with torch.no_grad():
                p.copy_(params[ours].T)
    assert set(at) == set(params)
    model = TuningModel(backbone, method, params, Head.for_task(TASK), {}).eval()
    ours = model(**batch)["loss"]
    expected = theirs(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"]
    ).loss
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    ours.backward()
    expected.backward()
    for name, p in model.own().items():
        torch.testing.assert_close(p.grad.T, at[name].grad, rtol=1e-4, atol=1e-5)
        assert p.grad.abs().max() > 1e-4


def test_full_tuning_has_transformers_loss_and_gradients(pair):
    whole, backbone = pair
    batch = batch_of(backbone)
    clone = backbone.clone()
    own = dict(clone.model.named_parameters())
    method = get_method("full")()
    params = {name: own[name].requires_grad_(True) for name in method.init(backbone, torch.Generator())}
    model = TuningModel(clone, method, params, Head.for_task(TASK), {}).eval()
    theirs = copy.deepcopy(whole)
    expected = theirs(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["targets"]
    ).loss
    ours = model(**batch)["loss"]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    ours.backward()
    expected.backward()
    found = dict(theirs.base_model.named_parameters())
    for name, p in model.own().items():
        torch.testing.assert_close(p.grad, found[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_unequal_batches_weigh_as_transformers_weighs_them(pair):
    """Two batches of one optimizer step: transformers divides by the tokens of the step, and so does training here."""
    whole, backbone = pair
    rows = TaskRows(backbone, TASK, ROWS, max_length=40, split="train")
    collate = Collator("generation", backbone.pad_id)
    pieces = [collate(rows.items[:1]), collate(rows.items[1:])]
    count = sum(int((p["targets"] != -100).sum()) for p in pieces)
    theirs = sum(
        whole(
            input_ids=p["input_ids"],
            attention_mask=p.get("attention_mask"),
            labels=p["targets"],
            num_items_in_batch=count,
        ).loss
        for p in pieces
    )
    model = TuningModel(backbone, LoRA(), LoRA().init(backbone, torch.Generator()), Head.for_task(TASK), {}).eval()
    torch.testing.assert_close(model(**batch_of(backbone))["loss"], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT's own, of its own default
@pytest.mark.parametrize("name", ["lora", "prefix", "prompt", "ia3"])
def test_an_exported_writer_computes_in_peft_what_it_computes_here(name, pair, random_params, random_rows, tmp_path):
    whole, backbone = pair
    settings = {"prefix": dict(length=3, reparametrise=False, shift_positions=True)}
    if whole.config.model_type == "gpt2":  # PEFT adapts query, key and value there as one map
        settings |= {
            "lora": dict(targets=("attention_output", "ffn_out")),
            "ia3": dict(outputs=(), inputs=("ffn_out",)),
        }
    method = get_method(name)(**settings.get(name, {}))
    adapter = Adapter(
        name="w",
        method=method,
        params=random_params(backbone, method, std=0.1),
        head=Head.for_task(TASK, pooling="last"),
        head_params={},
        task=TASK,
        backbone=backbone.describe(),
    )
    if (whole.config.model_type, name) == ("gemma2", "prefix"):  # its window hides the prefix there, and never here
        with pytest.raises(AdapterError, match="does not compute the same"):
            export_adapter(adapter, backbone, tmp_path / "peft")
        return
    done = export_adapter(adapter, backbone, tmp_path / "peft")
    assert done.check is not None
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(whole), str(tmp_path / "peft")).eval()
    ids, _ = random_rows(backbone, [7, 7]).padded()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -7:]
        found = backbone.logits(Plan([adapter.delta_set(backbone)] * 2), ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_an_exported_ranker_scores_in_peft_as_it_does_here(pair, random_params, tmp_path):
    """The pattern stays behind; what it asks of the model is answered alike."""
    whole, backbone = pair
    task = Task(
        name="r",
        kind="classification",
        template=("text",),
        label="y",
        labels=("bad", "good"),
        pattern=Pattern("{text} is :", {"good": "very good"}),
    )
    targets = ("attention_output", "ffn_out") if whole.config.model_type == "gpt2" else ("query", "value")
    method = LoRA(r=2, targets=targets)
    adapter = Adapter(
        name="r",
        method=method,
        params=random_params(backbone, method, std=0.1),
        head=Head.for_task(task),
        head_params={},
        task=task,
        backbone=backbone.describe(),
    )
    bank = Bank(backbone)
    bank.add("r", adapter)
    (found,) = bank.predict([("r", "the film")])
    export_adapter(adapter, backbone, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(whole), str(tmp_path / "peft")).eval()
    prompt = backbone.tokenizer("the film is :", add_special_tokens=False)["input_ids"]
    expected = []
    for answer in ("bad", "very good"):
        own = backbone.tokenizer(answer, add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + own])
        with torch.no_grad():
            expected.append(-theirs(input_ids=torch.tensor([prompt + own]), labels=labels).loss)
    torch.testing.assert_close(found.logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
