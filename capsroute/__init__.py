"""Fused capsule routing for PyTorch: routing by agreement without ever storing the votes."""

from . import nn
from ._backends import backends
from .functional import capsule_linear, dynamic_routing, squash

__version__ = "0.1.0"
__all__ = ["backends", "capsule_linear", "dynamic_routing", "nn", "squash"]
