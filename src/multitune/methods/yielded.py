"""What a method yields, held against the backbone it is put on: once, before training, never in a forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multitune.deltas import Delta
from multitune.errors import ConfigError, suggest
from multitune.methods.base import Method

if TYPE_CHECKING:
    from multitune.backbone import Backbone
    from multitune.sites import Site

_CONTRACT = "a dict from the names of sites to lists of deltas, such as {site.name: [Bias(b=b)]}"


def check_deltas(method: Method, yielded: Any, backbone: Backbone) -> None:
    """Refuse what `method.deltas` returned where it cannot be applied on this backbone.

    Raises:
        ConfigError: it is no dict of lists of deltas, a name is no site's, a delta acts at sites of another kind, or a
            tensor has another shape than the site needs; names method, site, and what was expected.
    """
    if not isinstance(yielded, Mapping):
        raise ConfigError(f"method '{method.name}': deltas returned a {_named(yielded)}; return {_CONTRACT}")
    sites = {site.name: site for site in backbone.sites}
    for name, deltas in yielded.items():
        if name not in sites:
            near = suggest(name, sites) if isinstance(name, str) else " Give the site's name: site.name."
            raise ConfigError(
                f"method '{method.name}': deltas returned something for {name!r}, which is no site of backbone "
                f"'{backbone.name}'.{near} Its sites: Backbone.sites"
            )
        listed = isinstance(deltas, (list, tuple))
        wrong = next((d for d in deltas if not isinstance(d, Delta)), None) if listed else deltas
        if wrong is not None or not listed:
            what = f"a list with a {_named(wrong)} in it" if listed else f"a {_named(deltas)}"
            raise ConfigError(f"method '{method.name}': deltas returned {what} for site '{name}'; return {_CONTRACT}")
        for delta in deltas:
            _check_delta(method, delta, sites[name])


def _check_delta(method: Method, delta: Delta, site: Site) -> None:
    """Raise `ConfigError` for a delta of another kind of site, or of other widths than the site's."""
    if delta.site_kind != site.kind:
        raise ConfigError(
            f"method '{method.name}': {delta.kind} acts at sites of kind {delta.site_kind}, and '{site.name}' is of "
            f"kind {site.kind}; choose sites by backbone.find_sites('{delta.site_kind}', roles, layers)"
        )
    sizes = {"I": site.in_features, "O": site.out_features}
    for name, letters in delta.dims.items():
        tensor = getattr(delta, name)
        if tensor is None:
            continue
        shape = list(tensor.shape)
        if len(shape) == len(letters):
            for letter, size in zip(letters, shape, strict=True):
                sizes.setdefault(letter, size)
        expected = [sizes.get(letter, letter) for letter in letters]
        if shape != expected:
            raise ConfigError(
                f"method '{method.name}': at site '{site.name}' the {name} of {delta.kind} has shape {shape}, "
                f"expected [{', '.join(map(str, expected))}]; the site maps in_features={site.in_features} to "
                f"out_features={site.out_features}"
            )


def check_trainable(method: Method, params: Mapping[str, Tensor], yielded: Mapping[str, Sequence[Delta]]) -> None:
    """Raise `ConfigError` where `why_not_trainable` has something to say."""
    why = why_not_trainable(method, params, yielded)
    if why:
        raise ConfigError(why)


def why_not_trainable(method: Method, params: Mapping[str, Tensor], yielded: Mapping[str, Sequence[Delta]]) -> str:
    """The message for deltas that depend on none of the tensors that are trained, so that training changes nothing.

    Args:
        params: the method's tensors by name, from which `yielded` was computed with gradients on.

    Returns:
        Empty where some tensor of a delta requires gradients, or none of `params` does.
    """
    trained = [name for name, p in params.items() if p.requires_grad]
    reached = any(t.requires_grad for deltas in yielded.values() for d in deltas for t in d.tensors().values())
    if method.changes_weights or not trained or reached:
        return ""
    few = ", ".join(trained[:3]) + (", ..." if len(trained) > 3 else "")
    return (
        f"method '{method.name}': no gradient reaches the tensors it trains ({few}), so that training would leave them "
        f"as they are. Do its deltas detach them, copy their values (.data, .item(), torch.tensor) or leave them out? "
        f"Compute the deltas from the tensors as given"
    )


def _named(value: Any) -> str:
    return type(value).__name__
