"""Capsule layers, losses and a capsule network as torch modules."""

from .capsnet import CapsNet, CapsNetOutput
from .decoder import Decoder
from .label_aware import LabelAwareAttention
from .linear import CapsuleLinear
from .loss import CapsNetLoss, MarginLoss
from .multi_interest import MultiInterest, active_interests
from .primary import PrimaryCapsules

__all__ = [
    "CapsNet",
    "CapsNetLoss",
    "CapsNetOutput",
    "CapsuleLinear",
    "Decoder",
    "LabelAwareAttention",
    "MarginLoss",
    "MultiInterest",
    "PrimaryCapsules",
    "active_interests",
]
