"""The handwritten digits that come with scikit-learn: no download."""

from __future__ import annotations

import torch

from ..._optional import optional
from .dataset import Dataset, Split, hold_out, make_dataset


def digits() -> Dataset:
    """scikit-learn's 1797 digits of 8 x 8 pixels, the same stratified 20 % of them always the test split."""
    bunch = optional("sklearn.datasets").load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)  # [1797, 1, 8, 8]
    return make_dataset("digits", *hold_out(Split(images, torch.from_numpy(bunch.target).long()), 0.2))
