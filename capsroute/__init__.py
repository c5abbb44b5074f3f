"""Fused capsule routing for PyTorch: routing by agreement without storing all the votes."""

from . import acceleration, nn
from ._backends import backends
from ._version import __version__
from .acceleration import accelerate
from .functional import capsule_linear, dynamic_routing, routing_pass, squash, votes_pass

__all__ = [
    "__version__",
    "accelerate",
    "acceleration",
    "backends",
    "capsule_linear",
    "dynamic_routing",
    "nn",
    "routing_pass",
    "squash",
    "votes_pass",
]
