"""Finding a backbone by its name, and loading it: a checkpoint's own weights, all of them, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from multitune.architectures import Architecture, Decoder, architecture_for
from multitune.errors import BackboneError, ConfigError, suggest, suggest_file
from multitune.files import refusal_of_pickle
from multitune.lsg import convert_to_lsg, split_name
from multitune.masked import masked_head_of
from multitune.packaged import PACKAGED, quietly, resolve
from multitune.placing import place
from multitune.pruned import prune, split_share
from multitune.quantized import quantize_in_place, split_scheme

if TYPE_CHECKING:
    from multitune.backbone import Backbone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_WHAT_LOADS = (
    f"Give {', '.join(map(repr, PACKAGED))}, a folder with config.json, model.safetensors and the tokenizer, or a hub "
    f"id that this machine can reach and that has safetensors (pickles are never opened)"
)

#: What stands behind a name to load an encoder-decoder with its decoder, and not its encoder alone.
DECODER = "+decoder"


def load(
    make: type[Backbone], name: str, dtype: str | torch.dtype, device: str | torch.device, quantize: str | None = None
) -> Backbone:
    """`Backbone.load`: what the name says, its conversions taken off from the end.

    Args:
        make: the class of backbone.
    """
    name, scheme = split_scheme(name, quantize)
    if scheme is not None:
        backbone = load(make, name, dtype, device)
        quantize_in_place(backbone, scheme)
        return backbone
    name, share = split_share(name)
    if share is not None:
        return prune(load(make, name, dtype, device), share)
    base, lsg = split_name(name)
    if lsg is not None:
        return convert_to_lsg(load(make, base, dtype, device), **asdict(lsg))
    return _load_plain(make, name, dtype, device)


def _load_plain(make: type[Backbone], name: str, dtype: str | torch.dtype, device: str | torch.device) -> Backbone:
    base = name.removesuffix(DECODER)
    wanted = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if wanted is None:
        raise ConfigError(f"dtype '{dtype}' is unknown; choose one of {', '.join(DTYPES)}")
    _check_device(device)
    source = resolve(base)
    _check_near_name(base)
    try:
        config = AutoConfig.from_pretrained(source)
        row = architecture_for(config.model_type, config)
        if base != name and row.decoder is None:
            raise BackboneError(
                f"'{name}': {config.model_type} is no encoder-decoder and has no decoder of its own; load it as it is: "
                f"Backbone.load('{base}')"
            )
        # float16 is cast to below: see fingerprint.py
        load_as = torch.float32 if wanted is torch.float16 else wanted
        loader = _loader(config) if base == name else AutoModelForSeq2SeqLM
        with quietly():
            _check_safetensors(base, source)
            model, report = loader.from_pretrained(
                source, config=config, dtype=load_as, output_loading_info=True, use_safetensors=True
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except BackboneError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise BackboneError(_cannot_load(base, source, error)) from error
    _check_complete(name, model, report["missing_keys"], writes=base != name)
    backbone = make(model, tokenizer, name=name)
    backbone.source = str(source)
    if "lm_head.weight" in report["missing_keys"]:  # the checkpoint of a base model alone: its head is random
        backbone.lm_linear = None
    if wanted is torch.float16:
        _ = backbone.fingerprint
    place(model, device, wanted)
    if backbone.parts.bias is not None:  # a tensor of its own, which no module moves
        backbone.parts = replace(backbone.parts, bias=backbone.parts.bias.to(device, wanted))
    return backbone


def _check_safetensors(name: str, source: str) -> None:
    """Raise BackboneError for a hub id without safetensors.

    Asked for safetensors that are not there, transformers would have a service on the hub convert the pickle in a pull
    request to that repository, wait for it, and load whatever lies in the request.
    """
    if Path(source).exists():
        return
    missing: list[OSError] = []
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):  # the latter of weights in several files
        try:
            cached_file(source, file)  # fetched here or a moment later by transformers, from the one cache
            return
        except OSError as error:
            missing.append(error)
    raise BackboneError(
        f"cannot load backbone '{name}': there is no {SAFE_WEIGHTS_NAME} of this hub id within reach "
        f"({str(missing[0]).splitlines()[0].rstrip('.')}). A pickle, which can run code when it is opened, is never "
        f"opened. If there is one that you trust, fetch it: hf download {source} --local-dir FOLDER. Loading FOLDER "
        f"then says how to convert it"
    ) from missing[0]


def _cannot_load(name: str, source: Any, error: Exception) -> str:
    folder = Path(source)
    pickled = folder / "pytorch_model.bin"
    if pickled.is_file() and not list(folder.glob("*.safetensors")):
        return f"cannot load backbone '{name}': {refusal_of_pickle(pickled, folder / 'model.safetensors')}"
    near = suggest(name, PACKAGED) or suggest_file(folder)
    absent = "" if folder.exists() else f"there is no folder '{name}'.{near} As a hub id: "
    return f"cannot load backbone '{name}': {absent}{str(error).splitlines()[0].rstrip('.')}. {_WHAT_LOADS}"


def _check_near_name(name: str) -> None:
    """Raise BackboneError for a packaged name with a typo, before the hub is asked, which takes long where it is far.

    Ids on the hub without an owner are few and old, and none of them is near a packaged name; one that this machine
    has a copy of is taken all the same.
    """
    near = "" if name in PACKAGED or "/" in name or Path(name).exists() else suggest(name, PACKAGED)
    if near and not _is_copied(name):
        raise BackboneError(f"cannot load backbone '{name}': there is no folder '{name}'.{near} {_WHAT_LOADS}")


def _is_copied(hub_id: str) -> bool:
    """Whether the hub's cache on this machine holds a model's configuration."""
    try:
        return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
    except ValueError:  # no name that the hub allows
        return False


#: The usual ones, as torch calls them.
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # how torch refuses a device that it does not have
        kind = str(device).partition(":")[0].lower()
        near = "" if kind in _DEVICES else suggest({"gpu": "cuda"}.get(kind, kind), _DEVICES)
        raise ConfigError(
            f"cannot use device '{device}': {str(error).splitlines()[0]}.{near} Leave it out to use the CPU; a GPU "
            f"needs its driver and a build of torch for it (https://pytorch.org/get-started)"
        ) from error


def _loader(config: PretrainedConfig) -> Any:
    """transformers' class that loads a checkpoint: a causal model with its head, an encoder alone without a decoder."""
    if architecture_for(config.model_type, config).causal:
        return AutoModelForCausalLM
    encoder = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    alone = isinstance(encoder, type) and encoder.__name__ in (config.architectures or ())
    return AutoModelForTextEncoding if alone else AutoModel


def with_decoder(name: str) -> str:
    """A backbone's name with `DECODER` where it belongs: in front of other conversions."""
    base, plus, others = name.partition("+")
    return f"{base}{DECODER}{plus}{others}"


def stacks_of(row: Architecture, model: PreTrainedModel, decoder: bool | None) -> Architecture:
    """The table's row for the stacks of `model` that run: of an encoder-decoder both, or the encoder alone."""
    if row.decoder is None:
        if decoder:
            raise BackboneError(f"{model.config.model_type} is no encoder-decoder and has no decoder of its own")
        return row
    writes = isinstance(model.get_output_embeddings(), nn.Linear) if decoder is None else decoder
    return replace(row, runs="") if writes else replace(row, decoder=None)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model as a backbone holds it: its base model, and what turns last hidden states into logits."""

    base: PreTrainedModel
    linear: nn.Linear | None = None
    """The head's own map; `None` where it is tied to the word embeddings, or absent."""
    bias: Tensor | None = None
    """`[1, V]`, added to the logits."""
    eos_ids: tuple[int, ...] = ()
    """Token ids that end a text."""
    start_id: int | None = None
    """Encoder-decoders: the token that the decoder begins with."""
    first_id: int | None = None
    """Encoder-decoders: the token that every text is made to begin with, if the model says so."""


def split(model: PreTrainedModel, architecture: Architecture) -> Parts:
    """The base model, and of a model that writes its head and the ids that begin and end a text."""
    settings = getattr(model, "generation_config", None) or model.config
    ends = settings.eos_token_id
    eos_ids = tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (int(ends),)
    base, linear = model.base_model, model.get_output_embeddings()
    if masked_head_of(model, architecture) is not None:
        assert isinstance(base, PreTrainedModel)
        return Parts(base=base, eos_ids=eos_ids)
    if architecture.decoder is not None:
        return _split_decoder(model, architecture.decoder, eos_ids)
    assert isinstance(base, PreTrainedModel)
    if model.config.is_encoder_decoder:
        return Parts(base=base, eos_ids=eos_ids)
    if not architecture.causal or base is model or not isinstance(linear, nn.Linear):
        return Parts(base=model, eos_ids=eos_ids)
    return Parts(base=base, linear=None if model.config.tie_word_embeddings else linear, eos_ids=eos_ids)


def _split_decoder(model: PreTrainedModel, decoder: Decoder, eos_ids: tuple[int, ...]) -> Parts:
    base, linear = model.base_model, model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise BackboneError(
            f"a {type(model).__name__} has no head, without which its decoder cannot write; give a model for "
            f"conditional generation, or decoder=False for its encoder alone"
        )
    if base is model:  # T5 keeps its stacks beside its head
        with torch.device("meta"):
            base = AutoModel.from_config(model.config)
        for name, _ in list(base.named_children()):
            setattr(base, name, getattr(model, name))
        base.name_or_path = model.name_or_path
    assert isinstance(base, PreTrainedModel)
    tied = linear.weight is base.get_input_embeddings().weight
    start: Any = None
    first: Any = None
    for source in (model.config, getattr(model, "generation_config", None)):
        start = getattr(source, "decoder_start_token_id", None) if start is None else start
        first = getattr(source, "forced_bos_token_id", None) if first is None else first
    bias = None if decoder.logit_bias is None else getattr(model, decoder.logit_bias).detach()
    return Parts(base=base, linear=None if tied else linear, bias=bias, eos_ids=eos_ids, start_id=start, first_id=first)


def _check_complete(name: str, model: PreTrainedModel, missing: Iterable[str], *, writes: bool) -> None:
    """Refuse a model some of whose weights are not from its checkpoint but random, other each time.

    Checkpoints of masked language models lack a pooler, so the model goes without one; and those of a causal base model
    a head, which only what `writes` by its name cannot do without.
    """
    pooler = architecture_for(model.config.model_type, model.config).pooler
    lacking = sorted(key for key in missing if writes or key != "lm_head.weight")
    if pooler is not None and any(key.startswith(f"{pooler}.") for key in lacking):
        setattr(model, pooler, None)
        lacking = [key for key in lacking if not key.startswith(f"{pooler}.")]
    if lacking:
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise BackboneError(f"cannot load backbone '{name}': its checkpoint lacks the weights {shown}")
