"""P-tuning (Liu et al. 2021):  pseudo tokens h_1..h_P anywhere,  h_i = MLP([LSTM→(e_1..e_i) ; LSTM←(e_i..e_P)]).

Legend: P pseudo tokens, A anchor tokens, E embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from multitune.deltas import Delta, Prompt
from multitune.deltas.prompt import in_slot
from multitune.methods.base import Method, Recipe, check
from multitune.methods.registry import register
from multitune.methods.size import Size
from multitune.methods.starts import token_ids

if TYPE_CHECKING:
    from multitune.backbone import Backbone

PSEUDO, TEXT = -1, -2
"""Codes of a layout; the contents of slot k stand behind the code `TEXT - 1 - k`."""
_MARK = re.compile(r"(\{text\}|\{p(?:\*[1-9]\d*)?\})")


@register
@dataclass(frozen=True, kw_only=True)
class PTuningV1(Method):
    """Vectors around the text, made by a recurrent network in training, among fixed words. No identity when fresh.

    Shapes:
        In training `vectors [P, E]`, a bidirectional LSTM of two layers with hidden width `E / 2` each way, and two
        linear maps `[E, E]` with a ReLU between them. Saved: `vectors [P, E]`, and where the pattern has words
        `layout [P + A + 1]`: token ids of the words, -1 for a pseudo token, -2 for the text, -3 - k in front of what
        stands in slot k. A row of T tokens becomes T + P + A in every layer.
    Parameters:
        Trained `P·E + (12·E² + 16·E) + (2·E² + 2·E)`: vectors, LSTM, linear maps; saved `P·E`. RoBERTa-base, P=9:
        8,278,272 trained, 6,912 saved.
    Use it when:
        A few words describe the task well, and the vectors should stand among them; on its own a prompt in the input
        layer is weaker than one in every layer (P-tuning v2).
    Pitfalls:
        - Where pseudo tokens and words stand matters; try several patterns.
        - The pattern goes around the whole input, special tokens included. Inside a text, between the texts of a pair
          or in front of the closing special token they stand in slots: `{|}` in the task's template, as in
          `--text "{premise} {|} ? {hypothesis}"`, and what goes there in `slots`. Other methods read past a slot.
        - With causal attention the text does not see what stands behind it: put everything in front.
        - The paper's SuperGLUE numbers also train the language model; only its LAMA probe freezes it, as here.
        - PEFT's encoder has twice the hidden width by default: `encoder_hidden_size` is E there and E / 2 in the paper.
    Published:
        Liu et al. 2021, abstract: on LAMA the best GPT recovers 64 % of the facts (precision at 1), over 20 points more
        than the best prompts before it. No figure of its SuperGLUE tables has been checked, so none stands here.
    """

    name: ClassVar[str] = "ptuning_v1"
    title: ClassVar[str] = "P-tuning"
    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2103.10385, section 3"
    identity_at_init: ClassVar[bool] = False
    size: ClassVar[Size | None] = Size(
        fields=("pattern",),
        settings=lambda n, *_: {"pattern": f"{{p*{n}}} {{text}}"},
        takes_positions=True,
        is_length=True,
    )
    recipe: ClassVar[Recipe] = Recipe(
        learning_rate=1e-3,
        source="a guess; the released code uses 1e-5 with a weight decay of 5e-4 on LAMA, and 1e-4 on SuperGLUE",
    )

    pattern: str = "{p*9} {text}"
    """The input: {text} once, pseudo tokens {p} or {p*3} for three, and any words, which stay as they are."""
    slots: tuple[str, ...] = ()
    """What stands in the slots of the task's template, in their order: pseudo tokens and words, as in the pattern."""
    position: int = 0
    """Tokens of the row that stay in front of the pattern: 1 leaves a first special token where it is."""
    reparametrise: bool = True
    """Make the vectors with the network, which is dropped at the end of training; false trains them as they are."""

    def __post_init__(self) -> None:
        pieces = self._pieces
        fix = "write {text} once, {p} or {p*3} for pseudo tokens, and words, such as '{p*3} {text} is it good ? {p}'"
        check(pieces.count("{text}") == 1, self, f"pattern={self.pattern!r} needs {{text}} exactly once", fix)
        every = pieces + [piece for slot in self.slots for piece in _split(slot)]
        shown = f"pattern={self.pattern!r}" + (f" with slots={self.slots!r}" if self.slots else "")
        check(any(map(_count, every)), self, f"{shown} has no pseudo token", fix)
        words = "".join(p for p in every if not _MARK.fullmatch(p))
        check("{" not in words and "}" not in words, self, f"{shown} has other braces", fix)
        for slot in self.slots:
            good = bool(_split(slot)) and "{text}" not in slot
            check(good, self, f"slot {slot!r} is not possible", "give pseudo tokens and words, such as '{p*3} ?'")
        check(self.position >= 0, self, f"position={self.position} is not possible", "give 0, 1, ...")

    @property
    def _pieces(self) -> list[str]:
        """Marks and the words between them, in order."""
        return _split(self.pattern)

    def init(self, backbone: Backbone, generator: torch.Generator) -> dict[str, Tensor]:
        width, layout = backbone.word_embeddings.shape[1], self._layout(backbone)
        room = backbone.max_length - 2
        inserted = sum(code >= PSEUDO for code in layout)
        check(inserted <= room, self, f"pattern={self.pattern!r} leaves no room", f"make it {room} tokens long")
        made = {"vectors": torch.randn(layout.count(PSEUDO), width, generator=generator)}
        if self.reparametrise:
            check(width % 2 == 0, self, f"the embedding width {width} is odd", "give reparametrise=false")
            for name, t in _encoder(width).named_parameters():
                fan = width // 2 if name.startswith("lstm.") else width  # as torch initialises LSTM and Linear
                made[name] = (torch.rand(t.shape, generator=generator) * 2 - 1) / fan**0.5
        if max(layout) >= 0:  # kept, so that the saved adapter needs no tokenizer for its words
            made["layout"] = torch.tensor(layout)
        return made

    def trains(self, name: str) -> bool:
        return name != "layout"

    def _layout(self, backbone: Backbone) -> list[int]:
        """Pattern and slots token by token, in the order in which they are read: `PSEUDO`, or the id of an anchor.

        In front of a slot's stands its code; `TEXT` stands in front of what is behind the text.
        """

        def coded(piece: str, setting: str) -> list[int]:
            return [PSEUDO] * _count(piece) or token_ids(self, backbone, setting, piece)

        layout: list[int] = []
        for piece in self._pieces:
            if piece != "{text}":
                layout += coded(piece, "pattern")
                continue
            for number, slot in enumerate(self.slots):
                layout += [TEXT - 1 - number, *(code for part in _split(slot) for code in coded(part, "slots"))]
            layout.append(TEXT)
        return layout

    def _plain(self, params: Mapping[str, Tensor]) -> Tensor:
        """The pseudo tokens' vectors `[P, E]`, whichever form `params` are in."""
        vectors = params["vectors"]
        if not self.reparametrise:
            return vectors
        own = {name: t for name, t in params.items() if name not in ("vectors", "layout")}
        made: Tensor = torch.func.functional_call(_encoder(vectors.shape[1]), own, (vectors,))
        return made

    def deltas(self, params: Mapping[str, Tensor], backbone: Backbone) -> dict[str, list[Delta]]:
        layout = params["layout"].tolist() if "layout" in params else self._layout(backbone)
        inserted = [code for code in layout if code >= PSEUDO]
        vectors = self._plain(params)
        if "layout" in params:
            anchors = backbone.embed(torch.tensor([code for code in inserted if code >= 0])).to(vectors)
            pseudo, anchor = count(), count(len(vectors))
            order = [next(pseudo if code == PSEUDO else anchor) for code in inserted]
            vectors = torch.cat([vectors, anchors])[order]
        return {"embedding": [Prompt(vectors=vectors, at=self._places(layout))]}

    def _places(self, layout: list[int]) -> tuple[int, ...]:
        """Where each inserted token stands, as `Prompt.at`."""
        places, here = [], self.position
        for code in layout:
            if code >= PSEUDO:
                places.append(here)
            else:
                here = -1 if code == TEXT else in_slot(TEXT - 1 - code)
        return tuple(places)

    def finish(self, params: Mapping[str, Tensor], backbone: Backbone) -> tuple[Method, Mapping[str, Tensor]]:
        if not self.reparametrise:
            return self, params
        kept = {name: t for name, t in params.items() if name == "layout"}
        return replace(self, reparametrise=False), {"vectors": self._plain(params), **kept}


def _split(pattern: str) -> list[str]:
    """Marks and the words between them, in order."""
    return [piece.strip() for piece in _MARK.split(pattern) if piece.strip()]


def _count(piece: str) -> int:
    """Pseudo tokens that a piece stands for."""
    if not piece.startswith("{p"):
        return 0
    return int(piece[3:-1] or 1)


class _Encoder(nn.Module):
    """The prompt encoder: `[P, E]` to `[P, E]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, vectors: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.lstm(vectors)[0])
        return out


def _encoder(width: int) -> _Encoder:
    """The encoder without values, to be called with given ones."""
    with torch.device("meta"):
        return _Encoder(width)
