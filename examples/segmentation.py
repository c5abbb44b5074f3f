"""Segmentation with capsules: votes from a convolution, routed at every pixel by itself.

As in LaLonde and Bagci, "Capsules for Object Segmentation", 2018: a convolution makes the votes of C capsule types for
J classes, so that `dynamic_routing` takes them as they are, with batch, height and width as leading dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import capsroute

TYPES, CLASSES, FEATURES = 4, 3, 6  # C, J, O
SIDE = 20


class SegmentationCapsules(nn.Module):
    """Lengths [B, H, W, J] of the class capsules of every pixel."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 7, padding=3), nn.ReLU(), nn.Conv2d(16, 32, 5, padding=2), nn.ReLU()
        )
        self.votes = nn.Conv2d(32, TYPES * CLASSES * FEATURES, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        votes = self.votes(self.features(images)).unflatten(1, (TYPES, CLASSES, FEATURES))
        votes = votes.permute(0, 4, 5, 1, 2, 3)  # [B, H, W, C, J, O]
        return capsroute.dynamic_routing(votes).norm(dim=-1)


def shapes(count: int) -> tuple[Tensor, Tensor]:
    """Noisy images of a square (class 1) and a disc (class 2) on nothing (class 0), and the class of each pixel."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    at = torch.randint(5, SIDE - 5, (4, count, 1, 1))
    square = (y - at[0]).abs().maximum((x - at[1]).abs()) <= 3
    disc = ((y - at[2]) ** 2 + (x - at[3]) ** 2 <= 16) & ~square
    labels = square + 2 * disc
    return (labels > 0).float().unsqueeze(1) + 0.1 * torch.randn(count, 1, SIDE, SIDE), labels.long()


def pixel_loss(lengths: Tensor, labels: Tensor) -> Tensor:
    """The margin loss of every pixel; each class counts the same, however few pixels it has."""
    target = F.one_hot(labels, CLASSES)
    share = target.flatten(0, 2).float().mean(0)
    errors = target * F.relu(0.9 - lengths).square() + 0.5 * (1 - target) * F.relu(lengths - 0.1).square()
    return (errors.sum(-1) / share[labels]).mean()


torch.manual_seed(0)
net = SegmentationCapsules()
optimizer = torch.optim.Adam(net.parameters(), 3e-3)
for step in range(120):
    images, labels = shapes(16)
    loss = pixel_loss(net(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 30 == 29:
        print(f"step {step + 1}: loss {loss.item():.3f}")

images, labels = shapes(32)
found = net(images).argmax(-1)
for k, name in enumerate(["nothing", "square", "disc"]):
    overlap = ((found == k) & (labels == k)).sum() / ((found == k) | (labels == k)).sum()
    print(f"{name}: intersection over union {overlap:.2f}")
picture = found[0].tolist()
print("\n".join("".join(".#o"[k] for k in row) for row in picture))
