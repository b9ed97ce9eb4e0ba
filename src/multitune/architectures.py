"""Where each architecture keeps its sites: one table, and nothing else knows a model's module names.

To support another architecture, add one `Architecture` row below. Paths are relative to one layer unless
they say "model"; `sites.find_sites` refuses a row whose paths do not exist in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from multitune.errors import BackboneError, suggest

AttentionKind = Literal["interface", "disentangled"]


@dataclass(frozen=True, kw_only=True)
class SubLayer:
    """Where a sub-layer (attention or feed-forward) begins and ends inside one layer."""

    enters: str
    """Module whose first argument is the sub-layer's input."""
    leaves: str
    """Module whose output is the sub-layer's output, before the residual sum and the norm."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The module names of one family of models."""

    model_types: tuple[str, ...]
    """`config.model_type` values this row serves."""
    layers: str
    """Model path of the `ModuleList` of layers."""
    embedding: str
    """Model path of the word embedding."""
    embedding_norms: Mapping[str, str] = field(default_factory=dict)
    """Role -> model path of the norms in front of the first layer."""
    linears: Mapping[str, str]
    """Role -> layer path. Roles: query, key, value, attention_output, ffn_in, ffn_out."""
    norms: Mapping[str, str]
    """Role -> layer path. Roles: attention_norm, ffn_norm."""
    sublayers: Mapping[str, SubLayer]
    """Role -> sub-layer. Roles: attention, ffn."""
    attention: str
    """Layer path of the module that computes attention from query, key and value."""
    attention_kind: AttentionKind = "interface"
    """`interface`: goes through transformers' attention interface; `disentangled`: DeBERTa's own."""
    pooler: str | None = None
    """Model path of a pretrained pooler over the first token, if the model has one."""
    position_offset: int | Literal["pad+1"] = 0
    """First position id: 0, or `pad+1` where positions count from the padding id."""


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
_EMBEDDING = "embeddings.word_embeddings"
_EMBEDDING_NORM = {"embedding_norm": "embeddings.LayerNorm"}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        model_types=("bert",),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears=_BERT_LINEARS,
        norms=_BERT_NORMS,
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
        pooler="pooler",
    ),
    Architecture(
        model_types=("roberta", "xlm-roberta"),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears=_BERT_LINEARS,
        norms=_BERT_NORMS,
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
        pooler="pooler",
        position_offset="pad+1",
    ),
    Architecture(
        model_types=("electra",),
        layers="encoder.layer",
        embedding=_EMBEDDING,
        embedding_norms=_EMBEDDING_NORM,
        linears=_BERT_LINEARS,
        norms=_BERT_NORMS,
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
    ),
    Architecture(
        model_types=("distilbert",),
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
        sublayers={
            "attention": SubLayer(enters="attention", leaves="attention.out_lin"),
            "ffn": SubLayer(enters="ffn.lin1", leaves="ffn.dropout"),
        },
        attention="attention",
    ),
    Architecture(
        model_types=("deberta-v2",),  # DeBERTa-v3 checkpoints carry this model type too
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
        sublayers=_BERT_SUBLAYERS,
        attention="attention.self",
        attention_kind="disentangled",
    ),
)


def supported_model_types() -> tuple[str, ...]:
    """Every `config.model_type` the table serves, sorted."""
    return tuple(sorted(t for row in ARCHITECTURES for t in row.model_types))


def architecture_for(model_type: str) -> Architecture:
    """The table's row for `config.model_type`.

    Raises:
        BackboneError: no row serves this type; lists the supported ones and says where a row goes.
    """
    for row in ARCHITECTURES:
        if model_type in row.model_types:
            return row
    known = supported_model_types()
    raise BackboneError(
        f"architecture '{model_type}' is not supported.{suggest(model_type, known)} "
        f"Supported: {', '.join(known)}. To add it, add one Architecture row to "
        f"multitune/architectures.py naming its modules."
    )
