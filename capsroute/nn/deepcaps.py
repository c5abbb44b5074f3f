"""A deep network of convolutional capsules with residual connections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_image_shape, check_images, check_labels, check_sizes, check_widths
from .capsnet import CapsNetOutput
from .conv import CapsuleConv2d
from .decoder import Decoder, capsule_lengths
from .linear import CapsuleLinear


class CapsuleCell(nn.Module):
    """A residual cell of convolutional capsules: ``h = down(x);  v = second(first(h)) + skip(h)``.

    Rajasegaran et al., "DeepCaps: Going Deeper with Capsule Networks", 2019. All four are 3 x 3
    :class:`CapsuleConv2d`; ``down`` halves height and width. Only ``skip`` routes, and only with more than one
    iteration, in the place of the routing by 3D convolution of the paper's last cell. A sum of capsules is not squashed
    again, so lengths reach 2.

    Args:
        in_types: C, the capsules at an input position.
        in_features: D, the features of an input capsule.
        out_types: J, the capsules at an output position.
        out_features: O, the features of an output capsule.
        iterations: R, the routing passes of ``skip``.
        **options: of all four, as in :class:`CapsuleConv2d`.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """

    def __init__(
        self, in_types: int, in_features: int, out_types: int, out_features: int, iterations: int = 1, **options
    ):
        super().__init__()
        out = out_types, out_features
        self.down = CapsuleConv2d(in_types, in_features, *out, 3, stride=2, padding=1, iterations=1, **options)
        self.first, self.second = (CapsuleConv2d(*out, *out, 3, padding=1, iterations=1, **options) for _ in range(2))
        self.skip = CapsuleConv2d(*out, *out, 3, padding=1, iterations=iterations, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Capsules ``[B, ceil(H / 2), ceil(W / 2), J, O]`` of a map ``[B, H, W, C, D]``."""
        h = self.down(x)
        return self.second(self.first(h)) + self.skip(h)


class DeepCapsNet(nn.Module):
    """A deep capsule network similar to DeepCaps (Rajasegaran et al. 2019).

    A convolution whose channels are capsules of one feature; cells of convolutional capsules, of which the last routes;
    the capsules of the last two cells routed to one capsule a class; a decoder that sees the chosen capsule alone, not
    which it was ("class independent").

    Args:
        image_shape: (channels, height, width).
        classes: J, the number of classes.
        channels: channels of the first convolution.
        types: capsules at each position of each cell.
        features: of the capsules, one number a cell.
        class_features: O, the features of a class capsule.
        iterations: R, the routing passes of the last cell and of the class capsules.
        hidden: widths of the decoder's hidden layers.
        device, dtype: of the parameters.
        **routing: other keyword arguments of all capsule layers, such as ``bias``, ``leaky``, ``detach_coupling`` and
            ``backend``.

    Raises:
        TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        classes: int,
        *,
        channels: int = 128,
        types: int = 32,
        features: tuple[int, ...] = (4, 8, 8, 8),
        class_features: int = 32,
        iterations: int = 3,
        hidden: tuple[int, ...] = (512, 1024),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing,
    ):
        super().__init__()
        check_image_shape(image_shape)
        check_sizes(classes=classes, channels=channels, types=types, class_features=class_features)
        check_widths("features", features)
        if not features:
            raise ValueError("features must have at least one number, one for each cell, got none")
        self.image_shape = tuple(image_shape)
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(image_shape[0], channels, 3, padding=1, **factory)
        self.norm = nn.BatchNorm2d(channels, **factory)
        cells, inside, size = [], (channels, 1), image_shape[1:]
        routed = []  # capsules of each cell, with their features
        for depth, out in enumerate(features, 1):
            passes = iterations if depth == len(features) else 1
            cells.append(CapsuleCell(*inside, types, out, passes, **routing, **factory))
            inside, size = (types, out), [-(-n // 2) for n in size]
            routed.append((size[0] * size[1] * types, out))
        self.cells = nn.ModuleList(cells)
        # Capsules of one size can be routed together.
        self.routed = [depth for depth, (_, out) in enumerate(routed) if depth >= len(routed) - 2 and out == inside[1]]
        inputs = sum(routed[depth][0] for depth in self.routed)
        self.routing = CapsuleLinear(inputs, inside[1], classes, class_features, iterations, **routing, **factory)
        self.decoder = Decoder(1, class_features, self.image_shape, hidden, **factory)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> CapsNetOutput:
        """Class capsules, their lengths and the reconstruction of images ``[B, C, H, W]``.

        Args:
            images: ``[B, C, H, W]`` in the dtype of the parameters, values in [0, 1].
            labels: int64 ``[B]``: reconstruct from these capsules (training). None: from the longest
                (prediction). Labels affect the reconstruction only.

        Raises:
            TypeError, ValueError: if an argument has the wrong type, dtype, shape or value; the message names it.
        """
        check_images(images, self.image_shape)
        x = F.relu(self.norm(self.conv(images)))
        x = x.permute(0, 2, 3, 1).unsqueeze(-1)  # [B, H, W, channels, 1]
        maps = []
        for cell in self.cells:
            x = cell(x)
            maps.append(x)
        u = torch.cat([maps[depth].flatten(1, 3) for depth in self.routed], 1)  # [B, I, D]
        capsules = self.routing(u)  # [B, J, O]
        lengths = capsule_lengths(capsules)
        if labels is None:
            labels = lengths.argmax(-1)
        check_labels(labels, capsules.shape[0], several=False)
        chosen = capsules.gather(1, labels[:, None, None].expand(-1, 1, capsules.shape[2]))  # [B, 1, O]
        return CapsNetOutput(capsules, lengths, self.decoder(chosen))
