"""Tiny language models whose next token is never in doubt, and adapters of every method on them."""

import copy
import dataclasses

import pytest
import torch
import transformers

from multitune import Backbone, DeltaSet, get_method, method_names

#: name -> transformers' class with the head.
LANGUAGE_MODELS = {
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
#: Token ids that end a text: several, so that some rows reach one.
ENDS = [11, 23, 37, 53, 71, 89]
#: Learned positions in two forms, rotary ones, windows with capped scores, and windows in some layers only.
SHAPES = ["gpt2", "opt", "llama", "gemma2", "gemma3_text"]
#: Settings that are not the defaults, so that widths differ and layers are left out.
SMALL = {
    "lora": dict(r=3, targets=("query", "value", "ffn_in")),
    "houlsby": dict(bottleneck=3),
    "prompt": dict(length=3),
    "prefix": dict(length=3, layers=(1,), reparametrise=False),
    "ptuning_v2": dict(length=5, shift_positions=True),
    "aot_fc": dict(r=2),
    "aot_kronecker": dict(r=2),
}


@pytest.fixture(scope="session")
def language_model(make_model):
    """`language_model(name, **config)`: transformers' model with a head of its own, scores far apart."""

    def make(name, **overrides):
        body = make_model(name, **({"tie_word_embeddings": False, "pad_token_id": 0} | overrides))
        whole = getattr(transformers, LANGUAGE_MODELS[name])(body.config)
        whole.base_model.load_state_dict(body.state_dict())
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(5)
            whole.get_output_embeddings().weight.normal_()
        whole.generation_config.pad_token_id = 0
        whole.generation_config.eos_token_id = ENDS
        return whole.eval()

    return make


@pytest.fixture(scope="session")
def lm(language_model, make_backbone):
    """`lm(name)`: the same model as a backbone with a tokenizer; shared."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = Backbone(copy.deepcopy(language_model(name)), make_backbone("gpt2").tokenizer, name=name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def small_method():
    """`small_method(name, backbone)`: a method with small settings that fits the backbone; `None` if none do."""

    def make(name, backbone):
        cls = get_method(name)
        given = dict(SMALL.get(name, {}))
        known = {f.name for f in dataclasses.fields(cls)}
        if "bottleneck" in known and name not in {"compacter", "compacter_pp"}:
            given.setdefault("bottleneck", 3)
        return cls(**given)

    return make


@pytest.fixture(scope="session")
def adapted(lm, small_method, random_params):
    """`adapted(name, method, seed)`: the deltas of a random adapter, as served."""
    made = {}

    def make(name, method, seed=0):
        key = (name, method, seed)
        if key not in made:
            backbone = lm(name)
            chosen = small_method(method, backbone) if isinstance(method, str) else method
            # Small changes: a model blown up by its adapters would turn roundings into other tokens.
            params = random_params(backbone, chosen, seed, std=0.1)
            made[key] = DeltaSet(chosen.deltas(params, backbone)).fused(backbone.dtype, backbone.device)
        return made[key]

    return make


@pytest.fixture(scope="session")
def mixable():
    """Names of the methods that share a batch."""
    return [name for name in method_names() if not get_method(name).changes_weights]


@pytest.fixture(scope="session")
def make_prompts():
    """`make_prompts(lengths, seed)`: rows of random ordinary token ids."""

    def make(lengths, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(12, 97, (n,), generator=generator).tolist() for n in lengths]

    return make


@pytest.fixture(scope="session")
def padded():
    """`padded(rows, side)`: ids and mask of rows, padded on one side."""

    def make(rows, side="right"):
        width = max(map(len, rows))
        ids, mask = [], []
        for row in rows:
            fill = [0] * (width - len(row))
            ids.append(row + fill if side == "right" else fill + row)
            real = [1] * len(row)
            mask.append(real + fill if side == "right" else fill + real)
        return torch.tensor(ids), torch.tensor(mask)

    return make
