"""Export to ONNX: the reference's operations, whatever the backend, and onnxruntime finds the same."""

import inspect

import onnxruntime
import pytest
import torch
from torch.export import Dim
from torch.testing import assert_close

from capsroute import nn

LENGTHS = torch.tensor([5, 1, 9, 0])


def interests(**options):
    return nn.MultiInterest(9, 4, 3, 5, **options), torch.randn(4, 9, 4), {"lengths": LENGTHS}


MODULES = {
    "interests": lambda: interests(adaptive=True),
    "interests, in": lambda: interests(shared=None, prior="zero", coupling="in", detach_coupling=True),
    "interests, cosine": lambda: interests(cosine_scale=20.0, squash_power=0.5, detach_coupling=True),
    "linear": lambda: (nn.CapsuleLinear(9, 4, 3, 5, leaky=True, bias=True), torch.randn(4, 9, 4), {}),
    "convolution": lambda: (nn.CapsuleConv2d(3, 4, 2, 5, kernel_size=3), torch.randn(4, 6, 5, 3, 4), {}),
    "network": lambda: (nn.CapsNet((1, 12, 12), classes=3, channels=8, types=2), torch.rand(4, 1, 12, 12), {}),
}


@pytest.mark.parametrize("name", MODULES)
def test_onnxruntime_finds_the_same_for_any_batch(name):
    module, x, others = MODULES[name]()
    module.eval()
    names = [next(iter(inspect.signature(module.forward).parameters)), *others]
    shapes = {name: {0: Dim("batch", min=1, max=64)} for name in names}
    with torch.no_grad():
        program = torch.onnx.export(module, (x,), kwargs=others, dynamic_shapes=shapes, optimize=False, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (1, 4):
        inputs = [x[-batch:], *(other[-batch:] for other in others.values())]
        found = session.run(None, dict(zip(names, (y.numpy() for y in inputs), strict=True)))[0]
        v = module(inputs[0], **dict(zip(others, inputs[1:], strict=True)))
        assert_close(torch.from_numpy(found), v if isinstance(v, torch.Tensor) else v[0], rtol=1e-4, atol=1e-5)


def test_a_named_backend_is_not_replaced(cpu):
    module = nn.CapsuleLinear(9, 4, 3, 5, backend=cpu).eval()
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"capsroute\.route"):
        torch.onnx.export(module, (torch.randn(2, 9, 4),), verbose=False)
    module(torch.randn(2, 9, 4))  # afterwards it serves again
