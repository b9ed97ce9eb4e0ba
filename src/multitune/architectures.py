"""Where each architecture keeps its sites: one table, and nothing else knows a model's module names.

To support another architecture, add one `Architecture` row below. Paths are relative to one layer unless
they say "model"; `sites.find_sites` refuses a row whose paths do not exist in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from multitune.errors import BackboneError, suggest

AttentionKind = Literal["interface", "biased", "disentangled", "disentangled_fused"]
NormKind = Literal["layer", "rms"]


@dataclass(frozen=True, kw_only=True)
class SubLayer:
    """Where a sub-layer (attention or feed-forward) begins and ends inside one layer."""

    enters: str
    """Module whose first argument is the sub-layer's input."""
    leaves: str
    """Module whose output is the sub-layer's output, before the residual sum and the norm."""


@dataclass(frozen=True)
class Part:
    """One of several equally wide maps that a model computes with one module, side by side in its output.

    Either each map's features lie together, or the maps take turns head by head.
    """

    module: str
    """Layer path of the module."""
    index: int
    """Which of them, from 0."""
    of: int
    """How many there are."""
    heads: str | None = None
    """Where they take turns head by head: attribute of the config that counts the heads."""
    bias: str | None = None
    """Layer path of this part's bias, where the model keeps it outside the module and adds it later."""


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What one attention of a layer consists of, and the feed-forward if it comes with it; as in `Architecture`."""

    linears: Mapping[str, str | Part]
    norms: Mapping[str, str]
    sublayers: Mapping[str, SubLayer]
    attention: str


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The module names of an encoder-decoder's decoder; where they mean the same, as in `Architecture`."""

    runs: str = "decoder"
    """Model path of the module that runs by itself once the encoder has run."""
    layers: str
    embedding: str
    embedding_norms: Mapping[str, str] = field(default_factory=dict)
    final_norms: Mapping[str, str] = field(default_factory=dict)
    own: LayerParts
    """Attention among the decoder's own tokens, and the feed-forward."""
    cross: LayerParts
    """Attention to what the encoder gives."""
    heads: str
    """Attribute of the config that counts the heads of both."""
    positions: str | None = None
    """Model path of a table of learned positions, which counts from its attribute `offset`; `None` where there is
    none."""
    logit_scale: str | None = None
    """Attribute of the config that says whether what a tied head reads is divided by the root of its width."""
    logit_bias: str | None = None
    """Attribute of the language model that holds what is added to all logits, `[1, V]`."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The module names of one family of models."""

    model_types: tuple[str, ...]
    """`config.model_type` values this row serves."""
    when: str | None = None
    """Attribute of the config that must be true for this row, which then stands before the type's general row."""
    layers: str
    """Model path of the `ModuleList` of layers."""
    layer_order: Callable[[Any], tuple[str, ...]] | None = None
    """Where one module runs as several layers: from the config, the path below `layers` of every layer as it runs."""
    runs: str = ""
    """Model path of the module that is run: of an encoder-decoder the encoder; empty for the whole model."""
    embedding: str
    """Model path of the word embedding."""
    embedding_norms: Mapping[str, str] = field(default_factory=dict)
    """Role -> model path of the norms in front of the first layer."""
    final_norms: Mapping[str, str] = field(default_factory=dict)
    """Role -> model path of the norms behind the last layer."""
    linears: Mapping[str, str | Part]
    """Role -> layer path, or the part of a module. Roles: query, key, value, attention_output, ffn_in, ffn_out, and
    where the feed-forward is gated ffn_gate, the branch that passes the activation."""
    norms: Mapping[str, str]
    """Role -> layer path. Roles: attention_norm, ffn_norm, and where the sub-layers' outputs are normed too
    attention_post_norm, ffn_post_norm. A layer whose module there has no gain (an identity) has no such site."""
    norm_kind: NormKind = "layer"
    """`layer`: subtract the mean, divide by the standard deviation; `rms`: divide by the root mean square."""
    post_norm: bool = False
    """Whether a sub-layer's output is added to that sub-layer's input, and the sum is what the sub-layer's norm reads;
    models that norm in front of a sub-layer add its output to what they normed."""
    sublayers: Mapping[str, SubLayer]
    """Role -> sub-layer. Roles: attention, ffn."""
    attention: str
    """Layer path of the module that computes attention from query, key and value."""
    attention_kind: AttentionKind = "interface"
    """`interface`: goes through transformers' attention interface; `biased`: the model's own, with a position bias
    that its encoder hands down; `disentangled`: DeBERTa-v2's own; `disentangled_fused`: that of the first DeBERTa."""
    pooler: str | None = None
    """Model path of a pretrained pooler over the first token, if the model has one."""
    pooler_activation: str | None = None
    """Where the pooler is a bare linear map: model path of the activation behind it."""
    masked_head: tuple[str, ...] = ()
    """Paths in transformers' masked language model of this type: the modules of its head, in the order they run."""
    position_offset: int | Literal["pad+1"] = 0
    """First position id: 0, or `pad+1` where positions count from the padding id."""
    causal: bool = False
    """Whether a token sees only itself and what stands before it."""
    own_positions: bool = False
    """Whether positions count from a row's first real token when the row is padded on the left. Rotary models need
    it although they see distances only: a memory has no position, so queries meet it at their absolute ones."""
    output_size: str = "hidden_size"
    """Attribute of the config that holds the width of the last hidden states."""
    logit_softcap: str | None = None
    """Causal models: attribute of the config that holds c where logits are `c · tanh(logits / c)`."""
    max_length: int | None = None
    """Longest sequence in positions where the model has no position table; `config.max_position_embeddings`, where
    there is one, goes before it."""
    positions: str | None = None
    """Encoders: model path of the table of learned absolute positions; `None` where positions are of another kind."""
    token_types: str | None = None
    """Model path of the table of token types that is added where the positions are."""
    decoder: Decoder | None = None
    """Encoder-decoders: where the decoder keeps its sites; a backbone that runs the encoder alone drops it."""
    first_token: bool = True
    """Whether rows begin with a token that stands for the whole row; without one, `mean` is the pooling to use."""


def _albert_order(config: Any) -> tuple[str, ...]:
    """ALBERT (Lan et al. 2019, arXiv 1909.11942, section 3.1) runs each group of layers several times in a row."""
    passes_per_group = config.num_hidden_layers / config.num_hidden_groups
    return tuple(
        f"{int(i / passes_per_group)}.albert_layers.{j}"
        for i in range(config.num_hidden_layers)
        for j in range(config.inner_group_num)
    )


_BERT_LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}
_BERT_NORMS = {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"}
_BERT_SUBLAYERS = {
    "attention": SubLayer(enters="attention.self", leaves="attention.output.dropout"),
    "ffn": SubLayer(enters="intermediate.dense", leaves="output.dropout"),
}
_BART_LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.out_proj",
    "ffn_in": "fc1",
    "ffn_out": "fc2",
}
_BART_NORMS = {"attention_norm": "self_attn_layer_norm", "ffn_norm": "final_layer_norm"}
_BART_SUBLAYERS = {
    "attention": SubLayer(enters="self_attn", leaves="self_attn.out_proj"),
    "ffn": SubLayer(enters="fc1", leaves="fc2"),
}
_BART_CROSS = "encoder_attn"
_BART_DECODER = Decoder(
    layers="decoder.layers",
    embedding="decoder.embed_tokens",
    embedding_norms={"embedding_norm": "decoder.layernorm_embedding"},
    own=LayerParts(linears=_BART_LINEARS, norms=_BART_NORMS, sublayers=_BART_SUBLAYERS, attention="self_attn"),
    cross=LayerParts(
        linears={
            "query": f"{_BART_CROSS}.q_proj",
            "key": f"{_BART_CROSS}.k_proj",
            "value": f"{_BART_CROSS}.v_proj",
            "attention_output": f"{_BART_CROSS}.out_proj",
        },
        norms={"attention_norm": "encoder_attn_layer_norm"},
        sublayers={"attention": SubLayer(enters=_BART_CROSS, leaves=f"{_BART_CROSS}.out_proj")},
        attention=_BART_CROSS,
    ),
    heads="decoder_attention_heads",
    positions="decoder.embed_positions",
    logit_bias="final_logits_bias",
)
_LLAMA_LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_in": "mlp.up_proj",
    "ffn_out": "mlp.down_proj",
}
_LLAMA_SUBLAYERS = {
    "attention": SubLayer(enters="self_attn", leaves="self_attn.o_proj"),
    "ffn": SubLayer(enters="mlp", leaves="mlp.down_proj"),
}
_T5_FFN = "layer.1.DenseReluDense"


def _t5_attention(path: str) -> dict[str, str | Part]:
    return {"query": f"{path}.q", "key": f"{path}.k", "value": f"{path}.v", "attention_output": f"{path}.o"}


def _t5_ffn(path: str, gated: bool) -> dict[str, str | Part]:
    if gated:
        return {"ffn_gate": f"{path}.wi_0", "ffn_in": f"{path}.wi_1", "ffn_out": f"{path}.wo"}
    return {"ffn_in": f"{path}.wi", "ffn_out": f"{path}.wo"}


def _t5_decoder(gated: bool) -> Decoder:
    own, cross, ffn = "layer.0.SelfAttention", "layer.1.EncDecAttention", "layer.2.DenseReluDense"
    return Decoder(
        layers="decoder.block",
        embedding="decoder.embed_tokens",
        final_norms={"final_norm": "decoder.final_layer_norm"},
        own=LayerParts(
            linears=_t5_attention(own) | _t5_ffn(ffn, gated),
            norms={"attention_norm": "layer.0.layer_norm", "ffn_norm": "layer.2.layer_norm"},
            sublayers={
                "attention": SubLayer(enters=own, leaves="layer.0.dropout"),
                "ffn": SubLayer(enters=ffn, leaves="layer.2.dropout"),
            },
            attention=own,
        ),
        cross=LayerParts(
            linears=_t5_attention(cross),
            norms={"attention_norm": "layer.1.layer_norm"},
            sublayers={"attention": SubLayer(enters=cross, leaves="layer.1.dropout")},
            attention=cross,
        ),
        heads="num_heads",
        logit_scale="scale_decoder_outputs",
    )


_T5 = Architecture(
    model_types=("t5",),
    runs="encoder",
    layers="encoder.block",
    embedding="encoder.embed_tokens",
    final_norms={"final_norm": "encoder.final_layer_norm"},
    linears=_t5_attention("layer.0.SelfAttention") | _t5_ffn(_T5_FFN, gated=False),
    norms={"attention_norm": "layer.0.layer_norm", "ffn_norm": "layer.1.layer_norm"},
    norm_kind="rms",
    sublayers={
        "attention": SubLayer(enters="layer.0.SelfAttention", leaves="layer.0.dropout"),
        "ffn": SubLayer(enters=_T5_FFN, leaves="layer.1.dropout"),
    },
    attention="layer.0.SelfAttention",
    max_length=2048,
    decoder=_t5_decoder(gated=False),
    first_token=False,
)
_DEBERTA_FUSED = "attention.self.in_proj"
_EMBEDDING = "embeddings.word_embeddings"
_EMBEDDING_NORM = {"embedding_norm": "embeddings.LayerNorm"}
_POSITIONS, _TOKEN_TYPES = "embeddings.position_embeddings", "embeddings.token_type_embeddings"

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_types=("bert",),
        masked_head=("cls",),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears=_BERT_LINEARS,
        norms=_BERT_NORMS,
        post_norm=True,
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
        pooler="pooler",
        positions=_POSITIONS,
        token_types=_TOKEN_TYPES,
    ),
    Architecture(
        model_types=("roberta", "xlm-roberta"),
        masked_head=("lm_head",),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears=_BERT_LINEARS,
        norms=_BERT_NORMS,
        post_norm=True,
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
        pooler="pooler",
        position_offset="pad+1",
        positions=_POSITIONS,
        token_types=_TOKEN_TYPES,
    ),
    Architecture(
        model_types=("electra",),
        masked_head=("generator_predictions", "generator_lm_head"),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears=_BERT_LINEARS,
        norms=_BERT_NORMS,
        post_norm=True,
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
        positions=_POSITIONS,
        token_types=_TOKEN_TYPES,
    ),
    Architecture(
        model_types=("distilbert",),
        masked_head=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        layers="transformer.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears={
            "query": "attention.q_lin",
            "key": "attention.k_lin",
            "value": "attention.v_lin",
            "attention_output": "attention.out_lin",
            "ffn_in": "ffn.lin1",
            "ffn_out": "ffn.lin2",
        },
        norms={"attention_norm": "sa_layer_norm", "ffn_norm": "output_layer_norm"},
        post_norm=True,
        sublayers={
            "attention": SubLayer(enters="attention", leaves="attention.out_lin"),
            "ffn": SubLayer(enters="ffn.lin1", leaves="ffn.dropout"),
        },
        attention="attention",
        positions=_POSITIONS,
    ),
    Architecture(
        model_types=("deberta-v2",),  # DeBERTa-v3 checkpoints carry this model type too
        masked_head=("cls",),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears=_BERT_LINEARS
        | {
            "query": "attention.self.query_proj",
            "key": "attention.self.key_proj",
            "value": "attention.self.value_proj",
        },
        norms=_BERT_NORMS,
        post_norm=True,
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
        attention_kind="disentangled",
    ),
    Architecture(
        model_types=("deberta",),
        masked_head=("cls",),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears=_BERT_LINEARS
        | {
            "query": Part(_DEBERTA_FUSED, 0, 3, heads="num_attention_heads", bias="attention.self.q_bias"),
            "key": Part(_DEBERTA_FUSED, 1, 3, heads="num_attention_heads"),
            "value": Part(_DEBERTA_FUSED, 2, 3, heads="num_attention_heads", bias="attention.self.v_bias"),
        },
        norms=_BERT_NORMS,
        post_norm=True,
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
        attention_kind="disentangled_fused",
    ),
    Architecture(
        model_types=("albert",),
        masked_head=("predictions",),
        layers="encoder.albert_layer_groups",
        layer_order=_albert_order,
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears={
            "query": "attention.query",
            "key": "attention.key",
            "value": "attention.value",
            "attention_output": "attention.dense",
            "ffn_in": "ffn",
            "ffn_out": "ffn_output",
        },
        norms={"attention_norm": "attention.LayerNorm", "ffn_norm": "full_layer_layer_norm"},
        post_norm=True,
        sublayers={
            "attention": SubLayer(enters="attention", leaves="attention.output_dropout"),
            "ffn": SubLayer(enters="ffn", leaves="ffn_output"),
        },
        attention="attention",
        pooler="pooler",
        pooler_activation="pooler_activation",
        positions=_POSITIONS,
        token_types=_TOKEN_TYPES,
    ),
    Architecture(
        model_types=("mpnet",),
        masked_head=("lm_head",),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears={
            "query": "attention.attn.q",
            "key": "attention.attn.k",
            "value": "attention.attn.v",
            "attention_output": "attention.attn.o",
            "ffn_in": "intermediate.dense",
            "ffn_out": "output.dense",
        },
        norms={"attention_norm": "attention.LayerNorm", "ffn_norm": "output.LayerNorm"},
        post_norm=True,
        sublayers={
            "attention": SubLayer(enters="attention.attn", leaves="attention.dropout"),
            "ffn": SubLayer(enters="intermediate.dense", leaves="output.dropout"),
        },
        attention="attention.attn",
        attention_kind="biased",
        pooler="pooler",
        position_offset="pad+1",
    ),
    Architecture(
        model_types=("bart",),
        runs="encoder",
        layers="encoder.layers",
        embedding="encoder.embed_tokens",
        embedding_norms={"embedding_norm": "encoder.layernorm_embedding"},
        linears=_BART_LINEARS,
        norms=_BART_NORMS,
        post_norm=True,
        sublayers=_BART_SUBLAYERS,
        attention="self_attn",
        positions="encoder.embed_positions",
        decoder=_BART_DECODER,
    ),
    replace(  # T5 v1.1 and Flan-T5
        _T5,
        when="is_gated_act",
        linears=_t5_attention("layer.0.SelfAttention") | _t5_ffn(_T5_FFN, gated=True),
        decoder=_t5_decoder(gated=True),
    ),
    _T5,
    Architecture(
        model_types=("modernbert",),
        masked_head=("head", "decoder"),
        layers="layers",
        embedding="embeddings.tok_embeddings",
        embedding_norms={"embedding_norm": "embeddings.norm"},
        final_norms={"final_norm": "final_norm"},
        linears={
            "query": Part("attn.Wqkv", 0, 3),
            "key": Part("attn.Wqkv", 1, 3),
            "value": Part("attn.Wqkv", 2, 3),
            "attention_output": "attn.Wo",
            "ffn_gate": Part("mlp.Wi", 0, 2),
            "ffn_in": Part("mlp.Wi", 1, 2),
            "ffn_out": "mlp.Wo",
        },
        norms={"attention_norm": "attn_norm", "ffn_norm": "mlp_norm"},  # the first layer has no attention_norm
        sublayers={
            "attention": SubLayer(enters="attn", leaves="attn.out_drop"),
            "ffn": SubLayer(enters="mlp", leaves="mlp.Wo"),
        },
        attention="attn",
        own_positions=True,
    ),
    Architecture(
        model_types=("gpt2",),
        layers="h",
        embedding="wte",
        final_norms={"final_norm": "ln_f"},
        linears={
            "query": Part("attn.c_attn", 0, 3),
            "key": Part("attn.c_attn", 1, 3),
            "value": Part("attn.c_attn", 2, 3),
            "attention_output": "attn.c_proj",
            "ffn_in": "mlp.c_fc",
            "ffn_out": "mlp.c_proj",
        },
        norms={"attention_norm": "ln_1", "ffn_norm": "ln_2"},
        sublayers={
            "attention": SubLayer(enters="attn", leaves="attn.resid_dropout"),
            "ffn": SubLayer(enters="mlp", leaves="mlp.dropout"),
        },
        attention="attn",
        causal=True,
        own_positions=True,
    ),
    Architecture(
        model_types=("opt",),
        layers="decoder.layers",
        embedding="decoder.embed_tokens",
        final_norms={"final_norm": "decoder.final_layer_norm"},
        linears=_BART_LINEARS,
        norms=_BART_NORMS,
        sublayers=_BART_SUBLAYERS,
        attention="self_attn",
        causal=True,
        own_positions=True,
        # Its position table holds two rows more than there are positions, and the model adds the two itself.
        position_offset=0,
        output_size="word_embed_proj_dim",
    ),
    Architecture(
        model_types=("llama", "mistral", "qwen2", "qwen3"),
        layers="layers",
        embedding="embed_tokens",
        final_norms={"final_norm": "norm"},
        linears=_LLAMA_LINEARS,
        norms={"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
        norm_kind="rms",
        sublayers=_LLAMA_SUBLAYERS,
        attention="self_attn",
        causal=True,
        own_positions=True,
    ),
    Architecture(
        model_types=("gemma2", "gemma3_text"),
        layers="layers",
        embedding="embed_tokens",
        final_norms={"final_norm": "norm"},
        linears=_LLAMA_LINEARS,
        norms={
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "ffn_post_norm": "post_feedforward_layernorm",
        },
        norm_kind="rms",
        sublayers=_LLAMA_SUBLAYERS,
        attention="self_attn",
        causal=True,
        own_positions=True,
        logit_softcap="final_logit_softcapping",
    ),
)


def supported_model_types() -> tuple[str, ...]:
    """Every `config.model_type` the table serves, sorted."""
    return tuple(sorted({t for row in ARCHITECTURES for t in row.model_types}))


def architecture_for(model_type: str, config: Any = None) -> Architecture:
    """The table's row for `config.model_type`, and where a type has several, for this configuration.

    Raises:
        BackboneError: no row serves this type; lists the supported ones and says where a row goes.
    """
    for row in ARCHITECTURES:
        if model_type in row.model_types and (row.when is None or getattr(config, row.when, False)):
            return row
    known = supported_model_types()
    raise BackboneError(
        f"architecture '{model_type}' is not supported.{suggest(model_type, known)} "
        f"Supported: {', '.join(known)}. To add it, add one Architecture row to "
        f"multitune/architectures.py naming its modules."
    )
