"""Replace the capsule layer of an existing model, keeping what it has learned.

Two ways: `capsroute.accelerate` swaps layers that it knows in place, once a probe shows that nothing changes; and
`CapsuleLinear.set_weight` takes over the weight of any other.
"""

import torch
from torch import nn

import capsroute


class DenseCapsule(nn.Module):
    """A layer as many repositories have it: weight [J, I, O, D], votes stored, and constants but in the last pass."""

    def __init__(self, in_num_caps: int, in_dim_caps: int, out_num_caps: int, out_dim_caps: int, routings: int = 3):
        super().__init__()
        self.routings = routings
        self.weight = nn.Parameter(0.1 * torch.randn(out_num_caps, in_num_caps, out_dim_caps, in_dim_caps))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        votes = torch.einsum("jiod,bid->bjio", self.weight, u)
        logits = torch.zeros(votes.shape[:3])
        for k in range(self.routings):
            own = votes if k == self.routings - 1 else votes.detach()
            v = capsroute.squash((logits.softmax(1).unsqueeze(-1) * own).sum(2))
            logits = logits + (own * v.unsqueeze(2)).sum(-1).detach()
        return v


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), DenseCapsule(288, 8, 10, 16))
u = torch.randn(32, 288, 8)
before = model(u)

# In place: the same object with the same parameters, so optimizers and checkpoints stay valid.
report = capsroute.accelerate(model)
assert all(entry.swapped for entry in report.entries)
torch.testing.assert_close(model(u), before, rtol=1e-4, atol=1e-5)

# By hand: a layer of ours, with the weight of the other.
layer = capsroute.nn.CapsuleLinear(288, 8, 10, 16, detach_coupling=True)
layer.set_weight(model[1].weight, "[J, I, O, D]")
model[1] = layer
torch.testing.assert_close(model(u), before, rtol=1e-4, atol=1e-5)
print(model)
