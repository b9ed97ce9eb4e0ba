"""`attach`: tune a Hugging Face model in place, so that any loop written for transformers trains it.

The model keeps its class, its modules and its head. Its base model is instrumented, the method's tensors are registered
as one more module, and its forward pass runs under the plan of that one adapter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from multitune.architectures import architecture_for
from multitune.backbone import Backbone
from multitune.call import Call
from multitune.current import active, recompute_context
from multitune.errors import BackboneError, ConfigError, PlanError
from multitune.files import replace_file
from multitune.hooks import Undo, wrap_forward
from multitune.inputs import Batch
from multitune.loading import with_decoder
from multitune.lsg import LSG
from multitune.methods import Combined, Method
from multitune.methods.yielded import check_deltas, check_trainable
from multitune.plan import DeltaSet, Plan
from multitune.tasks import Template

if TYPE_CHECKING:
    from multitune.adapter import Adapter

#: Name of the module that holds the tensors, and so the start of their names in the model's `state_dict`.
MODULE = "multitune"

#: What a Trainer loads again when it resumes, or takes back its best step: the trained tensors by their names there.
STATE_FILE = "model.safetensors"


def attach(
    model: PreTrainedModel,
    method: Method,
    *,
    name: str = "adapter",
    seed: int = 0,
    template: str | Sequence[str] | None = None,
    max_length: int = 128,
) -> PreTrainedModel:
    """Make `model` train `method` and its head alone, whatever loop trains it; the model itself is returned.

    Parameters of the base model are frozen, and so is a language model's head. A classifier's head stays trainable.
    `model.save_pretrained(FOLDER)` writes the adapter in our format, which `Bank` and `multitune predict` read, and
    beside it what a `Trainer` needs to resume. `model.detach()` takes everything off again.

    Args:
        model: a transformers model of a supported architecture, an encoder or a decoder, with or without a task head.
        method: any method that changes no weights and needs nothing of its loop but gradients; several of them joined
            (`Combined`) all get the loop's one learning rate.
        name: what saved adapters are called.
        seed: seed of the fresh tensors.
        template: how a saved adapter reads a row, as `Template` takes it, such as ("premise", "hypothesis") for a pair;
            by default one text, `{text}`, or for a token classifier a list of `words`. The loop has its own way, which
            nothing here sees.
        max_length: tokens that a saved adapter cuts a text to; those of the loop, likewise.

    Raises:
        BackboneError: an unsupported architecture, an encoder-decoder, a model converted to LSG attention, or a model
            that is attached already.
        ConfigError: full fine-tuning, which needs none of this; a method that chooses by gradients (SIFT), acts after
            each step (AdaLoRA, DSEE with `pruned_heads`) or wants several learning rates (LoRA+); one that does not
            fit; or a `max_length` below 1.
        TaskError: a malformed template, or for a token classifier one that is not a single column of words.
    """
    if MODULE in model._modules or hasattr(model, MODULE):
        raise BackboneError("this model has an adapter attached; detach it first: model.detach()")
    if method.changes_weights:
        raise ConfigError(f"{method.title} trains the model's own weights, for which nothing need be attached")
    if LSG.of(model.config) is not None:
        raise BackboneError(
            "this model was converted to LSG attention, whose global tokens its own heads do not know; train on its "
            "backbone: multitune.train(backbone, data, method)"
        )
    if max_length < 1:
        raise ConfigError(
            f"max_length={max_length} is not possible; give the tokens that the loop cuts texts to, such as 128"
        )
    read_as = None if template is None else _template_for(model, template)
    _check_plain_loop(method)
    _check_one_stack(model)
    attached = Attached(model, method, name, seed, read_as, max_length)
    model.add_module(MODULE, attached.tensors)
    return model


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the model is what it was, bit for bit, but for a head that was trained.

    Raises:
        BackboneError: nothing is attached.
    """
    tensors = model._modules.get(MODULE)
    if not isinstance(tensors, AttachedTensors):
        raise BackboneError("nothing is attached to this model; attach a method first: attach(model, LoRA(r=8))")
    tensors.owner.detach()


def _template_for(model: PreTrainedModel, template: str | Sequence[str]) -> Template:
    """The template as one that the model's task can have; later, saving would refuse what has been trained."""
    from multitune.convert.hugging_face import check_template

    made = Template((template,) if isinstance(template, str) else tuple(template))
    check_template(model, made)
    return made


def _check_plain_loop(method: Method) -> None:
    """Raise `ConfigError` for a method that needs more of its loop than gradients."""
    for part in method.methods if isinstance(method, Combined) else (method,):
        for hook in part.loop_hooks:
            raise ConfigError(
                f"{part.title} needs a loop that calls its {hook}, which loops of others do not; use multitune.train"
            )


def _check_one_rate(method: Method, params: Mapping[str, Tensor]) -> None:
    """Raise `ConfigError` for a method that is defined by different learning rates.

    Methods trained together get the one rate that the loop has, as each of them would alone; only their recipes differ.
    """
    for name in params:
        part, own = method.part_of(name) if isinstance(method, Combined) else (method, name)
        if part.trains(own) and part.learning_rate_factor(own) != 1:
            raise ConfigError(
                f"{part.title} wants another learning rate for '{name}', which other loops do not give it; use "
                f"multitune.train"
            )


def _check_yields(method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Raise `ConfigError` where the method's deltas do not fit the backbone, or would not train its tensors."""
    own = {
        name: t.detach().to(backbone.device).requires_grad_(t.is_floating_point() and method.trains(name))
        for name, t in params.items()
    }
    cast = {name: t.to(backbone.dtype) if t.is_floating_point() else t for name, t in own.items()}
    with torch.enable_grad():
        yielded = method.deltas(cast, backbone)
    check_deltas(method, yielded, backbone)
    check_trainable(method, own, yielded)


def _check_one_stack(model: PreTrainedModel) -> None:
    """Raise `BackboneError` for a model with an encoder and a decoder, of which only the encoder would be adapted."""
    decoder = architecture_for(model.config.model_type, model.config).decoder
    if decoder is None or not hasattr(model.base_model, decoder.runs):
        return
    name = model.config.name_or_path or "NAME"
    raise BackboneError(
        f"a {type(model).__name__} has an encoder and a decoder, and attach would adapt the encoder alone. Train both "
        f"as a backbone, multitune.train(Backbone.load('{with_decoder(name)}'), data, method), or the encoder alone: "
        f"Backbone.load('{name}')"
    )


class AttachedTensors(nn.Module):
    """A method's tensors as a module of the model, so that optimizers, checkpoints and devices find them."""

    def __init__(self, owner: Attached, params: Mapping[str, Tensor], method: Method) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # no module and no part of the state
        for name, tensor in params.items():
            trained = method.trains(name)
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor, requires_grad=trained))

    owner: Attached

    def by_name(self) -> dict[str, nn.Parameter]:
        """The tensors as `method.init` names them."""
        return {name.replace("/", "."): p for name, p in self.named_parameters()}


class Attached:
    """What `attach` did to one model, and how to undo it."""

    def __init__(
        self, model: PreTrainedModel, method: Method, name: str, seed: int, template: Template | None, max_length: int
    ) -> None:
        self.model = model
        self.method = method
        self.name = name
        self.template = template
        self.max_length = max_length
        base = model.base_model
        assert isinstance(base, PreTrainedModel)
        self.base = base
        was_training = {m: m.training for m in model.modules()}
        was_trained = {p: p.requires_grad for p in model.parameters()}
        name_of_model = str(model.config.name_or_path or model.config.model_type)
        self.backbone = Backbone(self.base, None, name=name_of_model, decoder=False)
        for module, training in was_training.items():
            module.training = training
        _ = self.backbone.fingerprint  # before the adapter's own tensors join the base model
        try:
            params = method.init(self.backbone, torch.Generator().manual_seed(seed))
            _check_one_rate(method, params)
            _check_yields(method, params, self.backbone)
        except Exception:  # a method's own mistake too leaves the model as it was
            self.backbone.detach()
            for parameter, trained in was_trained.items():
                parameter.requires_grad_(trained)
            raise
        self.tensors = AttachedTensors(self, {k: t.to(self.backbone.device) for k, t in params.items()}, method)
        self._signature = inspect.signature(self.base.forward)
        self._undo: list[Undo] = [wrap_forward(self.base, self._instrumented)]
        self._replace("_set_gradient_checkpointing", self._checkpointing)
        self._replace("save_pretrained", self._saving)
        self._set("detach", self.detach)
        self._freeze_output_embeddings()
        self._undo.append(lambda: _restore(was_trained))

    # ---------------------------------------------------------------- on and off

    def detach(self) -> None:
        """Undo `attach`."""
        for undo in reversed(self._undo):
            undo()
        self._undo = []
        self.backbone.detach()
        self.model._modules.pop(MODULE, None)

    def _set(self, name: str, value: Any) -> None:
        """Give the model an attribute of its own until it is detached."""
        self.model.__dict__[name] = value
        self._undo.append(lambda: self.model.__dict__.pop(name, None))

    def _replace(self, name: str, make: Callable[[Any], Any]) -> None:
        self._set(name, make(getattr(self.model, name)))

    def _freeze_output_embeddings(self) -> None:
        """A language model's head belongs to the frozen model; only heads of a task are trained."""
        out = self.model.get_output_embeddings()
        if isinstance(out, nn.Module):
            out.requires_grad_(False)

    # ---------------------------------------------------------------- running

    def delta_set(self) -> DeltaSet:
        """The deltas that the tensors yield now, differentiably, in the backbone's dtype."""
        dtype = self.backbone.dtype
        params = {k: p.to(dtype) if p.is_floating_point() else p for k, p in self.tensors.by_name().items()}
        return DeltaSet(self.method.deltas(params, self.backbone))

    def _instrumented(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = self._signature.bind_partial(*args, **kwargs)
            given = {k: v for k, v in bound.arguments.items() if k != "kwargs"} | bound.arguments.get("kwargs", {})
            # Task models pass on what they were not given as None, which is every argument's default.
            given = {k: v for k, v in given.items() if v is not None}
            return self._run(original, given)

        return forward

    def _run(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        ids = given.get("input_ids")
        if ids is None:
            raise PlanError("an attached model takes input_ids, not inputs_embeds: methods read the token ids")
        deltas = self.delta_set()
        plan = Plan([deltas] * ids.shape[0])
        mask = given.get("attention_mask")
        flat = mask if mask is None or mask.ndim == 2 else None
        _check_given(given, deltas)
        if deltas.num_positions:
            given.pop("position_ids", None)  # ordinary ones, as was checked; the call has others
        call = Call(self.backbone, plan, Batch(input_ids=ids, attention_mask=flat, token_type_ids=_types(given)))
        inputs = {k: v for k, v in call.inputs.items() if k not in given or k in _FROM_CALL}
        if _past(given) and "position_ids" not in given:
            inputs.pop("position_ids", None)  # of the whole row; the model itself counts on from its cache
        with active(call):
            output = original(**{**given, **inputs})
        return output if call.prompts is None else self._without_prompts(call, output)

    def _without_prompts(self, call: Call, output: Any) -> Any:
        """The output with the inserted vectors taken out again, and the pooler on the first token of the text."""
        hidden = call.restore(output[0])
        if isinstance(output, tuple):
            raise PlanError("an attached prompt needs return_dict=True, since it changes the output's length")
        output["last_hidden_state"] = hidden
        if output.get("pooler_output") is not None and self.backbone.pooler is not None:
            output["pooler_output"] = self.backbone.pooler(hidden)
        return output

    def _checkpointing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Recomputed layers find their own call again, which torch keeps with the graph."""

        @functools.wraps(original)
        def set_checkpointing(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(original).bind(*args, **kwargs)
            function = bound.arguments.get("gradient_checkpointing_func")
            if function is not None:
                settings = dict(getattr(function, "keywords", None) or {})
                if settings.get("use_reentrant", True):
                    raise ConfigError(
                        "recomputed layers need use_reentrant=False here: give "
                        "gradient_checkpointing_kwargs={'use_reentrant': False}"
                    )
                bound.arguments["gradient_checkpointing_func"] = functools.partial(
                    function, context_fn=recompute_context
                )
            return original(*bound.args, **bound.kwargs)

        return set_checkpointing

    # ---------------------------------------------------------------- saving

    def adapter(self) -> Adapter:
        """The adapter as it is now, with the model's head where our heads can hold it.

        Raises:
            AdapterError: a head that ours cannot express.
        """
        from multitune.convert.hugging_face import adapter_of

        with torch.no_grad():
            params = {
                k: (p.detach().float() if p.is_floating_point() else p.detach()).cpu().clone()  # or places in a weight
                for k, p in self.tensors.by_name().items()
            }
            method, params = self.method.finish(params, self.backbone)  # type: ignore[assignment]
        return adapter_of(
            self.model, self.backbone, method, params, self.name, template=self.template, max_length=self.max_length
        )

    def _saving(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def save_pretrained(
            save_directory: str | Path, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
        ) -> None:
            if not is_main_process:
                return
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            self.adapter().write_into(folder)
            trained = {k: p.detach().cpu().contiguous() for k, p in self.model.named_parameters() if p.requires_grad}
            trained |= {f"{MODULE}.{k}": p.detach().cpu().contiguous() for k, p in self.tensors.named_parameters()}
            replace_file(folder / STATE_FILE, lambda file: save_file(trained, file, metadata={"format": "pt"}))

        return save_pretrained


#: Inputs that a call may change, and so come from it even where they were given.
_FROM_CALL = ("input_ids", "attention_mask", "token_type_ids")


def _types(given: Mapping[str, Any]) -> Tensor | None:
    types = given.get("token_type_ids")
    return types if isinstance(types, Tensor) else None


def _past(given: Mapping[str, Any]) -> int:
    """Tokens in a key/value cache."""
    cache = given.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _check_given(given: Mapping[str, Any], deltas: DeltaSet) -> None:
    """Raise `PlanError` for arguments without a meaning where a prompt lengthens the rows or moves their positions."""
    if not deltas.num_positions:
        return
    if _past(given):
        raise PlanError("a prompt would be added again at every step with a cache; generate with use_cache=False")
    mask = given.get("attention_mask")
    refused = ("output_hidden_states", "output_attentions") if deltas.prompt_length else ()
    on = next((name for name in refused if given.get(name)), None)
    if mask is not None and mask.ndim != 2:
        on = "an attention_mask of more than two dimensions"
    elif not _ordinary(given.get("position_ids"), mask):
        on = "position_ids that do not count each row from its first token"
    if on is not None:
        raise PlanError(f"{on} cannot be honoured while the attached prompt takes positions of its own; leave it out")


def _ordinary(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether `positions [B, T]` count every row's real tokens from 0, as `generate` gives them."""
    if positions is None:
        return True
    if mask is None:
        return bool((positions == torch.arange(positions.shape[1], device=positions.device)).all())
    return bool(((positions == mask.cumsum(1) - 1) | (mask == 0)).all())


def _restore(was_trained: Mapping[nn.Parameter, bool]) -> None:
    for parameter, trained in was_trained.items():
        parameter.requires_grad_(trained)
