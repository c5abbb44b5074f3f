"""accelerate: the same outputs and gradients, the same object, and never by a class's name alone."""

import copy
import functools
import io
import threading

import pytest
import torch
import torch.nn.utils.prune
from foreign import MASKS, rechub, results
from torch import nn
from torch.testing import assert_close
from torch_rechub.basic.layers import CapsuleNetwork

import capsroute
from capsroute import acceleration
from capsroute.acceleration import Recipe, recipes, register


@pytest.fixture(autouse=True)
def no_recipe_is_left_behind(monkeypatch):
    monkeypatch.setattr(recipes, "_recipes", list(recipes._recipes))


# The swap


def test_the_layer_stays_the_object_that_it_was():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = rechub(1)
            self.same = self.layer

    model = Model()
    layer, parameters, keys = model.layer, list(model.parameters()), list(model.state_dict())
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    report = capsroute.accelerate(model, quiet=True)
    assert len(report.entries) == 1  # once, though it has two names
    assert model.layer is model.same is layer
    assert isinstance(layer, CapsuleNetwork)
    assert layer.interest_num == 3
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    layer(torch.randn(3, 9, 8), MASKS["some"])
    assert calls == [1]
    assert "AcceleratedCapsuleNetwork" in repr(model)
    assert capsroute.accelerate(model, quiet=True).entries[0].reason == "already swapped"


def test_copies_and_files_stay_accelerated():
    layer, item_eb = rechub(1), torch.randn(3, 9, 8)
    capsroute.accelerate(layer, quiet=True)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(other) is type(layer)
        assert torch.equal(other(item_eb, MASKS["some"]), layer(item_eb, MASKS["some"]))
        with torch.no_grad():
            other.linear.weight.zero_()
    assert layer.linear.weight.any()


def test_probing_touches_nothing():
    layer = rechub(0)
    layer.linear.weight.grad = torch.ones_like(layer.linear.weight)
    before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    capsroute.accelerate(layer, quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(layer.linear.weight.grad, torch.ones_like(layer.linear.weight))
    assert layer.relu[0].weight.grad is None


def test_probing_seeds_no_other_generator(monkeypatch):
    """torch.manual_seed seeds all devices, those that are not yet in use at their start."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    assert capsroute.accelerate(rechub(0), quiet=True).entries[0].swapped
    assert seeded == []


def test_a_layer_is_probed_without_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        (entry,) = capsroute.accelerate(DenseCapsule(), quiet=True).entries
        assert torch.is_autocast_enabled("cpu")
    assert entry.swapped, entry.reason


@pytest.mark.parametrize("inside", [False, True])
def test_a_layer_is_probed_outside_inference_mode(inside):
    with torch.inference_mode(inside):
        layer = DenseCapsule()
    with torch.inference_mode():
        (entry,) = capsroute.accelerate(layer, quiet=True).entries
        assert torch.is_inference_mode_enabled()
    assert entry.swapped, entry.reason


def test_an_option_that_is_changed_later_is_not_ignored():
    layer = rechub(1)
    capsroute.accelerate(layer, quiet=True)
    layer.stop_grad = False
    with pytest.raises(RuntimeError, match="accelerate swapped this CapsuleNetwork, but now stop_grad is False"):
        layer(torch.randn(3, 9, 8), MASKS["some"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_any_dtype_that_the_layer_itself_can_run(dtype):
    layer = DenseCapsule().to(dtype)
    assert capsroute.accelerate(layer, quiet=True).entries[0].swapped


# Layers as they circulate, in everybody's own file under these names: equations written out anew


def unit(s: torch.Tensor, eps: float = 0) -> torch.Tensor:
    n2 = s.square().sum(-1, keepdim=True)
    return n2 / (1 + n2) * s / (n2 + eps).sqrt()


class CapsuleLayer(nn.Module):
    def __init__(self, prior: bool = False):
        super().__init__()
        self.num_iterations = 3
        self.route_weights = nn.Parameter(torch.randn(4, 6, 3, 5))
        if prior:
            self.route_logits = nn.Parameter(torch.zeros(4, 1, 6, 1, 1))

    def forward(self, x):
        votes = torch.einsum("bid,jido->jbio", x, self.route_weights).unsqueeze(3)
        logits = getattr(self, "route_logits", torch.zeros(1, dtype=x.dtype)).expand(4, len(x), 6, 1, 1)
        for _ in range(self.num_iterations):
            v = unit((logits.softmax(2) * votes).sum(2, keepdim=True))
            logits = logits + (votes * v).sum(-1, keepdim=True)
        return v


def detached_routing(votes: torch.Tensor, passes: int, dtype: torch.dtype) -> torch.Tensor:
    """Of votes [B, J, I, O]: the softmax over j, constants in all passes but the last."""
    logits = torch.zeros(votes.shape[:3], dtype=dtype)
    for k in range(passes):
        own = votes if k == passes - 1 else votes.detach()
        v = unit((logits.softmax(1).unsqueeze(-1) * own).sum(2))
        logits = logits + (own * v.unsqueeze(2)).sum(-1).detach()
    return v


class DenseCapsule(nn.Module):
    def __init__(self, sizes=(4, 6, 5, 3)):  # J, I, O, D
        super().__init__()
        self.routings = 3
        self.weight = nn.Parameter(torch.randn(sizes))

    def forward(self, x):
        return detached_routing(torch.einsum("bid,jiod->bjio", x, self.weight), self.routings, x.dtype)


class RoutingCapsules(nn.Module):
    def __init__(self, sizes=(4, 6, 5, 3)):
        super().__init__()
        self.num_routing = 2
        self.W = nn.Parameter(torch.randn(1, *sizes))

    def forward(self, x):
        return detached_routing((self.W @ x[:, None, :, :, None]).squeeze(-1), self.num_routing, x.dtype)


SNIPPETS = [CapsuleLayer, lambda: CapsuleLayer(prior=True), DenseCapsule, RoutingCapsules]


@pytest.mark.parametrize("make", SNIPPETS)
def test_snippets_under_autocast(make):
    layer, x = make(), torch.randn(3, 6, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)  # float32, as their logits
        capsroute.accelerate(layer, quiet=True)
        assert_close(layer(x), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("make", SNIPPETS)
def test_snippets_are_swapped(make):
    layer, x = make(), torch.randn(3, 6, 3)
    expected = results(layer, x)
    assert capsroute.accelerate(layer, quiet=True).entries[0].swapped
    assert_close(results(layer, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [DenseCapsule, RoutingCapsules])
@pytest.mark.parametrize("sizes", [(7, 9, 2, 4), (32, 8, 8, 4), (1, 4, 4, 4), (21, 16, 4, 4)], ids=str)
def test_no_epsilon_in_squash_is_no_reason(make, sizes, dtype):
    (entry,) = capsroute.accelerate(make(sizes).to(dtype), quiet=True).entries
    assert entry.swapped, entry.reason


# Never by the class's name alone


class OtherAxis(CapsuleLayer):
    def forward(self, x):
        votes = torch.einsum("bid,jido->jbio", x, self.route_weights).unsqueeze(3)
        return unit((torch.zeros_like(votes).softmax(0) * votes).sum(2, keepdim=True))


class OtherGradient(CapsuleLayer):
    def forward(self, x):
        v = super().forward(x)
        return v.detach() + 0 * v if v.requires_grad else v


class OtherDraws(CapsuleLayer):
    def forward(self, x):
        torch.rand(1)
        return super().forward(x)


class OtherShape(CapsuleLayer):
    def forward(self, x):
        return super().forward(x).squeeze()


class TwoOutputs(CapsuleLayer):
    def forward(self, x):
        return super().forward(x), x


class NoGradient(CapsuleLayer):
    def forward(self, x):
        return super().forward(x).detach()


class Broken(CapsuleLayer):
    def forward(self, x):
        return x.cuda_was_here


class OverTheBatch(CapsuleLayer):
    """Logits averaged over the batch, as in higgsfield/Capsule-Network-Tutorial."""

    def forward(self, x):
        votes = torch.einsum("bid,jido->jbio", x, self.route_weights).unsqueeze(3)
        logits = torch.zeros(4, 1, 6, 1, 1)
        for _ in range(self.num_iterations):
            v = unit((logits.softmax(2) * votes).sum(2, keepdim=True))
            logits = logits + (votes * v).sum(-1, keepdim=True).mean(1, keepdim=True)
        return v


class DropsOut(CapsuleLayer):
    """Only in training, which it is not in when it is swapped."""

    def __init__(self):
        super().__init__()
        self.eval()

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class DropsOutBackwards(CapsuleLayer):
    """Only in evaluation, as Monte Carlo dropout may be wired."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, not self.training)


class Counts(CapsuleLayer):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Averages(CapsuleLayer):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5), persistent=False)

    def forward(self, x):
        v = super().forward(x)
        if self.training:
            self.mean.lerp_(v.detach().mean((0, 1, 2, 3)), 0.1)
        return v


class MakesABuffer(CapsuleLayer):
    def forward(self, x):
        self.register_buffer("seen", x.detach())
        return super().forward(x)


REFUSED = {
    DropsOut: "in training mode, it draws different random numbers",
    DropsOutBackwards: "in evaluation mode, it draws different random numbers",
    Counts: "buffer calls: differs",
    Averages: "buffer mean: differs by",
    MakesABuffer: "it makes or drops a buffer",
    OtherAxis: "output 0: differs by",
    OtherGradient: "gradient of argument 0: differs by",
    OtherDraws: "it draws different random numbers",
    OtherShape: r"output 0: torch.float32 \[4, 3, 5\], the fused forward torch.float32 \[4, 3, 1, 1, 5\]",
    TwoOutputs: "it returns a different number of tensors",
    NoGradient: "gradient of argument 0: only the fused forward returns one",
    Broken: "the probe failed with AttributeError: 'Tensor' object has no attribute 'cuda_was_here'",
    OverTheBatch: "output 0: differs by",
}


@pytest.mark.parametrize("impostor", REFUSED, ids=lambda kind: kind.__qualname__)
def test_a_name_alone_is_not_enough(impostor, capsys):
    impostor.__name__ = "CapsuleLayer"
    model = nn.Sequential(nn.Linear(3, 3), impostor())
    report = capsroute.accelerate(model)
    (entry,) = report.entries
    assert (entry.name, entry.layer, entry.swapped) == ("1", "CapsuleLayer", False)
    with pytest.raises(AssertionError, match=f"not swapped: {REFUSED[impostor]}"):
        raise AssertionError(entry.reason)
    assert type(model[1]) is impostor
    assert f"accelerate: 1 (CapsuleLayer): {entry.reason}" in capsys.readouterr().out


def test_gradients_are_compared_also_where_none_are_wanted():
    OtherGradient.__name__ = "CapsuleLayer"
    with torch.no_grad():
        (entry,) = capsroute.accelerate(OtherGradient(), quiet=True).entries
    assert "gradient of argument 0: differs by" in entry.reason


def test_a_frozen_layer_is_swapped():
    (entry,) = capsroute.accelerate(DenseCapsule().requires_grad_(False), quiet=True).entries
    assert entry.swapped, entry.reason


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("buffer", [torch.tensor([True, False]), torch.full((2,), -torch.inf), torch.zeros(0)])
def test_buffers_that_stay_as_they_are_are_in_nobodys_way(buffer, training):
    layer = CapsuleLayer().train(training)
    layer.register_buffer("table", buffer)
    (entry,) = capsroute.accelerate(layer, quiet=True).entries
    assert entry.swapped, entry.reason
    assert layer.training == training


def test_subclasses_are_left_alone():
    class Mine(CapsuleNetwork):
        pass

    (entry,) = capsroute.accelerate(Mine(8, 9), quiet=True).entries
    assert not entry.swapped
    assert "a subclass of CapsuleNetwork" in entry.reason


def test_a_forward_of_the_object_itself_is_left_alone():
    layer = CapsuleNetwork(8, 9)
    layer.forward = layer.forward
    (entry,) = capsroute.accelerate(layer, quiet=True).entries
    assert entry.reason == "not swapped: the instance overrides forward"


def test_a_layer_that_was_parametrized_since_is_still_swapped():
    layer = CapsuleNetwork(8, 9)
    first = capsroute.accelerate(layer, quiet=True)
    name = next(name for name, _ in layer.named_parameters())
    nn.utils.parametrize.register_parametrization(layer, name, nn.Identity())
    again = capsroute.accelerate(layer, quiet=True)
    assert first.entries[0].swapped
    assert again.entries[0] == ("", "CapsuleNetwork", True, "already swapped")


def test_a_layer_is_pruned_after_the_swap():
    layer, u = DenseCapsule(), torch.randn(2, 6, 3)
    capsroute.accelerate(layer, quiet=True)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    fused = layer(u)
    acceleration.restore(layer)
    assert_close(fused, layer(u))


@pytest.mark.parametrize("change", ["prune", "bias", "hook", "wrap", "forward"])
def test_torch_rechubs_linear_must_stay_a_product(change):
    """The fused forward reads its weight, and does not call it."""

    class Wrapped(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = rechub(1)
    capsroute.accelerate(layer, quiet=True)
    if change == "prune":
        torch.nn.utils.prune.l1_unstructured(layer.linear, "weight", 0.5)
    elif change == "bias":
        layer.linear.bias = nn.Parameter(torch.ones(len(layer.linear.weight)))
    elif change == "hook":
        layer.linear.register_forward_hook(lambda *_: None)
    elif change == "forward":
        layer.linear.forward = lambda x: x @ (2 * layer.linear.weight.T)
    else:
        layer.linear.__class__ = Wrapped
    with pytest.raises(
        RuntimeError, match=r"swapped this CapsuleNetwork, but now its linear is not, or not only, a pro"
    ):
        layer(torch.randn(3, 9, 8), MASKS["some"])
    acceleration.restore(layer)
    reason = capsroute.accelerate(layer, quiet=True).entries[0].reason
    assert reason.startswith("not swapped: ")


def test_torch_rechubs_linear_may_be_parametrized():
    layer, item_eb = rechub(1), torch.randn(3, 9, 8)
    capsroute.accelerate(layer, quiet=True)
    torch.nn.utils.parametrizations.weight_norm(layer.linear)
    fused = layer(item_eb, MASKS["some"])
    acceleration.restore(layer)
    assert_close(fused, layer(item_eb, MASKS["some"]))


def test_our_own_layers_need_no_swap():
    model = nn.Sequential(capsroute.nn.classic.CapsuleLayer(4, 6, 3, 5), capsroute.nn.CapsuleLinear(6, 3, 4, 5))
    assert capsroute.accelerate(model, quiet=True).entries == ()


def test_primary_capsules_of_the_snippet_are_left_alone():
    layer = CapsuleLayer()
    del layer.route_weights
    (entry,) = capsroute.accelerate(layer, quiet=True).entries
    assert entry.reason == "not swapped: it has no route_weights: primary capsules, or a layer that is not gram-ai's"


def test_what_cannot_be_served_says_why():
    layer = rechub(1)
    layer.stop_grad = False
    (entry,) = capsroute.accelerate(layer, quiet=True).entries
    assert "not swapped: stop_grad is False" in entry.reason


def test_torch_rechub_without_a_pass_is_left_alone():
    layer = rechub(1)
    layer.routing_times = 0
    assert capsroute.accelerate(layer, quiet=True).entries[0].reason == "not swapped: routing_times is 0"


# Layers that do more than the equations


class Edited(nn.Module):
    """A copy of DenseCapsule as people edit them."""

    eps, device = 0.0, "cpu"

    def __init__(self, inputs=7):
        super().__init__()
        self.routings, self.temperature, self.names, self.scales = 3, 1.0, ["cat"], [1.0]
        self.weight = nn.Parameter(torch.randn(4, inputs, 6, 5))

    def forward(self, inputs):
        votes = torch.einsum("jiod,bid->bjio", self.weight.expand(4, inputs.shape[1], 6, 5), inputs)
        logits = torch.zeros(votes.shape[:3], dtype=inputs.dtype, device=self.device)
        for k in range(self.routings):
            last = k == self.routings - 1
            c = (self.temperature * self.scales[0] * logits).softmax(1)
            v = unit(torch.einsum("bji,bjio->bjo", c, votes if last else votes.detach()), self.eps)
            logits = logits + torch.einsum("bjio,bjo->bji", votes.detach(), v.detach())
        self.see(c)
        return v

    def see(self, coupling):
        pass


class Keeps(Edited):
    def see(self, coupling):
        self.coupling = coupling.detach()


class Writes(Edited):
    def __init__(self):
        super().__init__()
        self.seen = torch.zeros(())

    def see(self, coupling):
        self.seen.add_(1)


class Reads(Writes):
    def see(self, coupling):
        assert self.seen == 0


class Drops(Edited):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, inputs):
        return super().forward(self.drop(inputs))


class Begins(Edited):
    def __init__(self):
        super().__init__()
        self.register_buffer("start", torch.zeros(()))

    def forward(self, inputs):
        return super().forward(inputs + self.start)


class Squeezes(Edited):
    def forward(self, inputs):
        return super().forward(inputs).squeeze()


class OtherEpsilon(Edited):
    eps = 1e-6


class OtherWeightGradient(Edited):
    def __init__(self):
        super().__init__()
        self.weight.requires_grad_(False)

    def forward(self, inputs):
        return super().forward(inputs) + self.weight.sum() - self.weight.sum().detach()


class Masks(Edited):
    def forward(self, inputs, mask=None):
        return super().forward(inputs if mask is None else inputs * mask)


MORE = {
    Keeps: "its forward sets coupling",
    Writes: "its forward sets seen",
    Reads: "its forward reads seen, which the fused one leaves out",
    Drops: "its forward reads drop, which the fused one leaves out",
    Begins: "its forward reads start, which the fused one leaves out",
    Squeezes: "output 0: torch.float32 [4, 6], the fused forward torch.float32 [1, 4, 6]",
    OtherEpsilon: "output 0: differs by ",
    OtherWeightGradient: "gradient of weight: differs by ",
    Masks: "its forward also takes mask",
    functools.partial(Edited, 1): "its weight has one input capsule, and may serve any number of them",
}


@pytest.mark.parametrize(("make", "reason"), MORE.items(), ids=str)
def test_a_layer_that_does_more_is_left_alone(make, reason):
    layer = make()
    register(acceleration.known.GUO._replace(layer=type(layer)))
    (entry,) = capsroute.accelerate(layer, quiet=True).entries
    assert not entry.swapped
    assert entry.reason.startswith(f"not swapped: {reason}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_hides_no_other_definition(dtype):
    class Warmer(Edited):
        def forward(self, inputs):
            self.temperature = 1.01
            v = super().forward(inputs)
            self.temperature = 1.0
            return v

    for layer, reason in (
        (Edited(), "swapped: the same outputs and gradients on a probe"),
        (Warmer(), "not swapped: in float32, output 0: differs by "),
    ):
        register(acceleration.known.GUO._replace(layer=type(layer)))
        (entry,) = capsroute.accelerate(layer.to(dtype), quiet=True).entries
        assert entry.reason.startswith(reason)


@pytest.fixture
def edited():
    layer = Edited()
    register(acceleration.known.GUO._replace(layer=Edited))
    assert capsroute.accelerate(layer, quiet=True).entries[0].swapped
    return layer


def test_what_the_fused_forward_does_not_read_must_stay(edited):
    for layer in (edited, copy.deepcopy(edited)):
        layer.names.append("dog")  # no forward reads it
        layer(torch.randn(2, 7, 5))
        layer.temperature = 5.0
        with pytest.raises(RuntimeError, match=r"swapped this Edited, but now temperature is 5.0, and was 1.0"):
            layer(torch.randn(2, 7, 5))
        layer.temperature, layer.scales[0] = 1.0, 2.0
        with pytest.raises(RuntimeError, match=r"but now scales is \[2.0\], and was \[1.0\]"):
            layer(torch.randn(2, 7, 5))
        layer.scales[0], layer.eps = 1.0, 1e-3  # which was the class's
        with pytest.raises(RuntimeError, match=r"but now eps is 0.001, and was 0.0"):
            layer(torch.randn(2, 7, 5))


def test_a_layer_may_be_moved(edited):
    edited.device = torch.device("cpu")  # as some layers must be told
    edited(torch.randn(2, 7, 5))


def test_an_argument_has_the_name_that_the_layer_gives_it(edited):
    u = torch.randn(2, 7, 5)
    assert torch.equal(edited(inputs=u), edited(u))


def test_a_script_would_undo_the_swap(edited):
    with pytest.raises(RuntimeError, match=r"accelerate swapped this Edited, which torch.jit.script would undo: trace"):
        torch.jit.script(nn.Sequential(edited))


def test_a_swap_can_be_undone(edited):
    u, attributes = torch.randn(2, 7, 5), set(vars(Edited()))
    fused = edited(u)
    acceleration.restore(nn.Sequential(edited, nn.ReLU()))
    assert type(edited) is Edited
    assert set(vars(edited)) == attributes
    edited.temperature = 1.0 + 1e-9
    assert_close(edited(u), fused)


def test_what_cannot_be_probed_yet_says_what_to_do_first():
    pruned, parametrized, locked, inner = DenseCapsule(), DenseCapsule(), DenseCapsule(), rechub(1)
    torch.nn.utils.prune.l1_unstructured(pruned, "weight", 0.5)
    torch.nn.utils.prune.l1_unstructured(inner.linear, "weight", 0.5)
    locked.lock = threading.Lock()
    torch.nn.utils.parametrizations.weight_norm(parametrized)
    for layer, reason in (
        (pruned, "weight is made of other tensors, as torch.nn.utils.prune does; accelerate it before that"),
        (inner, "linear.weight is made of other tensors, as torch.nn.utils.prune does; accelerate it before that"),
        (locked, "it cannot be copied for a probe, with its hooks and attributes: cannot pickle '_thread.lock' object"),
        (parametrized, "it is parametrized; accelerate it before that"),
        (DenseCapsule().to("meta"), "its parameters are on the meta device; accelerate it when they have values"),
    ):
        assert capsroute.accelerate(layer, quiet=True).entries[0].reason == f"not swapped: {reason}"


# Recipes of one's own


class Mean(nn.Module):
    """Uniform coupling, as a user may have written it."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 5, 3))  # [J, O, D]

    def forward(self, u, scale=1.0):
        return scale * torch.einsum("bid,jod->bjo", u, self.matrix) / 6


def fused_mean(self, u, scale=1.0):
    return scale * capsroute.routing_pass(u, self.matrix, None)


def probe(self):
    return (torch.randn(2, 7, 3),)


@pytest.mark.parametrize("layer", [Mean, f"{Mean.__module__}.Mean", "Mean"])
def test_a_user_registers_a_layer(layer):
    assert capsroute.accelerate(Mean(), quiet=True).entries == ()
    register(Recipe(layer, fused_mean, probe))
    mean, u = Mean(), torch.randn(4, 7, 3)
    expected = mean(u, scale=2.0)
    report = capsroute.accelerate(nn.Sequential(mean), quiet=True)
    assert str(report) == "accelerate: 0 (Mean): swapped: the same outputs and gradients on a probe"
    assert_close(mean(u, scale=2.0), expected)
    register(Recipe(layer, lambda self, u: 2 * fused_mean(self, u), probe))  # the last one counts
    assert not capsroute.accelerate(Mean(), quiet=True).entries[0].swapped


WRONG = {
    "nan": (lambda self, u: fused_mean(self, u) * torch.nan, "output 0: differs by nan"),
    "dtype": (
        lambda self, u: fused_mean(self, u).double(),
        r"output 0: torch.float32 \[2, 6, 5\], the fused forward torch.float64",
    ),
    "value": (lambda self, u: 1.001 * fused_mean(self, u), "output 0: differs by"),
    "parameter": (
        lambda self, u: capsroute.routing_pass(u, self.matrix.detach(), None),
        "gradient of matrix: only the layer returns one",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_recipe_swaps_nothing(wrong):
    forward, reason = WRONG[wrong]
    register(Recipe(Mean, forward, probe))
    (entry,) = capsroute.accelerate(Mean(), quiet=True).entries
    with pytest.raises(AssertionError, match=f"not swapped: {reason}"):
        raise AssertionError(entry.reason)


def test_an_output_without_numbers_is_in_nobodys_way():
    class Emptied(Mean):
        def forward(self, u):
            return super().forward(u), u[:0]

    register(Recipe(Emptied, lambda self, u: (fused_mean(self, u), u[:0]), probe))
    (entry,) = capsroute.accelerate(Emptied(), quiet=True).entries
    assert entry.swapped, entry.reason


def test_a_recipe_that_fails_leaves_its_layer_alone():
    def refuses(layer):
        return layer.no_such_attribute

    register(Recipe(Mean, fused_mean, probe, refuses))
    first, second = capsroute.accelerate(nn.Sequential(DenseCapsule(), Mean()), quiet=True).entries
    assert first.swapped
    assert second.reason.startswith("not swapped: the probe failed with AttributeError: 'Mean' object has no attribute")


def test_a_file_needs_its_recipe():
    register(Recipe(Mean, fused_mean, probe))
    mean = Mean()
    capsroute.accelerate(mean, quiet=True)
    recipes._recipes.pop()
    with pytest.raises(RuntimeError, match=r"can only be loaded where capsroute.acceleration knows .*Mean"):
        copy.deepcopy(mean)


def test_wrong_arguments_are_named():
    for function in (capsroute.accelerate, acceleration.restore):
        with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got list"):
            function([])
    with pytest.raises(TypeError, match="recipe must be a Recipe for a subclass of"):
        register(Recipe(int, fused_mean, probe))
    with pytest.raises(TypeError, match=r"recipe.probe must be a function, got None"):
        register(Recipe(Mean, fused_mean, None))


def test_a_probe_is_a_tuple():
    register(Recipe(Mean, fused_mean, lambda layer: probe(layer)[0]))
    (entry,) = capsroute.accelerate(Mean(), quiet=True).entries
    assert entry.reason == "not swapped: its recipe's probe must return a tuple, got Tensor"


def test_a_model_without_capsules_says_so(capsys):
    capsroute.accelerate(nn.Linear(2, 2))
    assert "the model has no known capsule layer" in capsys.readouterr().out
