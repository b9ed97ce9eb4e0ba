"""Sites: the places in a frozen backbone where deltas apply. Finding them changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from multitune.architectures import Architecture, Decoder, LayerParts, Part
from multitune.errors import BackboneError, ConfigError, suggest

Stack = Literal["encoder", "decoder", "cross"]
SiteKind = Literal["linear", "norm", "sublayer", "attention", "layers", "embedding"]


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place where a delta can apply, by an architecture-neutral name such as `layer.3.query`."""

    name: str
    kind: SiteKind
    role: str
    """What it does in the model: a key of the architecture's `linears`, `norms` or `sublayers`, or its kind; the whole
    layer, seen as one sub-layer, is the sub-layer `block`."""
    layer: int | None
    """Layer index, `None` for sites outside the layers. A decoder's layers count on from its encoder's."""
    stack: Stack | None = None
    """Encoder-decoders: whether it belongs to the encoder, to the decoder, or to the decoder's attention to the
    encoder's output; `None` where only one stack runs."""
    module: str
    """Path of the module in the model (for `layers`: the list of layers)."""
    layers: tuple[str, ...] = ()
    """Of the site `layers`: the path of every layer, in the order they run; a path may occur several times."""
    shared: bool = False
    """Whether the module runs as other layers too, so that its weights are not this site's alone."""
    in_features: int
    """Width of what goes in, I."""
    out_features: int
    """Width of what comes out, O."""
    bias: bool = True
    """Whether the frozen module has a bias."""
    enters: str | None = None
    """Sub-layers only: path of the module whose first argument is the sub-layer's input."""
    owns_input: bool = False
    """Whether nothing else reads this linear's input, so that it may be changed in place when serving."""
    part: tuple[int, int] | None = None
    """Linears only: first and end of the module's output features that are this site's; `None` for all of them."""
    blocks: int = 1
    """Linears only: in how many equal blocks the module's output features lie, `part` being the same in each."""
    bias_path: str | None = None
    """Linears only: path of the bias, where the model keeps it outside the module and adds it later."""
    transposed: bool = False
    """Linears only: whether the module keeps its weight as `[I, O]`."""
    centred: bool = True
    """Norms only: whether the mean is subtracted."""

    @property
    def prefix(self) -> str:
        """What its name begins with, and the names of all in the same attention or feed-forward."""
        return _prefix(self.layer, self.stack)

    @property
    def roles(self) -> tuple[str, ...]:
        """What selects it: its role in every stack, and its role in its own, such as `cross.query`."""
        return (self.role,) if self.stack is None else (self.role, f"{self.stack}.{self.role}")

    def has_role(self, roles: Iterable[str]) -> bool:
        """Whether one of these roles selects it."""
        return not set(self.roles).isdisjoint(roles)


def _prefix(layer: int | None, stack: Stack | None) -> str:
    if layer is None:
        return "decoder." if stack == "decoder" else ""
    return f"layer.{layer}.cross." if stack == "cross" else f"layer.{layer}."


def _get(model: nn.Module, path: str, architecture: Architecture) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise BackboneError(
            f"{type(model).__name__} has no module '{path}', which the table row for "
            f"{'/'.join(architecture.model_types)} names; correct that row in multitune/architectures.py"
        ) from error


def _norm_sites(
    model: nn.Module,
    a: Architecture,
    role: str,
    layer: int | None,
    path: str,
    shared: bool = False,
    stack: Stack | None = None,
) -> list[Site]:
    """The site of one norm, or nothing where this model leaves that norm out or gives it no gain."""
    parent, _, last = path.rpartition(".")
    if getattr(_get(model, parent, a), last, 0) is None:
        return []
    weight = getattr(_get(model, path, a), "weight", None)
    if weight is None:
        return []
    assert isinstance(weight, nn.Parameter)
    width = weight.shape[0]
    site = Site(
        name=_prefix(layer, stack) + role,
        kind="norm",
        role=role,
        layer=layer,
        stack=stack,
        module=path,
        in_features=width,
        out_features=width,
        bias=getattr(model.get_submodule(path), "bias", None) is not None,
        centred=a.norm_kind == "layer",
        shared=shared,
    )
    return [site]


def _linear_site(
    model: nn.Module,
    a: Architecture,
    role: str,
    layer: int,
    inside: str,
    where: str | Part,
    shared: bool,
    stack: Stack | None,
) -> Site:
    path = f"{inside}.{where.module if isinstance(where, Part) else where}"
    linear = _get(model, path, a)
    if not isinstance(linear, nn.Linear | Conv1D):
        raise BackboneError(f"'{path}' is a {type(linear).__name__}, but the table calls it a linear '{role}'")
    transposed = isinstance(linear, Conv1D)
    width_out, width_in = linear.weight.shape[::-1] if transposed else linear.weight.shape
    part, blocks, bias_path = None, 1, None
    if isinstance(where, Part):
        blocks = 1 if where.heads is None else int(getattr(model.config, where.heads))
        if width_out % (where.of * blocks):
            raise BackboneError(
                f"the {width_out} outputs of '{path}' are not {where.of} equal parts; correct the table"
            )
        width_out //= where.of
        width = width_out // blocks
        part = (where.index * width, (where.index + 1) * width)
        bias_path = None if where.bias is None else f"{inside}.{where.bias}"
    return Site(
        name=_prefix(layer, stack) + role,
        kind="linear",
        role=role,
        layer=layer,
        stack=stack,
        module=path,
        in_features=width_in,
        out_features=width_out,
        bias=linear.bias is not None or bias_path is not None,
        owns_input=role == "ffn_out",  # its input is the fresh output of the activation
        part=part,
        blocks=blocks,
        bias_path=bias_path,
        transposed=transposed,
        shared=shared,
    )


def _layer_paths(model: nn.Module, a: Architecture) -> tuple[str, ...]:
    """The path of every layer in the order they run; the encoder's where there are two stacks."""
    layers = _get(model, a.layers, a)
    assert isinstance(layers, nn.ModuleList)
    below = map(str, range(len(layers))) if a.layer_order is None else a.layer_order(model.config)
    return tuple(f"{a.layers}.{path}" for path in below)


def find_sites(model: nn.Module, architecture: Architecture) -> tuple[Site, ...]:
    """Every site of `model`, in the order its forward pass meets them. Changes nothing.

    Raises:
        BackboneError: the table names a module that the model lacks, or one of another type.
    """
    a = architecture
    d = a.decoder
    stack: Stack | None = None if d is None else "encoder"
    layers = _layer_paths(model, a)
    behind = () if d is None else _decoder_paths(model, a, d)
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    sites = [_embedding_site(model, a, a.embedding, stack)]
    for role, path in a.embedding_norms.items():
        sites += _norm_sites(model, a, role, None, path, stack=stack)
    sites.append(
        Site(
            name="layers", kind="layers", role="layers", layer=None, module=a.layers,
            in_features=hidden, out_features=hidden, bias=False, layers=(*layers, *behind),
        )
    )  # fmt: skip
    passes = Counter(layers)
    own = LayerParts(linears=a.linears, norms=a.norms, sublayers=a.sublayers, attention=a.attention)
    for i, path in enumerate(layers):
        sites += _layer_sites(model, a, own, i, path, hidden, shared=passes[path] > 1, stack=stack)
    for role, path in a.final_norms.items():
        sites += _norm_sites(model, a, role, None, path, stack=stack)
    if d is not None:
        sites += _decoder_sites(model, a, d, behind, len(layers), hidden)
    return tuple(sites)


def _decoder_paths(model: nn.Module, a: Architecture, d: Decoder) -> tuple[str, ...]:
    layers = _get(model, d.layers, a)
    assert isinstance(layers, nn.ModuleList)
    return tuple(f"{d.layers}.{i}" for i in range(len(layers)))


def _decoder_sites(
    model: nn.Module, a: Architecture, d: Decoder, layers: Sequence[str], first: int, hidden: int
) -> list[Site]:
    """The decoder's sites; its layers are numbered from `first`."""
    sites = [_embedding_site(model, a, d.embedding, "decoder")]
    for role, path in d.embedding_norms.items():
        sites += _norm_sites(model, a, role, None, path, stack="decoder")
    for i, path in enumerate(layers, start=first):
        sites += _layer_sites(model, a, d.own, i, path, hidden, shared=False, stack="decoder")
        sites += _layer_sites(model, a, d.cross, i, path, hidden, shared=False, stack="cross")
    for role, path in d.final_norms.items():
        sites += _norm_sites(model, a, role, None, path, stack="decoder")
    return sites


def _embedding_site(model: nn.Module, a: Architecture, path: str, stack: Stack | None) -> Site:
    embedding = _get(model, path, a)
    assert isinstance(embedding, nn.Embedding)
    width = embedding.embedding_dim
    return Site(
        name=_prefix(None, stack) + "embedding", kind="embedding", role="embedding", layer=None, module=path,
        stack=stack, in_features=width, out_features=width, bias=False,
    )  # fmt: skip


def _layer_sites(
    model: nn.Module,
    a: Architecture,
    parts: LayerParts,
    i: int,
    layer: str,
    hidden: int,
    shared: bool,
    stack: Stack | None,
) -> list[Site]:
    def at(path: str) -> str:
        return f"{layer}.{path}"

    prefix = _prefix(i, stack)
    sites = [_linear_site(model, a, role, i, layer, where, shared, stack) for role, where in parts.linears.items()]
    for role, path in parts.norms.items():
        sites += _norm_sites(model, a, role, i, at(path), shared, stack)
    for role, sub in parts.sublayers.items():
        _get(model, at(sub.enters), a)
        _get(model, at(sub.leaves), a)
        sites.append(
            Site(
                name=f"{prefix}{role}_sublayer", kind="sublayer", role=role, layer=i, shared=shared, stack=stack,
                module=at(sub.leaves), enters=at(sub.enters), in_features=hidden, out_features=hidden,
            )
        )  # fmt: skip
    if stack != "cross":
        sites.append(
            Site(
                name=f"{prefix}block_sublayer", kind="sublayer", role="block", layer=i, shared=shared, stack=stack,
                module=layer, enters=layer, in_features=hidden, out_features=hidden,
            )
        )  # fmt: skip
    _get(model, at(parts.attention), a)
    key, value = (next(s for s in sites if s.role == role) for role in ("key", "value"))
    sites.append(
        Site(
            name=f"{prefix}attention", kind="attention", role="attention", layer=i, shared=shared, stack=stack,
            module=at(parts.attention), in_features=key.out_features, out_features=value.out_features,
        )
    )  # fmt: skip
    return sites


#: The usual names of modules in transformers' models, which PEFT takes as targets, and their roles.
_ROLES_OF_MODULES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_output",
    "out_proj": "attention_output",
    "up_proj": "ffn_in",
    "gate_proj": "ffn_gate",
    "down_proj": "ffn_out",
    "fc1": "ffn_in",
    "fc2": "ffn_out",
}


def _suggest_role(asked: str, known: Sequence[str]) -> str:
    """`suggest` for a role, which may be called as the module is."""
    role = _ROLES_OF_MODULES.get(asked)
    return f" Did you mean {role!r}?" if role in known else suggest(asked, known)


def select_sites(
    sites: Iterable[Site],
    *,
    kind: SiteKind,
    roles: Iterable[str] | None = None,
    layers: Iterable[int] | str | None = None,
) -> tuple[Site, ...]:
    """The sites of one kind, narrowed to roles and layers.

    In an encoder-decoder a role selects its sites in every stack, and with the stack in front of it those there:
    `query` those of all three attentions, `encoder.query`, `decoder.query` or `cross.query` those of one.

    Raises:
        ConfigError: no site is of this kind, or a role or a layer matches none of them; nothing is dropped silently.
    """
    sites = tuple(sites)
    of_kind = [s for s in sites if s.kind == kind]
    if not of_kind:
        kinds = tuple(dict.fromkeys(s.kind for s in sites))
        raise ConfigError(f"no site is of kind {kind!r}.{suggest(str(kind), kinds)} There are: {', '.join(kinds)}")
    known_roles = tuple(dict.fromkeys(role for s in of_kind for role in s.roles))
    known_layers = tuple(dict.fromkeys(s.layer for s in of_kind if s.layer is not None))
    if roles is not None:
        roles = (roles,) if isinstance(roles, str) else tuple(roles)
        for role in roles:
            if role not in known_roles:
                raise ConfigError(
                    f"no {kind} site has the role '{role}'.{_suggest_role(role, known_roles)} "
                    f"This backbone has: {', '.join(known_roles)}"
                )
        of_kind = [s for s in of_kind if s.has_role(roles)]
    if isinstance(layers, str):
        raise ConfigError(
            f"layers='{layers}' stands for no layers yet: with 'semantic' train() chooses them by a task's rows; "
            f"elsewhere give numbers, such as multitune.layers.choose_layers(backbone, texts).trained"
        )
    if layers is not None:
        wanted = tuple(layers)
        for layer in wanted:
            if layer not in known_layers:
                raise ConfigError(f"layer {layer} does not exist; this backbone has layers 0 to {max(known_layers)}")
        of_kind = [s for s in of_kind if s.layer in wanted]
    if not of_kind:
        raise ConfigError(f"no {kind} site matches roles={roles} layers={layers}; this backbone has {known_roles}")
    return tuple(of_kind)
