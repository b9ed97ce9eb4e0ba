"""Gradients of frozen weights, for methods that choose by them what to train; never a whole model's at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from multitune.frozen import part_of_weight
from multitune.sites import Site
from multitune.training.data import num_targets
from multitune.training.model import TuningModel

Take = Callable[[Site, Tensor], None]


class BatchGradients:
    """`multitune.methods.base.WeightGradients` of a model's loss on its first training batches.

    Dropout is off, so that no random number is drawn and the same rows give the same gradients.
    """

    def __init__(self, model: TuningModel, batches: Callable[[int], Sequence[dict[str, Tensor]]]) -> None:
        """
        Args:
            batches: the first so many batches, as `TuningModel.forward` takes them; fewer if there are not so many.
        """
        self._model = model
        self._batches = batches

    def __call__(self, sites: Iterable[Site], num_batches: int, take: Take) -> None:
        batches, sites = self._batches(num_batches), list(sites)
        passes: dict[int | None, list[Site]] = defaultdict(list)
        for site in sites:
            # Within one backward pass each gradient goes as soon as it is there. Over several batches they add up,
            # so they are made layer by layer: that costs time, and memory for one layer instead of all.
            passes[site.layer if len(batches) > 1 else None].append(site)
        self._model.eval()
        for of_pass in passes.values():
            self._pass(of_pass, batches, take)

    def _pass(self, sites: Sequence[Site], batches: Sequence[dict[str, Tensor]], take: Take) -> None:
        model = self._model.backbone.model
        modules: dict[str, list[Site]] = defaultdict(list)  # one module may hold several sites
        for site in sites:
            modules[site.module].append(site)
        weights = {path: model.get_submodule(path).get_parameter("weight") for path in modules}
        handles = []

        def hand_out(of_module: Sequence[Site], weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            with torch.no_grad():
                for site in of_module:
                    take(site, part_of_weight(gradient, site))

        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            for number, batch in enumerate(batches, start=1):
                if number == len(batches):
                    handles = [
                        weight.register_post_accumulate_grad_hook(partial(hand_out, modules[path]))
                        for path, weight in weights.items()
                    ]
                self._backward(batch)
        finally:
            for handle in handles:
                handle.remove()
            for weight in weights.values():
                weight.requires_grad_(False)
                weight.grad = None
            self._model.zero_grad(set_to_none=True)

    def _backward(self, batch: dict[str, Tensor]) -> None:
        with torch.enable_grad():
            outputs = self._model(**batch)
            items = num_targets(self._model.head.kind, batch["targets"])
            # Where every word was cut off the mean loss is not a number; the graph is run all the same.
            loss = outputs["loss"] * items if items else outputs["logits"].sum() * 0.0
            loss.backward()
