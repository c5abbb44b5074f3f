"""Capsule layers, losses and a capsule network as torch modules."""

from .capsnet import CapsNet, CapsNetOutput
from .decoder import Decoder
from .linear import CapsuleLinear
from .loss import CapsNetLoss, MarginLoss
from .primary import PrimaryCapsules

__all__ = ["CapsNet", "CapsNetLoss", "CapsNetOutput", "CapsuleLinear", "Decoder", "MarginLoss", "PrimaryCapsules"]
