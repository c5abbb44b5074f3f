"""Judge the fused kernels by the reference yourself: outputs and every gradient, in your shape and dtype.

The truth is the reference in float64. What counts is not that two float32 results agree to some tolerance, but that
the kernel is no further from the truth than plain PyTorch in float32 is.
"""

import torch

import capsroute

SIZES = {"B": 16, "I": 288, "D": 8, "J": 10, "O": 16}
B, I, D, J, O = SIZES.values()


def run(backend: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    v = capsroute.capsule_linear(**leaves, iterations=3, backend=backend)
    v.backward(torch.ones_like(v))
    return {"v": v.detach(), **{f"gradient of {name}": x.grad for name, x in leaves.items()}}


torch.manual_seed(0)
exact = {
    "u": torch.randn(B, I, D, dtype=torch.float64),
    "weight": torch.randn(I, J, O, D, dtype=torch.float64) / 8,
    "bias": torch.randn(J, O, dtype=torch.float64) / 8,
    "logits": torch.randn(I, J, dtype=torch.float64),
}
truth = run("reference", exact)
single = {name: x.float() for name, x in exact.items()}
fused, reference = run("auto", single), run("reference", single)

print(f"largest error, of the largest value   {'fused':>10} {'reference':>10}")
for name, value in truth.items():
    scale = value.abs().max()
    errors = [((result[name] - value).abs().max() / scale).item() for result in (fused, reference)]
    print(f"{name:37} {errors[0]:10.1e} {errors[1]:10.1e}")
    assert errors[0] <= 2 * errors[1] + 1e-6
