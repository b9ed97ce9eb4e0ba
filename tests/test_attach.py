"""An attached model trains under transformers' own Trainer, and what it leaves is an adapter like any other."""

import copy
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file

import multitune as mt

ROWS = 24


def classifier(make_model, name="bert", num_labels=2, **config):
    """A tiny sequence classifier with a random head, without dropout."""
    base = make_model(name)
    settings = copy.deepcopy(base.config)
    settings.num_labels = num_labels
    for key, value in config.items():
        setattr(settings, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(settings)
    model.base_model.load_state_dict(base.state_dict(), strict=False)
    return model.eval()


@pytest.fixture(scope="module")
def rows():
    """Rows whose label is whether their ids are large."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(ROWS):
        ids = torch.randint(11 + 40 * (i % 2), 50 + 40 * (i % 2), (8,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.long), "labels": i % 2})
    return made


def trainer(model, rows, folder, **more):
    settings = dict(
        num_train_epochs=8, learning_rate=2e-2, per_device_train_batch_size=8, save_strategy="no", report_to="none"
    )
    args = transformers.TrainingArguments(
        output_dir=str(folder), disable_tqdm=True, logging_steps=1, use_cpu=True, seed=0, **(settings | more)
    )
    return transformers.Trainer(model=model, args=args, train_dataset=rows)


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def recompute(model, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated for another name since transformers 5.23
        model.gradient_checkpointing_enable(settings)


METHODS = [
    mt.LoRA(r=4),
    mt.IA3(),
    mt.BitFit(),
    mt.Pfeiffer(),
    mt.PromptTuning(length=3),
    mt.PTuningV2(length=3, shift_positions=True),
    mt.AoTFC(r=2),
    mt.HeadOnly(),
    mt.Combined(methods=(mt.LoRA(r=2), mt.BitFit())),
    mt.DSEE(r=2, num_sparse=9),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_trainer_trains_the_adapter_and_the_head_alone(make_model, make_backbone, rows, method, tmp_path):
    model = classifier(make_model)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    assert mt.attach(model, method) is model and isinstance(model, transformers.BertForSequenceClassification)
    run = trainer(model, rows, tmp_path / "run", num_train_epochs=8 if method.name == "lora" else 2)
    run.train()
    found = losses(run)
    assert found[-1] < found[0] / 2 if method.name == "lora" else len(found) == 6
    after = model.state_dict()
    assert set(before) == {k for k in after if not k.startswith("multitune.")}
    moved = {k for k, t in before.items() if not torch.equal(t, after[k])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} - moved == {
        f"multitune.{n}" for n, _ in model.multitune.named_parameters() if method.trains(n.replace("/", "."))
    }

    run.save_model(str(tmp_path / "adapter"))
    backbone = make_backbone("bert")
    adapter = mt.Adapter.load(tmp_path / "adapter", backbone)
    bank = mt.Bank(backbone)
    bank.add("a", adapter)
    fresh = method.init(backbone, torch.Generator().manual_seed(0))
    assert {k: t.dtype for k, t in adapter.params.items()} == {k: t.dtype for k, t in fresh.items()}
    assert adapter.method == method and adapter.task.labels == ("LABEL_0", "LABEL_1")
    texts = ["good film", "not the very bad film"]
    model.eval()
    for text, answer in zip(texts, bank.predict([("a", t) for t in texts] + [(None, "x")]), strict=False):
        with torch.no_grad():
            logits = model(**backbone.tokenizer(text, return_tensors="pt")).logits[0]
        torch.testing.assert_close(answer.logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra", "deberta-v2/v3"])
def test_heads_of_every_kind_are_saved_with_the_adapter(make_model, make_backbone, name, tmp_path):
    model = mt.attach(classifier(make_model, name, num_labels=3), mt.LoRA(r=2))
    with torch.no_grad():
        for parameter in model.multitune.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.save_pretrained(tmp_path)
    backbone = make_backbone(name)
    bank = mt.Bank(backbone)
    bank.add("a", tmp_path)
    with torch.no_grad():
        expected = model(**backbone.tokenizer("not bad", return_tensors="pt", return_token_type_ids=False)).logits[0]
    torch.testing.assert_close(bank.predict([("a", "not bad")])[0].logits, expected, rtol=1e-4, atol=1e-5)


def test_a_saved_adapter_reads_and_cuts_rows_as_it_was_told_the_loop_does(make_model, make_backbone, tmp_path):
    with pytest.raises(mt.ConfigError, match="max_length=0 is not possible; give the tokens"):
        mt.attach(classifier(make_model), mt.LoRA(r=2), max_length=0)
    with pytest.raises(mt.TaskError, match="a template has one or two parts, not 3"):
        mt.attach(classifier(make_model), mt.LoRA(r=2), template=("a", "b", "c"))
    tagger = transformers.AutoModelForTokenClassification.from_config(make_model("bert").config)
    with pytest.raises(mt.TaskError, match="the template of tagging is one column"):  # and not when it is saved
        mt.attach(tagger, mt.LoRA(r=2), template=("premise", "hypothesis"))
    mt.attach(tagger, mt.LoRA(r=2), template="tokens").detach()
    model = mt.attach(classifier(make_model), mt.LoRA(r=2), template=("premise", "hypothesis"), max_length=6)
    model.save_pretrained(tmp_path)
    bank = mt.Bank(make_backbone("bert"))
    bank.add("a", tmp_path)
    tokenizer = bank.backbone.tokenizer
    row = {"premise": "good film " * 8, "hypothesis": "bad"}
    with torch.no_grad():
        expected = model(**tokenizer(*row.values(), truncation=True, max_length=6, return_tensors="pt")).logits[0]
    torch.testing.assert_close(bank.predict([("a", row)])[0].logits, expected, rtol=1e-4, atol=1e-5)


def test_checkpoints_of_the_trainer_resume_to_the_same_tensors(make_model, rows, tmp_path):
    settings = dict(num_train_epochs=2, save_strategy="epoch")
    whole = trainer(mt.attach(classifier(make_model), mt.LoRA(r=2)), rows, tmp_path / "whole", **settings)
    whole.train()
    (first, last) = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert mt.Adapter.load(first).method == mt.LoRA(r=2)
    assert all(k.startswith(("multitune.", "classifier.")) for k in load_file(first / "model.safetensors"))
    rest = trainer(mt.attach(classifier(make_model), mt.LoRA(r=2), seed=5), rows, tmp_path / "rest", **settings)
    rest.train(resume_from_checkpoint=str(first))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(rest.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert mt.Adapter.load(last).params.keys() == mt.Adapter.load(first).params.keys()


@pytest.mark.parametrize("method", [mt.LoRA(r=2), mt.PTuningV2(length=2), mt.AoTFC(r=2)], ids=lambda m: m.name)
def test_recomputed_layers_give_the_same_gradients(make_model, rows, method):
    gradients = []
    batch = {k: torch.stack([torch.as_tensor(r[k]) for r in rows[:4]]) for k in rows[0]}
    for checkpointing in (False, True):
        model = mt.attach(classifier(make_model), method).train()
        if checkpointing:
            recompute(model, use_reentrant=False)
            assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(g.abs().max() > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_trainer_recomputes_too(make_model, rows, tmp_path):
    name = "activation_checkpointing"  # its name since transformers 5.23
    if not hasattr(transformers.TrainingArguments, name):
        name = "gradient_checkpointing"
    found = []
    for more in ({}, {name: True, f"{name}_kwargs": {"use_reentrant": False}}):
        run = trainer(mt.attach(classifier(make_model), mt.LoRA(r=2)), rows, tmp_path, max_steps=3, **more)
        run.train()
        found.append(losses(run))
        assert any(getattr(m, "gradient_checkpointing", False) for m in run.model.modules()) == bool(more)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    with pytest.raises(mt.ConfigError, match="use_reentrant=False"):
        recompute(mt.attach(classifier(make_model), mt.LoRA(r=2)), use_reentrant=True)


def test_detaching_restores_the_model(make_model, rows):
    model = classifier(make_model)
    batch = {k: torch.stack([torch.as_tensor(r[k]) for r in rows[:4]]) for k in rows[0]}
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    state, attributes, modules = copy.deepcopy(model.state_dict()), set(vars(model)), list(dict(model.named_modules()))
    base = set(vars(model.bert))
    with torch.no_grad():
        bare = model(**batch).logits
        mt.attach(model, mt.PromptTuning(length=2))
        assert not torch.equal(model(**batch).logits, bare)
        model.detach()
        assert torch.equal(model(**batch).logits, bare)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert model.state_dict().keys() == state.keys() and list(dict(model.named_modules())) == modules
    assert set(vars(model)) == attributes and set(vars(model.bert)) == base
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    with pytest.raises(mt.BackboneError, match="nothing is attached"):
        mt.detach(model)
    mt.detach(mt.attach(model, mt.LoRA(r=2)))  # and again


def test_a_model_without_a_head_embeds(make_model, make_backbone, rows, tmp_path):
    model = mt.attach(make_model("bert").eval(), mt.LoRA(r=2))
    with torch.no_grad():
        for parameter in model.multitune.parameters():
            parameter.add_(0.1)
        hidden = model(input_ids=rows[0]["input_ids"][None]).last_hidden_state[0]
    model.save_pretrained(tmp_path)
    backbone = make_backbone("bert")
    adapter = mt.Adapter.load(tmp_path, backbone)
    assert adapter.task.kind == "embedding" and adapter.num_head_parameters == 0
    deltas = adapter.delta_set(backbone)
    with torch.no_grad():
        found = backbone.run(mt.Plan([None, deltas]), rows[0]["input_ids"].expand(2, -1))[1]
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)
    bank = mt.Bank(backbone)
    bank.add("a", adapter)
    mixed = bank.predict([("a", "good film"), (None, "good film")])
    assert mixed[0].embedding.shape == (32,) and not torch.allclose(mixed[0].embedding, mixed[1].embedding, atol=1e-3)
    assert mixed[0].to_dict()["adapter"] == "a" and mixed[0].label is None


def test_a_head_of_several_numbers_is_left_out(make_model, make_backbone, tmp_path):
    model = mt.attach(classifier(make_model, num_labels=2, problem_type="regression"), mt.LoRA(r=2))
    model.save_pretrained(tmp_path)
    assert mt.Adapter.load(tmp_path, make_backbone("bert")).task.kind == "embedding"


def test_a_method_that_needs_more_of_its_loop_is_refused(make_model):
    model = classifier(make_model)
    with pytest.raises(mt.ConfigError, match="calls its after_step"):
        mt.attach(model, mt.AdaLoRA())
    with pytest.raises(mt.ConfigError, match="another learning rate for 'layer.0.query.B'"):
        mt.attach(model, mt.LoRAPlus())
    both = mt.Combined(methods=(mt.BitFit(), mt.LoRAPlus()))
    with pytest.raises(mt.ConfigError, match="^LoRA. wants another learning rate for 'lora_plus.layer.0.query.B'"):
        mt.attach(model, both)
    with pytest.raises(mt.ConfigError, match="^SIFT needs a loop that calls its calibrate"):
        mt.attach(model, mt.Combined(methods=(mt.BitFit(), mt.SIFT())))
    with pytest.raises(mt.ConfigError, match="^DSEE needs a loop that calls its after_step"):
        mt.attach(model, mt.DSEE(pruned_heads=0.25))
    mt.detach(mt.attach(model, mt.LoRA()))


ENCODER_DECODERS = [
    ("bart", "BartForSequenceClassification", {"eos_token_id": 3}),
    ("bart/writes", "", {}),
    ("t5/writes", "", {}),
    ("t5", "", {}),
]


@pytest.mark.parametrize(("name", "class_name", "config"), ENCODER_DECODERS)
def test_an_encoder_with_a_decoder_is_refused_by_name(make_model, name, class_name, config):
    model = make_model(name, class_name=class_name, **config)
    model.config.name_or_path = "folder/model"
    words = rf"a {type(model).__name__} has an encoder and a decoder.*Backbone\.load\('folder/model\+decoder'\)"
    with pytest.raises(mt.BackboneError, match=words):
        mt.attach(model, mt.LoRA(r=2))
    assert all(p.requires_grad for p in model.parameters()) and "multitune" not in model._modules


def test_the_encoder_of_an_encoder_decoder_alone_is_attached(make_model, make_backbone, random_rows):
    model = mt.attach(make_model("t5/eager").eval(), mt.LoRA(r=2))
    ids = random_rows(make_backbone("t5/eager"), [6]).padded()[0]
    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
        for parameter in model.multitune.parameters():
            parameter.add_(0.1)
        assert not torch.allclose(model(input_ids=ids).last_hidden_state, before, atol=1e-3)


def test_what_cannot_be_honoured_is_refused(make_model, rows):
    model = classifier(make_model)
    with pytest.raises(mt.ConfigError, match="trains the model's own weights"):
        mt.attach(model, mt.FullFineTuning())
    with pytest.raises(mt.ConfigError, match="no linear site has the role 'quer'"):
        mt.attach(model, mt.LoRA(targets=("quer",)))
    assert all(p.requires_grad for p in model.parameters())  # a refusal leaves the model as it was
    mt.attach(model, mt.PromptTuning(length=2))
    with pytest.raises(mt.BackboneError, match="detach it first"):
        mt.attach(model, mt.LoRA(r=2))
    ids = rows[0]["input_ids"][None]
    with pytest.raises(mt.PlanError, match="input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(mt.PlanError, match="output_hidden_states cannot be honoured"):
        model(input_ids=ids, output_hidden_states=True)
    with pytest.raises(mt.PlanError, match="position_ids that do not count"):
        model(input_ids=ids, position_ids=1 + torch.arange(8)[None])
    with torch.no_grad():  # the ordinary ones say nothing new
        ordinary = model(input_ids=ids, position_ids=torch.arange(8)[None]).logits
        assert torch.equal(ordinary, model(input_ids=ids).logits)
