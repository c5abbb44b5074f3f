"""Convolutional capsules: against capsule_linear position by position, and what is stored."""

import io
import itertools

import pytest
import torch
from peak import extra_memory
from torch.testing import assert_close

import capsroute
from capsroute import _autograd
from capsroute.nn import CapsuleConv2d, CapsuleConvTranspose2d, PrimaryCapsules, _windows, conv_transpose

IN, OUT = (2, 3), (3, 4)  # types and features
ALL_AT_ONCE, ROW_BY_ROW, SOME = 2**25, 1, 6000  # chunk_bytes


def by_hand(layer, x, mask=None):
    """Each output position by itself: which inputs it sees from the definition, then capsule_linear."""
    transposed = isinstance(layer, CapsuleConvTranspose2d)
    sizes = output_sizes(layer, x.shape[1:3], transposed)
    v = x.new_zeros(x.shape[0], *sizes, *OUT)
    for y, z in itertools.product(*map(range, sizes)):
        u, weight, keep = [x[:, :0, 0, 0]], [layer.weight[:0, 0, 0]], [torch.ones(x.shape[0], 0, dtype=torch.bool)]
        for a, b in itertools.product(*map(range, layer.kernel_size)):
            seen = [input_of(layer, d, out, tap, transposed) for d, (out, tap) in enumerate([(y, a), (z, b)])]
            if all(i is not None and 0 <= i < n for i, n in zip(seen, x.shape[1:3], strict=True)):
                u.append(x[:, seen[0], seen[1]])
                weight.append(layer.weight[a, b])
                keep.append((torch.ones(x.shape[:4]).bool() if mask is None else mask)[:, seen[0], seen[1]])
        options = {**layer.routing_options(), "backend": "reference", "bias": layer.bias}
        weights = torch.cat(weight).permute(0, 2, 3, 1)
        v[:, y, z] = capsroute.capsule_linear(torch.cat(u, 1), weights, mask=torch.cat(keep, 1), **options)
    return v


def output_sizes(layer, sizes, transposed):
    steps = zip(sizes, layer.kernel_size, layer.stride, layer.padding, strict=True)
    if transposed:
        return [(n - 1) * s - 2 * p + k + o for (n, k, s, p), o in zip(steps, layer.output_padding, strict=True)]
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for (n, k, s, p), d in zip(steps, layer.dilation, strict=True)]


def input_of(layer, d, out, tap, transposed):
    """The input position that an output position sees through a tap, if any."""
    if not transposed:
        return out * layer.stride[d] - layer.padding[d] + tap * layer.dilation[d]
    i, rest = divmod(out + layer.padding[d] - tap, layer.stride[d])
    return None if rest else i


CONV = {
    "plain": {},
    "in, padding of one axis": {"coupling": "in", "padding": (0, 1)},
    "in, padding of the other axis": {"coupling": "in", "padding": (1, 0)},
    "stride and padding": {"stride": 2, "padding": 1},
    "uneven": {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "dilation": {"dilation": 2, "padding": 1},
    "in": {"coupling": "in", "padding": 1, "bias": True},
    "one pass": {"iterations": 1, "bias": True, "leaky": True},
    "detached": {"detach_coupling": True, "iterations": 2, "padding": 2, "eps": 1e-3},
}
TRANSPOSED = {
    "plain": {},
    "doubled": {"kernel_size": 4, "stride": 2, "padding": 1},
    "odd": {"stride": 2, "padding": 1, "output_padding": 1},
    "uneven": {"kernel_size": (3, 5), "stride": (3, 2), "padding": (0, 2), "output_padding": (2, 0)},
    "in": {"coupling": "in", "stride": 2, "padding": 1, "bias": True},
    "one pass": {"iterations": 1, "kernel_size": 2, "stride": 2},
    "cropped": {"kernel_size": 2, "stride": 1, "padding": 1},
}


def make(kind, options, **more):
    layer = kind(*IN, *OUT, **{"kernel_size": 3, "dtype": torch.float64, **options, **more})
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("chunk_bytes", [ALL_AT_ONCE, ROW_BY_ROW, SOME])
@pytest.mark.parametrize(
    ("kind", "options"),
    [*((CapsuleConv2d, x) for x in CONV.values()), *((CapsuleConvTranspose2d, x) for x in TRANSPOSED.values())],
    ids=[*CONV, *(f"transposed, {name}" for name in TRANSPOSED)],
)
def test_each_position_is_routed_by_itself(backend, kind, options, chunk_bytes):
    layer = make(kind, options, chunk_bytes=chunk_bytes, backend=backend)
    x = torch.randn(3, 5, 6, *IN, dtype=torch.float64)
    assert_close(layer(x), by_hand(layer, x))


def test_padding_counts_on_both_sides():
    layer, x = make(CapsuleConv2d, {"padding": 1}), torch.randn(2, 1, 1, *IN, dtype=torch.float64)
    assert_close(layer(x), by_hand(layer, x))


@pytest.mark.parametrize("chunk_bytes", [ALL_AT_ONCE, ROW_BY_ROW])
@pytest.mark.parametrize("coupling", ["out", "in"])
@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_a_masked_capsule_reaches_nothing(kind, coupling, chunk_bytes):
    layer = make(kind, {"coupling": coupling, "stride": 2, "padding": 1}, chunk_bytes=chunk_bytes)
    x, mask = torch.randn(2, 4, 5, *IN, dtype=torch.float64), torch.rand(2, 4, 5, IN[0]) < 0.6
    expected = by_hand(layer, x, mask)
    x[~mask] = torch.nan
    x.requires_grad_()
    v = layer(x, mask=mask)
    assert_close(v, expected)
    v.sum().backward()
    assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
    assert layer.weight.grad.isfinite().all()
    x, broadcast = torch.randn(x.shape, dtype=x.dtype), mask[0, 0]  # [W, C]
    assert_close(layer(x, mask=broadcast), layer(x, mask=broadcast.expand(mask.shape)))


@pytest.mark.parametrize("chunk_bytes", [ALL_AT_ONCE, ROW_BY_ROW, 3000])
@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_gradients(kind, chunk_bytes):
    layer = make(kind, {"stride": 2, "padding": 1, "bias": True}, chunk_bytes=chunk_bytes)
    x = torch.randn(2, 3, 2, *IN, dtype=torch.float64)  # two rows of windows, which overlap
    function, tensors = as_function(layer, x)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(
    ("side", "padding", "expected"),
    [((1, 1), (1, 1), 2 * 2), ((1, 1), (0, 1), 4 * 2), ((2, 1), (1, 1), 4 * 2), ((2, 2), (1, 1), 4 * 4)],
)
def test_phases_without_an_output_are_not_routed(monkeypatch, side, padding, expected):
    routed = []

    def route(*args):
        routed.append(args)
        return _windows.route_windows(*args)

    monkeypatch.setattr(conv_transpose, "route_windows", route)
    layer = make(CapsuleConvTranspose2d, {"kernel_size": 4, "stride": 4, "padding": padding})
    x = torch.randn(3, *side, *IN, dtype=torch.float64)
    assert_close(layer(x), by_hand(layer, x))
    assert len(routed) == expected


def as_function(layer, x):
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    return function, (x.requires_grad_(), *parameters)


def test_the_backward_routes_in_the_dtype_of_autocast(monkeypatch):
    layer, seen = make(CapsuleConv2d, {"bias": True}, chunk_bytes=ROW_BY_ROW, dtype=torch.float32), []
    route = _windows.capsule_linear
    monkeypatch.setattr(
        _windows, "capsule_linear", lambda u, *args, **options: seen.append(u.dtype) or route(u, *args, **options)
    )
    with torch.autocast("cpu", torch.bfloat16):
        v = layer(torch.randn(2, 4, 5, *IN))
    v.float().sum().backward()  # outside
    assert seen == [torch.bfloat16] * 8  # two images of two rows, forward and backward
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


def test_a_backward_inside_of_autocast_is_that_of_the_forward_outside():
    layer = make(CapsuleConv2d, {"bias": True}, chunk_bytes=ROW_BY_ROW, dtype=torch.float32)
    x = torch.randn(2, 4, 5, *IN, requires_grad=True)
    leaves = x, *layer.parameters()
    expected = torch.autograd.grad(layer(x).sum(), leaves)
    v = layer(x).sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(v, leaves)
    assert_close(found, expected, rtol=0, atol=0)


def test_maps_may_have_the_dtype_of_autocast():
    layer = CapsuleConv2d(*IN, *OUT, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4, 5, *IN).bfloat16()).dtype == torch.bfloat16


def test_many_chunks_are_not_summed_in_low_precision():
    layer, x = make(CapsuleConv2d, {"bias": True}), torch.randn(60, 7, 4, *IN, dtype=torch.float64)
    exact = torch.autograd.grad(layer(x).sum(), layer.parameters())
    layer, x = layer.bfloat16(), x.bfloat16()
    errors = []
    for chunk_bytes in (ALL_AT_ONCE, ROW_BY_ROW):  # 1 and 300 chunks
        layer.chunk_bytes = chunk_bytes
        grads = torch.autograd.grad(layer(x).float().sum(), layer.parameters())
        errors.append([(grad - want).abs().max() for grad, want in zip(grads, exact, strict=True)])
    for whole, chunked in zip(*errors, strict=True):
        assert chunked <= 2 * whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [ALL_AT_ONCE, ROW_BY_ROW])
def test_windows_that_overlap_are_not_summed_in_low_precision(chunk_bytes, dtype):
    layer = make(CapsuleConv2d, {"kernel_size": 9, "iterations": 1}, chunk_bytes=chunk_bytes)
    torch.nn.init.uniform_(layer.weight)  # so that nothing cancels
    x = torch.rand(1, 14, 14, *IN).to(dtype).double().requires_grad_()
    cotangent = torch.rand(layer(x).shape).to(dtype)
    exact = torch.autograd.grad(layer(x), x, cotangent.double())[0]
    layer.to(dtype)
    windows = _windows.Windows(layer.kernel_size).unfold(x, x.dtype).flatten(3, 5).to(dtype)
    weight = layer.weight.flatten(0, 2).permute(0, 2, 3, 1)
    v = capsroute.capsule_linear(windows, weight, 1, backend="reference")
    found, reference = (torch.autograd.grad(v, x, cotangent)[0].to(dtype) - exact for v in (layer(x.to(dtype)), v))
    assert found.norm() <= 1.1 * reference.norm()  # summed in float64


@pytest.mark.parametrize("left_out", [None, "x", "weight", "bias"])
def test_only_wanted_gradients(monkeypatch, left_out):
    layer = make(CapsuleConv2d, {"bias": True}, chunk_bytes=ROW_BY_ROW)
    leaves = {"x": torch.randn(2, 4, 4, *IN, dtype=torch.float64), "weight": layer.weight, "bias": layer.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != left_out)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    asked, vjp = [], _autograd.vjp
    monkeypatch.setattr(_autograd, "vjp", lambda f, values, grad: asked.append(len(values)) or vjp(f, values, grad))
    found = torch.autograd.grad(layer(leaves["x"]).sum(), wanted)
    assert asked == [len(wanted)] * 4  # two images of two rows
    layer.chunk_bytes = ALL_AT_ONCE
    assert_close(found, torch.autograd.grad(layer(leaves["x"]).sum(), wanted))


@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_gradients_of_chunks_under_hooks_on_saved_tensors(kind):
    layer = make(kind, {"padding": 1, "bias": True}, chunk_bytes=ROW_BY_ROW)
    function, tensors = as_function(layer, torch.randn(2, 3, 2, *IN, dtype=torch.float64))
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    with torch.autograd.graph.save_on_cpu():
        assert_close(torch.autograd.grad(function(*tensors).square().sum(), tensors), expected)


@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_forward_mode_of_chunks(kind):
    layer = make(kind, {"padding": 1, "coupling": "in"}, chunk_bytes=ROW_BY_ROW)
    x, tangent = torch.randn(2, 2, 3, 2, *IN, dtype=torch.float64)
    found = torch.func.jvp(layer, (x,), (tangent,))
    layer.chunk_bytes = ALL_AT_ONCE
    assert_close(found, torch.func.jvp(layer, (x,), (tangent,)))


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_layer_of_chunks_can_be_saved():
    layer, file = make(CapsuleConv2d, {"padding": 1}, chunk_bytes=ROW_BY_ROW), io.BytesIO()
    x = torch.randn(2, 3, 2, *IN, dtype=torch.float64)
    torch.jit.save(torch.jit.trace(layer, (x,)), file)
    file.seek(0)
    assert_close(torch.jit.load(file)(x), layer(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of unfold's backward under vmap
@pytest.mark.parametrize("chunk_bytes", [ALL_AT_ONCE, ROW_BY_ROW])
def test_gradients_per_sample(chunk_bytes):
    layer = make(CapsuleConv2d, {"padding": 1}, chunk_bytes=chunk_bytes)
    x = torch.randn(3, 3, 4, *IN, dtype=torch.float64)

    def loss(weight, sample):
        return torch.func.functional_call(layer, {"weight": weight}, (sample.unsqueeze(0),)).square().sum()

    gradient = torch.func.grad(loss)
    found = torch.vmap(gradient, (None, 0))(layer.weight.detach(), x)
    assert_close(found, torch.stack([gradient(layer.weight.detach(), sample) for sample in x]))


@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_chunks_change_no_bit_of_the_output(kind):
    x = torch.randn(3, 5, 6, *IN)
    outputs = []
    for chunk_bytes in (ALL_AT_ONCE, ROW_BY_ROW, SOME):
        torch.manual_seed(0)
        outputs.append(make(kind, {"stride": 2}, chunk_bytes=chunk_bytes, dtype=torch.float32)(x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_compiled_and_exported_for_any_batch_that_fits_one_chunk(kind):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    layer = kind(2, 4, 3, 5, 3, 2, 1)
    compiled = torch.compile(layer, backend=count, dynamic=True, fullgraph=True)
    exported = torch.export.export(
        layer, (torch.randn(3, 6, 5, 2, 4),), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},)
    ).module()
    for batch in range(2, 8):
        x = torch.randn(batch, 6, 5, 2, 4)
        assert_close(compiled(x), layer(x))
        assert_close(exported(x), layer(x))
    assert len(graphs) <= 2


@pytest.mark.not_interpreted
@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_compiled_for_several_threads_gradients_are_those_of_eager_code(fused, kind, threads, any_algorithms):
    """Large enough for the compiler to share out: that of torch 2.13 makes a wrong gradient of Tensor.unfold."""
    threads(2)
    layer, x = kind(32, 1, 8, 4, 3, 2, 1, backend=fused), torch.rand(8, 32, 32, 32, 1, requires_grad=True)
    wanted = [x, *layer.parameters()]
    compiled, eager = (torch.autograd.grad(f(x).square().sum(), wanted) for f in (torch.compile(layer), layer))
    assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_phases_of_many_chunks_compile_in_one_graph_of_unknown_sizes():
    layer, x = make(CapsuleConvTranspose2d, {"stride": 2}, chunk_bytes=ROW_BY_ROW), torch.rand(2, 2, 2, *IN).double()
    compiled = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    grads = (torch.autograd.grad(function(x).square().sum(), layer.parameters()) for function in (compiled, layer))
    assert_close(*grads)


def test_empty_batch():
    layer = make(CapsuleConv2d, {"bias": True}, chunk_bytes=ROW_BY_ROW)
    x = torch.zeros(0, 4, 4, *IN, dtype=torch.float64, requires_grad=True)
    v = layer(x)
    assert v.shape == (0, 2, 2, *OUT)
    v.sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


@pytest.mark.not_interpreted
def test_neither_votes_nor_unfolded_inputs_are_stored(fused):
    layer = CapsuleConv2d(16, 8, 16, 8, 3, padding=1, chunk_bytes=2**20, backend=fused)
    x = torch.randn(8, 16, 16, 16, 8, requires_grad=True)
    votes = 8 * 16 * 16 * (9 * 16) * 16 * 8 * 4
    unfolded = 9 * x.nbytes
    assert votes == 16 * unfolded == 144 * 2**20
    one_chunk = CapsuleConv2d(16, 8, 16, 8, 3, padding=1, backend=fused)
    chunked = extra_memory(lambda: torch.autograd.grad(layer(x).sum(), (x, layer.weight)))
    whole = extra_memory(lambda: torch.autograd.grad(one_chunk(x).sum(), (x, one_chunk.weight)))
    assert chunked < unfolded < whole < votes / 4


def test_matrix_capsules_fit():
    """From an image to class capsules through maps: the shapes fit, and a gradient reaches the first weight."""
    primary = PrimaryCapsules(3, 4, 5, 3, 2, padding=1, flatten=False)
    down, up = CapsuleConv2d(4, 5, 3, 6, 3, 2, 1), CapsuleConvTranspose2d(3, 6, 2, 4, 4, 2, 1)
    maps = primary(torch.rand(2, 3, 16, 12))
    assert maps.shape == (2, 8, 6, 4, 5)
    v = up(down(maps))
    assert v.shape == (2, 8, 6, 2, 4)
    v.sum().backward()
    assert primary.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("depth", [6])
def test_stacks_of_one_pass_neither_vanish_nor_saturate(depth):
    layers = [CapsuleConv2d(8, 4, 8, 4, 3, padding=1, iterations=1) for _ in range(depth)]
    x = torch.nn.functional.normalize(torch.randn(2, 8, 8, 8, 4), dim=-1) * 0.5
    for layer in layers:
        x = layer(x)
    inside = x[:, 3:5, 3:5].norm(dim=-1).mean()
    assert 0.3 < inside < 0.97


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_a_leak_counts_as_an_output_of_the_first_weight(kind, iterations):
    weights = []
    for leaky in (False, True):
        torch.manual_seed(0)
        weights.append(kind(8, 3, 2, 4, 3, iterations=iterations, leaky=leaky).weight)
    assert_close(weights[1], 1.5 * weights[0])


def test_a_softmax_over_i_starts_with_longer_votes():
    """The first pass weighs each of the 9 x 8 capsules of a window by 1 / 72, and not by 1 / 2."""
    weights = []
    for coupling in ("out", "in"):
        torch.manual_seed(0)
        weights.append(CapsuleConv2d(8, 3, 2, 4, 3, iterations=1, coupling=coupling).weight)
    assert_close(weights[1], 9 * 8 / 2 * weights[0])


def test_a_bias_starts_at_zero():
    assert not CapsuleConv2d(8, 3, 2, 4, 3, bias=True).bias.any()


def test_a_transposed_layer_starts_by_what_a_position_sees():
    layer = CapsuleConvTranspose2d(8, 3, 2, 4, 4, 2, 1)  # 2 x 2 x 8 capsules on average
    assert layer.weight.std().item() == pytest.approx(2 * 2 / 32**0.5 / 4**0.5, rel=0.1)


@pytest.mark.parametrize("coupling", ["out", "in"])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("types", [4, 16])
def test_a_stack_does_not_start_silent(types, iterations, coupling):
    torch.manual_seed(0)
    x = PrimaryCapsules(1, types, 8, 3, padding=1, flatten=False)(torch.rand(2, 1, 12, 12))
    options = {"padding": 1, "iterations": iterations, "coupling": coupling}
    layers = [CapsuleConv2d(types, 8, types, 8, 3, **options) for _ in range(5)]
    v = torch.nn.Sequential(*layers)(x)
    assert v.norm(dim=-1).median() > 0.5
    (grad,) = torch.autograd.grad((v * torch.randn_like(v)).sum() / v.numel() ** 0.5, layers[0].weight)
    assert grad.norm() > 0.01


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (CapsuleConv2d, {"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        (
            CapsuleConv2d,
            {"stride": (1, 2, 3)},
            TypeError,
            r"stride must be an int or \(height, width\), got \(1, 2, 3\)",
        ),
        (CapsuleConv2d, {"stride": True}, TypeError, "stride must be an int or"),
        (CapsuleConv2d, {"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        (CapsuleConv2d, {"dilation": 1.5}, TypeError, "dilation must be an int or"),
        (CapsuleConv2d, {"iterations": 0}, ValueError, "iterations must be at least 1"),
        (CapsuleConv2d, {"bias": "no"}, TypeError, "bias must be True or False, got 'no'"),
        (CapsuleConv2d, {"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1"),
        (
            CapsuleConvTranspose2d,
            {"stride": 4},
            ValueError,
            r"kernel_size must be at least stride = \(4, 4\), got \(3, 3\)",
        ),
        (
            CapsuleConvTranspose2d,
            {"stride": 9},
            ValueError,
            r"kernel_size must be at least stride = \(9, 9\), got \(3, 3\)",
        ),
        (
            CapsuleConvTranspose2d,
            {"output_padding": 1},
            ValueError,
            r"output_padding must be less than stride = \(1, 1\)",
        ),
    ],
)
def test_wrong_arguments_are_named(kind, options, error, message):
    with pytest.raises(error, match=message):
        make(kind, options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 5, 3, 2), r"x must be \[B, H, W, C, D\] with C = 2 and D = 3, got \[2, 5, 5, 3, 2\]"),
        ((5, 5, 2, 3), r"x must be \[B, H, W, C, D\] with C = 2 and D = 3, got \[5, 5, 2, 3\]"),
        ((2, 5, 2, 2, 3), r"with H and W, padded by \(0, 0\), at least \(3, 3\), got \[2, 5, 2, 2, 3\]"),
    ],
)
def test_wrong_maps_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        make(CapsuleConv2d, {})(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_maps_of_another_dtype_are_named(autocast):
    message = r"x must have the dtype of the weight, torch.float64, got torch.float32"
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(TypeError, match=message):
        make(CapsuleConv2d, {})(torch.zeros(2, 5, 5, *IN))


def test_wrong_masks_are_named():
    layer, x = make(CapsuleConv2d, {}), torch.zeros(2, 5, 5, *IN, dtype=torch.float64)
    with pytest.raises(TypeError, match="mask must be bool"):
        layer(x, mask=torch.ones(2, 5, 5, 2))
    with pytest.raises(ValueError, match=r"mask must broadcast to"):
        layer(x, mask=torch.ones(2, 5, 5, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="x must leave an output"):
        make(CapsuleConvTranspose2d, {"kernel_size": 1, "padding": 3})(x)
    with pytest.raises(ValueError, match="x must leave an output"):
        make(CapsuleConvTranspose2d, {"kernel_size": 1, "padding": (0, 3)})(x)


@pytest.mark.parametrize("kind", [CapsuleConv2d, CapsuleConvTranspose2d])
def test_a_backend_that_is_named_is_asked(kind):
    with pytest.raises(RuntimeError, match='backend="cuda" cannot serve this call: the input capsules are on cpu'):
        kind(2, 3, 4, 5, 3, backend="cuda")(torch.randn(1, 5, 5, 2, 3))


def test_layers_show_themselves():
    shown = repr(CapsuleConv2d(2, 3, 4, 5, 3, 2, 1, bias=True))
    assert shown.startswith(
        "CapsuleConv2d(2, 3, 4, 5, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), "
    )
    assert "iterations=3" in shown
    assert "bias=True" in shown
    assert "output_padding=(1, 1)" in repr(CapsuleConvTranspose2d(2, 3, 4, 5, 3, 2, 1, 1))
