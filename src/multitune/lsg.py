"""LSG attention: convert an encoder to inputs longer than its positions (Condevaux and Harispe 2023, arXiv 2210.15497).

Attention becomes local (a block and its neighbours), sparse (selected keys beyond them) and global (a few tokens in
front that see all and are seen by all): linear in the length. Linear maps keep their names and shapes, so every method
tunes a converted backbone as it tunes any other. The arithmetic is in `lsg_attention` and `lsg_sparse`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from multitune.errors import BackboneError, ConfigError, suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from multitune.backbone import Backbone

Kind = Literal["norm", "pooling", "lsh", "stride", "block_stride", "none"]

#: Attribute of the model's configuration that says that it was converted, and how.
CONFIG_KEY = "lsg"
#: Name of the parameter `[G, E]` that holds the global tokens' embeddings, in the part of the model that runs.
GLOBALS = "lsg_globals"
#: The global tokens behind the first take every 64th position, so that few of them are spread over all.
GLOBAL_STRIDE = 64

_NAME = re.compile(r"(?P<base>.+)\+lsg(?::(?P<settings>.*))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class LSG:
    """How a backbone was converted.

    Raises:
        ConfigError: a value that is not possible, or at odds with another.
    """

    max_length: int = 4096
    """Longest sequence in tokens, the global ones not counted."""
    block: int = 128
    """Tokens of a block, b; a query sees its own block and one on each side."""
    sparse: int = 128
    """Sparse keys on each side, s, taken from the `sparse * sparsity` tokens beyond the local ones; 0 for none."""
    sparsity: int = 2
    """By how much tokens are reduced to sparse keys, ρ; divides `block`."""
    kind: Kind = "norm"
    """How they are: `norm` (the largest keys of each block), `pooling` (means of neighbours), `lsh` (means of similar
    keys), `stride` and `block_stride` (each head others), `none`."""
    num_global: int = 1
    """Global tokens in front, g. With 0, which is ours, a row of up to two blocks gets the original's output."""
    mask_first: bool = False
    """Close the first token, which the first global one duplicates, and give the global one's state in its place."""
    seed: int = 0
    """`lsh`: seed of the random projections."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) != isinstance(field.default, bool):
                raise ConfigError(f"LSG: {field.name}={value!r} is not possible; its default is {field.default!r}")
        least = {"max_length": 1, "block": 1, "sparse": 0, "sparsity": 1, "num_global": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ConfigError(f"LSG: {name}={value!r} is not possible; give a whole number from {low}")
        known = get_args(Kind)
        if self.kind not in known:
            raise ConfigError(
                f"LSG: kind '{self.kind}' is unknown.{suggest(self.kind, known)} Choose {', '.join(known)}"
            )
        if self.block % self.sparsity:
            raise ConfigError(f"LSG: sparsity={self.sparsity} does not divide block={self.block}")
        if self.kind == "lsh" and self.sparsity > 1 and self.block // self.sparsity % 2:
            raise ConfigError(
                f"LSG: lsh has pairs of buckets, but block / sparsity is {self.block // self.sparsity}; make it even"
            )
        if self.mask_first and not self.num_global:
            raise ConfigError("LSG: mask_first puts a global token in the first one's place; give num_global=1 or more")

    @property
    def has_sparse(self) -> bool:
        """Whether there are sparse keys at all."""
        return self.kind != "none" and self.sparse > 0

    def seed_of(self, layer: int) -> int:
        """Seed of one layer's random projections."""
        return self.seed * 100_003 + layer

    @property
    def spelled(self) -> str:
        """What stands behind a backbone's name: `+lsg`, and the settings that are not the defaults."""
        own = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        values = ",".join(f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in own)
        return "+lsg" + (f":{values}" if values else "")

    @property
    def key(self) -> str:
        """All settings as text, for fingerprints."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def of(cls, config: PretrainedConfig) -> LSG | None:
        """How a model was converted, or `None` if it was not."""
        settings = getattr(config, CONFIG_KEY, None)
        return None if settings is None else cls.from_settings(settings)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> LSG:
        """From values, or from words as a command line gives them.

        Raises:
            ConfigError: an unknown name or an impossible value.
        """
        defaults = {f.name: f.default for f in fields(cls)}
        for name in settings:
            if name not in defaults:
                raise ConfigError(f"LSG has no setting '{name}'.{suggest(name, defaults)} It has {', '.join(defaults)}")
        return cls(**{name: _read(name, value, defaults[name]) for name, value in settings.items()})


def _read(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str) or isinstance(default, str):
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"LSG: {name} is true or false, not '{value}'")
        return value.lower() == "true"
    if not value.isdecimal():
        raise ConfigError(f"LSG: {name} is a whole number, not '{value}'")
    return int(value)


def split_name(name: str) -> tuple[str, LSG | None]:
    """`"minilm+lsg:kind=pooling,block=64"` as the name of the original and how to convert it.

    A name without `+lsg`, or of a folder that exists, is the original's.

    Raises:
        ConfigError: an unknown setting or an impossible value.
    """
    found = _NAME.fullmatch(name)
    if found is None or Path(name).exists():
        return name, None
    settings: dict[str, str] = {}
    for pair in filter(None, (found["settings"] or "").split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(
                f"backbone '{name}': '{pair}' is no setting; give NAME=VALUE, such as {found['base']}+lsg:kind=pooling"
            )
        settings[key.strip()] = value.strip()
    return found["base"], LSG.from_settings(settings)


def convert_to_lsg(
    backbone: Backbone | str | Path,
    *,
    max_length: int = 4096,
    block: int = 128,
    sparse: int = 128,
    sparsity: int = 2,
    kind: Kind = "norm",
    num_global: int = 1,
    mask_first: bool = False,
    seed: int = 0,
) -> Backbone:
    """A copy of an encoder with LSG attention and positions for long inputs; nothing is trained.

    The table of positions is repeated up to `max_length`. The first global token is the first token's word and position
    (`<s>`, `[CLS]`), the others are `<mask>` words at positions spread over the table; all pass the embeddings' norm.
    Rows of up to two blocks get full attention. Padding on the left is taken off before anything counts positions.

    Args:
        backbone: an encoder with learned absolute positions, or the name of one; it is not changed.
        max_length, block, sparse, sparsity, kind, num_global, mask_first, seed: as `LSG` has them.

    Returns:
        A backbone with a fingerprint of its own, whose name `Backbone.load` takes: `minilm+lsg:block=64`.

    Raises:
        ConfigError: settings that are impossible, or do not suit this backbone.
        BackboneError: a backbone that cannot be converted; says why.
    """
    from multitune.backbone import Backbone

    original = backbone if isinstance(backbone, Backbone) else Backbone.load(backbone)
    lsg = LSG(
        max_length=max_length,
        block=block,
        sparse=sparse,
        sparsity=sparsity,
        kind=kind,
        num_global=num_global,
        mask_first=mask_first,
        seed=seed,
    )
    _check(original, lsg)
    copied = original.clone()
    copied.detach()
    states = _global_states(original, lsg) if lsg.num_global else None
    _lengthen(copied, lsg.max_length)
    if states is not None:
        parameter = nn.Parameter(states.to(original.device, original.dtype), requires_grad=False)
        copied.running.register_parameter(GLOBALS, parameter)
    setattr(copied.model.config, CONFIG_KEY, asdict(lsg))
    converted = Backbone(copied.model, original.tokenizer, original.name + lsg.spelled)
    # The new weights follow from the old ones and the settings, and so does the fingerprint, whatever the dtype.
    digest = hashlib.sha256(f"{original.fingerprint} lsg {lsg.key}".encode())
    converted.__dict__["fingerprint"] = digest.hexdigest()[:32]
    converted.tokenizer_lock = original.tokenizer_lock  # one tokenizer, one lock
    converted.mlm_head, converted.source = copied.mlm_head, copied.source
    return converted


def _check(backbone: Backbone, lsg: LSG) -> None:
    """Raise unless the backbone can be converted so."""
    problem = None
    if backbone.lsg is not None:
        problem = "it is converted already; convert the original"
    elif backbone.quantized is not None:
        problem = "it is quantised, which comes last; convert the original, then quantise"
    elif backbone.decodes:
        problem = "its decoder runs too, and LSG here is for encoders; load it without '+decoder'"
    elif backbone.causal:
        problem = "its tokens see only what stands before them, and LSG here is for encoders"
    elif backbone.architecture.positions is None:
        problem = "its attention has relative or rotary positions, which blocks and tiled tables do not carry"
    if problem is not None:
        raise BackboneError(
            f"backbone '{backbone.name}' ({backbone.model.config.model_type}) cannot be converted to LSG attention: "
            f"{problem}. Encoders with a table of absolute positions can: BERT, RoBERTa, XLM-R, ELECTRA, DistilBERT, "
            f"ALBERT, BART"
        )
    if lsg.max_length < backbone.max_length:
        raise ConfigError(
            f"LSG: max_length={lsg.max_length} is less than the {backbone.max_length} positions that "
            f"'{backbone.name}' has without it; give at least those"
        )
    if lsg.num_global > backbone.max_length:
        raise ConfigError(
            f"LSG: num_global={lsg.num_global} is more than the {backbone.max_length} positions that "
            f"'{backbone.name}' has for them"
        )
    if lsg.has_sparse and lsg.kind in ("stride", "block_stride") and lsg.sparsity > backbone.num_attention_heads:
        raise ConfigError(
            f"LSG: with sparsity={lsg.sparsity}, {lsg.kind} needs as many heads to see every token, and "
            f"'{backbone.name}' has {backbone.num_attention_heads}; give a smaller sparsity or another kind"
        )


def _table(backbone: Backbone) -> nn.Embedding:
    path = backbone.architecture.positions
    assert path is not None
    table = backbone.model.get_submodule(path)
    assert isinstance(table, nn.Embedding)
    return table


def _global_states(backbone: Backbone, lsg: LSG) -> Tensor:
    """Embeddings `[G, E]` of the global tokens, float32: word, position and token type, before the norm."""
    table = _table(backbone)
    count = backbone.max_length
    learned = table.weight[table.num_embeddings - count :].detach().float()
    order = sorted(range(count), key=lambda p: (p % GLOBAL_STRIDE, p))[: lsg.num_global]
    words = [_special(backbone, ("bos_token_id", "cls_token_id"), "first")]
    if lsg.num_global > 1:
        words += [_special(backbone, ("mask_token_id",), "mask")] * (lsg.num_global - 1)
    states = backbone.embed(torch.tensor(words)).float() + learned[order]
    types = backbone.architecture.token_types
    if types is not None:
        kinds = backbone.model.get_submodule(types).weight
        assert isinstance(kinds, Tensor)
        states = states + kinds[0].detach().float()
    return states


def _special(backbone: Backbone, names: tuple[str, ...], what: str) -> int:
    for source in (backbone.tokenizer, backbone.model.config):
        for name in names:
            token = getattr(source, name, None)
            if isinstance(token, int):
                return token
    raise BackboneError(
        f"backbone '{backbone.name}' has no {what} token, which global tokens are made from: neither its tokenizer nor "
        f"its configuration gives {' or '.join(names)}; give it a tokenizer that does, or num_global="
        f"{0 if what == 'first' else 1}"
    )


def _lengthen(backbone: Backbone, length: int) -> None:
    """Repeat the learned positions until there are `length`; rows in front of them that are reserved stay."""
    table = _table(backbone)
    reserved = table.num_embeddings - backbone.max_length
    learned = table.weight.detach()[reserved:]
    tiled = learned.repeat(-(-length // len(learned)), 1)[:length]
    shift = int(backbone.model.config.max_position_embeddings) - backbone.max_length
    table.weight = nn.Parameter(torch.cat([table.weight.detach()[:reserved], tiled]), requires_grad=False)
    table.num_embeddings = reserved + length
    backbone.model.config.max_position_embeddings = length + shift
    path = backbone.architecture.positions
    assert path is not None
    parent = backbone.model.get_submodule(path.rpartition(".")[0])
    for name, values in (
        ("position_ids", torch.arange(length + shift)),
        ("token_type_ids", torch.zeros(length + shift)),
    ):
        buffer = getattr(parent, name, None)
        if isinstance(buffer, Tensor):
            setattr(parent, name, values.to(buffer).expand(1, -1))
