"""Law 3: the same tensors in Hugging Face PEFT and here give the same hidden states and logits.

Prefix tuning is compared on BERT, RoBERTa and ELECTRA. PEFT 0.21.2 with transformers 5.23 has none on DistilBERT
("Please specify `token_dim`") and fails on DeBERTa (the lengthened mask meets embeddings that are not lengthened).
"""

import copy

import pytest
import torch
import transformers

from multitune import (
    IA3,
    Adapter,
    Backbone,
    BackboneError,
    Bank,
    DeltaSet,
    Head,
    LayerNormTuning,
    LoRA,
    Plan,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
)

peft = pytest.importorskip("peft", reason="PEFT is not installed; pip install 'multitune[parity]'")

RELATIVE = 1e-5
MODELS = [
    "bert",
    "roberta",
    "electra",
    "distilbert",
    "deberta-v2/v3",
    "deberta-v2/conv",
    "albert",
    "mpnet",
    "bart",
    "t5",
    "t5/gated",
    "minilm",
]
LENGTHS = [6, 4, 9]


def equal(ours, theirs):
    """Largest difference, relative to the largest value."""
    assert torch.isfinite(ours).all() and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= RELATIVE * theirs.abs().max()


class Pair:
    """One base model twice: instrumented by us, and plain, for PEFT to wrap."""

    def __init__(self, backbone, random_rows):
        self.backbone = backbone
        self.ids, self.mask = random_rows(backbone, LENGTHS).padded()
        copied = backbone.clone()
        copied.detach()
        self.plain = copied.running  # the encoder of an encoder-decoder
        self.std = 0.05 if backbone.hidden_size > 100 else 0.2  # an adapter of a size that training would leave

    def peft_model(self, config):
        """A PEFT model of a copy, with every one of its own tensors random."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = peft.get_peft_model(copy.deepcopy(self.plain), config)
        self.randomise(model)
        return model.eval()

    def randomise(self, model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        own = [p for p in model.parameters() if p.requires_grad]
        assert own
        with torch.no_grad():
            for parameter in own:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * self.std)

    def theirs(self, model, **kwargs):
        with torch.no_grad():
            return model(input_ids=self.ids, attention_mask=self.mask, **kwargs).last_hidden_state

    def compare(self, model, method, params):
        """Alone, and in a batch with another adapter of the method and a bare row; then bare for contrast."""
        theirs = self.theirs(model)
        deltas = DeltaSet(method.deltas(params, self.backbone))
        other = method.init(self.backbone, torch.Generator().manual_seed(5))
        other = DeltaSet(method.deltas({k: t + 0.1 for k, t in other.items()}, self.backbone))
        fused = deltas.fused(self.backbone.dtype, self.backbone.device)
        with torch.no_grad():
            bare = self.backbone.run(Plan([None] * 3), self.ids, self.mask)
            for sets in ([deltas] * 3, [fused, other, fused], [fused, None, other]):
                ours = self.backbone.run(Plan(sets), self.ids, self.mask)
                for i, n in enumerate(LENGTHS):
                    if sets[i] in (deltas, fused):
                        equal(ours[i, :n], theirs[i, :n])
                        assert (bare[i, :n] - theirs[i, :n]).abs().max() > 100 * RELATIVE * theirs.abs().max()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, make_backbone, random_rows):
    if request.param == "minilm":
        return Pair(request.getfixturevalue("minilm"), random_rows)
    return Pair(make_backbone(request.param), random_rows)


def path_of(backbone, site):
    """The path of a site's module in the part of the model that is run."""
    return site.module.removeprefix(f"{backbone.architecture.runs}.")


def modules_of(backbone, roles):
    return sorted({path_of(backbone, s) for s in backbone.find_sites("linear", roles)})


# ---- low rank


@pytest.mark.parametrize(
    ("targets", "r", "alpha", "rank_stabilised"),
    [
        (("query", "value"), 4, 16.0, False),
        (("query", "value"), 5, 3.0, True),
        (("key", "attention_output"), 3, 8.0, False),
        (("query", "key", "value", "attention_output", "ffn_in", "ffn_out"), 2, 4.0, True),
    ],
)
def test_lora(pair, targets, r, alpha, rank_stabilised):
    modules = modules_of(pair.backbone, targets)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, use_rslora=rank_stabilised)
    model = pair.peft_model(config)
    params = {}
    for site in pair.backbone.find_sites("linear", targets):
        theirs = model.base_model.model.get_submodule(path_of(pair.backbone, site))
        params[f"{site.name}.A"] = theirs.lora_A["default"].weight.detach().T
        params[f"{site.name}.B"] = theirs.lora_B["default"].weight.detach().T
    pair.compare(model, LoRA(r=r, alpha=alpha, targets=targets, rank_stabilised=rank_stabilised), params)


@pytest.fixture(scope="module", params=["gpt2", "modernbert", "llama", "gemma2"])
def newer(request, make_backbone, random_rows):
    return Pair(make_backbone(request.param), random_rows)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_lora_on_a_module_of_several_parts(newer):
    """PEFT has one A for a fused projection: the same A at each of its parts, and the part's own rows of B."""
    targets = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
    modules = list(dict.fromkeys(modules_of(newer.backbone, targets)))
    model = newer.peft_model(peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=modules))
    params = {}
    for site in newer.backbone.find_sites("linear", targets):
        theirs = model.base_model.model.get_submodule(site.module)
        own = slice(*site.part) if site.part is not None else slice(None)
        if site.part is not None and site.role == "ffn_in":  # the gate beside it is a target of theirs, too
            gate = slice(0, site.part[0])
            with torch.no_grad():
                theirs.lora_B["default"].weight[gate] = 0
        params[f"{site.name}.A"] = theirs.lora_A["default"].weight.detach().T
        params[f"{site.name}.B"] = theirs.lora_B["default"].weight.detach()[own].T
    newer.compare(model, LoRA(r=3, alpha=6.0, targets=targets), params)


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*Norm:UserWarning")
def test_norms_without_offset(newer):
    sites = [s for s in newer.backbone.find_sites("norm") if s.role != "embedding_norm"]
    model = newer.peft_model(peft.LNTuningConfig(target_modules=[s.module for s in sites]))
    params = {}
    for site in sites:
        theirs = model.base_model.model.get_submodule(site.module).ln_tuning_layers["default"]
        frozen = newer.plain.get_submodule(site.module)
        params[f"{site.name}.gain"] = (theirs.weight - frozen.weight).detach()
        if site.bias:
            params[f"{site.name}.offset"] = (theirs.bias - frozen.bias).detach()
    newer.compare(model, LayerNormTuning(), params)


# ---- rescaled activations


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(("key", "value"), ("ffn_out",)), (("query", "ffn_in"), ("attention_output", "value"))]
)
def test_ia3(pair, outputs, inputs):
    config = peft.IA3Config(
        target_modules=modules_of(pair.backbone, outputs + inputs),
        feedforward_modules=modules_of(pair.backbone, inputs),
    )
    model = pair.peft_model(config)
    params = {}
    for site in pair.backbone.find_sites("linear", outputs + inputs):
        vector = model.base_model.model.get_submodule(path_of(pair.backbone, site)).ia3_l["default"].detach()
        params[f"{site.name}.s"] = vector.flatten() - 1
    pair.compare(model, IA3(outputs=outputs, inputs=inputs), params)


# ---- norms


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm:UserWarning")  # PEFT's own, of its own target
def test_layer_norm_tuning(pair):
    sites = pair.backbone.find_sites("norm")
    model = pair.peft_model(peft.LNTuningConfig(target_modules=sorted({path_of(pair.backbone, s) for s in sites})))
    params = {}
    for site in sites:
        theirs = model.base_model.model.get_submodule(path_of(pair.backbone, site)).ln_tuning_layers["default"]
        frozen = pair.plain.get_submodule(path_of(pair.backbone, site))
        params[f"{site.name}.gain"] = (theirs.weight - frozen.weight).detach()
        if site.bias:
            params[f"{site.name}.offset"] = (theirs.bias - frozen.bias).detach()
    in_front = any(s.role == "embedding_norm" for s in sites)
    pair.compare(model, LayerNormTuning(embedding_norm=in_front), params)


# ---- prompts


def test_prompt_tuning(pair):
    config = peft.PromptTuningConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=5,
        token_dim=pair.backbone.word_embeddings.shape[1],
        num_layers=pair.backbone.num_layers,
        num_attention_heads=pair.backbone.num_key_value_heads,
    )
    model = pair.peft_model(config)
    vectors = model.prompt_encoder["default"].embedding.weight.detach()
    theirs = pair.theirs(model)
    assert theirs.shape[1] == 5 + max(LENGTHS)  # PEFT leaves the prompt in front; we take it out again
    deltas = DeltaSet(PromptTuning(length=5).deltas({"vectors": vectors}, pair.backbone))
    other = DeltaSet(PromptTuning(length=3, position=1).deltas({"vectors": vectors[:3]}, pair.backbone))
    with torch.no_grad():
        for sets in ([deltas] * 3, [deltas, other, None], [None, deltas, other], [other, None, deltas]):
            ours = pair.backbone.run(Plan(sets), pair.ids, pair.mask)
            for i, n in enumerate(LENGTHS):
                if sets[i] is deltas:
                    equal(ours[i, :n], theirs[i, 5 : 5 + n])


@pytest.mark.parametrize("length", [2, 7])
def test_prompt_tuning_from_a_text(length, pair, tmp_path):
    """The same start, and so the same output; PEFT tokenises the text with special tokens, we without."""
    tokenizer = pair.backbone.tokenizer
    tokenizer.save_pretrained(tmp_path)
    text = "not very good film"
    config = peft.PromptTuningConfig(
        task_type="FEATURE_EXTRACTION",
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tmp_path),
        num_virtual_tokens=length,
        token_dim=pair.backbone.word_embeddings.shape[1],
        num_layers=pair.backbone.num_layers,
        num_attention_heads=pair.backbone.num_key_value_heads,
    )
    model = peft.get_peft_model(copy.deepcopy(pair.plain), config).eval()
    text = f"{tokenizer.cls_token} {text} {tokenizer.sep_token}"
    method = PromptTuning(length=length, start="text", text=text)
    params = method.init(pair.backbone, torch.Generator())
    assert torch.equal(params["vectors"], model.prompt_encoder["default"].embedding.weight)
    theirs = pair.theirs(model)
    deltas = DeltaSet(method.deltas(params, pair.backbone))
    with torch.no_grad():
        ours = pair.backbone.run(Plan([deltas, None, None]), pair.ids, pair.mask)
    equal(ours[0, : LENGTHS[0]], theirs[0, length : length + LENGTHS[0]])


def test_p_tuning(pair):
    """PEFT's LSTM encoder at the paper's width: half the embedding's in each direction."""
    width = pair.backbone.word_embeddings.shape[1]
    config = peft.PromptEncoderConfig(
        task_type="FEATURE_EXTRACTION",
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=width // 2,
        num_virtual_tokens=5,
        token_dim=width,
        num_layers=pair.backbone.num_layers,
        num_attention_heads=pair.backbone.num_key_value_heads,
    )
    model = pair.peft_model(config)
    encoder = model.prompt_encoder["default"]
    params = {
        name.replace("embedding.weight", "vectors").replace("_head", ""): t.detach()
        for name, t in encoder.named_parameters()
    }
    method = PTuningV1(pattern="{p*5} {text}", position=0)
    assert {n: t.shape for n, t in params.items()} == method.shapes(pair.backbone)
    theirs = pair.theirs(model)
    trained = DeltaSet(method.deltas(params, pair.backbone))
    finished, plain = method.finish(params, pair.backbone)
    finished = DeltaSet(finished.deltas(plain, pair.backbone))
    with torch.no_grad():
        for sets in ([trained] * 3, [finished, None, trained], [None, finished, None]):
            ours = pair.backbone.run(Plan(sets), pair.ids, pair.mask)
            for i, n in enumerate(LENGTHS):
                if sets[i] is not None:
                    equal(ours[i, :n], theirs[i, 5 : 5 + n])


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "minilm"])
def test_prefix_tuning(name, projection, make_backbone, random_rows, request):
    """PEFT lets a prefix shift the positions by its length, we do not: PEFT's copy gets its position table shifted."""
    length = 3
    backbone = request.getfixturevalue("minilm") if name == "minilm" else make_backbone(name)
    pair = Pair(backbone, random_rows)
    table = pair.plain.embeddings.position_embeddings.weight.data
    table[length:] = table[:-length].clone()
    config = peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=length, prefix_projection=projection, encoder_hidden_size=24
    )
    model = pair.peft_model(config)
    pair.randomise(model)  # they start small
    method, params = taken_over(model.prompt_encoder["default"], backbone, length, projection)
    assert {n: t.shape for n, t in params.items()} == method.shapes(backbone)
    deltas = DeltaSet(method.deltas(params, backbone))
    method, params = method.finish(params, backbone)
    fused = DeltaSet(method.deltas(params, backbone)).fused(backbone.dtype, backbone.device)
    with torch.no_grad():
        for i, n in enumerate(LENGTHS):
            ids = pair.ids[i : i + 1, :n]
            theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            for sets in ([deltas] * 3, [fused if k == i else None for k in range(3)]):
                equal(backbone.run(Plan(sets), pair.ids, pair.mask)[i, :n], theirs[0])


def taken_over(encoder, backbone, length, projection):
    """PEFT's prefix encoder as one of ours: the last map's outputs are layer by layer keys, then values."""

    def by_layer(t):
        parts = t.unflatten(-1, (backbone.num_layers, 2, -1)).unbind(-3)
        return {
            f"layer.{i}.attention.{key}": part[..., k, :]
            for i, part in enumerate(parts)
            for k, key in enumerate(("keys", "values"))
        }

    if not projection:
        return PTuningV2(length=length), by_layer(encoder.embedding.weight.detach())
    inner, _, outer = encoder.transform
    params = {
        "prefix": encoder.embedding.weight,
        "hidden.weight": inner.weight.T,
        "hidden.bias": inner.bias,
        **{f"{name}.weight": t for name, t in by_layer(outer.weight.T).items()},
        **{f"{name}.bias": t for name, t in by_layer(outer.bias).items()},
    }
    return PrefixTuning(length=length, hidden=inner.out_features), {n: t.detach() for n, t in params.items()}


# ---- logits of a whole classifier


def test_logits_of_a_classifier(make_backbone, tasks):
    """A PEFT sequence classifier, taken over as it is: LoRA, pooler and classification head."""
    backbone = make_backbone("bert")
    config = copy.deepcopy(backbone.model.config)
    config._attn_implementation, config.num_labels = "sdpa", 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.BertForSequenceClassification(config)
    base.bert.load_state_dict(backbone.model.state_dict())
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(base, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.2)
    model.eval()
    bert = model.base_model.model.bert
    params = {}
    for site in backbone.find_sites("linear", ("query", "value")):
        theirs = bert.get_submodule(site.module)
        params[f"{site.name}.A"] = theirs.lora_A["default"].weight.detach().T
        params[f"{site.name}.B"] = theirs.lora_B["default"].weight.detach().T
    classifier = model.base_model.model.classifier.modules_to_save["default"]
    adapter = Adapter(
        name="taken over",
        method=LoRA(r=4, alpha=8),
        params=params,
        head=Head.for_task(tasks["classification"], pooling="pooler"),
        head_params={"weight": classifier.weight.detach(), "bias": classifier.bias.detach()},
        task=tasks["classification"],
        backbone=backbone.describe(),
    )
    bank = Bank(backbone)
    bank.add("a", adapter)
    texts = ["good film", "not the very bad film", "x"]
    answers = bank.predict([("a", text) for text in texts] + [(None, "x")])
    for text, got in zip(texts, answers, strict=False):
        with torch.no_grad():
            theirs = model(**backbone.tokenizer(text, return_tensors="pt")).logits[0]
        equal(got.logits, theirs)


# ---- many adapters in one batch, where PEFT gives every row the active one (docs/field.md, 1.3)


def test_each_row_gets_its_own_ia3(make_backbone, random_rows):
    """PEFT drops `adapter_names` for (IA)³ without a word; its answers one adapter at a time are what is right."""
    pair = Pair(make_backbone("bert"), random_rows)
    targets, inputs = ("key", "value"), ("ffn_out",)
    config = peft.IA3Config(
        target_modules=modules_of(pair.backbone, targets + inputs),
        feedforward_modules=modules_of(pair.backbone, inputs),
    )
    sets, theirs = [], []
    for seed in range(3):
        model = pair.peft_model(config)
        pair.randomise(model, seed + 1)
        params = {
            f"{site.name}.s": model.base_model.model.get_submodule(path_of(pair.backbone, site))
            .ia3_l["default"]
            .detach()
            .flatten()
            - 1
            for site in pair.backbone.find_sites("linear", targets + inputs)
        }
        sets.append(DeltaSet(IA3().deltas(params, pair.backbone)))
        theirs.append(pair.theirs(model.eval()))
    with torch.no_grad():
        ours = pair.backbone.run(Plan(sets), pair.ids, pair.mask)
    for i, n in enumerate(LENGTHS):
        equal(ours[i, :n], theirs[i][i, :n])
        wrong = theirs[(i + 1) % 3][i, :n]  # what the row would be with its neighbour's adapter
        assert (ours[i, :n] - wrong).abs().max() > 100 * RELATIVE * wrong.abs().max()


def test_different_methods_in_one_batch(make_backbone, random_rows):
    """LoRA, (IA)³ and a prompt side by side: in PEFT three models, here one batch."""
    pair = Pair(make_backbone("roberta"), random_rows)
    backbone = pair.backbone
    lora = pair.peft_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules_of(backbone, ("query", "value"))))
    lora_params = {}
    for site in backbone.find_sites("linear", ("query", "value")):
        module = lora.base_model.model.get_submodule(site.module)
        lora_params[f"{site.name}.A"] = module.lora_A["default"].weight.detach().T
        lora_params[f"{site.name}.B"] = module.lora_B["default"].weight.detach().T
    ia3 = pair.peft_model(
        peft.IA3Config(
            target_modules=modules_of(backbone, ("key", "value", "ffn_out")),
            feedforward_modules=modules_of(backbone, ("ffn_out",)),
        )
    )
    ia3_params = {
        f"{site.name}.s": ia3.base_model.model.get_submodule(site.module).ia3_l["default"].detach().flatten() - 1
        for site in backbone.find_sites("linear", ("key", "value", "ffn_out"))
    }
    prompt = pair.peft_model(peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4))
    vectors = prompt.prompt_encoder["default"].embedding.weight.detach()
    sets = [
        DeltaSet(LoRA(r=4, alpha=8).deltas(lora_params, backbone)),
        DeltaSet(IA3().deltas(ia3_params, backbone)),
        DeltaSet(PromptTuning(length=4).deltas({"vectors": vectors}, backbone)),
    ]
    theirs = [pair.theirs(lora), pair.theirs(ia3), pair.theirs(prompt)[:, 4:]]
    with torch.no_grad():
        ours = backbone.run(Plan(sets), pair.ids, pair.mask)
    for i, n in enumerate(LENGTHS):
        equal(ours[i, :n], theirs[i][i, :n])


def test_the_backbone_is_not_theirs(make_model):
    """A model that PEFT wrapped is not a base model of the table: refused, not half instrumented."""
    wrapped = peft.get_peft_model(make_model("bert"), peft.LoraConfig(target_modules=["query"]))
    model = wrapped.base_model.model
    with pytest.raises(
        BackboneError, match=r"attention\.self\.query' is a Linear, but the table calls it a linear 'quer"
    ):
        Backbone(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
