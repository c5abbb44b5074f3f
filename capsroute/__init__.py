"""Fused capsule routing for PyTorch: routing by agreement without ever storing the votes."""

from . import nn
from ._backends import backends
from ._version import __version__
from .functional import capsule_linear, dynamic_routing, routing_pass, squash, votes_pass

__all__ = [
    "__version__",
    "backends",
    "capsule_linear",
    "dynamic_routing",
    "nn",
    "routing_pass",
    "squash",
    "votes_pass",
]
