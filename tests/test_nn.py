"""capsroute.nn: each module against its equation written out anew, and what a torch module must survive."""

import copy
import io
import math

import pytest
import torch

from capsroute.nn import CapsNet, CapsNetLoss, Decoder, MarginLoss, PrimaryCapsules
from capsroute.nn.capsnet import CapsNetOutput
from capsroute.nn.decoder import capsule_lengths

DIGITS = (1, 8, 8)


def small_net(**options) -> CapsNet:
    return CapsNet(DIGITS, 3, **{"channels": 4, "types": 2, "primary_features": 3, "hidden": (5,), **options})


# PrimaryCapsules


def test_primary_capsules_hold_the_channels_of_one_type_at_one_position():
    primary = PrimaryCapsules(1, types=2, features=3, kernel_size=1)
    scales = torch.arange(1.0, 7.0)  # channel = type * features + feature
    with torch.no_grad():
        primary.conv.weight.copy_(scales.view(6, 1, 1, 1))
        primary.conv.bias.zero_()
    image = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # height 2, width 3
    u = primary(image.view(1, 1, 2, 3))
    assert u.shape == (1, 2 * 3 * 2, 3)
    for y in range(2):
        for x in range(3):
            for kind in range(2):
                s = image[y, x] * scales[3 * kind : 3 * kind + 3]
                n2 = float(s @ s)
                expected = n2 / (1 + n2) * s / math.sqrt(n2)
                torch.testing.assert_close(u[0, (y * 3 + x) * 2 + kind], expected)


def test_primary_capsules_are_as_many_as_the_convolution_has_positions():
    primary = PrimaryCapsules(3, types=5, features=4, kernel_size=(3, 2), stride=(2, 1))
    assert primary(torch.randn(2, 3, 9, 6)).shape == (2, 4 * 5 * 5, 4)


def test_primary_capsules_as_a_map():
    flat = PrimaryCapsules(3, types=2, features=4, kernel_size=3, stride=2, padding=1)
    maps = PrimaryCapsules(3, types=2, features=4, kernel_size=3, stride=2, padding=1, flatten=False)
    maps.load_state_dict(flat.state_dict())
    x = torch.randn(2, 3, 9, 6)
    assert maps(x).shape == (2, 5, 3, 2, 4)
    assert torch.equal(maps(x).flatten(1, 3), flat(x))


def test_primary_capsules_gradients():
    primary = PrimaryCapsules(2, types=2, features=3, kernel_size=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(primary, torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("flatten", [True, False])
def test_primary_capsules_take_their_eps(flatten):
    plain, soft = (PrimaryCapsules(1, 2, 3, 1, flatten=flatten, **options) for options in ({}, {"eps": 1.0}))
    soft.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1, 4, 4)
    n2 = plain.conv(x).unflatten(1, (2, 3)).permute(0, 3, 4, 1, 2).square().sum(-1, keepdim=True)
    n2 = n2.flatten(1, 3) if flatten else n2
    torch.testing.assert_close(soft(x), plain(x) * ((n2 + 1e-9) / (n2 + 1)).sqrt())


def test_primary_capsules_refuse_wrong_arguments():
    with pytest.raises(TypeError, match="flatten must be True or False, got 'no'"):
        PrimaryCapsules(1, 2, 3, 1, flatten="no")


# Decoder


def test_decoder_draws_the_labelled_capsule_alone():
    decoder = Decoder(3, 4, DIGITS, (6,))
    capsules = torch.randn(5, 3, 4, requires_grad=True)
    labels = torch.tensor([0, 2, 1, 1, 0])
    image = decoder(capsules, labels)
    by_hand = torch.zeros(5, 12)
    for b, label in enumerate(labels.tolist()):
        by_hand[b, 4 * label : 4 * label + 4] = capsules[b, label].detach()
    first, second = decoder.layers[0], decoder.layers[2]
    expected = torch.sigmoid(second(torch.relu(first(by_hand))))
    torch.testing.assert_close(image, expected.view(5, *DIGITS))
    image.sum().backward()
    touched = capsules.grad.abs().sum(-1) > 0  # [B, J]
    assert torch.equal(touched, torch.nn.functional.one_hot(labels, 3).bool())


def test_decoder_predicts_from_the_longest_capsule():
    decoder = Decoder(3, 2, DIGITS)
    capsules = torch.tensor([[[0.1, 0.1], [0.0, -0.9], [0.5, 0.5]], [[0.6, 0.6], [0.0, 0.8], [0.3, 0.0]]])
    torch.testing.assert_close(decoder(capsules), decoder(capsules, torch.tensor([1, 0])), rtol=0, atol=0)


def test_decoder_lets_no_other_capsule_through():
    decoder = Decoder(2, 3, DIGITS)
    capsules = torch.randn(1, 2, 3)
    clean = decoder(capsules, torch.tensor([1]))
    capsules[0, 0] = torch.nan
    torch.testing.assert_close(decoder(capsules, torch.tensor([1])), clean, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 12)])
def test_decoder_refuses_capsules_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"capsules must be \[B, J, O\] with J = 3 and O = 4, got"):
        Decoder(3, 4, DIGITS)(torch.rand(shape))


# CapsNet


@pytest.mark.parametrize(
    ("image_shape", "grid"),
    [((1, 5, 5), (1, 1)), ((1, 8, 8), (4, 4)), ((3, 32, 32), (8, 8)), ((1, 28, 28), (6, 6)), ((2, 12, 20), (6, 10))],
)
def test_capsnet_takes_any_image(image_shape, grid):
    net = CapsNet(image_shape, 4, channels=3, types=2, hidden=(4,))
    output = net(torch.rand(2, *image_shape), torch.tensor([0, 3]))
    assert net.grid == (*grid, 2)
    assert output.capsules.shape == (2, 4, 16)
    torch.testing.assert_close(output.lengths, output.capsules.norm(dim=-1))
    assert output.reconstruction.shape == (2, *image_shape)


def test_lengths_have_derivatives_of_any_order():
    capsules = torch.cat([torch.zeros(1, 3, 4), torch.randn(1, 3, 4)]).double().requires_grad_()
    (grad,) = torch.autograd.grad(capsule_lengths(capsules).square().sum(), capsules, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), capsules)
    torch.testing.assert_close(grad, 2 * capsules)
    torch.testing.assert_close(second[1], 8 * capsules[1])
    assert not second[0].any()  # of |v| itself there is none
    assert torch.equal(capsule_lengths(capsules), capsules.norm(dim=-1))
    assert capsule_lengths(torch.full((2, 4), torch.nan)).isnan().all()


@pytest.mark.parametrize("side", [28, 224, 512])
def test_capsnet_passes_over_no_part_of_a_large_image(side):
    images = torch.rand(1, 1, side, side, requires_grad=True)
    net = CapsNet((1, side, side), 2, channels=2, types=1, hidden=(4,), iterations=1)
    torch.nn.init.ones_(net.conv.weight)  # nothing is cut off by the ReLU
    (influence,) = torch.autograd.grad(net.primary_capsules(images).sum(), images)
    end = side - max(round(side * 2 / 28), 1)  # what fills no more capsules may be left over there
    assert influence[0, 0, :end, :end].all()


def test_capsnet_is_the_papers_by_default():
    with torch.device("meta"):
        net = CapsNet((1, 28, 28), 10)
    assert (net.conv.kernel_size, net.conv.stride, net.conv.out_channels) == ((9, 9), (1, 1), 256)
    assert (net.primary.conv.kernel_size, net.primary.conv.stride) == ((9, 9), (2, 2))
    assert net.routing.weight.shape == (1152, 8, 10, 16)
    assert [layer.out_features for layer in net.decoder.layers[::2]] == [512, 1024, 784]


def test_capsnet_hands_the_options_of_routing_on():
    """Of ports of the paper: no gradient through the coupling; of the authors' code: a leak and a bias."""
    routing = small_net(bias=True, leaky=True, detach_coupling=True, eps=1e-7).routing
    assert (routing.leaky, routing.detach_coupling, routing.eps) == (True, True, 1e-7)
    assert routing.bias.shape == (3, 16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'leak'"):
        small_net(leak=True)


def test_several_labels_of_an_image():
    """[B, K] means K classes at once in the margin loss, and K capsules drawn each alone."""
    lengths, labels = torch.rand(2, 4), torch.tensor([[0, 3], [2, 1]])
    present, absent = (0.9 - lengths).clamp(min=0).square(), (lengths - 0.1).clamp(min=0).square()
    total = present.gather(1, labels).sum() + 0.5 * (absent.sum() - absent.gather(1, labels).sum())
    torch.testing.assert_close(MarginLoss()(lengths, labels), total / 2)
    decoder, capsules = Decoder(4, 3, DIGITS, hidden=(5,)), torch.rand(2, 4, 3)
    drawings = decoder(capsules, labels)
    assert drawings.shape == (2, 2, *DIGITS)
    for k in (0, 1):
        torch.testing.assert_close(drawings[:, k], decoder(capsules, labels[:, k]))
    output = small_net()(torch.rand(2, *DIGITS), torch.tensor([[0, 2], [2, 1]]))
    images = torch.rand(2, 2, *DIGITS)
    expected = MarginLoss()(output.lengths, torch.tensor([[0, 2], [2, 1]]))
    expected = expected + 4 * (output.reconstruction - images).square().mean()
    torch.testing.assert_close(CapsNetLoss()(output, images, torch.tensor([[0, 2], [2, 1]])), expected)
    with pytest.raises(ValueError, match="images must be of the reconstruction's shape"):
        CapsNetLoss()(output, images[:, 0], torch.tensor([[0, 2], [2, 1]]))


@pytest.mark.parametrize("labels", [None, (0,), (0, 2), (2, 0)], ids=str)
def test_a_batch_of_nothing(labels):
    batch = labels[0] if labels else 0
    capsules, images = torch.rand(batch, 3, 4), torch.rand(batch, *DIGITS)
    labels = None if labels is None else torch.zeros(labels, dtype=torch.long)
    several = () if labels is None else labels.shape[1:]
    assert Decoder(3, 4, DIGITS, (6,))(capsules, labels).shape == (batch, *several, *DIGITS)
    assert small_net()(images, labels).reconstruction.shape == (batch, *several, *DIGITS)
    if labels is not None:
        assert MarginLoss()(torch.rand(batch, 3), labels).shape == ()


def test_labels_reach_only_the_reconstruction():
    net, images = small_net(), torch.rand(4, *DIGITS)
    free = net(images)
    told = net(images, (free.lengths.argmax(-1) + 1) % 3)
    assert torch.equal(free.capsules, told.capsules)
    assert torch.equal(free.lengths, told.lengths)
    assert not torch.equal(free.reconstruction, told.reconstruction)
    chosen = net(images, free.lengths.argmax(-1))
    assert torch.equal(free.reconstruction, chosen.reconstruction)


@pytest.mark.parametrize(
    ("image_shape", "error", "message"),
    [
        ((1, 4, 8), ValueError, "image_shape must have a height and width of at least 5, got 4"),
        ((8, 8), ValueError, r"image_shape must be \(channels, height, width\), got \(8, 8\)"),
        (28, ValueError, r"image_shape must be \(channels, height, width\), got 28"),
        ((0, 8, 8), ValueError, r"image_shape\[0\] must be at least 1, got 0"),
        ((1, 8.0, 8), TypeError, r"image_shape\[1\] must be an int, got float"),
    ],
)
def test_capsnet_refuses_wrong_image_shapes(image_shape, error, message):
    with pytest.raises(error, match=message):
        CapsNet(image_shape, 10)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 8, 9), (1, 8, 8)])
def test_capsnet_refuses_wrong_images(shape):
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\] with C = 1, H = 8 and W = 8, got \["):
        small_net()(torch.rand(shape))


@pytest.mark.parametrize("images", [[[0.0]], torch.zeros(2, *DIGITS, dtype=torch.uint8)], ids=type)
def test_capsnet_refuses_images_that_are_no_floats(images):
    with pytest.raises(TypeError, match="images must be"):
        small_net()(images)


@pytest.mark.not_interpreted
def test_capsnet_gradients(backend):
    net = small_net(backend=backend, dtype=torch.float64, class_features=2)
    images, labels = torch.rand(2, *DIGITS, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2])

    def loss(images, *parameters):
        output = torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (images, labels))
        return CapsNetLoss()(output, images, labels)

    names, parameters = zip(*net.named_parameters(), strict=True)
    assert torch.autograd.gradcheck(loss, (images, *parameters), fast_mode=True)


@pytest.mark.not_interpreted
@pytest.mark.usefixtures("one_thread")
def test_capsnet_learns_its_batch(backend):
    net, images, labels = small_net(backend=backend), torch.rand(6, *DIGITS), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = CapsNetLoss()(net(images, labels), images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert torch.equal(net(images).lengths.argmax(-1), labels)


# What a torch module must survive


@pytest.fixture
def net_and_batch(backend):
    return small_net(backend=backend), torch.rand(4, *DIGITS), torch.tensor([0, 1, 2, 0])


def test_state_dict_and_deepcopy(net_and_batch):
    net, images, _ = net_and_batch
    copied = copy.deepcopy(net)
    loaded = small_net(backend=net.routing.backend)
    loaded.load_state_dict(net.state_dict())
    for other in (copied, loaded):
        for mine, theirs in zip(net(images), other(images), strict=True):
            assert torch.equal(mine, theirs)
    with torch.no_grad():
        copied.routing.weight.zero_()
    assert net.routing.weight.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(net_and_batch, dtype):
    net, images, labels = net_and_batch
    output = copy.deepcopy(net).to(dtype)(images.to(dtype), labels)
    assert output.capsules.dtype == output.reconstruction.dtype == dtype
    assert output.lengths.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(output.lengths.float(), net(images).lengths, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(net_and_batch, dtype):
    net, images, labels = net_and_batch
    with torch.autocast("cpu", dtype):
        output = net(images, labels)
        loss = CapsNetLoss()(output, images, labels)
    assert output.capsules.dtype == dtype
    assert output.lengths.dtype == loss.dtype == torch.float32
    loss.backward()
    exact = torch.autograd.grad(CapsNetLoss()(net(images, labels), images, labels), net.parameters())
    for parameter, expected in zip(net.parameters(), exact, strict=True):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()) + 1e-6)


def test_an_exported_program_can_be_saved(net_and_batch):
    net, images, _ = net_and_batch
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (images,)), file)
    file.seek(0)
    found = torch.export.load(file).module()(images)
    assert isinstance(found, CapsNetOutput)
    torch.testing.assert_close(found, net(images))


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced(net_and_batch):
    net, images, labels = net_and_batch
    traced, more = torch.jit.trace(net, (images, labels)), (images.repeat(2, 1, 1, 1), labels.repeat(2))
    expected = net(*more)
    torch.testing.assert_close(CapsNetOutput(*traced(*more)), expected)
    loss = torch.jit.trace(MarginLoss(), (expected.lengths.detach(), more[1]))
    torch.testing.assert_close(loss(expected.lengths, more[1]), MarginLoss()(expected.lengths, more[1]))


def test_lengths_of_float16_capsules_are_float32():
    capsules = torch.full((1, 3, 16), 1e-5, dtype=torch.float16, requires_grad=True)  # its square is 0 in float16
    lengths = capsule_lengths(capsules)
    torch.testing.assert_close(lengths, capsules.detach().float().norm(dim=-1))
    lengths.sum().backward()
    torch.testing.assert_close(capsules.grad, torch.full_like(capsules, 0.25))


def test_lengths_of_zero_capsules_have_no_gradient():
    capsules = torch.zeros(1, 3, 4, requires_grad=True)
    capsule_lengths(capsules).sum().backward()
    assert torch.equal(capsules.grad, torch.zeros_like(capsules))


def test_compile_in_one_graph(fused):
    net, images, labels = small_net(backend=fused), torch.rand(4, *DIGITS), torch.tensor([0, 1, 2, 0])
    step = torch.compile(lambda x, y: CapsNetLoss()(net(x, y), x, y), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 3):
        eager = CapsNetLoss()(net(images[:batch], labels[:batch]), images[:batch], labels[:batch])
        compiled = step(images[:batch], labels[:batch])
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(
            torch.autograd.grad(compiled, net.parameters()), torch.autograd.grad(eager, net.parameters())
        )
