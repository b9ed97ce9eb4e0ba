"""Attention sites: keys and values of a `Memory` in front of a row's own.

A memory has no position: every query sees it, however narrow its window and wherever it stands in a causal row. Models
with rotary positions rotate queries and keys before they call this code, so a memory's keys meet the rotated queries
as they are. Models whose query heads share key and value heads get the memory in the shared heads. Where a model adds
a bias by distance to the scores, a memory's entries get none.

Models that call transformers' attention interface get a function registered there that wraps the implementation they
were loaded with, or has it work block by block where the backbone was converted to LSG attention (`lsg_attention`).
DeBERTa and MPNet compute their attention themselves, and each has a form of its own.

Legend: B rows, H heads, Q queries, S keys, M memory entries, K head width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from multitune.call import Call
from multitune.cross_cache import PairedCache
from multitune.current import current_call
from multitune.deltas import Memory
from multitune.joint import JointCall, attend_apart
from multitune.kv_cache import DistanceBias, RowCache
from multitune.lsg_attention import Dense, Memories, lsg_attention
from multitune.plan import Group, Step

#: Attention implementations that can carry a memory; the others need masks that cannot be lengthened here.
WRAPPED = ("sdpa", "eager")
PREFIX = "multitune_"


def register_attention() -> None:
    """Add the wrapped implementations to transformers' registries; harmless to repeat."""
    for name in WRAPPED:
        ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, partial(_attend, name))
        ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, partial(_mask, ALL_MASK_ATTENTION_FUNCTIONS[name]))


def _mask(make: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    """The model's mask, in rows of several texts closed between them; none for LSG attention and with our own cache.

    Both make their own, and LSG attention must never see one of Q times S entries.
    """
    call = current_call()
    if call.lsg_open is not None or call.reads_cache:
        return None
    if call.pieces is not None:
        # Columns of a text lie side by side, so that a model's window holds of it what it holds of the text alone.
        closed = and_masks(kwargs["mask_function"], _within(call.pieces))
        kwargs |= {"mask_function": closed, "allow_is_causal_skip": False}
    return make(*args, **kwargs)


def _within(pieces: Tensor) -> Callable[[Any, Any, Any, Any], Tensor]:
    """For transformers' masks: whether a query and a key are of the same text, by `pieces [B, T]`."""

    def same_text(row: Any, head: Any, query: Any, key: Any) -> Tensor:
        return pieces[row, query] == pieces[row, key]

    return same_text


def _attend(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: `query [B, H, Q, K]` … to `[B, Q, H, K]` and maybe weights."""
    if name == "eager":  # every model file brings its own eager function
        base = sys.modules[type(module).__module__].eager_attention_forward
        if attention_mask is not None and attention_mask.dtype == torch.float64:
            # Models take the softmax in float32, where float64's least number is -inf and a row of padding NaN.
            attention_mask = attention_mask.clamp(min=torch.finfo(torch.float32).min)
    else:
        base = ALL_ATTENTION_FUNCTIONS[name]
    call = current_call()
    if isinstance(call, JointCall):
        return _attend_joint(call, name, module, query, key, value, attention_mask, kwargs), None
    if call.reads_cache and isinstance(call.cache, PairedCache):
        return _attend_paired(call, call.cache, base, module, query, key, value, kwargs, name == "eager"), None
    if isinstance(call.cache, RowCache):
        attend_masked = partial(_dense, base, module, kwargs)
        window = kwargs.get("sliding_window")
        return call.cache.attend(call.layer, attend_masked, query, key, value, window, always=name == "eager"), None
    site = call.backbone.attention_names.get(module)
    if site is not None:
        call.record(site(call), key, value)
    steps = call.steps(site(call)) if site is not None else None
    if call.lsg_open is not None:
        return _attend_lsg(partial(_dense, base, module, kwargs), steps or [], query, key, value), None
    if not steps:
        return base(module, query, key, value, attention_mask, **kwargs)
    causal = bool(kwargs.get("is_causal", getattr(module, "is_causal", False))) and query.shape[2] > 1
    position_bias = kwargs.get("position_bias")

    def attend(rows: slice | Tensor | None, memory: Memories | None) -> Tensor:
        q, k, v = (t if rows is None else t[rows] for t in (query, key, value))
        mask = _rows_of_mask(attention_mask, rows)
        own = kwargs
        if position_bias is not None:
            own = kwargs | {"position_bias": _rows_of_bias(position_bias, rows, memory)}
        if memory is not None:
            k, v, mask = _lengthen(q, k, v, mask, memory, causal, additive=name == "eager")
        out: Tensor = base(module, q, k, v, mask, **own)[0]
        return out

    return _by_rows(steps, query.shape[0], attend), None


def _attend_paired(
    call: Call,
    cache: PairedCache,
    base: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    settings: dict[str, Any],
    always: bool,
) -> Tensor:
    """`_attend` of an encoder-decoder's decoder that generates; `[B, Q, H, K]`.

    A bias by distance that the model brings counts columns, of which rows hold different tokens: it is made anew.
    """
    backbone = call.backbone
    settings = {key: given for key, given in settings.items() if key != "position_bias"}
    attend_masked = partial(_dense, base, module, settings)
    layer = call.layer - backbone.num_encoder_layers
    if module in backbone.cross_attention:
        return cache.cross.attend(layer, attend_masked, query, key, value)
    return cache.own.attend(layer, attend_masked, query, key, value, None, always, backbone.distance_bias)


def distance_bias(module: Any) -> DistanceBias:
    """T5 (Raffel et al. 2020, arXiv 1910.10683, section 2.1): the decoder's bias by distance, of its first layer."""

    def bias(distances: Tensor) -> Tensor:
        buckets = module._relative_position_bucket(
            distances.long(),
            bidirectional=False,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        values: Tensor = module.relative_attention_bias(buckets)
        return values

    return bias


def _attend_joint(
    call: JointCall,
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    settings: dict[str, Any],
) -> Tensor:
    """`_attend` for every part of a joint call by itself; `[B, Q, H, K]`."""
    windowed = call.backbone.causal or settings.get("sliding_window") is not None

    def attend(part: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = part.square(attention_mask)
        if not windowed and "attention_mask" not in part.call.inputs:
            mask = None  # it hid the other parts' padding
        own = settings
        if settings.get("position_bias") is not None:
            own = settings | {"position_bias": part.square(settings["position_bias"])}
        return _attend(name, module, q, k, v, mask, **own)[0]

    return attend_apart(call, (query, key, value), 2, attend)


def _dense(
    base: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    kwargs: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    return base(module, query, key, value, mask, **kwargs)[0]


def _attend_lsg(dense: Dense, steps: list[Step], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """LSG attention, a memory in front of the global tokens; `[B, Q, H, K]`."""
    call = current_call()
    lsg, is_open = call.backbone.lsg, call.lsg_open
    assert lsg is not None and is_open is not None

    def attend(rows: slice | Tensor | None, memory: Memories | None) -> Tensor:
        q, k, v, seen = (t if rows is None else t[rows] for t in (query, key, value, is_open))
        return lsg_attention(dense, q, k, v, seen, lsg, call.layer, memory)

    return _by_rows(steps, query.shape[0], attend) if steps else attend(None, None)


Attend = Callable[[slice | Tensor | None, Memories | None], Tensor]


def _by_rows(steps: list[Step], num_rows: int, attend: Attend) -> Tensor:
    """Run `attend` once per group with its memory and once per range of rows without any; `[B, Q, H, K]`."""
    if steps[0].group.rows is None:
        return attend(None, _memory_of(steps[0], num_rows))
    if any(isinstance(s.group.rows, Tensor) for s in steps):
        out = attend(None, None)
        for step in steps:
            out = step.group.put(out, attend(step.group.rows, _memory_of(step, num_rows)))
        return out
    pieces: list[Tensor] = []
    done = 0
    for step in steps:  # a plan has them in the order of their rows
        rows = _range(step.group)
        if rows.start > done:
            pieces.append(attend(slice(done, rows.start), None))
        pieces.append(attend(rows, _memory_of(step, num_rows)))
        done = rows.stop
    if done < num_rows:
        pieces.append(attend(slice(done, num_rows), None))
    return torch.cat(pieces)


def _range(group: Group) -> slice:
    assert isinstance(group.rows, slice)
    return group.rows


def _memory_of(step: Step, num_rows: int) -> Memories:
    """Keys and values `[R, H, M, K]` and which entries are open `[R, M]`, for the step's R rows."""
    d = step.delta
    assert isinstance(d, Memory)
    # (A compiler cannot look at the values, and takes the general way.)
    whole = not torch.compiler.is_compiling() and id(d) in current_call().plan.open_memories
    if step.group.rows is None:
        keys, values = (t.transpose(0, 1).expand(num_rows, -1, -1, -1) for t in (d.keys, d.values))
        return keys, values, None if whole else d.open.expand(num_rows, -1)
    keys, values = (step.group.spread(t.transpose(1, 2)) for t in (d.keys, d.values))
    return keys, values, None if whole else step.group.spread(d.open.squeeze(1))


def _rows_of_mask(mask: Tensor | None, rows: slice | Tensor | None) -> Tensor | None:
    if mask is None or rows is None or mask.shape[0] == 1:
        return mask
    return mask[rows]


def _rows_of_bias(bias: Tensor, rows: slice | Tensor | None, memory: Memories | None) -> Tensor:
    """The position bias `[B or 1, H, Q, S]` of some rows, with 0 for every entry of a memory in front."""
    own = _rows_of_mask(bias, rows)
    assert own is not None
    return own if memory is None else F.pad(own, (memory[0].shape[2], 0))


def _lengthen(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, memory: Memories, causal: bool, additive: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with the memory in front; `additive`: the implementation adds its mask to the scores."""
    keys, values, is_open = memory
    key_out = torch.cat([keys.to(key.dtype), key], dim=2)
    value_out = torch.cat([values.to(value.dtype), value], dim=2)
    if mask is None and not causal and is_open is None:
        return key_out, value_out, None
    if is_open is None:
        is_open = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=query.device)
    is_open = is_open > 0
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask is None:
        # No mask with causal semantics means "below the diagonal": once there is a memory it must be written out.
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)[None, None] if causal else mask[None, None]
        if additive:
            closed = torch.finfo(query.dtype).min
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, closed)
    front = is_open[:, None, None, :].expand(-1, -1, num_queries, -1)
    if mask.dtype != torch.bool:
        closed = torch.finfo(mask.dtype).min
        front = torch.zeros_like(front, dtype=mask.dtype).masked_fill(~front, closed)
    mask = mask.expand(query.shape[0], -1, num_queries, -1)
    return key_out, value_out, torch.cat([front, mask], dim=-1)


def _or_original(attend: Callable[..., Tensor | None]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`attend` as the attention module's forward, with the model's own forward where it returns `None`.

    Every part of a joint call goes through it by itself, its projections included: the relative embeddings that all
    rows share are dropped anew for each part, and projected as its own deltas say.
    """

    @wraps(attend)
    def attention(
        module: Any,
        original: Callable[..., tuple[Tensor, Tensor | None]],
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        **relative: Any,
    ) -> tuple[Tensor, Tensor | None]:
        call = current_call()
        if isinstance(call, JointCall):

            def apart(part: Any, own: Tensor) -> Tensor:
                cut = {**relative, "relative_pos": part.square(relative.get("relative_pos"))}
                return attention(module, original, own, part.square(attention_mask), **cut)[0]

            return attend_apart(call, (hidden_states,), 1, apart), None
        attended = attend(module, hidden_states, attention_mask, **relative)
        if attended is None:
            return original(hidden_states, attention_mask, output_attentions, **relative)
        return attended, None

    return attention


@_or_original
def disentangled_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> Tensor | None:
    """DeBERTa-v2/v3 attention (He et al. 2020, arXiv 2006.03654, eq. 4) with per-row projections and memory.

    The model's own forward serves every call that changes nothing here. It cannot serve the rest: it projects
    the shared relative embeddings once as a batch of one, while here query and key may differ row by row, and
    with shared projections the relative terms differ with them.
    """
    call = current_call()
    sites = call.backbone.disentangled_sites[module]
    bare = not any(call.steps(site) or call.plan.input_steps.get(site) for site in sites)
    if bare and call.recorded is None:
        return None
    source = hidden_states if query_states is None else query_states
    heads = module.num_attention_heads
    query = _split_heads(module.query_proj(source), heads)
    key = _split_heads(module.key_proj(hidden_states), heads)
    value = _split_heads(module.value_proj(hidden_states), heads)
    kinds = module.pos_att_type if module.relative_attention else ()
    num_terms = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    # Rounded and applied as the model does, so that a row is the same to the bit whichever form serves its batch.
    scale = torch.tensor(float(query.shape[-1] * num_terms)).sqrt().to(query)
    scores = query @ (key.transpose(-1, -2) / scale)
    if module.relative_attention:
        assert relative_pos is not None and rel_embeddings is not None
        scores = scores + _relative_scores(module, query, key, relative_pos, rel_embeddings, kinds, scale)
    scores = scores.masked_fill(~attention_mask.bool(), torch.finfo(scores.dtype).min)
    site = call.backbone.attention_names[module](call)
    call.record(site, key, value)
    return _attend_scores(module, call.steps(site) or [], query, scores, value, scale)


@_or_original
def disentangled_fused_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> Tensor | None:
    """Attention of the first DeBERTa (He et al. 2020, arXiv 2006.03654, eq. 4) with memory.

    The model's own forward serves every call without a memory here: its relative terms have projections of their own,
    which are no sites.
    """
    call = current_call()
    site = call.backbone.attention_names[module](call)
    steps = call.steps(site) or []
    if not steps and call.recorded is None:
        return None
    assert query_states is None, "the model reads its own hidden states"
    split = module.transpose_for_scores
    query, key, value = split(module.in_proj(hidden_states)).chunk(3, dim=-1)
    query, value = query + split(module.q_bias[None, None]), value + split(module.v_bias[None, None])
    call.record(site, key, value)
    num_terms = 1 + len(module.pos_att_type)
    query = query / torch.tensor(float(query.shape[-1] * num_terms)).sqrt().to(query)
    scores = query @ key.transpose(-1, -2)
    if module.relative_attention:
        assert relative_pos is not None and rel_embeddings is not None
        rel_embeddings = module.pos_dropout(rel_embeddings)
        scores = scores + module.disentangled_att_bias(query, key, relative_pos, rel_embeddings, num_terms)
    talk = (module.head_logits_proj, module.head_weights_proj)
    scores = _over_heads(talk[0], scores).masked_fill(~attention_mask.bool(), torch.finfo(scores.dtype).min)
    return _attend_scores(module, steps, query, scores, value, 1.0, talk)


def biased_attention(
    module: Any,
    original: Callable[..., tuple[Tensor, ...]],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """MPNet attention (Song et al. 2020, arXiv 2004.09297) with memory; every entry of a memory has position bias 0.

    The model's own forward serves every call without a memory here.
    """
    call = current_call()
    if isinstance(call, JointCall):

        def attend(part: Any, own: Tensor) -> Tensor:
            out: Tensor = module.forward(own, part.square(attention_mask), part.square(position_bias), **kwargs)[0]
            return out

        return (attend_apart(call, (hidden_states,), 1, attend),)
    site = call.backbone.attention_names[module](call)
    steps = call.steps(site) or []
    if not steps and call.recorded is None:
        return original(hidden_states, attention_mask, position_bias, output_attentions=output_attentions, **kwargs)
    heads = module.num_attention_heads
    query, key, value = (_split_heads(p(hidden_states), heads) for p in (module.q, module.k, module.v))
    call.record(site, key, value)
    scale = math.sqrt(query.shape[-1])
    scores = query @ key.transpose(-1, -2) / scale
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores + bias
    out: Tensor = module.o(_attend_scores(module, steps, query, scores, value, scale))
    return (out,)


def _attend_scores(
    module: Any,
    steps: list[Step],
    query: Tensor,
    scores: Tensor,
    value: Tensor,
    scale: Tensor | float,
    talk: tuple[nn.Module | None, nn.Module | None] = (None, None),
) -> Tensor:
    """Values weighted by masked `scores [B, H, Q, S]`, those of a memory in front; `[B, Q, H*K]`.

    `talk` holds what mixes scores and weights over the heads (DeBERTa's talking heads); `scores` are mixed already.
    """

    def attend(rows: slice | Tensor | None, memory: Memories | None) -> Tensor:
        q, s, v = (t if rows is None else t[rows] for t in (query, scores, value))
        if memory is not None:
            keys, values, is_open = memory
            front = _over_heads(talk[0], q @ (keys.to(q.dtype).transpose(-1, -2) / scale))
            if is_open is not None:
                front = front.masked_fill(~(is_open > 0)[:, None, None, :], torch.finfo(front.dtype).min)
            s = torch.cat([front, s], dim=-1)
            v = torch.cat([values.to(v.dtype), v], dim=2)
        out: Tensor = _over_heads(talk[1], module.dropout(s.softmax(dim=-1))) @ v
        return out.transpose(1, 2)

    out = _by_rows(steps, query.shape[0], attend) if steps else attend(None, None)
    return out.reshape(*out.shape[:2], -1)


def _over_heads(mix: nn.Module | None, t: Tensor) -> Tensor:
    """`t [B, H, Q, S]` with its heads mixed linearly, or as it is."""
    if mix is None:
        return t
    mixed: Tensor = mix(t.movedim(1, -1))
    return mixed.movedim(-1, 1)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H*K]` to `[B, H, T, K]`."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _relative_scores(
    module: Any, query: Tensor, key: Tensor, relative_pos: Tensor, rel_embeddings: Tensor, kinds: Any, scale: Tensor
) -> Tensor:
    """Content-to-position plus position-to-content terms, `[B, H, Q, S]`.

    The relative embeddings pass through the sites' projections, once per row where the rows differ there.
    """
    span = module.pos_ebd_size
    shared = module.pos_dropout(rel_embeddings)[: 2 * span].unsqueeze(0)
    positions = relative_pos.view(1, 1, *relative_pos.shape[-2:]).to(torch.long)
    heads = module.num_attention_heads
    total: Tensor | float = 0.0
    if "c2p" in kinds:
        projection = module.key_proj if module.share_att_key else module.pos_key_proj
        pos_key = _split_heads(projection(shared), heads)
        index = (positions + span).clamp(0, 2 * span - 1).expand(*query.shape[:2], -1, -1)
        total = total + (query @ pos_key.transpose(-1, -2)).gather(-1, index) / scale
    if "p2c" in kinds:
        projection = module.query_proj if module.share_att_key else module.pos_query_proj
        pos_query = _split_heads(projection(shared), heads)
        index = (span - positions).clamp(0, 2 * span - 1).expand(*key.shape[:2], -1, -1)
        total = total + (key @ pos_query.transpose(-1, -2)).gather(-1, index).transpose(-1, -2) / scale
    assert isinstance(total, Tensor)
    return total
