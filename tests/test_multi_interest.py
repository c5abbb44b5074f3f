"""MultiInterest against the equations of the libraries that it replaces, and what histories do to it."""

import copy
import io
import math
import re
from pathlib import Path

import pytest
import recommenders
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import capsroute
from capsroute.nn import LabelAwareAttention, MultiInterest, active_interests, to_layout

BATCH, CLICKS, FEATURES, INTERESTS, OUT = 5, 9, 4, 3, 6
LENGTHS = torch.tensor([9, 1, 0, 4, 8])
REAL = torch.arange(CLICKS) < LENGTHS.unsqueeze(-1)  # [B, I]
SHARED = ("pairs", "inputs", None)


def layer(**options) -> MultiInterest:
    return MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, dtype=torch.float64, **options)


def histories() -> torch.Tensor:
    return torch.randn(BATCH, CLICKS, FEATURES, dtype=torch.float64, requires_grad=True)


def votes(u, module):
    """h [B, I, J, O], from the weight in the order in which the module keeps it."""
    equation = {"pairs": "bid,od->bio", "inputs": "bid,jod->bijo", None: "bid,idjo->bijo"}[module.shared]
    h = torch.einsum(equation, u, module.weight)
    return h if h.dim() == 4 else h.unsqueeze(2).expand(-1, -1, INTERESTS, -1)


def assert_same(module, u, v, expected):
    """The same interests, and the same gradients of u and of all parameters."""
    assert_close(v, expected, rtol=1e-7, atol=1e-9)
    g = torch.randn_like(v)
    leaves = [u, *module.parameters()]
    grads = torch.autograd.grad(v, leaves, g, retain_graph=True)
    assert_close(grads, torch.autograd.grad(expected, leaves, g), rtol=1e-6, atol=1e-8)


# The libraries


@pytest.mark.parametrize("shared", SHARED)
def test_comirec(shared):
    module = layer(shared=shared, prior="random" if shared == "pairs" else "zero", detach_coupling=True)
    u = histories()
    b = (
        torch.zeros(BATCH, CLICKS, INTERESTS, dtype=torch.float64)
        if module.logits is None
        else module.logits.expand(BATCH, -1, -1)
    )
    assert_same(module, u, module(u, lengths=LENGTHS), recommenders.comirec(votes(u, module), REAL, b))


@pytest.mark.parametrize("shared", SHARED)
def test_torch_rechub_with_padding_of_zeros(shared):
    module = layer(shared=shared, prior="random" if shared == "pairs" else "zero", coupling="in", detach_coupling=True)
    padded = histories()
    u = torch.where(REAL.unsqueeze(-1), padded, 0)
    b = (
        torch.zeros(BATCH, CLICKS, INTERESTS, dtype=torch.float64)
        if module.logits is None
        else module.logits.expand(BATCH, -1, -1)
    )
    assert_same(module, padded, module(u), recommenders.torch_rechub(votes(u, module), REAL, b))


@pytest.mark.parametrize(("scale", "power"), [(20.0, 1.0), (3.0, 0.5), (3.0, 2.0)])
def test_easyrec(scale, power):
    module = layer(cosine_scale=scale, squash_power=power, adaptive=True, detach_coupling=True, eps=1e-16)
    u, logits = histories(), torch.randn(BATCH, CLICKS, INTERESTS, dtype=torch.float64)
    expected = recommenders.easyrec(votes(u, module), REAL, logits, active_interests(LENGTHS, INTERESTS), scale, power)
    assert_same(module, u, module(u, lengths=LENGTHS, logits=logits), expected)


def test_the_paper_with_a_power(backend):
    """Li et al. 2019, 3.3.2, all of it differentiated, with squash to the power of 0.5 in every pass."""
    module = layer(prior="learned", squash_power=0.5, backend=backend)
    u = histories()
    h, b = votes(u, module), module.logits.expand(BATCH, -1, -1)
    for _ in range(3):
        s = recommenders.weighted_sum(torch.softmax(b, 2) * REAL.unsqueeze(-1), h)
        n2 = s.square().sum(-1, keepdim=True) + 1e-300
        v = (n2 / (1 + n2)).sqrt() / (n2 + 1e-9).sqrt() * s
        b = b + recommenders.agreement(h, v)
    assert_same(module, u, module(u, lengths=LENGTHS), v)


@pytest.mark.parametrize("options", [{}, {"squash_power": 0.5}, {"cosine_scale": 2.0}], ids=str)
def test_a_detached_coupling_of_one_pass_gives_the_prior_no_gradient(options):
    module = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, 1, detach_coupling=True, **options)
    logits = torch.randn(CLICKS, INTERESTS, requires_grad=True)
    v = module(torch.randn(BATCH, CLICKS, FEATURES), logits=logits)
    assert torch.autograd.grad(v.sum(), [module.weight, logits], allow_unused=True)[1] is None


@pytest.mark.parametrize("options", [{}, {"squash_power": 0.5}, {"cosine_scale": 2.0}, {"adaptive": True}], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (CLICKS, 1), (BATCH, 1, 1)], ids=str)
def test_prior_logits_broadcast_over_the_interests(options, shape):
    module = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, **options)
    u, logits = torch.randn(BATCH, CLICKS, FEATURES), torch.randn(shape)
    expected = module(u, logits=logits.expand(BATCH, CLICKS, INTERESTS))
    torch.testing.assert_close(module(u, logits=logits), expected)


def test_prior_logits_under_autocast():
    module = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT)
    with torch.autocast("cpu", torch.bfloat16):
        v = module(torch.randn(BATCH, CLICKS, FEATURES), logits=torch.randn(CLICKS, INTERESTS).bfloat16())
    assert v.dtype == torch.bfloat16


def test_cosines_are_not_rounded_under_autocast():
    module = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, cosine_scale=5.0)
    u, logits = torch.randn(BATCH, CLICKS, FEATURES), torch.randn(CLICKS, INTERESTS)
    expected = copy.deepcopy(module).bfloat16()(u.bfloat16(), logits=logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(u, logits=logits), expected)


def test_a_detached_coupling_is_as_exact_as_any_in_bfloat16():
    options = {"squash_power": 0.5}
    modules = [MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, detach_coupling=d, **options) for d in (False, True)]
    modules[1].load_state_dict(modules[0].state_dict())
    u = 3 * torch.randn(50, CLICKS, FEATURES).bfloat16()
    couplings = [module.bfloat16()(u, return_coupling=True)[1] for module in modules]
    assert_close(*couplings, rtol=2**-7, atol=0)  # a unit in the last place; a logarithm in bfloat16 is off by 2 %


def test_a_power_and_detached_coupling():
    module = layer(shared="inputs", prior="zero", squash_power=1.5, detach_coupling=True)
    u = histories()
    h, b = votes(u, module), torch.zeros(BATCH, CLICKS, INTERESTS, dtype=torch.float64)
    for _ in range(3):
        s = recommenders.weighted_sum((torch.softmax(b, 2) * REAL.unsqueeze(-1)).detach(), h)
        n2 = s.square().sum(-1, keepdim=True)
        v = (n2 / (1 + n2)) ** 1.5 / (n2 + 1e-9).sqrt() * s
        b = b + recommenders.agreement(h, v).detach()
    assert_same(module, u, module(u, lengths=LENGTHS), v)


def test_a_power_takes_the_eps():
    module = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, 1, squash_power=0.5, eps=1.0)
    u = torch.randn(BATCH, CLICKS, FEATURES)
    s = capsroute.routing_pass(u, module.weight, None, logits=module.logits)
    assert_close(module(u), capsroute.squash(s, eps=1.0, power=0.5))


# Prior logits


def test_evaluation_gives_the_same_every_time():
    module, u = layer(), histories()
    generator = torch.Generator().manual_seed(3)
    module.eval()
    before = generator.get_state(), torch.random.get_rng_state()
    first, second = module(u), module(u, generator=generator)
    assert torch.equal(first, second)
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_a_checkpoint_holds_the_random_prior():
    module, other, u = layer(), layer(), histories()
    assert not torch.equal(module(u), other(u))
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(u), other(u))
    assert torch.equal(module(u), copy.deepcopy(module)(u))


def test_training_draws_from_the_users_generator_alone():
    module, u = layer(prior_std=0.5), histories()
    state = torch.random.get_rng_state()
    drawn = module(u, generator=torch.Generator().manual_seed(3))
    again = module(u, generator=torch.Generator().manual_seed(3))
    logits = 0.5 * torch.randn(
        BATCH, CLICKS, INTERESTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(drawn, again)
    assert_close(drawn, module(u, logits=logits))
    assert torch.equal(module(u), module(u))  # and none is drawn where there is no generator
    assert not torch.equal(drawn, module(u))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_checkpoint_of_activations_with_logits_that_were_drawn_outside():
    """A second run of the call would draw others."""
    module, u = layer(prior_std=0.5), histories()
    wanted = [u, module.weight]
    expected = torch.autograd.grad(module(u, generator=torch.Generator().manual_seed(3)).sum(), wanted)
    logits = module.draw_logits(u, torch.Generator().manual_seed(3))
    v = checkpoint(lambda u: module(u, logits=logits), u, use_reentrant=False)
    assert_close(torch.autograd.grad(v.sum(), wanted), expected, rtol=0, atol=0)


def test_drawing_under_vmap_and_compile():
    module, u = layer(), histories().detach()

    def drawn(u):
        return module(u, generator=torch.Generator().manual_seed(3))

    assert torch.vmap(drawn, randomness="different")(u).shape == (BATCH, INTERESTS, OUT)
    logits = module.draw_logits(u)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(u, logits=logits), module(u, logits=logits))
    torch.compiler.reset()


@pytest.mark.parametrize("prior", ["random", "learned"])
def test_parameters_come_from_a_generator(prior):
    one, two = layer(prior=prior), layer(prior=prior)
    for module in (one, two):
        module.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.logits, two.logits)


@pytest.mark.parametrize("prior", ["random", "learned"])
def test_the_prior_is_as_wide_as_asked_for(prior):
    logits = []
    for prior_std in (1.0, 0.5):
        torch.manual_seed(0)
        logits.append(layer(prior=prior, prior_std=prior_std).logits)
    assert_close(logits[1], 0.5 * logits[0])


def test_weights_start_by_what_the_softmax_is_over():
    """The first pass weighs a click by 1 / 2, or by 1 / 9; the votes are no longer than the clicks."""
    weights = []
    for coupling in ("out", "in"):
        torch.manual_seed(0)
        weights.append(MultiInterest(CLICKS, FEATURES, 2, OUT, coupling=coupling).weight)
    assert_close(weights[0], 2 / 3 * weights[1])


@pytest.mark.parametrize("prior", ["learned", "zero"])
def test_only_a_random_prior_is_drawn_anew(prior):
    module, u = layer(prior=prior, shared="inputs"), histories()
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    assert torch.equal(module(u, generator=generator), module(u))
    assert torch.equal(generator.get_state(), state)


def test_logits_are_drawn_in_the_dtype_of_the_weight():
    module = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT)
    assert module.draw_logits(torch.zeros(2, CLICKS, FEATURES).bfloat16()).dtype == torch.float32


def test_learned_logits_learn():
    module, u = layer(prior="learned"), histories()
    module(u, lengths=LENGTHS)[0, 0, 0].backward()
    assert module.logits.grad.abs().sum() > 0
    assert set(dict(module.named_parameters())) == {"weight", "logits"}
    assert set(dict(layer().named_parameters())) == {"weight"}


# Histories


def test_an_empty_history_has_no_interests_and_no_gradient(backend):
    for options in ({}, {"coupling": "in"}, {"cosine_scale": 5.0}, {"adaptive": True}):
        module, u = layer(backend=backend, **options), histories()
        v = module(u, lengths=LENGTHS)
        v.square().sum().backward()
        assert torch.equal(v[2], torch.zeros(INTERESTS, OUT, dtype=torch.float64))
        assert torch.equal(u.grad[2], torch.zeros(CLICKS, FEATURES, dtype=torch.float64))
        assert v.isfinite().all()
        assert u.grad.isfinite().all()
        assert module.weight.grad.isfinite().all()


@pytest.mark.parametrize("options", [{}, {"coupling": "in"}, {"cosine_scale": 5.0}, {"adaptive": True}])
@pytest.mark.parametrize("detach", [False, True])
def test_what_padding_holds_reaches_nothing(options, detach):
    module, u = layer(detach_coupling=detach, **options), histories()
    dirty = torch.where(REAL.unsqueeze(-1), u.detach(), torch.nan).requires_grad_()
    clean = module(u, lengths=LENGTHS)
    v = module(dirty, lengths=LENGTHS)
    assert torch.equal(v, clean)
    assert torch.equal(v, module(dirty, mask=REAL))
    grads = torch.autograd.grad(v.square().sum(), [dirty, module.weight])
    expected = torch.autograd.grad(clean.square().sum(), [u, module.weight])
    assert_close(grads, expected)
    assert not grads[0][~REAL].any()


@pytest.mark.parametrize("shared", SHARED)
def test_a_short_batch_is_a_padded_one(shared):
    module, u = layer(shared=shared), histories()
    short = module(u[:, :4], lengths=LENGTHS.clamp_max(4))
    assert_close(short, module(u, lengths=LENGTHS.clamp_max(4)))


def test_more_clicks_than_there_are_count_as_all():
    module, u = layer(adaptive=True), histories()
    assert torch.equal(module(u, lengths=LENGTHS + CLICKS), module(u))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_lengths_of_any_integers(dtype):
    module, u = layer(adaptive=True), histories()
    assert torch.equal(module(u, lengths=LENGTHS.to(dtype)), module(u, lengths=LENGTHS))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_interests_of_a_longer_history_than_was_given(shape):
    """As many as active_interests says: who attends to them must not weigh interests that are 0."""
    module = MultiInterest(50, 4, 8, 6, adaptive=True)
    lengths = torch.full(shape, 300)
    used = module(torch.randn(*shape, 20, 4), lengths=lengths).ne(0).any(-1)
    assert torch.equal(used, active_interests(lengths, 8))
    assert used.all()


def test_a_history_without_a_length_is_as_long_as_it_is():
    module, u = layer(adaptive=True), histories()
    assert torch.equal(module(u[:, :2]), module(u[:, :2], lengths=torch.full((BATCH,), 2)))
    assert module(u[:, :2]).ne(0).any(-1).sum(-1).tolist() == [1] * BATCH


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_any_leading_dimensions(lead):
    module = layer(adaptive=True)
    u = torch.randn(*lead, CLICKS, FEATURES, dtype=torch.float64)
    lengths = torch.full(lead, 5)
    v, c = module(u, lengths=lengths, return_coupling=True)
    assert v.shape == (*lead, INTERESTS, OUT)
    assert c.shape == (*lead, CLICKS, INTERESTS)
    one = module(u.reshape(-1, CLICKS, FEATURES)[-1:], lengths=lengths.reshape(-1)[-1:])
    assert_close(v.reshape(-1, INTERESTS, OUT)[-1:], one)


@pytest.mark.parametrize("most", [1, 2, 4, 70])
def test_interests_by_length(most):
    lengths = [-3, 0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 2**20, 2**40 - 1, 2**40]
    active = active_interests(torch.tensor(lengths), most)
    assert active.sum(-1).tolist() == [recommenders.interests(n, most) for n in lengths]
    assert torch.equal(active, active.sort(-1, descending=True).values)  # the first ones


@pytest.mark.parametrize(
    "options", [{}, {"shared": "inputs", "prior": "zero"}, {"prior": "learned"}, {"coupling": "in"}]
)
@pytest.mark.parametrize("given", ["lengths", "mask", "logits"])
def test_short_histories_have_fewer_interests(options, given):
    module, u = layer(adaptive=True, **options), histories()
    arguments = {"mask": REAL} if given == "mask" else {"lengths": LENGTHS}
    if given == "logits":
        arguments["logits"] = torch.randn(CLICKS, INTERESTS, dtype=torch.float64)
    v = module(u, **arguments)
    used = v.ne(0).any(-1)
    expected = active_interests(LENGTHS, INTERESTS) & LENGTHS.ne(0).unsqueeze(-1)
    assert torch.equal(used, expected)
    if options.get("coupling") != "in":  # a user with one interest: all clicks go there
        weight = module.weight.unsqueeze(0) if module.shared == "pairs" else module.weight[:1]  # [1, O, D]
        one = capsroute.capsule_linear(u[1:2], weight, mask=REAL[1:2])
        assert_close(v[1:2, :1], one)


# As a module


@pytest.mark.parametrize(
    "options",
    [
        {"prior": "learned"},
        {"shared": None, "prior": "zero"},
        {"prior": "learned", "cosine_scale": 3.0, "squash_power": 0.5},
        {"prior": "learned", "coupling": "in"},
    ],
)
def test_gradients(options):
    module = MultiInterest(4, 2, 2, 3, dtype=torch.float64, **options)
    names, parameters = zip(*module.named_parameters(), strict=True)
    lengths = torch.tensor([4, 2, 0])

    def run(u, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (u,), {"lengths": lengths})

    u = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (u, *parameters))


def test_second_derivatives_of_cosines_with_padding():
    module = MultiInterest(4, 2, 2, 3, cosine_scale=2.0, dtype=torch.float64)
    u, lengths = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True), torch.tensor([4, 2, 0])

    def run(u, weight):
        return torch.func.functional_call(module, {"weight": weight}, (u,), {"lengths": lengths})

    assert torch.autograd.gradgradcheck(run, (u, module.weight))


@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-14, 1e-9])
def test_cosines_of_short_items_have_finite_gradients(length):
    module, u = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, cosine_scale=5.0), histories().float().detach()
    u[:, 0] *= length
    v = module(u.requires_grad_())
    grads = torch.autograd.grad(v.square().sum(), [u, module.weight])
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("options", [{"cosine_scale": 20.0}, {"squash_power": 0.5}], ids=str)
def test_an_exported_file_is_read(options):
    module = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, detach_coupling=True, **options)
    u, file = torch.randn(BATCH, CLICKS, FEATURES), io.BytesIO()
    torch.export.save(torch.export.export(module, (u,), {"lengths": LENGTHS}), file)
    file.seek(0)
    assert_close(torch.export.load(file).module()(u, lengths=LENGTHS), module(u, lengths=LENGTHS))


@pytest.mark.parametrize("shared", SHARED)
def test_one_exported_program_takes_histories_of_any_length(shared):
    module, clicks = layer(shared=shared), torch.export.Dim("clicks", min=2, max=CLICKS)
    u = histories().detach()
    program = torch.export.export(module, (u[:, 1:].contiguous(),), dynamic_shapes=({1: clicks},)).module()
    for length in (2, CLICKS - 1, CLICKS):
        assert torch.equal(program(u[:, :length]), module(u[:, :length]))


@pytest.mark.parametrize("shared", SHARED)
def test_weights_come_in_by_their_layout(shared):
    module = layer(shared=shared, prior="random")
    assert module.logical_weight().data_ptr() == module.weight.data_ptr()
    layout = {"pairs": "[1, D, O]", "inputs": "[J*O, D]", None: "[1, I, J*O, D]"}[shared]
    weight = torch.randn_like(module.logical_weight())
    module.set_weight(to_layout(weight, layout), layout)
    assert torch.equal(module.logical_weight(), weight)
    u, logits = histories(), torch.randn(CLICKS, INTERESTS, dtype=torch.float64)
    assert_close(module(u, logits=logits), capsroute.capsule_linear(u, weight, logits=logits))
    with pytest.raises(ValueError, match=r"weight must be \[.*\], got \[7\]"):
        module.set_weight(torch.zeros(7))


def test_a_weight_that_is_made_anew_is_not_set():
    module = torch.nn.utils.parametrizations.weight_norm(layer(), "weight")
    with pytest.raises(RuntimeError, match="weight must be a parameter, but a parametrization makes it anew"):
        module.set_weight(torch.zeros(OUT, FEATURES))


@pytest.mark.parametrize(("options", "batches"), [({}, (5, 4)), ({"cosine_scale": 5.0}, (5,))])
def test_compile_in_one_graph(options, batches):
    module = layer(adaptive=True, **options)
    compiled = torch.compile(module, fullgraph=True, dynamic=len(batches) > 1, backend="aot_eager")
    for batch in batches:
        u, lengths = histories()[:batch], LENGTHS[:batch]
        assert_close(compiled(u, lengths=lengths), module(u, lengths=lengths))
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    module, u = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, adaptive=True), histories().float()
    exact = module(u, lengths=LENGTHS)
    v = copy.deepcopy(module).to(dtype)(u.to(dtype), lengths=LENGTHS)
    assert v.dtype == dtype
    assert_close(v.float(), exact, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype):
        assert module(u, lengths=LENGTHS).dtype == dtype


@pytest.mark.parametrize("options", [{"adaptive": True}, {"detach_coupling": True}])
def test_cosines_of_nothing_in_float16(options):
    """A vote of zeros, masked or not, has no direction; what F.normalize adds to its length is 0 in float16."""
    module = MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, cosine_scale=5.0, **options)
    u = histories().float().detach()
    u[:, 0] = 0
    for half in (False, True):
        own = copy.deepcopy(module).half() if half else module
        with torch.autocast("cpu", torch.float16, enabled=not half):
            v = own(u.half() if half else u, lengths=LENGTHS)
        v.float().square().sum().backward()
        assert v.isfinite().all()
        assert own.weight.grad.isfinite().all()
        assert own.weight.grad.any()


def test_repr():
    assert repr(MultiInterest(50, 64, 4, 32, adaptive=True)) == (
        "MultiInterest(length=50, in_features=64, interests=4, out_features=32, iterations=3, shared='pairs', "
        "prior='random', prior_std=1.0, adaptive=True, coupling='out', cosine_scale=None, squash_power=1.0, "
        "detach_coupling=False, eps=1e-09, backend='auto')"
    )
    assert repr(LabelAwareAttention(math.inf)) == "LabelAwareAttention(power=inf)"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior": "learned", "detach_coupling": True}, ValueError, "so they would never train"),
        ({"prior": "zero"}, ValueError, "else all interests are the same"),
        ({"prior": "none"}, ValueError, 'prior must be "random", "learned" or "zero", got \'none\''),
        ({"shared": "outputs"}, ValueError, 'shared must be None, "inputs" or "pairs", got \'outputs\''),
        ({"cosine_scale": 20.0, "shared": "inputs"}, ValueError, 'shared must be "pairs" with cosine_scale'),
        ({"cosine_scale": 0.0}, ValueError, "cosine_scale must be a positive finite number, got 0.0"),
        ({"squash_power": "2"}, TypeError, "squash_power must be a float, got str"),
        ({"prior_std": -1.0}, ValueError, "prior_std must be a positive finite number, got -1.0"),
        ({"prior_std": 10**400}, ValueError, "prior_std must be a positive finite number, got 1000"),
        ({"adaptive": 1}, TypeError, "adaptive must be True or False, got 1"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, **options)


@pytest.mark.parametrize(
    ("shape", "arguments", "error", "message"),
    [
        (
            (BATCH, CLICKS + 1, FEATURES),
            {},
            ValueError,
            r"u must be \[\*, I, D\] with I <= length = 9 and D = 4, got \[5, 10, 4\]",
        ),
        ((BATCH, CLICKS, FEATURES + 1), {}, ValueError, r"and D = 4, got \[5, 9, 5\]"),
        (
            (BATCH, CLICKS, FEATURES),
            {"lengths": LENGTHS, "mask": REAL},
            ValueError,
            "mask must be None where lengths is given",
        ),
        ((BATCH, CLICKS, FEATURES), {"lengths": LENGTHS[:2]}, ValueError, r"lengths must be \[\*\] = \[5\], got \[2\]"),
        ((BATCH, CLICKS, FEATURES), {"lengths": LENGTHS.double()}, TypeError, "lengths must be int64"),
        (
            (BATCH, CLICKS, FEATURES),
            {"lengths": LENGTHS.to(torch.uint16)},
            TypeError,
            r"lengths must be int64, int32, int16, int8 or uint8 \[\*\], got torch.uint16",
        ),
        (
            (BATCH, CLICKS, FEATURES),
            {"lengths": LENGTHS.to("meta")},
            ValueError,
            "lengths must be on the device of the input capsules, .*, got meta",
        ),
        ((BATCH, CLICKS, FEATURES), {"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ((BATCH, CLICKS, FEATURES), {"lengths": [9] * 5}, TypeError, "lengths must be a tensor of integers"),
        ((BATCH, CLICKS, FEATURES), {"mask": REAL.long()}, TypeError, r"pass mask.bool\(\)"),
        ((BATCH, CLICKS, FEATURES), {"mask": REAL[:, 1:]}, ValueError, r"mask must broadcast to \[\*, I\]"),
        ((BATCH, CLICKS, FEATURES), {"logits": torch.zeros(CLICKS, INTERESTS + 1)}, ValueError, "logits must"),
        (
            (BATCH, CLICKS, FEATURES),
            {"logits": torch.zeros(CLICKS, INTERESTS, device="meta")},
            ValueError,
            "logits must be on the device",
        ),
        (
            (BATCH, CLICKS, FEATURES),
            {"logits": torch.zeros(BATCH + 1, CLICKS, INTERESTS)},
            ValueError,
            "logits must broadcast",
        ),
        (
            (BATCH, CLICKS, FEATURES),
            {"logits": torch.zeros(BATCH + 1, CLICKS, INTERESTS), "lengths": LENGTHS},
            ValueError,
            r"logits must broadcast to \[\*, I, J\]",
        ),
    ],
)
def test_wrong_arguments_are_refused(shape, arguments, error, message):
    with pytest.raises(error, match=message):
        MultiInterest(CLICKS, FEATURES, INTERESTS, OUT, adaptive=True)(torch.randn(shape), **arguments)


def test_drawing_refuses_wrong_arguments():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int"):
        layer().draw_logits(histories(), 3)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int"):
        layer().eval()(histories(), generator=3)
    with pytest.raises(ValueError, match=r"u must be \[\*, I, D\] with I <= length = 9 and D = 4, got \[2, 10, 4\]"):
        layer().draw_logits(torch.randn(2, CLICKS + 1, FEATURES))


def test_the_page_serves_no_interest_that_a_history_does_not_have():
    page = (Path(__file__).parent.parent / "docs" / "multi_interest.md").read_text()
    names = {}
    exec(re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1], names)
    for scores, interests, length in zip(names["scores"], names["interests"], names["lengths"], strict=True):
        own = interests[active_interests(length, 4)]
        assert_close(scores, (own @ names["items"].weight.T).amax(0))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_one_traced_graph_takes_histories_of_any_length(name):
    module, u = layer(shared=None, backend=name).eval(), histories().detach()
    traced = torch.jit.trace(module, u)
    for length in (1, 2, CLICKS):
        assert_close(traced(u[:, :length]), module(u[:, :length]))


def test_a_program_keeps_no_generator():
    with pytest.raises(ValueError, match="generator must be None in an exported program, which would keep it"):
        torch.export.export(layer().train(), (histories().detach(),), {"generator": torch.Generator()})


def test_a_mask_that_broadcasts_counts_every_click():
    module, u = layer(adaptive=True), histories()
    assert torch.equal(module(u, mask=torch.ones(BATCH, 1, dtype=torch.bool)), module(u))


@pytest.mark.parametrize("options", [{}, {"squash_power": 0.5}, {"cosine_scale": 2.0}])
def test_a_backend_that_is_named_is_asked(options):
    module, u = layer(backend="cuda", **options), histories()
    with pytest.raises(RuntimeError, match='backend="cuda" cannot serve this call: the input capsules are on cpu'):
        module(u)
