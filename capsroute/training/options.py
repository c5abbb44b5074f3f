"""How to train: the options, their meaning and their checks, in one place."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch

from .augment import Augmentation

SCHEDULES = ("cosine", "exponential", "constant")
AMP_DTYPES = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UP = 0.1  # the share of the steps over which the learning rate rises
MOST = sys.float_info.max  # an int may be beyond, and is not infinite
LEAST = 0.01  # where the exponential schedule ends, as a share of the highest rate


class TrainingOptions(NamedTuple):
    """How to train.

    Attributes:
        epochs: passes over the training split.
        batch_size: images a step, over all processes.
        learning_rate: the peak learning rate of AdamW.
        schedule: what follows a short rise: half a "cosine" down to 0, an "exponential" fall, or "constant".
        weight_decay: of AdamW.
        clip: maximum norm of the whole gradient; 0: no clipping.
        amp: "off", or the dtype of automatic mixed precision, "bfloat16" or "float16".
        shift, rotation, scale, shear: of :class:`capsroute.training.augment.Augmentation`.
        overlap: train and test on two overlapping digits.
        validation: the share of the training split that is held out to choose the best epoch by, unless the dataset
            has images for that; 0: the last epoch is the result, and nothing is held out.
        patience: stop when the validation loss has not fallen for this many epochs; 0: never.
        seed: of the initial parameters, the order of the images and their augmentation.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 5e-3
    schedule: str = "cosine"
    weight_decay: float = 0.01
    clip: float = 0.0
    amp: str = "off"
    shift: float = 2 / 28
    rotation: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    overlap: bool = False
    validation: float = 0.0
    patience: int = 0
    seed: int = 0

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.shift, self.rotation, self.scale, self.shear)

    @property
    def held_out(self) -> str:
        """Which split the network is judged by after each epoch."""
        return "validation" if self.validation else "test"

    @property
    def samples(self) -> str:
        """What the network sees, in words."""
        return "pairs of overlapping images" if self.overlap else "images"

    def check(self) -> TrainingOptions:
        """The options, if they make sense.

        Raises:
            ValueError: naming the option, what was expected and what came.
        """
        for name, default in self._field_defaults.items():
            _expect_kind(name, getattr(self, name), type(default))
        for name, least in (("epochs", 1), ("batch_size", 1), ("patience", 0)):
            _expect(getattr(self, name) >= least, name, f"at least {least}", self)
        _expect(0 <= self.seed < 2**32, "seed", "from 0 to 2^32 - 1, all that torch's generator looks at", self)
        for name in ("weight_decay", "clip", "shift", "scale"):
            _expect(0 <= getattr(self, name) <= MOST, name, "finite and at least 0", self)
        for name in ("rotation", "shear"):
            _expect(0 <= getattr(self, name) <= 180, name, "degrees from 0 to 180", self)
        _expect(self.shear < 90, "shear", "below 90 degrees", self)
        _expect(0 < self.learning_rate <= MOST, "learning_rate", "finite and above 0", self)
        _expect(0 <= self.validation < 1, "validation", "a share from 0 to below 1", self)
        _expect(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}", self)
        _expect(self.amp in AMP_DTYPES, "amp", f"one of {', '.join(AMP_DTYPES)}", self)
        if self.patience and not self.validation:
            raise ValueError("patience needs images to judge by: give validation too, such as 0.1")
        return self

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, counted from 0, of a training of `steps`."""
        rise = max(1, round(WARM_UP * steps))
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        done = (step - rise) / max(1, steps - rise)  # from 0 to below 1
        fall = {"cosine": (1 + math.cos(math.pi * done)) / 2, "exponential": LEAST**done, "constant": 1.0}
        return self.learning_rate * fall[self.schedule]


def _expect_kind(name: str, value: object, kind: type) -> None:
    """A float may be a whole number; True is none, though Python takes it for 1."""
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")


def _expect(holds: bool, name: str, what: str, options: TrainingOptions) -> None:
    if not holds:
        raise ValueError(f"{name} must be {what}, got {getattr(options, name)}")
