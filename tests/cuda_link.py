"""What `make cuda-build` shows where torch has CUDA and the machine may have no GPU and no driver: the library loads,
its ops are registered for CUDA, and fake CUDA tensors pass through them."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import capsroute
from capsroute import _ops

OPS = ("route", "route_backward", "routing_pass", "routing_pass_backward")


def main() -> None:
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, a GPU: {torch.cuda.is_available()}")
    print(f"{capsroute.__file__}: {capsroute.backends()}")
    assert _ops.cuda_library()[0]
    for name in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"capsroute::{name}", "CUDA"), name
    print("registered for CUDA:", *OPS)

    with FakeTensorMode():
        u, weight = torch.empty(8, 20, 4, device="cuda"), torch.empty(20, 3, 16, 4, device="cuda")
        v, c = capsroute.capsule_linear(u, weight, backend="cuda", return_coupling=True)
        assert (v.shape, v.device.type, c.shape) == ((8, 3, 16), "cuda", (8, 20, 3))
        # The engine of autograd asks the driver about the device, so the backward is called by itself.
        problem = u, weight, None, None, None, 3, False, False, 1e-9
        v, s, norm, _, votes, _ = torch.ops.capsroute.route(*problem, 3, 0, False)
        grads = torch.ops.capsroute.route_backward(v, s, norm, votes, *problem, False, True, True, False, False)
        assert [x.shape for x in grads[:2]] == [(8, 20, 4), (20, 3, 16, 4)]
        assert all(x.device.type == "cuda" for x in grads)
        exported = torch.export.export(Layer(), (u, weight))
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "capsroute.route.default" in names
    print("fake tensors: forward, backward, torch.export")


class Layer(torch.nn.Module):
    def forward(self, u, weight):
        return capsroute.capsule_linear(u, weight)


if __name__ == "__main__":
    main()
