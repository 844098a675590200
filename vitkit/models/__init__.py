"""Reference models: small, complete, readable, built from :mod:`vitkit.nn`.

``create(name)`` makes one with random weights, ``list_models()`` names them all. Where weights are
public, parameters have their names: ``load_state_dict`` takes them as they are. ``entry(name)`` is
the configuration and whose weights those are.

Models are for inference and for training without dropout or stochastic depth.
"""

from vitkit.models import (
    beit,
    conch,
    dalle,
    dinov3,
    dit,
    fit,
    flamingo,
    hipt,
    longnet,
    perceiver,
    prism,
    siglip,
    swin,
    titan,
    unet,
    vae,
    vit,
)
from vitkit.models.registry import Entry, Family, Registry

_registry = Registry(
    *(m.FAMILY for m in (vit, dinov3, beit, siglip, conch, swin, hipt, longnet, titan)),
    *(m.FAMILY for m in (dit, fit, unet, vae, dalle, perceiver, flamingo, prism)),
)
create = _registry.create
entry = _registry.entry
list_models = _registry.list_models

__all__ = ["Entry", "Family", "create", "entry", "list_models"]
