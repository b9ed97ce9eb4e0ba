"""The frozen backbone: a Hugging Face model, its tokenizer and its sites, instrumented once."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from multitune import copies, hooks, instrument, passes
from multitune.architectures import Architecture, architecture_for
from multitune.errors import BackboneError, ConfigError, PlanError, suggest
from multitune.fingerprint import describe, fingerprint_of
from multitune.frozen import frozen_view
from multitune.inputs import Batch
from multitune.joint import JointBatch
from multitune.language_head import AnyLanguageHead, LanguageHead, MaskedHead
from multitune.loading import Parts, load, split, stacks_of, with_decoder
from multitune.lsg import LSG
from multitune.masked import masked_head_of, read_masked_head
from multitune.plan import Plan
from multitune.pruned import Pruned
from multitune.quantized import Quantized, bytes_of, check_weights
from multitune.sites import Site, SiteKind, find_sites, select_sites

if TYPE_CHECKING:
    from multitune.compiled import Compiled
    from multitune.generation.prompts import AnySettings
    from multitune.generation.settings import Generation
    from multitune.kv_cache import DistanceBias
    from multitune.methods import Method


class Backbone:
    """One frozen transformer, shared by every task. Loading or unloading adapters changes no module of it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        name: str = "",
        *,
        decoder: bool | None = None,
        parts: Parts | None = None,
    ) -> None:
        """
        Args:
            model: a base model (no task head) of a supported architecture; it is frozen and instrumented here. Of a
                causal or masked language model, its base model is; the head is kept beside it (`lm_head`,
                `masked_head`).
            tokenizer: its tokenizer; needed to pass texts rather than token ids.
            name: what to call it in messages and adapter files; by default the model's own name or type.
            decoder: encoder-decoders: whether the decoder runs too, so that the backbone writes; or the encoder alone.
                By default it runs where the model is one for conditional generation, with its head.
            parts: of a copy: what the original was taken into, with `model` as its base.

        Raises:
            BackboneError: unsupported architecture, or a model that another `Backbone` already instruments.
        """
        self.architecture: Architecture = stacks_of(
            architecture_for(model.config.model_type, model.config), model, decoder
        )
        self.mlm_head: MaskedHead | None = masked_head_of(model, self.architecture)
        """The head of a masked language model, as far as it is here; ask for `masked_head`."""
        self.source = ""
        """Where the backbone was loaded from, and the head of a masked language model can be read."""
        parts = split(model, self.architecture) if parts is None else parts
        self.parts = parts
        """The model's base and head, as they were found."""
        self.eos_ids = parts.eos_ids
        """Token ids that end a text."""
        self.model = model = parts.base
        self.tokenizer = tokenizer
        self.lm_linear = parts.linear
        """The head's own map; `None` where it is tied to the word embeddings, or absent."""
        self.name = name or model.config.name_or_path or model.config.model_type
        self.sites: tuple[Site, ...] = find_sites(model, self.architecture)
        self.lsg: LSG | None = LSG.of(model.config)
        """How the model was converted to LSG attention, if it was."""
        check_weights(model, self.sites)
        self.attention_names: dict[nn.Module, hooks.NameAt] = {}
        """For every attention module, the name of its site in a call."""
        self.cross_attention: frozenset[nn.Module] = frozenset()
        """The attention modules that read the encoder's output."""
        self.distance_bias: DistanceBias | None = None
        """What the decoder of an encoder-decoder adds to its own attention's scores by distance."""
        self.disentangled_sites: dict[nn.Module, tuple[str, ...]] = {}
        """DeBERTa: the sites whose deltas need the row-wise attention."""
        self.tokenizer_lock = threading.Lock()
        self._shapes: dict[Method, dict[str, torch.Size]] = {}
        self.undo: list[hooks.Undo] = []
        """What takes the instruments off again, run last to first."""
        self._checkpointed: list[hooks.Undo] = []
        self.compiled: Compiled | None = None
        """What `compile` made, if it was called."""
        model.requires_grad_(False)
        model.eval()
        self.attach()

    # ---------------------------------------------------------------- loading

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        quantize: str | None = None,
    ) -> Backbone:
        """Load a backbone.

        Args:
            name: `"minilm"` or `"smollm2"` (ship as packages, need no network), a local folder, or a hub id; with
                `+decoder` behind it, an encoder-decoder with its decoder, so that it writes; with `+lsg`, and perhaps
                settings, converted to LSG attention: `"minilm+lsg:kind=pooling,block=64"`; with `+pruned:0.3` behind
                that, so many of its weights zero; with `+int8` or `+nf4` at its end, quantised.
            dtype: `float32`, `bfloat16` or `float16`.
            device: where the weights live, as torch names devices.
            quantize: "int8" or "nf4" to hold the weights of the layers' linear maps in 8 or 4 bits, as `quantize` does.

        Raises:
            BackboneError: nothing by that name, an unsupported architecture, or weights that do not load.
            ConfigError: an unknown dtype or way to quantise, a device that this machine does not have, or impossible
                settings of LSG attention.
        """
        return load(cls, str(name), dtype, device, quantize)

    def clone(self) -> Backbone:
        """An independent copy of the model; only what changes weights needs one: tuning, merging or converting them."""
        return copies.clone(self)

    def language_model(self) -> PreTrainedModel:
        """A language model of transformers' with copies of these weights and the head; not instrumented.

        Raises:
            BackboneError: no causal language model, or one without its head.
        """
        return copies.language_model(self)

    def to_float32(self) -> None:
        """Make all weights float32, the head's own too; only a copy's, for full fine-tuning."""
        self.model.float()
        if self.lm_linear is not None:
            self.lm_linear.float()
        if self.mlm_head is not None:
            self.mlm_head.modules.float()

    # ---------------------------------------------------------------- shape

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        """Width D of the hidden states."""
        return int(self.model.config.hidden_size)

    @property
    def output_size(self) -> int:
        """Width of the last hidden states, which a few models project."""
        return int(getattr(self.model.config, self.architecture.output_size))

    @property
    def causal(self) -> bool:
        """Whether a token sees only itself and what stands before it."""
        return self.architecture.causal and not getattr(self.model.config, "use_bidirectional_attention", False)

    @property
    def decodes(self) -> bool:
        """Whether this is an encoder-decoder whose decoder runs, so that it writes and does nothing else."""
        return self.architecture.decoder is not None

    @property
    def writes(self) -> bool:
        """Whether this kind of model finds the next token of a text: a causal one, or one whose decoder runs."""
        return self.causal or self.decodes

    @cached_property
    def num_encoder_layers(self) -> int:
        """Encoder-decoders: the number of the decoder's first layer; elsewhere that of all layers."""
        of_decoder = [s.layer for s in self.sites if s.stack == "decoder" and s.layer is not None]
        return min(of_decoder, default=self.num_layers)

    @property
    def default_pooling(self) -> Literal["cls", "last", "mean"]:
        """The token that has seen its whole row: the first, or the last where attention is causal.

        The mean where a row begins with an ordinary word.
        """
        if self.causal:
            return "last"
        return "cls" if self.architecture.first_token else "mean"

    @cached_property
    def num_layers(self) -> int:
        """Number of layers L."""
        return 1 + max(s.layer for s in self.sites if s.layer is not None)

    @property
    def word_embeddings(self) -> Tensor:
        """The frozen word embeddings `[V, E]`."""
        weight = self.model.get_submodule(self.architecture.embedding).weight
        assert isinstance(weight, Tensor)
        return weight

    def embed(self, ids: Tensor) -> Tensor:
        """What stands for token ids `[...]` where prompt vectors are inserted, `[..., E]`.

        That is the word embeddings, multiplied by what the model multiplies them by.
        """
        with torch.no_grad():
            module = self.model.get_submodule(self.architecture.embedding)
            embedded: Tensor = module.forward(ids.to(self.device))  # not called: that would insert prompts
            return embedded

    @property
    def vocab_size(self) -> int:
        """Number of token ids V."""
        return self.word_embeddings.shape[0]

    @property
    def has_lm_head(self) -> bool:
        """Whether this is a language model with its head, so that it can generate text."""
        return self.decodes or (
            self.causal and (self.lm_linear is not None or bool(self.model.config.tie_word_embeddings))
        )

    @cached_property
    def lm_head(self) -> LanguageHead:
        """Last hidden states `[..., D]` to logits `[..., V]`; call it on those of the positions that matter.

        Raises:
            BackboneError: this is no causal language model, or one without its head.
        """
        if not self.has_lm_head:
            why = "its checkpoint holds the base model without a head" if self.causal else "it is no causal model"
            fix = "Load a causal language model with its head, such as Backbone.load('smollm2') (--backbone smollm2)"
            if self.model.config.is_encoder_decoder:
                why, whole = "its encoder runs alone", with_decoder(self.name)
                fix = f"Load it with its decoder: Backbone.load('{whole}') (--backbone {whole})"
            raise BackboneError(
                f"backbone '{self.name}' ({self.model.config.model_type}) has no language-model head: {why}. {fix}"
            )
        softcap, decoder = self.architecture.logit_softcap, self.architecture.decoder
        is_scaled = decoder is not None and decoder.logit_scale and getattr(self.model.config, decoder.logit_scale)
        return LanguageHead(
            self.lm_linear,
            embeddings=lambda: self.word_embeddings,
            softcap=None if softcap is None else getattr(self.model.config, softcap, None),
            scale=self.hidden_size**-0.5 if is_scaled else 1.0,
            bias=self.parts.bias,
        )

    @property
    def masked_head(self) -> MaskedHead:
        """Last hidden states `[..., D]` to logits `[..., V]` of the word at that place; read when first asked for.

        Raises:
            BackboneError: this is no masked language model, or its checkpoint lacks the head.
        """
        if self.mlm_head is None:
            self.mlm_head = read_masked_head(self)
        return self.mlm_head

    @property
    def token_head(self) -> AnyLanguageHead:
        """The head that this kind of model has for tokens: `lm_head` where it writes or would, else `masked_head`.

        Raises:
            BackboneError: it has none.
        """
        return self.lm_head if self.writes or self.model.config.is_encoder_decoder else self.masked_head

    @property
    def num_attention_heads(self) -> int:
        """Heads of queries."""
        return int(self.model.config.num_attention_heads)

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values."""
        config = self.model.config
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def heads_at(self, site: Site) -> tuple[int, int]:
        """Heads of queries, and heads of keys and values, of the attention that a site belongs to."""
        decoder = self.architecture.decoder
        if decoder is None or site.stack not in ("decoder", "cross"):
            return self.num_attention_heads, self.num_key_value_heads
        heads = int(getattr(self.model.config, decoder.heads))
        return heads, heads

    @property
    def start_ids(self) -> tuple[int, ...]:
        """Encoder-decoders: what the decoder begins with; empty elsewhere.

        Raises:
            BackboneError: the model's configuration does not say.
        """
        if not self.decodes:
            return ()
        if self.parts.start_id is None:
            raise BackboneError(
                f"backbone '{self.name}' does not say which token its decoder begins with; set decoder_start_token_id "
                f"in its config (T5: the padding id)"
            )
        return (self.parts.start_id,)

    @property
    def max_length(self) -> int:
        """Longest sequence in positions, prompts included."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or self.architecture.max_length
        assert limit is not None, "a row of the table for models without a position table gives max_length"
        return int(limit) - self._position_offset

    @property
    def pad_id(self) -> int:
        """Token id that fills shorter rows: the model's own, or where it has none the end of text.

        Which id it is never matters, since masks hide it.
        """
        config = self.model.config
        end: Any = getattr(config, "eos_token_id", None)
        ends = end if isinstance(end, list) else [end]
        known = (i for i in (config.pad_token_id, *ends) if isinstance(i, int) and 0 <= i < self.vocab_size)
        return next(known, 0)

    @property
    def placeholder_id(self) -> int:
        """An ordinary token id that stands where a prompt vector will be; never the padding id."""
        return 1 if self.pad_id == 0 else 0

    @property
    def _position_offset(self) -> int:
        offset = self.architecture.position_offset
        return offset if isinstance(offset, int) else self.pad_id + 1

    @cached_property
    def takes_position_ids(self) -> bool:
        """Whether the model can be told where its tokens stand, as adapters that shift them need."""
        return "position_ids" in inspect.signature(type(self.model).forward).parameters

    def position_ids(self, input_ids: Tensor, shift: Tensor) -> Tensor:
        """Positions `[B, T]` as the model counts them, `shift` further on; those of padding may be any.

        Args:
            input_ids: int64 `[B, T]`.
            shift: int64 `[B]`, or `[B, T]` where it differs within a row.
        """
        shift = shift if shift.ndim == 2 else shift.unsqueeze(1)
        if self.architecture.position_offset == "pad+1":  # these models count what is no padding
            real = (input_ids != self.pad_id).long()
            return (real.cumsum(1) + shift) * real + self.pad_id
        positions = torch.arange(input_ids.shape[1], device=shift.device) + shift
        return self._position_offset + positions.clamp(0, self.max_length - 1)  # what is outside is padding

    @property
    def takes_token_types(self) -> bool:
        """Whether the model has token types (segment ids)."""
        return int(getattr(self.model.config, "type_vocab_size", 0) or 0) > 1

    @property
    def pooler(self) -> Callable[[Tensor], Tensor] | None:
        """The pretrained pooler over the first token, `[B, T, D]` to `[B, D]`, if the model has one."""
        linear, activation = self._pooler_module, self.architecture.pooler_activation
        if linear is None or activation is None:
            return linear
        function = self.model.get_submodule(activation)
        return lambda hidden: function(linear(hidden[:, 0]))

    @property
    def _pooler_module(self) -> nn.Module | None:
        path = self.architecture.pooler
        return None if path is None else getattr(self.model, path, None)

    @property
    def running(self) -> nn.Module:
        """The part of the model that is run: all of it, or the encoder of an encoder-decoder."""
        return self.model.get_submodule(self.architecture.runs)

    @property
    def stepping(self) -> nn.Module:
        """The part that runs for every new token of a text: all, or the decoder of an encoder-decoder."""
        decoder = self.architecture.decoder
        return self.running if decoder is None else self.model.get_submodule(decoder.runs)

    def refuse_decoder(self, what: str, fix: str) -> None:
        """Raise `BackboneError` where the decoder of an encoder-decoder runs, with which `what` does not work."""
        if self.decodes:
            raise BackboneError(f"backbone '{self.name}' runs an encoder and its decoder, with which {what}; {fix}")

    @cached_property
    def site_names(self) -> frozenset[str]:
        """Names of all sites."""
        return frozenset(s.name for s in self.sites)

    def frozen(self, site: str) -> nn.Module:
        """The frozen module of a site by its name, in the form that deltas read and merge into.

        Raises:
            ConfigError: no site of this name; names the nearest.
        """
        found = next((s for s in self.sites if s.name == site), None)
        if found is None:
            raise ConfigError(
                f"backbone '{self.name}' has no site '{site}'.{suggest(str(site), self.site_names)} All of them: "
                f"[site.name for site in backbone.sites]"
            )
        return frozen_view(self.model, found)

    def find_sites(
        self, kind: SiteKind, roles: Iterable[str] | None = None, layers: Iterable[int] | str | None = None
    ) -> tuple[Site, ...]:
        """Sites of one kind, narrowed to roles and layers; raises `ConfigError` where nothing matches."""
        return select_sites(self.sites, kind=kind, roles=roles, layers=layers)

    def shapes_of(self, method: Method) -> dict[str, torch.Size]:
        """Names and shapes of a method's tensors on this backbone; made once per method and hyper-parameters."""
        if method not in self._shapes:
            self._shapes[method] = method.shapes(self)
        return self._shapes[method]

    @cached_property
    def num_parameters(self) -> int:
        """Parameters of the frozen model that its last hidden states depend on."""
        return sum(p.numel() for p in self.used_parameters().values())

    @property
    def quantized(self) -> Quantized | None:
        """How the weights of the linear maps are quantised, if they are."""
        return Quantized.of(self.model)

    @property
    def pruned(self) -> Pruned | None:
        """How the linear maps' smallest weights were set to zero, if they were."""
        return Pruned.of(self.model)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors in memory."""
        return bytes_of(self.model)

    def used_parameters(self) -> dict[str, nn.Parameter]:
        """The weights that the last hidden states depend on, by name: not the pooler's, nor an unused decoder's."""
        pooler = self._pooler_module
        skipped = {id(p) for p in pooler.parameters()} if pooler is not None else set()
        used = {id(p) for p in self.running.parameters()} - skipped
        return {name: p for name, p in self.model.named_parameters() if id(p) in used}

    @cached_property
    def fingerprint(self) -> str:
        """Tells whether an adapter belongs to these weights: a hash of the names, shapes and sampled values."""
        return fingerprint_of(self)

    # ---------------------------------------------------------------- instrumentation

    @property
    def attached(self) -> bool:
        """Whether the sites are instrumented."""
        return bool(self.undo)

    def attach(self) -> None:
        """Instrument the sites; harmless when they are.

        Raises:
            BackboneError: the model belongs to another `Backbone`, computes attention in a way that cannot carry the
                rows' memories, or lacks the global tokens that its configuration speaks of; nothing is changed.
        """
        if self.attached:
            return
        instrument.attach(self)

    def detach(self) -> None:
        """Undo `attach`: the model is bit for bit what it was before `attach`."""
        for undo in reversed(self.undo):
            undo()
        self.undo = []

    def compile(
        self, *, backend: str = "inductor", mode: str | None = None, dynamic: bool | None = None, max_graphs: int = 64
    ) -> None:
        """Have `torch.compile` compile the pass of `run`; every plan runs, and gives the result it gave before.

        A plan is data of the compiled code and not part of it: plans of one structure (as many rows per group, the
        same kinds of delta and shapes at the same sites, the same number of tokens or after the second any) share one
        graph. What has another structure is compiled anew when it is first met, which takes seconds to minutes.

        Args:
            backend, mode, dynamic: as `torch.compile` has them.
            max_graphs: most graphs kept; a batch that would need one more runs uncompiled. Before torch 2.13 the
                limit is `torch._dynamo.config.recompile_limit` of the process.

        Raises:
            BackboneError: an encoder-decoder whose decoder runs.
            ConfigError: gradient checkpointing is on, whose recomputed layers the compiler cannot be given; or
                max_graphs is not at least 1.
        """
        self.refuse_decoder("the compiler is not tested", "run it as it is")
        if self._is_checkpointed:
            raise ConfigError(
                "compile: gradient checkpointing is on, and the compiler cannot be told which call a recomputed layer "
                "belongs to; switch one of them off: Backbone.disable_gradient_checkpointing()"
            )
        from multitune.compiled import Compiled  # which imports the compiler: as long as all else together

        self.compiled = Compiled(self.running, self.name, max_graphs, backend=backend, mode=mode, dynamic=dynamic)

    def uncompile(self) -> None:
        """Undo `compile`."""
        self.compiled = None

    @property
    def _is_checkpointed(self) -> bool:
        on = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        return bool(self._checkpointed) or on

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the layers in the backward pass instead of keeping their activations (training only).

        Raises:
            ConfigError: the backbone is compiled.
        """
        if self.compiled is not None:
            raise ConfigError(
                "gradient checkpointing: this backbone is compiled, and the compiler cannot be told which call a "
                "recomputed layer belongs to; switch one of them off: Backbone.uncompile()"
            )
        if not self._checkpointed:
            self._checkpointed = instrument.recompute_layers(self)

    def disable_gradient_checkpointing(self) -> None:
        """Undo `enable_gradient_checkpointing`."""
        for undo in self._checkpointed:
            undo()
        self._checkpointed = []
        instrument.keep_layers(self)

    def train_above(self, layer: int) -> None:
        """Training mode for the layers from `layer` on; dropout everywhere else stays off."""
        self.model.eval()
        for path in next(s.layers for s in self.sites if s.kind == "layers")[layer:]:
            self.model.get_submodule(path).train()
        self.model.training = True  # of the model as a whole, which says that a training run is using it

    # ---------------------------------------------------------------- running

    def run(
        self,
        plan: Plan,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        slots: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        pieces: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states of one batch under a plan.

        Args:
            plan: which rows use which deltas.
            input_ids: int64 `[B, T]`.
            attention_mask: `[B, T]`, 1 for real tokens; `None` for no padding.
            token_type_ids: int64 `[B, T]`; ignored by models without token types.
            slots: int64 `[B, S]`: the token in front of which each slot of a row stands, as in `Batch.slots`; needed by
                prompts that stand in slots.
            decoder_input_ids: int64 `[B, U]` as `Batch.decoder_input_ids`; needed where a decoder runs.
            pieces: int64 `[B, T]` as `Batch.pieces`, where rows hold several texts that see nothing of each other.

        Returns:
            `[B, T, D]`, or the decoder's `[B, U, D]`, rows and tokens as given; inserted prompt vectors are taken out
            again.

        Raises:
            PlanError: the plan does not fit the batch, the batch is not on the backbone's device, the mask or the token
                types are not shaped as the ids, an id is outside the vocabulary or a token type unknown, a row is too
                long, rows of several texts have a prompt or a backbone that is not causal, or the backbone is detached.
        """
        batch = Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            slots=slots,
            decoder_input_ids=decoder_input_ids,
            pieces=pieces,
        )
        return passes.run(self, plan, batch)

    def logits(self, plan: Plan, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of the token that follows each token of one batch under a plan: `lm_head(run(...))`.

        Where only some positions matter, hand `lm_head` the hidden states of those: V is large.

        Args:
            plan, input_ids, attention_mask: as `run` takes them.

        Returns:
            `[B, T, V]`, rows and tokens as given.

        Raises:
            BackboneError: no causal language model, or one without its head.
            PlanError: as `run` raises it.
        """
        return self.lm_head(self.run(plan, input_ids, attention_mask))

    def generate(
        self,
        plan: Plan,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        settings: AnySettings | Sequence[AnySettings] | None = None,
    ) -> list[Generation]:
        """Text for every row of one batch under a plan: prompts once, then a token per row and step.

        Args:
            plan: which rows use which deltas; kept for all steps until rows are done.
            input_ids: int64 `[B, T]`, padded on either side.
            attention_mask: `[B, T]`, 1 for real tokens; `None` for no padding.
            settings: how to decode, for all rows or one per row (`GenerationSettings`, or a mapping); by default
                greedily.

        Returns:
            One per row. Texts are empty where the backbone has no tokenizer.

        Raises:
            BackboneError: no causal language model, or one without its head.
            ConfigError: settings that are unknown or impossible.
            PlanError: before any forward pass, naming the row: no tokens, too many, or an id outside the vocabulary.
        """
        from multitune.generation.batch import generate
        from multitune.generation.prompts import settings_per_row

        return generate(self, plan, input_ids, attention_mask, settings_per_row(settings, plan.num_rows))

    def run_below(self, plan: Plan, layer: int, batch: Batch) -> Tensor:
        """What goes into a layer under a plan; that layer and those above it do not run.

        Args:
            plan: which rows use which deltas, not in pieces.
            layer: from 1 to the uppermost, counted from 0.

        Returns:
            `[B, T', D]`, rows as given. T' counts what stands in the rows beside their tokens: inserted prompt vectors,
            LSG's global tokens.

        Raises:
            PlanError: as `run`, and for a layer that does not exist.
        """
        return passes.run_below(self, plan, layer, batch)

    def run_above(self, plan: Plan, layer: int, states: Tensor, batch: Batch) -> Tensor:
        """`run`, from a layer on: the layers below it do not run, and `states` goes into it.

        With the `states` of `run_below` on the same batch that is `run`, as long as the plan's deltas below `layer` are
        those that `run_below` had.

        Args:
            states: `[B, T', D]`, as `run_below` gives it.
        """
        return passes.run_above(self, plan, layer, states, batch)

    def run_joint(self, batches: Sequence[JointBatch]) -> list[Tensor]:
        """The last hidden states of several batches that go through the frozen model together.

        The frozen operations see the rows of all; deltas, attention and dropout work on each batch's own rows in the
        shapes they have alone. A batch's result is that of `run` up to the rounding of the frozen matrix products, and
        no value of another batch has a way into it.

        Returns:
            Per batch `[K, W, D]`, rows and tokens as given.

        Raises:
            PlanError: as `run`, for any of the batches.
        """
        return passes.run_joint(self, batches)

    def keys_and_values(self, token_ids: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
        """What the attention sites of the bare backbone attend to in one row.

        Args:
            token_ids: its T tokens.

        Returns:
            Attention site name to keys and values `[T, H, K]` each, positions already applied where the model
            applies them to keys; without gradients. H counts key/value heads.

        Raises:
            PlanError: an id is outside the vocabulary, the row is too long, or the backbone is detached.
        """
        return passes.keys_and_values(self, token_ids)

    def check_attached(self) -> None:
        """Raise `PlanError` unless the sites are instrumented."""
        if not self.attached:
            raise PlanError(
                f"backbone '{self.name}' is detached, so that a plan would change nothing; Backbone.attach() first"
            )

    def check_idle(self) -> None:
        """Raise `PlanError` while a training run uses the backbone; before every pass, or dropout gets into answers."""
        if self.model.training:
            raise PlanError("the backbone is in training mode (a training run is using it); wait for it to end")

    def with_weights(self, weights: Mapping[str, Tensor]) -> Backbone:
        """A copy of this backbone with some weights replaced (full fine-tuning).

        Raises:
            BackboneError: a weight this backbone does not have, or a quantised backbone.
        """
        return copies.with_weights(self, weights)

    def describe(self) -> dict[str, Any]:
        """What an adapter file records about the backbone it was trained on."""
        return describe(self)

    def __repr__(self) -> str:
        return f"Backbone({json.dumps(self.name)}, {self.model.config.model_type}, {self.num_parameters:,} parameters)"


def check_is_backbone(taker: str, backbone: Any, how_often: str = "") -> None:
    """Raise `ConfigError` with the line that makes a backbone of what was given instead.

    Args:
        taker: what takes one, as messages call it.
        how_often: what they say behind that line.
    """
    if isinstance(backbone, Backbone):
        return
    named = isinstance(backbone, (str, Path))
    given = repr(str(backbone)) if named else f"a {type(backbone).__name__}"
    more = f", {how_often}" if how_often else ""
    raise ConfigError(f"{taker} takes a Backbone, not {given}; give Backbone.load({given if named else 'NAME'}){more}")
