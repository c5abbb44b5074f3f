"""What every module of capsroute.nn must survive, as torch's own do."""

import copy
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from capsroute import nn

# name: (the module, its input). Small, and with more than one chunk where there are chunks.
MODULES = {
    "CapsuleLinear": (lambda: nn.CapsuleLinear(7, 3, 4, 5, bias=True), (7, 3)),
    "CapsuleLinear, inputs": (lambda: nn.CapsuleLinear(None, 3, 4, 5, shared="inputs"), (7, 3)),
    "CapsuleLinear, pairs": (lambda: nn.CapsuleLinear(None, 3, 4, 5, shared="pairs", bias=True), (7, 3)),
    "MultiInterest": (lambda: nn.MultiInterest(7, 3, 4, 5), (7, 3)),
    "PrimaryCapsules": (lambda: nn.PrimaryCapsules(2, 3, 4, 3, 2, flatten=False), (2, 7, 7)),
    "CapsuleConv2d": (lambda: nn.CapsuleConv2d(2, 3, 3, 4, 3, 2, 1, chunk_bytes=600), (5, 5, 2, 3)),
    "CapsuleConvTranspose2d": (lambda: nn.CapsuleConvTranspose2d(2, 3, 3, 4, 2, 2, chunk_bytes=400), (3, 3, 2, 3)),
    "CapsuleCell": (lambda: nn.CapsuleCell(2, 3, 3, 4, 2), (6, 6, 2, 3)),
    "Decoder": (lambda: nn.Decoder(3, 4, (1, 5, 5), (6,)), (3, 4)),
    "CapsNet": (lambda: nn.CapsNet((1, 8, 8), 3, channels=4, types=2, primary_features=3, hidden=(5,)), (1, 8, 8)),
    "DeepCapsNet": (lambda: nn.DeepCapsNet((1, 8, 8), 3, channels=4, types=2, features=(2, 3), hidden=(5,)), (1, 8, 8)),
    "classic.CapsuleLayer": (lambda: nn.classic.CapsuleLayer(3, 7, 4, 5), (7, 4)),
    "classic, primary": (lambda: nn.classic.CapsuleLayer(3, -1, 2, 4, 3, 2), (2, 7, 7)),
}


@pytest.fixture(params=MODULES)
def module_and_input(request):
    make, shape = MODULES[request.param]
    module = make()
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.any():  # biases start at 0, and a shared weight needs them apart
            torch.nn.init.normal_(parameter)
    return module, torch.rand(3, *shape)


def loss(output) -> torch.Tensor:
    tensors = output if isinstance(output, (tuple, list)) else (output,)
    return sum((x - 0.1).square().sum() for x in tensors)


def test_gradients(module_and_input):
    module, x = module_and_input
    module = module.double().eval()  # running statistics do not move between the calls of gradcheck
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x, *parameters):
        return loss(torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,)))

    assert torch.autograd.gradcheck(function, (x.double().requires_grad_(), *parameters), fast_mode=True)


def test_state_dict_and_deepcopy(module_and_input):
    module, x = module_and_input
    module.eval()
    expected = loss(module(x))
    copied = copy.deepcopy(module)
    loaded = copy.deepcopy(module)
    for parameter in loaded.parameters():
        torch.nn.init.zeros_(parameter)
    assert not torch.equal(loss(loaded(x)), expected)
    loaded.load_state_dict(module.state_dict())
    for other in (copied, loaded):
        assert torch.equal(loss(other(x)), expected)
    assert not {x.data_ptr() for x in copied.parameters()} & {x.data_ptr() for x in module.parameters()}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.CapsuleLinear(7, 3, 4, 5),
        lambda: nn.LazyCapsuleLinear(4, 5),
        lambda: nn.MultiInterest(7, 3, 4, 5, shared=None, prior="zero"),
    ],
)
def test_channels_last_leaves_weights_in_the_order_that_the_kernels_read(make):
    """Of four dimensions, they would be taken for those of a convolution, and copied on every call."""
    model = torch.nn.Sequential(make()).double()
    loss(model(torch.rand(2, 7, 3).double())).backward()
    model.to(memory_format=torch.channels_last)
    (weight,) = model.parameters()
    assert weight.is_contiguous()
    assert weight.grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(module_and_input, dtype):
    module, x = module_and_input
    module.eval()
    expected = loss(module(x))
    found = loss(copy.deepcopy(module).to(dtype)(x.to(dtype)))
    assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_autocast(module_and_input):
    module, x = module_and_input
    module.eval()
    exact = torch.autograd.grad(loss(module(x)), list(module.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    tensors = output if isinstance(output, tuple) else (output,)
    assert any(x.dtype == torch.bfloat16 for x in tensors)
    grads = torch.autograd.grad(loss([x.float() for x in tensors]), list(module.parameters()))
    for grad, want in zip(grads, exact, strict=True):
        assert grad.dtype == torch.float32
        assert_close(grad, want, rtol=0.2, atol=0.1 * float(want.abs().max()) + 1e-5)


@pytest.mark.parametrize("name", ["CapsuleLinear, pairs", "CapsuleConv2d", "CapsuleConvTranspose2d", "DeepCapsNet"])
def test_compile_in_one_graph(name):
    torch._dynamo.reset()
    make, shape = MODULES[name]
    module, x = make(), torch.rand(2, *shape)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    other = copy.deepcopy(module)  # running statistics move
    found, expected = loss(compiled(x)), loss(other(x))
    assert_close(found, expected)
    grads = torch.autograd.grad(found, module.parameters())
    for grad, want in zip(grads, torch.autograd.grad(expected, other.parameters()), strict=True):
        assert_close(grad, want, rtol=1e-3, atol=1e-5)


DDP = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from test_modules import MODULES, loss

dist.init_process_group("gloo")
rank = dist.get_rank()
for name, (make, shape) in MODULES.items():
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter)
    module.eval()
    x = torch.rand(4, *shape)
    loss(module(x)).backward()
    expected = [p.grad / 2 for p in module.parameters()]  # the mean over two processes of sums over half the batch
    module.zero_grad()
    parallel = DistributedDataParallel(module)
    loss(parallel(x[2 * rank : 2 * rank + 2])).backward()
    for parameter, grad in zip(module.parameters(), expected):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)
print(f"{len(MODULES)} modules agree on rank {rank}")
del parallel
dist.barrier()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # on a busy machine gloo's threads may outlive what they use even so, and an exit with farewells aborts
"""


def test_distributed_data_parallel_in_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    base = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error:Grad strides", "-c", DDP],
            env={**base, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, output
        assert f"{len(MODULES)} modules agree on rank {rank}" in output
