"""The kinds of delta. Each file is one kind: tensors plus the arithmetic it does at a site."""

from multitune.deltas.affine import Affine
from multitune.deltas.base import Delta
from multitune.deltas.bias import Bias
from multitune.deltas.bottleneck import ACTIVATIONS, SOFTMAX, Bottleneck
from multitune.deltas.embedding_low_rank import EmbeddingLowRank
from multitune.deltas.low_rank import LowRank
from multitune.deltas.memory import Memory
from multitune.deltas.prompt import Prompt
from multitune.deltas.scale import InputScale, Scale
from multitune.deltas.shared_low_rank import SharedLowRank
from multitune.deltas.sparse_weight import SparseWeight
from multitune.deltas.token_bias import TokenBias
from multitune.deltas.token_rows import FCRows, KroneckerRows, TableRows, TokenRows, build_table, table_error

#: Order in which deltas of different kinds apply at one site: `((x W + LowRank + SparseWeight) * Scale) + Bias`.
ORDER: tuple[type[Delta], ...] = (
    InputScale,
    LowRank,
    SharedLowRank,
    SparseWeight,
    Scale,
    Bias,
    Affine,
    Bottleneck,
    Memory,
    EmbeddingLowRank,
    Prompt,
    TokenBias,
)

__all__ = [
    "ACTIVATIONS",
    "ORDER",
    "SOFTMAX",
    "Affine",
    "Bias",
    "Bottleneck",
    "Delta",
    "EmbeddingLowRank",
    "FCRows",
    "InputScale",
    "KroneckerRows",
    "LowRank",
    "Memory",
    "Prompt",
    "Scale",
    "SharedLowRank",
    "SparseWeight",
    "TableRows",
    "TokenBias",
    "TokenRows",
    "build_table",
    "table_error",
]
