"""Capsule layers, losses and capsule networks as torch modules."""

from . import classic
from .capsnet import CapsNet, CapsNetOutput
from .conv import CapsuleConv2d
from .conv_transpose import CapsuleConvTranspose2d
from .decoder import Decoder
from .deepcaps import CapsuleCell, DeepCapsNet
from .label_aware import LabelAwareAttention
from .layout import from_layout, to_layout
from .linear import CapsuleLinear, LazyCapsuleLinear
from .loss import CapsNetLoss, MarginLoss, SpreadLoss
from .multi_interest import MultiInterest, active_interests
from .primary import PrimaryCapsules

__all__ = [
    "CapsNet",
    "CapsNetLoss",
    "CapsNetOutput",
    "CapsuleCell",
    "CapsuleConv2d",
    "CapsuleConvTranspose2d",
    "CapsuleLinear",
    "Decoder",
    "DeepCapsNet",
    "LabelAwareAttention",
    "LazyCapsuleLinear",
    "MarginLoss",
    "MultiInterest",
    "PrimaryCapsules",
    "SpreadLoss",
    "active_interests",
    "classic",
    "from_layout",
    "to_layout",
]
