"""The classic names: scripts written for the snippet run, and what was wrong in it is gone.

Each fault, as docs/migrating.md lists them, has a test with its name.
"""

import pytest
import torch
import torch.nn.functional as F
from peak import extra_memory
from torch.testing import assert_close

import capsroute
from capsroute.nn import from_layout
from capsroute.nn.classic import CapsuleLayer, CapsuleLoss, CapsuleNet


def digits(layer: CapsuleLayer, x: torch.Tensor) -> torch.Tensor:
    return layer(x).squeeze(3).squeeze(2).transpose(0, 1)  # [J, B, 1, 1, O] to [B, J, O]


SCRIPT = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam

from capsroute.nn.classic import CapsuleLayer, CapsuleLoss

class MyCapsuleNet(nn.Module):  # a user's own network in the manner of the snippet
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels=1, out_channels=8, kernel_size=3, stride=1)
        self.primary_capsules = CapsuleLayer(num_capsules=4, num_route_nodes=-1, in_channels=8, out_channels=3,
                                             kernel_size=3, stride=2)
        self.digit_capsules = CapsuleLayer(num_capsules=10, num_route_nodes=3 * 2 * 2, in_channels=4, out_channels=6,
                                           num_iterations=2)
        self.decoder = nn.Sequential(nn.Linear(6 * 10, 64), nn.Sigmoid())

    def forward(self, x, y):
        x = F.relu(self.conv1(x), inplace=True)
        x = self.primary_capsules(x)
        x = self.digit_capsules(x).squeeze().transpose(0, 1)
        classes = (x ** 2).sum(dim=-1) ** 0.5
        return classes, self.decoder((x * y[:, :, None]).view(x.size(0), -1))

torch.manual_seed(0)
model, capsule_loss = MyCapsuleNet(), CapsuleLoss()
optimizer = Adam(model.parameters(), lr=0.01)
images, labels = torch.rand(6, 1, 8, 8), torch.eye(10)[torch.arange(6)]
losses = []
for _ in range(40):
    classes, reconstructions = model(images, labels)
    loss = capsule_loss(images, labels, classes, reconstructions)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
"""


def test_a_script_written_for_the_snippet_runs():
    names = {"__name__": "script"}
    exec(SCRIPT, names)
    assert names["losses"][-1] < 0.5 * names["losses"][0]


def test_names_and_shapes_of_the_parameters_are_the_snippets():
    with torch.device("meta"):
        net = CapsuleNet()
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    assert shapes["conv1.weight"] == (256, 1, 9, 9)
    assert [shapes[f"primary_capsules.capsules.{k}.weight"] for k in range(8)] == [(32, 256, 9, 9)] * 8
    assert shapes["digit_capsules.route_weights"] == (10, 1152, 8, 16)
    assert [shapes[f"decoder.{k}.weight"] for k in (0, 2, 4)] == [(512, 160), (1024, 512), (784, 1024)]
    assert len(shapes) == 2 + 16 + 1 + 6


def test_all_layers_are_drawn_anew():
    net = CapsuleNet()
    before = [parameter.clone() for parameter in net.parameters()]
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not any(torch.equal(x, y) for x, y in zip(net.parameters(), before, strict=True))


def test_the_network_draws_the_chosen_capsule():
    net = CapsuleNet()
    images = torch.rand(2, 1, 28, 28)
    classes, drawn = net(images)
    assert classes.shape == (2, 10)
    assert drawn.shape == (2, 784)
    told = F.one_hot(classes.argmax(1), 10).float()
    assert torch.equal(net(images, told)[1], drawn)
    assert not torch.equal(net(images, told.roll(1, 1))[1], drawn)
    loss = CapsuleLoss()(images, told, classes, drawn)
    loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in net.parameters())


def test_gradients_per_sample():
    net, images = CapsuleNet(), torch.rand(2, 1, 28, 28)
    weight = net.digit_capsules.route_weights.detach()

    def loss(weight, image):  # the longest is drawn
        _, drawn = torch.func.functional_call(net, {"digit_capsules.route_weights": weight}, (image.unsqueeze(0),))
        return drawn.square().sum()

    gradient = torch.func.grad(loss)
    expected = torch.stack([gradient(weight, image) for image in images])
    assert_close(torch.vmap(gradient, (None, 0))(weight, images), expected)


# What was wrong


def test_fault_softmax_over_the_wrong_axis(backend):
    layer = CapsuleLayer(5, 7, 3, 4, backend=backend)
    u, weight = torch.randn(2, 7, 3), from_layout(layer.route_weights, "[J, I, D, O]")
    v = digits(layer, u)
    assert layer(u).shape == (5, 2, 1, 1, 4)
    assert_close(v, capsroute.capsule_linear(u, weight, 3, backend=backend), rtol=0, atol=0)
    assert not torch.allclose(v, capsroute.capsule_linear(u, weight, 3, coupling="in"), rtol=0.1)


def test_fault_logits_averaged_over_the_batch():
    layer, u = CapsuleLayer(5, 7, 3, 4), torch.randn(6, 7, 3)
    assert torch.equal(digits(layer, u)[2:3], digits(layer, u[2:3]))


def test_fault_a_copy_of_the_weight_for_each_sample():
    layer, u = CapsuleLayer(8, 256, 8, 16), torch.randn(64, 256, 8)
    weight_bytes = layer.route_weights.nbytes
    extra = extra_memory(lambda: torch.autograd.grad(layer(u).sum(), layer.route_weights))
    assert extra < 8 * weight_bytes  # not 64 times; a copy in the kernels' order, and scratch


def test_fault_nan_at_zero():
    for layer, x in [
        (CapsuleLayer(5, 7, 3, 4), torch.zeros(2, 7, 3)),
        (CapsuleLayer(4, -1, 2, 3, 3), torch.zeros(2, 2, 5, 5)),
    ]:
        torch.nn.init.zeros_(next(layer.parameters()))
        if layer.num_route_nodes == -1:
            for convolution in layer.capsules:
                torch.nn.init.zeros_(convolution.weight)
                torch.nn.init.zeros_(convolution.bias)
        x.requires_grad_()
        v = layer(x)
        assert torch.equal(v, torch.zeros_like(v))
        v.sum().backward()
        assert x.grad.isfinite().all()


def test_fault_squash_of_single_numbers():
    """Over a trailing axis of size 1 every number is squashed by itself: lengths reach sqrt(O), directions are lost."""
    layer = CapsuleLayer(5, 7, 3, 16, num_iterations=1)
    torch.nn.init.normal_(layer.route_weights, std=100)
    u = torch.randn(2, 7, 3)
    v, s = digits(layer, u), torch.einsum("jido,bid->bjo", layer.route_weights, u)
    assert_close(v.norm(dim=-1), torch.ones(2, 5), rtol=1e-3, atol=0)
    assert_close(F.cosine_similarity(v, s, dim=-1), torch.ones(2, 5))


def test_fault_pixels_mixed_with_units():
    """Every feature of a primary capsule comes from one position: a pixel changes all of its capsules, no other."""
    layer = CapsuleLayer(num_capsules=4, num_route_nodes=-1, in_channels=1, out_channels=3, kernel_size=1)
    image = torch.rand(1, 1, 5, 6)
    before = layer(image)
    assert before.shape == (1, 3 * 5 * 6, 4)
    image[0, 0, 2, 3] += 1
    changed = layer(image) != before
    of_the_pixel = torch.arange(90) % 30 == 2 * 6 + 3
    assert torch.equal(changed, of_the_pixel[None, :, None].expand_as(changed))


def test_fault_softmax_of_lengths():
    """A softmax over ten lengths is at most e / (e + 9) = 0.23: the margin loss could never reach 0.9."""
    net = CapsuleNet()
    with torch.no_grad():
        net.digit_capsules.route_weights.mul_(1000)
        classes, _ = net(torch.rand(2, 1, 28, 28))
        u = net.primary_capsules(F.relu(net.conv1(torch.rand(2, 1, 28, 28))))
        lengths = digits(net.digit_capsules, u).norm(dim=-1)
    assert classes.max() > 0.9
    assert lengths.max() < 1


def test_fault_a_batch_of_one():
    net = CapsuleNet()
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        for one, both in zip(net(images[:1]), net(images), strict=True):
            assert_close(one, both[:1])


def test_fault_one_device_and_dtype():
    layer = CapsuleLayer(5, 7, 3, 4, dtype=torch.float64)
    assert layer(torch.randn(2, 7, 3, dtype=torch.float64)).dtype == torch.float64
    on_meta = CapsuleLayer(5, 7, 3, 4, device="meta", backend="reference")
    assert on_meta(torch.randn(2, 7, 3, device="meta")).device.type == "meta"


def test_fault_weights_that_saturate_at_once():
    u = F.normalize(torch.randn(4, 1152, 8), dim=-1)
    layer = CapsuleLayer(10, 1152, 8, 16)
    assert digits(layer, u).norm(dim=-1).mean() < 0.9
    torch.nn.init.normal_(layer.route_weights)  # the snippet's
    assert digits(layer, u).norm(dim=-1).mean() > 0.99


def test_fault_a_reconstruction_that_weighs_nothing():
    images, drawn = torch.rand(3, 1, 4, 4), torch.rand(3, 16)
    classes, labels = torch.rand(3, 10), torch.eye(10)[:3]
    squares = (drawn - images.view(3, 16)).square().sum() / 3
    lengths_only = CapsuleLoss()(images, labels, classes, images.view(3, 16))
    assert_close(CapsuleLoss()(images, labels, classes, drawn) - lengths_only, 0.0005 * squares)
    assert_close(lengths_only, capsroute.nn.MarginLoss()(classes, torch.arange(3)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 7, 3, 4), ValueError, "num_capsules must be at least 1, got 0"),
        ((5, -2, 3, 4), ValueError, "num_route_nodes must be at least 1, got -2"),
        ((5, -1, 3, 4), TypeError, "kernel_size must be given with num_route_nodes=-1, got None"),
        ((5, 7, 3, 4, None, None, 0), ValueError, "num_iterations must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        CapsuleLayer(*arguments)


def test_class_indices_are_not_taken_for_one_hot_labels():
    """Ten of them would broadcast with ten classes."""
    images, classes, labels = torch.rand(10, 1, 28, 28), torch.rand(10, 10), torch.arange(10)
    with pytest.raises(ValueError, match=r"labels must be one-hot \[10, 10\], got \[10\]"):
        CapsuleLoss()(images, labels, classes, torch.rand(10, 784))
    with pytest.raises(ValueError, match=r"y must be one-hot \[10, 10\], got \[10\]"):
        CapsuleNet()(images, labels)
