"""Law 3 for LoRA's relatives: the same tensors in Hugging Face PEFT and here give the same hidden states."""

import copy

import pytest
import torch
import transformers

from multitune import AdaLoRA, DeltaSet, DoRA, LoRA, PiSSA, Plan, RsLoRA, VeRA

peft = pytest.importorskip("peft", reason="PEFT is not installed; pip install 'multitune[parity]'")

RELATIVE = 1e-5
MODELS = ["bert", "roberta", "distilbert", "deberta-v2/v3", "minilm"]
ALL = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
LENGTHS = [6, 4, 9]


class Pair:
    """One base model twice: instrumented by us, and plain, for PEFT to wrap."""

    def __init__(self, backbone, random_rows):
        self.backbone = backbone
        self.ids, self.mask = random_rows(backbone, LENGTHS).padded()
        copied = backbone.clone()
        copied.detach()
        self.plain = copied.model
        self.std = 0.05 if backbone.hidden_size > 100 else 0.2  # an adapter of a size that training would leave

    def sites(self, targets):
        return self.backbone.find_sites("linear", targets)

    def modules(self, targets):
        return [site.module for site in self.sites(targets)]

    def peft_model(self, config):
        """A PEFT model of a copy, as PEFT starts it."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(copy.deepcopy(self.plain), config).eval()

    def randomise(self, model):
        generator = torch.Generator().manual_seed(0)
        own = [p for p in model.parameters() if p.requires_grad]
        assert own
        with torch.no_grad():
            for parameter in own:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * self.std)

    def compare(self, model, method, params):
        """Alone, fused, and in a batch with another adapter of the method and a bare row."""
        with torch.no_grad():
            theirs = model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
            bare = self.backbone.run(Plan([None] * 3), self.ids, self.mask)
        deltas = DeltaSet(method.deltas(params, self.backbone))
        fresh = method.init(self.backbone, torch.Generator().manual_seed(5))
        moved = {k: t + 0.1 if method.trains(k) else t for k, t in fresh.items()}
        other = DeltaSet(method.deltas(moved, self.backbone))
        fused = deltas.fused(self.backbone.dtype, self.backbone.device)
        for sets in ([deltas] * 3, [fused, other, fused], [fused, None, other]):
            with torch.no_grad():
                ours = self.backbone.run(Plan(sets), self.ids, self.mask)
            for i, n in enumerate(LENGTHS):
                if sets[i] in (deltas, fused):
                    difference = (ours[i, :n] - theirs[i, :n]).abs().max()
                    assert torch.isfinite(ours[i, :n]).all() and difference <= RELATIVE * theirs.abs().max()
                    assert (bare[i, :n] - theirs[i, :n]).abs().max() > 100 * RELATIVE * theirs.abs().max()


@pytest.fixture(scope="module", params=MODELS)
def pair(request, make_backbone, random_rows):
    if request.param == "minilm":
        return Pair(request.getfixturevalue("minilm"), random_rows)
    return Pair(make_backbone(request.param), random_rows)


def low_rank_params(pair, model, targets):
    params = {}
    for site in pair.sites(targets):
        theirs = model.base_model.model.get_submodule(site.module)
        params[f"{site.name}.A"] = theirs.lora_A["default"].weight.detach().T
        params[f"{site.name}.B"] = theirs.lora_B["default"].weight.detach().T
    return params


def test_rslora(pair):
    targets = ("query", "value")
    model = pair.peft_model(peft.LoraConfig(r=5, lora_alpha=3.0, target_modules=pair.modules(targets), use_rslora=True))
    pair.randomise(model)
    pair.compare(model, RsLoRA(r=5, alpha=3.0), low_rank_params(pair, model, targets))


def test_lora_on_the_word_embeddings(pair):
    (site,) = pair.backbone.find_sites("embedding")
    targets = ("query",)
    config = peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=[site.module, *pair.modules(targets)])
    model = pair.peft_model(config)
    pair.randomise(model)
    theirs = model.base_model.model.get_submodule(site.module)
    params = low_rank_params(pair, model, targets)
    params["embedding.A"] = theirs.lora_embedding_A["default"].detach().T
    params["embedding.B"] = theirs.lora_embedding_B["default"].detach().T
    pair.compare(model, LoRA(r=3, alpha=6.0, targets=("embedding", *targets)), params)


@pytest.mark.parametrize(("targets", "r", "alpha"), [(("query", "value"), 4, 8.0), (ALL, 3, 3.0)])
def test_dora(pair, targets, r, alpha):
    model = pair.peft_model(peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=pair.modules(targets), use_dora=True))
    pair.randomise(model)
    params = low_rank_params(pair, model, targets)
    for site in pair.sites(targets):
        magnitude = model.base_model.model.get_submodule(site.module).lora_magnitude_vector["default"].weight.detach()
        params[f"{site.name}.m"] = magnitude - pair.backbone.frozen(site.name).weight.detach().norm(dim=1)
    pair.compare(model, DoRA(r=r, alpha=alpha, targets=targets), params)


def test_dora_gradients(make_backbone, random_rows):
    """PEFT takes the norm for a constant in the backward pass, and so do we."""
    pair = Pair(make_backbone("bert"), random_rows)
    targets = ("query", "value")
    model = pair.peft_model(peft.LoraConfig(r=2, lora_alpha=4, target_modules=pair.modules(targets), use_dora=True))
    pair.randomise(model)
    model(input_ids=pair.ids).last_hidden_state.square().sum().backward()
    params = low_rank_params(pair, model, targets)
    expected = {}
    for site in pair.sites(targets):
        theirs = model.base_model.model.get_submodule(site.module)
        magnitude = theirs.lora_magnitude_vector["default"].weight
        params[f"{site.name}.m"] = magnitude.detach() - pair.backbone.frozen(site.name).weight.detach().norm(dim=1)
        expected[f"{site.name}.A"] = theirs.lora_A["default"].weight.grad.T
        expected[f"{site.name}.B"] = theirs.lora_B["default"].weight.grad.T
        expected[f"{site.name}.m"] = magnitude.grad
    params = {k: t.clone().requires_grad_() for k, t in params.items()}
    deltas = DeltaSet(DoRA(r=2, alpha=4.0).deltas(params, pair.backbone))
    pair.backbone.run(Plan([deltas] * 3), pair.ids).square().sum().backward()
    for name, gradient in expected.items():
        assert (params[name].grad - gradient).abs().max() <= 1e-4 * gradient.abs().max()


@pytest.mark.parametrize("targets", [("query", "value"), ALL])
def test_vera(pair, targets):
    """The random matrices are not taken over: the same seed makes the same ones, smaller sites' parts included."""
    config = peft.VeraConfig(r=24, target_modules=pair.modules(targets), projection_prng_key=11, d_initial=0.3)
    model = pair.peft_model(config)
    method = VeRA(r=24, seed=11, d_initial=0.3, targets=targets)
    fresh = method.init(pair.backbone, torch.Generator())
    params = {}
    for site in pair.sites(targets):
        theirs = model.base_model.model.get_submodule(site.module)
        assert torch.equal(theirs.vera_lambda_d["default"], fresh[f"{site.name}.d"])
        assert torch.equal(theirs.vera_lambda_b["default"], fresh[f"{site.name}.b"])
    pair.randomise(model)
    for site in pair.sites(targets):
        theirs = model.base_model.model.get_submodule(site.module)
        params[f"{site.name}.d"] = theirs.vera_lambda_d["default"].detach()
        params[f"{site.name}.b"] = theirs.vera_lambda_b["default"].detach()
    pair.compare(model, method, params)


@pytest.mark.parametrize("alpha", [4.0, 12.0])
def test_pissa(pair, alpha):
    targets = ("query", "value")
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=pair.modules(targets), init_lora_weights="pissa")
    model = pair.peft_model(config)
    method = PiSSA(r=4, alpha=alpha)
    ours = method.init(pair.backbone, torch.Generator())
    starts = {k: t.clone() for k, t in low_rank_params(pair, model, targets).items()}
    for site in pair.sites(targets):  # the product, since the sign of a singular vector is free
        theirs = starts[f"{site.name}.A"] @ starts[f"{site.name}.B"]
        product = ours[f"{site.name}.A_start"] @ ours[f"{site.name}.B_start"]
        assert (product - theirs).abs().max() <= RELATIVE * theirs.abs().max()
    pair.randomise(model)
    now = low_rank_params(pair, model, targets)
    params = {f"{name}_start": t for name, t in starts.items()}
    params |= {f"{name}_change": t - starts[name] for name, t in now.items()}
    pair.compare(model, method, params)


def adalora_model(pair, config, base=None):
    model = pair.peft_model(config) if base is None else peft.get_peft_model(base, config).eval()
    pair.randomise(model)
    return model


def adalora_params(pair, model, targets, prefix=""):
    params = {}
    for site in pair.sites(targets):
        theirs = model.base_model.model.get_submodule(prefix + site.module)
        params[f"{site.name}.A"] = theirs.lora_A["default"].detach().T
        params[f"{site.name}.E"] = theirs.lora_E["default"].detach().flatten()
        params[f"{site.name}.B"] = theirs.lora_B["default"].detach().T
    return params


def test_adalora(pair):
    targets = ("query", "key", "ffn_in")
    modules = pair.modules(targets)
    model = adalora_model(pair, peft.AdaLoraConfig(init_r=5, lora_alpha=7, target_modules=modules, total_step=10))
    pair.compare(model, AdaLoRA(r=5, target_r=2, alpha=7.0, targets=targets), adalora_params(pair, model, targets))


def test_the_penalty_of_adalora(make_backbone, random_rows):
    """PEFT adds it to the loss of its forward pass: its loss with a weight, less that without."""
    pair = Pair(make_backbone("bert"), random_rows)
    config = copy.deepcopy(pair.plain.config)
    config.num_labels = 2
    losses = {}
    for weight in (0.5, 0.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = transformers.BertForSequenceClassification(config)
        adalora = peft.AdaLoraConfig(
            init_r=3, target_modules=["query", "value"], total_step=10, orth_reg_weight=weight, task_type="SEQ_CLS"
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = adalora_model(pair, adalora, base)
        with torch.no_grad():
            outputs = model(input_ids=pair.ids, attention_mask=pair.mask, labels=torch.tensor([0, 1, 0]))
        losses[weight] = float(outputs.loss)
    params = adalora_params(pair, model, ("query", "value"), prefix="bert.")
    ours = AdaLoRA(r=3, target_r=2, orthogonality=0.5).penalty(params)
    assert float(ours) == pytest.approx(losses[0.5] - losses[0.0], rel=1e-5)


def test_the_scores_of_adalora(make_backbone, random_rows):
    """PEFT's rank allocator, fed with the same gradients, keeps the same triplets."""
    pair = Pair(make_backbone("bert"), random_rows)
    targets = ("query", "value")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=1, tfinal=4, deltaT=100, total_step=10, beta1=0.8, beta2=0.7,
        target_modules=pair.modules(targets),
    )  # fmt: skip
    model = adalora_model(pair, config)
    allocator = model.base_model.rankallocator
    method = AdaLoRA(
        r=4, target_r=2, initial_share=0.1, final_share=0.4, interval=100, beta1=0.8, beta2=0.7, targets=targets
    )
    params = method.init(pair.backbone, torch.Generator()) | adalora_params(pair, model, targets)
    params = {k: torch.nn.Parameter(t.clone(), requires_grad=method.trains(k)) for k, t in params.items()}
    generator = torch.Generator().manual_seed(3)
    last = method.last_pruning(10)
    assert last == 10 - config.tfinal
    with torch.no_grad():
        for step in range(1, last + 1):
            for site in pair.sites(targets):
                theirs = model.base_model.model.get_submodule(site.module)
                for key, own in (("A", theirs.lora_A), ("E", theirs.lora_E), ("B", theirs.lora_B)):
                    mine = params[f"{site.name}.{key}"]
                    mine.grad = torch.randn(mine.shape, generator=generator)
                    own["default"].grad = (mine.grad.T if key != "E" else mine.grad[:, None]).clone()
            if step < last:
                allocator.update_ipt(model.base_model.model)
                method._observe(params)
        pattern = allocator.mask_to_budget(model.base_model.model, 2 * len(pair.sites(targets)))
        for tensors in params.values():
            tensors.grad = None  # PEFT scores up to the step before the last pruning, we up to that one
        method.after_step(params, last, 10)
    masks = {name: torch.tensor(mask) for name, mask in pattern.items()}
    for site in pair.sites(targets):
        (mask,) = (m for name, m in masks.items() if site.module in name)
        assert torch.equal(params[f"{site.name}.kept"].bool(), mask)
        assert torch.equal(params[f"{site.name}.E"] != 0, mask)
