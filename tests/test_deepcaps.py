"""The residual stack of convolutional capsules."""

import pytest
import torch
from torch.testing import assert_close

from capsroute.nn import CapsNetLoss, CapsuleCell, DeepCapsNet


def test_a_cell_is_its_four_convolutions():
    cell = CapsuleCell(2, 3, 4, 5, iterations=3, bias=True)
    assert [part.iterations for part in (cell.down, cell.first, cell.second, cell.skip)] == [1, 1, 1, 3]
    x = torch.randn(2, 5, 6, 2, 3)
    h = cell.down(x)
    assert h.shape == (2, 3, 3, 4, 5)
    assert torch.equal(cell(x), cell.second(cell.first(h)) + cell.skip(h))


def test_the_network_is_the_papers_by_default():
    with torch.device("meta"):
        net = DeepCapsNet((3, 64, 64), 10)
    assert [cell.down.weight.shape[2:] for cell in net.cells] == [
        (128, 1, 32, 4),
        (32, 4, 32, 8),
        (32, 8, 32, 8),
        (32, 8, 32, 8),
    ]
    assert [cell.skip.iterations for cell in net.cells] == [1, 1, 1, 3]
    assert net.routing.weight.shape == ((8 * 8 + 4 * 4) * 32, 8, 10, 32)
    assert net.decoder.layers[0].in_features == 32  # it sees the chosen capsule, not which it was


def small(**options) -> DeepCapsNet:
    return DeepCapsNet((1, 8, 8), 3, **{"channels": 6, "types": 4, "features": (4, 6, 6), "hidden": (16,), **options})


def test_cells_of_unlike_capsules_are_not_mixed():
    assert small(features=(4, 6)).routing.in_capsules == 2 * 2 * 4
    assert small(features=(6,)).routing.in_capsules == 4 * 4 * 4
    assert small().routing.in_capsules == (2 * 2 + 1) * 4


def test_all_capsule_layers_have_the_options_of_routing():
    net = small(bias=True, detach_coupling=True)
    for layer in (net.routing, net.cells[0].down, net.cells[-1].skip):
        assert layer.detach_coupling
        assert layer.bias is not None


def test_the_decoder_draws_the_chosen_capsule():
    net, images = small().eval(), torch.rand(3, 1, 8, 8)
    free = net(images)
    told = net(images, (free.lengths.argmax(1) + 1) % 3)
    assert torch.equal(free.capsules, told.capsules)
    assert not torch.equal(free.reconstruction, told.reconstruction)
    assert torch.equal(net(images, free.lengths.argmax(1)).reconstruction, free.reconstruction)
    assert_close(free.lengths, free.capsules.norm(dim=-1))


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_labels_outside_the_classes_are_refused(label):
    with pytest.raises(RuntimeError, match="index"):
        small().eval()(torch.rand(1, 1, 8, 8), torch.tensor([label]))


def test_one_label_an_image():
    with pytest.raises(ValueError, match=r"labels must be \[B\] with B = 1, got \[1, 2\]"):
        small().eval()(torch.rand(1, 1, 8, 8), torch.tensor([[0, 1]]))


@pytest.mark.not_interpreted
def test_it_learns_its_batch(backend):
    net, images = small(backend=backend), torch.rand(6, 1, 8, 8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(40):
        loss = CapsNetLoss(0.1)(net(images, labels), images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert torch.equal(net(images).lengths.argmax(1), labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": ()}, ValueError, "features must have at least one number, one for each cell, got none"),
        ({"types": 0}, ValueError, "types must be at least 1, got 0"),
        ({"class_features": 0}, ValueError, "class_features must be at least 1, got 0"),
        ({"features": 4}, TypeError, "features must be a tuple of ints, got int"),
        ({"hidden": (0,)}, ValueError, r"hidden\[0\] must be at least 1, got 0"),
        ({"features": (4, 0)}, ValueError, r"features\[1\] must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


@pytest.mark.parametrize("shape", [(2, 1, 7, 7), (2, 1, 8, 16), (2, 3, 8, 8)])
def test_images_of_another_size(shape):
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\] with C = 1, H = 8 and W = 8, got"):
        small()(torch.rand(shape))
