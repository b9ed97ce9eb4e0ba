"""Prompt tuning, and P-tuning, whose encoder PEFT leaves out of the checkpoint:  `prompt_embeddings [P, E]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from multitune.convert.peft.family import Family, Source, Written, family
from multitune.deltas import Prompt
from multitune.errors import AdapterError
from multitune.methods import Method
from multitune.methods.prompt_tuning import PromptTuning
from multitune.methods.ptuning_v1 import PTuningV1

if TYPE_CHECKING:
    from multitune.backbone import Backbone

VECTORS = "prompt_embeddings"


@family
class PromptFamily(Family):
    """`peft_type` PROMPT_TUNING: vectors in front of the whole text, the first token included."""

    peft_type = "PROMPT_TUNING"
    methods: ClassVar[tuple[str, ...]] = ("prompt", "ptuning_v1")
    prompt = True
    settings = frozenset(
        {
            "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules",
            "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path",
        }
    )  # fmt: skip

    def read(self, source: Source) -> tuple[Method, dict[str, Tensor]]:
        return read_prompt(source)

    def write(self, method: Method, params: Mapping[str, Tensor], backbone: Backbone) -> Written:
        if isinstance(method, PTuningV1):
            return _written(_in_front(method, params, backbone), backbone)
        assert isinstance(method, PromptTuning)
        if method.position != 0:
            raise AdapterError(
                f"its vectors stand at position={method.position}, and PEFT's stand in front of the whole text; only "
                f"prompts trained with position=0 can be exported"
            )
        return _written(params["vectors"], backbone)

    def fold(self, source: Source, model: nn.Module) -> int:
        return int(source.tensors[VECTORS].shape[0])


@family
class PTuningFamily(PromptFamily):
    """`peft_type` P_TUNING: the checkpoint holds the encoder's output, which is all that inference needs."""

    peft_type = "P_TUNING"
    methods: ClassVar[tuple[str, ...]] = ()
    settings = PromptFamily.settings | {
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    }  # fmt: skip


def _written(vectors: Tensor, backbone: Backbone) -> Written:
    settings = {
        "num_virtual_tokens": vectors.shape[0],
        "token_dim": vectors.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": backbone.model.config.num_attention_heads,
        "num_layers": backbone.num_layers,
        "prompt_tuning_init": "RANDOM",
    }
    return Written(config=settings, tensors={VECTORS: vectors})


def _in_front(method: PTuningV1, params: Mapping[str, Tensor], backbone: Backbone) -> Tensor:
    """The vectors `[P, E]` of a P-tuning that ended as a prompt in front of the whole text.

    Raises:
        AdapterError: it has words among its vectors, or vectors elsewhere.
    """
    finished, own = method.finish(params, backbone)
    (prompt,) = finished.deltas(own, backbone)["embedding"]
    assert isinstance(prompt, Prompt)
    if "layout" in own or set(prompt.at) != {0}:
        raise AdapterError(
            f"its pattern {method.pattern!r} at position={method.position} puts words among its vectors, or vectors "
            f"behind or inside the text, and PEFT's stand in front of the whole text; only a pattern such as "
            f"'{{p*9}} {{text}}' with position=0 and without slots can be exported"
        )
    return own["vectors"]


def read_prompt(source: Source) -> tuple[Method, dict[str, Tensor]]:
    """The vectors of a prompt as our prompt tuning."""
    vectors = source.tensors.get(VECTORS)
    width = source.backbone.word_embeddings.shape[1]
    if vectors is None or vectors.ndim != 2 or vectors.shape[1] != width:
        found = "no" if vectors is None else f"{tuple(vectors.shape)}"
        raise AdapterError(f"{source.where}: {found} '{VECTORS}' where [length, {width}] is expected")
    return PromptTuning(length=vectors.shape[0], position=0), {"vectors": vectors}
