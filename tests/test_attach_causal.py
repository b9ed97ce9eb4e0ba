"""Language models with an adapter attached: the Trainer, generation with and without a cache, TRL's SFTTrainer."""

import copy

import datasets
import pytest
import torch
import transformers

import multitune as mt


def language_model(make_model, name="llama"):
    """A tiny language model with a random head of its own."""
    base = make_model(name)
    config = copy.deepcopy(base.config)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, None, None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.base_model.load_state_dict(base.state_dict())
    return model.eval()


def moved(model, std=0.1):
    """The same model with its adapter away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.multitune.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@pytest.fixture(scope="module")
def rows():
    """Rows that count upwards from a random start."""
    starts = torch.randint(5, 80, (16,), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": start + torch.arange(8), "labels": start + torch.arange(8)} for start in starts]


METHODS = [mt.LoRA(r=4), mt.PromptTuning(length=3), mt.PTuningV2(length=3), mt.AoTFC(r=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_trains_its_adapter_alone(make_model, make_backbone, rows, name, method, tmp_path):
    model = mt.attach(language_model(make_model, name), method)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"multitune"}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, learning_rate=3e-2, per_device_train_batch_size=8, save_strategy="no",
        logging_steps=1, use_cpu=True, disable_tqdm=True, report_to="none",
    )  # fmt: skip
    run = transformers.Trainer(model=model, args=args, train_dataset=rows)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    changed = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    assert changed and all(k.startswith("multitune.") for k in changed)
    run.save_model(str(tmp_path / "out"))
    backbone = make_backbone(name)
    adapter = mt.Adapter.load(tmp_path / "out", backbone)
    ids = rows[0]["input_ids"][None]
    deltas = adapter.delta_set(backbone)
    with torch.no_grad():
        hidden = model.eval().base_model(input_ids=ids).last_hidden_state
        found = backbone.run(mt.Plan([deltas, None]), ids.expand(2, -1))[:1]
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_generation_is_the_same_with_and_without_a_cache(make_model, method):
    model = moved(mt.attach(language_model(make_model), method))
    ids = torch.tensor([[0, 0, 11, 12, 13], [21, 22, 23, 24, 25]])  # the first row is padded on the left
    mask = (ids != 0).long()
    settings = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    without = model.generate(ids, use_cache=False, **settings)
    if method.name == "prompt":
        with pytest.raises(mt.PlanError, match="generate with use_cache=False"):
            model.generate(ids, use_cache=True, **settings)
    else:
        assert torch.equal(model.generate(ids, use_cache=True, **settings), without)
    alone = model.generate(ids[:1, 2:], use_cache=False, **(settings | {"attention_mask": mask[:1, 2:]}))
    assert torch.equal(alone[0, 3:], without[0, 5:])
    model.detach()
    bare = model.generate(ids, use_cache=False, **settings)
    assert not torch.equal(bare, without)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses names that transformers 5.23 has deprecated
def test_trl_fine_tunes_an_attached_model(make_model, make_backbone, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed; pip install 'multitune[parity]'")
    model = mt.attach(language_model(make_model), mt.LoRA(r=4))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    tokenizer = make_backbone("llama").tokenizer
    tokenizer.eos_token = tokenizer.sep_token
    texts = [{"text": "good film not bad film"}, {"text": "the very good film"}] * 8
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=12, learning_rate=3e-2, per_device_train_batch_size=8, save_steps=6,
        logging_steps=1, use_cpu=True, disable_tqdm=True, report_to="none", max_length=16, bf16=False,
    )  # fmt: skip
    run = trl.SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(texts), processing_class=tokenizer)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.98 * sum(losses[:3])  # the head is random and frozen
    changed = {k for k, t in model.state_dict().items() if not torch.equal(t, before[k])}
    assert changed and all(k.startswith("multitune.") for k in changed)
    assert mt.Adapter.load(tmp_path / "checkpoint-12", make_backbone("llama")).method == mt.LoRA(r=4)
