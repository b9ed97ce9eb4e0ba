"""What the frozen layers give for every row, computed once: epochs then cost the layers above alone.

The lowest layer that a run trains cuts the backbone in two. What goes into that layer is the same in every epoch, as
long as nothing below it draws random numbers: with `cache_frozen` everything but the trained layers and the head runs
without dropout, whether its outputs are kept or not. Where only the head is trained, and it reads one vector of a row,
that vector is kept instead of one per token.

The states are computed before the first step, in an order that depends on the rows alone, so that a resumed run ends
at the bits of an undisturbed one.

Legend: N kept states, D width, B sequences, T tokens of the longest, S states per sequence.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from multitune.batching import Encoded, pad
from multitune.errors import ConfigError
from multitune.training.config import TrainConfig
from multitune.training.model import TuningModel

_Key = tuple[tuple[int, ...], tuple[int, ...]]


def _key(sequence: Encoded) -> _Key:
    return tuple(sequence.input_ids), tuple(sequence.token_type_ids or ())


class FrozenStates:
    """The states of all sequences of a run, one behind the other in `[N, D]`; equal sequences are kept once."""

    def __init__(self, model: TuningModel, sequences: Iterable[Encoded], batch_size: int) -> None:
        """
        Args:
            model: `frozen_layers` of it are cut off.
            batch_size: sequences in one forward pass.
        """
        self._model = model
        self._batch_size = batch_size
        self._sequences = sorted(
            {_key(s): s for s in sequences}.values(), key=lambda s: (len(s), _key(s)), reverse=True
        )
        self._first = self._compute(0)
        self._lead = self._first.shape[1] - len(self._sequences[0])
        """States in front of a sequence's tokens (LSG's global tokens)."""
        stops = torch.tensor([self._count(s) for s in self._sequences]).cumsum(0).tolist()
        self._ranges = dict(zip(map(_key, self._sequences), zip([0, *stops], stops, strict=False), strict=True))
        self._kept = self._first.new_empty(0)

    def _count(self, sequence: Encoded) -> int:
        """States of a sequence, S without padding."""
        return 1 if self._model.keeps_one_state else self._lead + len(sequence)

    def _compute(self, start: int) -> Tensor:
        """`[B, S, D]` of the batch that starts at a sequence."""
        batch = pad(self._sequences[start : start + self._batch_size], self._model.backbone.pad_id)
        return self._model.frozen_outputs(batch.input_ids, batch.attention_mask, batch.token_type_ids).cpu()

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, D)`."""
        return max(stop for _, stop in self._ranges.values()), self._first.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""
        return self.shape[0] * self.shape[1] * self._first.element_size()

    def fill(self, folder: Path | None = None) -> None:
        """Compute all states, into memory or into a file in `folder` that goes when the process does."""
        self._kept = self._first.new_empty(self.shape) if folder is None else _mapped(folder, self.shape, self._first)
        for start in range(0, len(self._sequences), self._batch_size):
            states = self._first if start == 0 else self._compute(start)
            for sequence, own in zip(self._sequences[start : start + self._batch_size], states, strict=False):
                first, stop = self._ranges[_key(sequence)]
                self._kept[first:stop] = own[: stop - first]
        self._first = self._first[:0]

    def batch(self, rows: Sequence[Sequence[Encoded]]) -> Tensor:
        """`[B, S, D]` of rows of one sequence, or of several one behind the other; zero where a row is padded."""
        ranges = [[self._ranges[_key(s)] for s in row] for row in rows]
        width = max(sum(stop - start for start, stop in row) for row in ranges)
        out = self._kept.new_zeros(len(rows), width, self.shape[1])
        for place, row in zip(out, ranges, strict=True):
            end = 0
            for start, stop in row:
                place[end : end + stop - start] = self._kept[start:stop]
                end += stop - start
        return out


def _mapped(folder: Path, shape: tuple[int, int], like: Tensor) -> Tensor:
    """A tensor whose bytes are in a file without a name, so that nothing is left of it, however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".frozen-") as file:
        return torch.from_file(file.name, shared=True, size=shape[0] * shape[1], dtype=like.dtype).view(shape)


def keep_frozen_states(
    model: TuningModel,
    config: TrainConfig,
    splits: Sequence[Sequence[Encoded]],
    folder: Path | None,
    report: Callable[[str], None],
) -> FrozenStates | None:
    """Cut a model where `config.cache_frozen` asks for it, and keep what the frozen layers give.

    Args:
        splits: the sequences of the training rows, then of the validation rows.
        folder: where a file may go; by default the system's folder for temporary files.

    Returns:
        `None` where nothing is kept. Where there are frozen layers they run without dropout all the same.

    Raises:
        ConfigError: `memory` or `disk`, and no layer is frozen below the trained ones, or the states do not fit.
    """
    if config.cache_frozen is None:
        return None
    layers, why = model.find_frozen_layers()
    if not layers:
        if config.cache_frozen != "auto":
            raise ConfigError(
                f"cache_frozen='{config.cache_frozen}' is not possible: {why}; train upper layers alone (such as "
                f"layers=(10, 11) of a method, or method 'top_layers'), or leave cache_frozen out"
            )
        report(f"nothing is cached: {why}")
        return None
    model.frozen_layers = layers
    if config.cache_frozen == "auto" and _passes(config, len(splits[0])) <= 1:
        report("nothing is cached: the run reads its rows only once")
        return None
    states = FrozenStates(model, [s for split in splits for s in split], config.eval_batch_size)
    if states.nbytes > config.cache_bytes:
        problem = f"what the frozen layers give takes {states.nbytes} bytes, more than cache_bytes={config.cache_bytes}"
        if config.cache_frozen != "auto":
            raise ConfigError(f"cache_frozen='{config.cache_frozen}' is not possible: {problem}; raise cache_bytes")
        report(f"nothing is cached: {problem}")
        return None
    states.fill(_with_room(folder, states.nbytes) if config.cache_frozen == "disk" else None)
    what = "the whole backbone" if layers == model.backbone.num_layers else f"the lowest {layers} layers"
    report(f"{what} ran once for all rows: {states.nbytes} bytes kept")
    return states


def _passes(config: TrainConfig, num_sequences: int) -> float:
    if config.max_steps is None:
        return config.epochs
    return config.max_steps * config.batch_size * config.gradient_accumulation / num_sequences


def _with_room(folder: Path | None, nbytes: int) -> Path:
    folder = folder or Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise ConfigError(f"cache_frozen='disk' is not possible: it takes {nbytes} bytes and {folder} has {free} free")
    return folder
