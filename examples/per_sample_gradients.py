"""A gradient for each sample, by torch.func: for influence, differential privacy or gradient noise."""

import torch

import capsroute

torch.manual_seed(0)
layer = capsroute.nn.CapsuleLinear(64, 8, 10, 16)
loss = capsroute.nn.MarginLoss()
u, labels = torch.randn(12, 64, 8), torch.randint(0, 10, (12,))
weights = {name: x.detach() for name, x in layer.named_parameters()}


def sample_loss(weights, u, label):
    v = torch.func.functional_call(layer, weights, (u.unsqueeze(0),))
    return loss(v.norm(dim=-1), label.unsqueeze(0))


gradients = torch.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0))(weights, u, labels)
norms = gradients["weight"].flatten(1).norm(dim=1)
print("length of each sample's gradient:", " ".join(f"{x:.3f}" for x in norms))

# Their mean is the gradient of the batch.
loss(layer(u).norm(dim=-1), labels).backward()
torch.testing.assert_close(gradients["weight"].mean(0), layer.weight.grad)
