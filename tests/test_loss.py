"""The losses."""

import pytest
import torch

from capsroute.nn import CapsNet, CapsNetLoss, Decoder, MarginLoss, SpreadLoss


def test_margin_loss_is_equation_4():
    lengths = torch.tensor([[0.95, 0.3, 0.05], [0.2, 0.5, 0.6]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    total = 0.0
    for row, label in zip(lengths.tolist(), labels.tolist(), strict=True):
        for j, length in enumerate(row):
            present = 1 if j == label else 0
            total += present * max(0, 0.9 - length) ** 2 + 0.5 * (1 - present) * max(0, length - 0.1) ** 2
    assert MarginLoss()(lengths, labels).item() == pytest.approx(total / 2, rel=1e-12)


def test_margin_loss_takes_its_constants():
    loss = MarginLoss(m_plus=0.8, m_minus=0.2, down_weight=0.25)
    assert loss(torch.tensor([[0.5, 0.6]]), torch.tensor([0])).item() == pytest.approx(0.3**2 + 0.25 * 0.4**2)
    assert repr(loss) == "MarginLoss(m_plus=0.8, m_minus=0.2, down_weight=0.25)"


def test_spread_loss_is_equation_3():
    activations = torch.tensor([[0.95, 0.3, 0.05], [0.2, 0.5, 0.6]], dtype=torch.float64)
    total = 0.0
    for row, t in zip(activations.tolist(), [0, 1], strict=True):
        total += sum(max(0, 0.7 - (row[t] - row[i])) ** 2 for i in range(3) if i != t)
    loss = SpreadLoss(0.7)
    assert loss(activations, torch.tensor([0, 1])).item() == pytest.approx(total / 2, rel=1e-12)
    loss.margin = 0.05  # as a schedule sets it
    assert loss(activations[:1], torch.tensor([0])).item() == 0
    assert repr(loss) == "SpreadLoss(margin=0.05)"
    with pytest.raises(ValueError, match="margin must be a positive finite number, got 0"):
        SpreadLoss(0)
    with pytest.raises(ValueError, match=r"activations must be \[B, J\], got \[3\]"):
        loss(activations[0], torch.tensor([0, 1]))


def test_capsnet_loss_adds_the_mean_squared_error():
    net = CapsNet((1, 28, 28), 2, channels=2, types=1, hidden=(4,))
    images, labels = torch.rand(3, 1, 28, 28), torch.tensor([0, 1, 1])
    output = net(images, labels)
    squares = (output.reconstruction - images).square().sum() / 3  # the paper's sum over the 784 pixels
    expected = MarginLoss()(output.lengths, labels) + 0.0005 * squares
    torch.testing.assert_close(CapsNetLoss(0.392)(output, images, labels), expected)


def test_images_do_not_broadcast_to_the_reconstruction():
    net = CapsNet((1, 8, 8), 3, channels=2, types=1, hidden=(4,))
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="images must be of the reconstruction's shape"):
        CapsNetLoss()(net(images, labels), images[:1], labels)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0.0, 1.0]), TypeError, "labels must be int64, got torch.float32"),
        ([0, 1], TypeError, "labels must be an int64 tensor, got list"),
        (torch.tensor([0]), ValueError, r"labels must be \[B\] or \[B, K\] with B = 2, got \[1\]"),
        (torch.tensor([[[0], [1]]]), ValueError, r"labels must be \[B\] or \[B, K\] with B = 2, got \[1, 2, 1\]"),
    ],
)
def test_labels_are_checked(labels, error, message):
    with pytest.raises(error, match=message):
        MarginLoss()(torch.rand(2, 3), labels)
    with pytest.raises(error, match=message):
        Decoder(3, 4, (1, 8, 8))(torch.rand(2, 3, 4), labels)


def test_one_hot_labels_are_not_taken_for_classes():
    message = r"with K < J = 3, got \[2, 3\]; of one-hot labels pass \.argmax\(1\)"
    with pytest.raises(ValueError, match=message):
        MarginLoss()(torch.rand(2, 3), torch.eye(3, dtype=torch.int64)[:2])
    with pytest.raises(ValueError, match="of one-hot labels pass"):
        MarginLoss()(torch.rand(2, 2), torch.eye(2, dtype=torch.int64))
    MarginLoss()(torch.rand(2, 3), torch.tensor([[0, 1], [2, 0]]))
    MarginLoss()(torch.rand(2, 1), torch.tensor([[0], [0]]))


def test_the_spread_loss_wants_one_label():
    with pytest.raises(ValueError, match=r"labels must be \[B\] with B = 2, got \[2, 1\]"):
        SpreadLoss()(torch.rand(2, 3), torch.tensor([[0], [1]]))


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_outside_the_classes_are_refused(label):
    labels = torch.tensor([0, label])
    for call in (MarginLoss(), SpreadLoss(), lambda x, y: Decoder(3, 4, (1, 8, 8))(torch.rand(2, 3, 4), y)):
        with pytest.raises(RuntimeError, match="index"):
            call(torch.rand(2, 3), labels)


@pytest.mark.parametrize("loss", [MarginLoss(), SpreadLoss()])
def test_losses_under_vmap(loss):
    lengths, labels = torch.rand(5, 2, 3), torch.randint(0, 3, (5, 2))
    expected = torch.stack([loss(x, y) for x, y in zip(lengths, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(lengths, labels), expected)


def test_margin_loss_wants_one_length_for_each_class():
    with pytest.raises(ValueError, match=r"lengths must be \[B, J\], got \[2, 3, 4\]"):
        MarginLoss()(torch.rand(2, 3, 4), torch.tensor([0, 1]))


def test_losses_want_tensors():
    labels = torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"lengths must be a tensor \[B, J\], got list"):
        MarginLoss()([[0.5, 0.1], [0.2, 0.3]], labels)
    with pytest.raises(TypeError, match=r"activations must be a tensor \[B, J\], got list"):
        SpreadLoss()([[0.5, 0.1], [0.2, 0.3]], labels)
    output = CapsNet((1, 8, 8), 2, channels=2, types=1, hidden=(4,))(torch.rand(2, 1, 8, 8), labels)
    with pytest.raises(TypeError, match=r"images must be a tensor \[B, C, H, W\] or \[B, K, C, H, W\], got list"):
        CapsNetLoss()(output, [[0.0]], labels)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (MarginLoss, "m_plus"),
        (lambda x: MarginLoss(m_minus=x), "m_minus"),
        (lambda x: MarginLoss(down_weight=x), "down_weight"),
        (CapsNetLoss, "reconstruction_weight"),
    ],
)
def test_constants_of_losses_are_checked(make, name):
    for wrong in (float("nan"), -0.1, float("inf"), 10**400):
        with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0, got {wrong}"):
            make(wrong)
    for wrong in ("a", True):
        with pytest.raises(TypeError, match=f"{name} must be a float, got {type(wrong).__name__}"):
            make(wrong)
    make(0)


def test_an_int_beyond_64_bits_is_the_float_that_it_equals():
    lengths, labels = torch.rand(3, 4), torch.arange(3)
    for make in (MarginLoss, lambda x: MarginLoss(down_weight=x), SpreadLoss):
        assert make(10**20)(lengths, labels) == make(1e20)(lengths, labels)
