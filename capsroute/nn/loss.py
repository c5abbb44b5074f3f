"""The losses that capsule networks are trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_amount, check_labels, check_positive, check_tensor
from .capsnet import CapsNetOutput
from .decoder import one_hot


class MarginLoss(nn.Module):
    """The margin loss on capsule lengths (Sabour, Frosst and Hinton 2017, eq. 4).

    L = sum over classes j of T_j max(0, m+ - |v_j|)^2 + lambda (1 - T_j) max(0, |v_j| - m-)^2, averaged
    over the batch; T_j is 1 for the labelled class, else 0.

    Args:
        m_plus: the length that the capsule of the labelled class should reach.
        m_minus: the length that the others should stay below.
        down_weight: lambda, the weight of the absent classes.

    Raises:
        TypeError, ValueError: if a constant is not a finite number of at least 0.
    """

    def __init__(self, m_plus: float = 0.9, m_minus: float = 0.1, down_weight: float = 0.5):
        super().__init__()
        self.m_plus, self.m_minus = check_amount("m_plus", m_plus), check_amount("m_minus", m_minus)
        self.down_weight = check_amount("down_weight", down_weight)

    def forward(self, lengths: Tensor, labels: Tensor) -> Tensor:
        """The loss.

        Args:
            lengths: of the class capsules, ``[B, J]``.
            labels: ``[B]``, or ``[B, K]``: K classes in each image; int64, 0 to J - 1.

        Returns:
            A scalar, the mean over the batch.

        Raises:
            TypeError, ValueError: if labels or lengths have the wrong dtype or shape.
        """
        check_tensor("lengths", lengths, "[B, J]")
        if lengths.dim() != 2:
            raise ValueError(f"lengths must be [B, J], got {list(lengths.shape)}")
        labelled = is_labelled(labels, *lengths.shape)
        present = F.relu(self.m_plus - lengths).square()  # [B, J]
        absent = F.relu(lengths - self.m_minus).square()  # [B, J]
        return torch.where(labelled, present, self.down_weight * absent).sum(1).mean()

    def extra_repr(self) -> str:
        return f"m_plus={self.m_plus}, m_minus={self.m_minus}, down_weight={self.down_weight}"


class SpreadLoss(nn.Module):
    """The spread loss (Hinton, Sabour and Frosst, "Matrix capsules with EM routing", 2018, eq. 3).

    L = sum over classes i other than the labelled t of max(0, m - (a_t - a_i))^2, averaged over the batch: the
    labelled class should lead each other by a margin.

    Args:
        margin: m. The paper raises it from 0.2 to 0.9 while training: set the attribute ``margin`` between epochs.

    Raises:
        TypeError, ValueError: if the margin is not a positive number.
    """

    def __init__(self, margin: float = 0.9):
        super().__init__()
        self.margin = check_positive("margin", margin)

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """The loss.

        Args:
            activations: ``[B, J]``, capsule lengths for instance.
            labels: ``[B]``, int64, 0 to J - 1.

        Returns:
            A scalar, the mean over the batch.

        Raises:
            TypeError, ValueError: if labels or activations have the wrong dtype or shape.
        """
        check_tensor("activations", activations, "[B, J]")
        if activations.dim() != 2:
            raise ValueError(f"activations must be [B, J], got {list(activations.shape)}")
        labelled = is_labelled(labels, *activations.shape, several=False)
        lead = activations.gather(1, labels.unsqueeze(1)) - activations  # a_t - a_i [B, J], 0 for the labelled class
        return F.relu(self.margin - lead).square().masked_fill(labelled, 0).sum(1).mean()

    def extra_repr(self) -> str:
        return f"margin={self.margin}"


class CapsNetLoss(nn.Module):
    """The loss of a :class:`CapsNet`: the margin loss and, scaled down, the error of the reconstruction.

    Args:
        reconstruction_weight: weight of the mean squared error of a pixel, which suits every image size. The
            paper's 0.0005 times a sum over 784 pixels would be 0.392; about ten times as much draws sharper images
            and makes fewer errors on scikit-learn's digits.

    Raises:
        TypeError, ValueError: if the weight is not a finite number of at least 0.
    """

    def __init__(self, reconstruction_weight: float = 4.0):
        super().__init__()
        self.reconstruction_weight = check_amount("reconstruction_weight", reconstruction_weight)
        self.margin = MarginLoss()

    def forward(self, output: CapsNetOutput, images: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar, of the network's output for images and labels.

        Args:
            output: what the network returned.
            images: what the reconstruction should be: ``[B, C, H, W]``, or ``[B, K, C, H, W]`` under labels
                ``[B, K]``.
            labels: ``[B]`` or ``[B, K]``, as in :class:`MarginLoss`.

        Raises:
            TypeError, ValueError: if images or labels have the wrong dtype or shape.
        """
        check_tensor("images", images, "[B, C, H, W] or [B, K, C, H, W]")
        if output.reconstruction.shape != images.shape:  # mse_loss would broadcast
            raise ValueError(
                f"images must be of the reconstruction's shape {list(output.reconstruction.shape)}, "
                f"got {list(images.shape)}"
            )
        error = F.mse_loss(output.reconstruction, images)
        return self.margin(output.lengths, labels) + self.reconstruction_weight * error

    def extra_repr(self) -> str:
        return f"reconstruction_weight={self.reconstruction_weight:g}"


def is_labelled(labels: Tensor, batch: int, classes: int, several: bool = True) -> Tensor:
    """Checked labels [B] or [B, K] as bool [B, J]."""
    check_labels(labels, batch, several)
    if labels.dim() == 1:
        return one_hot(labels, classes)
    if labels.shape[1] >= max(classes, 2):  # taken for indices, 0 and 1 would pass as classes
        raise ValueError(
            f"labels must be [B] or [B, K] with K < J = {classes}, got {list(labels.shape)}; "
            "of one-hot labels pass .argmax(1)"
        )
    return one_hot(labels, classes).any(1)
