"""The private ops under torch's own checks and by hand, and the operator in torch.compile and torch.export."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import EVERY, FORMS, Problem, cotangent, random_problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import capsroute
from capsroute import _ops


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


# The private ops


def permuted(x: Tensor | None) -> Tensor | None:
    """The same values, the dimensions in reverse order in memory."""
    dims = [] if x is None else list(reversed(range(x.dim())))
    return x if x is None else x.permute(dims).contiguous().permute(dims)


# the op set of each fused backend
NAMESPACES = {"cpu": "capsroute", "triton": "capsroute_triton", "emulated": "capsroute_emulated"}

CHECKED = [
    ("ijod", "plain"),
    ("ijod", "one pass"),
    ("ijod", "all"),
    ("jod", "logits of the layer"),
    ("jod", "mask"),
    ("od", "mask of the layer"),
    ("votes", "leaky"),
    ("votes", "all"),
    ("ijod", "in, all"),
    ("ijod", "pass, all"),
    ("jod", "pass, in"),
    ("od", "pass"),
    ("votes", "pass, all, in"),
]


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, permuted])
@pytest.mark.parametrize(("form", "options"), CHECKED)
def test_ops_pass_opcheck(fused, form, options, layout):
    problem = random_problem((3, 5, 2, 3, 4), form=form, dtype=torch.float32, **EVERY[options])
    given = {name: x if name in ("weight", "bias") else add_lead(x) for name, x in problem.tensors.items()}
    one_pass = "query" in given
    tensors = [given.get("u", given.get("votes")), given.get("weight")]
    tensors += [given["query"].expand(3, -1, -1) if one_pass else given.get("bias"), given.get("logits")]
    mask = None if problem.mask is None else torch.atleast_2d(problem.mask)
    arguments = [None if x is None else layout(x) for x in (*tensors, mask)]
    problem.run(fused)  # defines the ops, where a backend is loaded at its first call
    options = problem.options.get("coupling") == "in", problem.options.get("leaky", False)
    scalars = options if one_pass else (problem.options.get("iterations", 3), *options, 1e-9)
    ops = getattr(torch.ops, NAMESPACES[fused])
    forward, backward = (ops.routing_pass, ops.routing_pass_backward) if one_pass else (ops.route, ops.route_backward)
    saves = [(False,), (True,)] if one_pass else [(0, 0), (scalars[0], 0), (1, 0)]
    for save, return_coupling in zip(saves, (True, False, True), strict=False):
        torch.library.opcheck(forward.default, (*arguments, *scalars, *save, return_coupling))
    if not one_pass:  # what there is room for is not all written, so values cannot be compared
        with_room = (*arguments, *scalars, scalars[0], 1000, False)
        torch.library.opcheck(forward.default, with_room, test_utils=("test_schema", "test_faketensor"))
    leaves = [None if x is None else x.detach().requires_grad_() for x in arguments[:4]]
    torch.library.opcheck(forward.default, (*leaves, arguments[4], *scalars, *saves[1], False))
    v, *saved, _ = forward(*arguments, *scalars, *saves[1], False)
    saved = [v, *saved] if one_pass else [saved[0], saved[1], saved[3]]
    every = tuple(x is not None for x in tensors)
    per_sample = (True, *every[:3], every[3] and len(tensors[3]) == 3)
    for wanted in ((False, *every), (False, every[0], False, every[2], False), per_sample):
        torch.library.opcheck(backward.default, (layout(cotangent(v)), *saved, *arguments, *scalars, *wanted))


def test_the_librarys_schemas_are_those_of_the_file():
    """Where there is a library it defines them, without Python: from the file, when it was built."""
    assert len(_ops.SCHEMAS) == 4
    for name, schema in _ops.SCHEMAS.items():
        assert str(torch._C.parse_schema(f"capsroute::{schema}")) == str(
            getattr(torch.ops.capsroute, name).default._schema
        )


def add_lead(x: Tensor) -> Tensor:
    return x if x.dim() > 2 else x[None]


# compile and export


def layer(u: Tensor, weight: Tensor, backend: str, **options) -> Tensor:
    return capsroute.capsule_linear(u, weight, backend=backend, **options)


@pytest.mark.parametrize(
    ("form", "options"),
    [("ijod", "plain"), ("ijod", "in, all"), ("jod", "pass, all"), *((form, "all") for form in FORMS)],
)
def test_compile_is_one_graph_and_does_not_recompile_for_another_batch(fused, form, options):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(tensors, mask, options):
        return Problem(tensors, mask, options).run(fused)

    graphs = set()
    for batch in (2, 4, 7):
        problem = random_problem((batch, 9, 3, 6, 5), form=form, dtype=torch.float32, **EVERY[options])
        leaves = problem.map(lambda x: x.requires_grad_()).tensors
        v = compiled(leaves, problem.mask, problem.options)
        graphs.add(counter.frame_count)
        found = torch.autograd.grad(v, leaves.values(), cotangent(v))
        expected = problem.gradients(fused)
        assert_close(v, expected["v"])
        for name, grad in zip(leaves, found, strict=True):
            assert_close(grad, expected[name])
    assert len(graphs) == 1


GIVEN = {
    "mask": {"mask": "BI"},
    "mask of the layer": {"mask": "I", "logits": "IJ"},
    "logits": {"logits": "BIJ", "mask": "BI"},
    "logits of all": {"logits": "1IJ", "mask": "1I"},
    "query": {"query": "BJO", "mask": "BI"},
}


@pytest.mark.parametrize("weight", [torch.clone, torch.nn.Parameter], ids=["tensor", "parameter"])  # of known size
@pytest.mark.parametrize("lead", [None, (), (1,)], ids=["dynamic", "from data", "from data, two"])
@pytest.mark.parametrize("given", GIVEN)
def test_compile_broadcasts_what_has_unknown_sizes(fused, given, lead, weight):
    problem = random_problem((6, 5, 2, 3, 4), **GIVEN[given])
    tensors = problem.tensors | {"weight": weight(problem.tensors["weight"])}
    few = torch.tensor([True, False, True, True, False, True])

    def run(tensors, mask, few):
        def some(x):
            return x if lead is None or x.shape[0] != 6 else x[few].reshape(-1, *lead, *x.shape[1:])

        mask = None if mask is None else some(mask)
        return Problem({name: some(x) for name, x in tensors.items()}, mask).run(fused)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
        assert_close(compiled(tensors, problem.mask, few), run(tensors, problem.mask, few))


def test_compile_with_the_coupling_and_without_gradients(fused):
    u, weight = torch.randn(4, 9, 3), torch.randn(9, 3, 5, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for x, y in zip(
        compiled(u, weight, fused, return_coupling=True), layer(u, weight, fused, return_coupling=True), strict=True
    ):
        assert_close(x, y)


@pytest.mark.filterwarnings("error::UserWarning")
def test_compile_warns_of_nothing(fused):
    """Nor of the caches of a plain call, which dynamo traces past."""
    u, weight = torch.randn(2, 3, 4), torch.randn(3, 5, 6, 4, requires_grad=True)
    torch.compile(layer, backend="aot_eager", fullgraph=True)(u, weight, fused)


def test_compile_by_inductor(fused):
    u, weight = torch.randn(4, 9, 3, requires_grad=True), torch.randn(9, 3, 5, 3, requires_grad=True)

    def step(u, weight):
        return layer(u * 2, weight, fused).norm(dim=-1)

    found, expected = (
        torch.autograd.grad(call(u, weight).sum(), (u, weight)) for call in (torch.compile(step, fullgraph=True), step)
    )
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize(("form", "options"), [("ijod", "all"), ("votes", "all"), ("jod", "pass, all, in")])
def test_func_grad_inside_compile(fused, form, options):
    """dynamo says of what torch.func differentiates that it needs no gradient; it gets one all the same."""
    function, leaves = random_problem(form=form, **EVERY[options]).as_function(fused)
    tensors = tuple(x.detach() for x in leaves)
    gradients = torch.func.grad(lambda *x: function(*x).square().sum(), tuple(range(len(tensors))))
    assert_close(torch.compile(gradients, backend="aot_eager", fullgraph=True)(*tensors), gradients(*tensors))


@pytest.mark.parametrize("options", [{}, {"query": "BJO"}], ids=str)
def test_compiled_autograd_of_a_plain_forward(fused, options):
    function, leaves = random_problem(**options).as_function(fused)
    expected = torch.autograd.grad(square(function(*leaves)), leaves)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda loss: loss.backward(), backend="aot_eager")(square(function(*leaves)))
    for x, grad in zip(leaves, expected, strict=True):
        assert_close(x.grad, grad)


COMPILED = """
import torch, capsroute
from torch._dynamo.utils import counters
weight = torch.ones(3, 2, 5, 4, requires_grad=True)
torch.compile(capsroute.capsule_linear)(torch.ones(2, 3, 4), weight, backend="cpu").sum().backward()
print(sorted(name for name in counters["aot_autograd"] if name in ("autograd_cache_hit", "autograd_cache_miss")))
"""


def test_nothing_runs_that_was_compiled_by_another_version(cpu, tmp_path):
    """torch keeps compiled code on disk by the names of its ops, with the schemas that they had."""
    package = tmp_path / "another" / "capsroute"
    shutil.copytree(Path(capsroute.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with (package / "schemas.txt").open("a") as schemas:
        schemas.write("# another\n")
    found = []
    for path in (Path(capsroute.__file__).parents[1], package.parent, package.parent):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(path)}
        run = subprocess.run([sys.executable, "-c", COMPILED], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.strip())
    assert found == ["['autograd_cache_miss']", "['autograd_cache_miss']", "['autograd_cache_hit']"]


# Transformations of f in its first argument, compiled


def square(x: Tensor) -> Tensor:
    return x.square().sum()


def of_first(f, rest):
    return lambda x: f(2 * x, *(2 * y for y in rest))  # after other ops, as in a network


def mapped(f, x, *rest):
    return torch.func.vmap(of_first(f, rest))(torch.stack([x, -x]))


def differentiated(f, x, *rest):
    return torch.func.grad(lambda x: square(f(x, *rest)))(x)


def tangents(f, x, *rest):
    return torch.func.jvp(of_first(f, rest), (x,), (torch.ones_like(x),))[1]


TRANSFORMED = {
    "vmap": mapped,
    "vmap of vmap": lambda f, *x: mapped(lambda *x: mapped(f, *x), *x),
    "grad": lambda f, *x: differentiated(lambda *x: of_first(f, x[1:])(x[0]), *x),
    "penalty": lambda f, *x: square(differentiated(f, *x)) + square(f(*x)),
    "grad of vmap": lambda f, *x: differentiated(lambda *x: mapped(f, *x), *x),
    "vmap of grad": lambda f, *x: mapped(lambda *x: differentiated(f, *x), *x),
    "grad of grad": lambda f, *x: differentiated(lambda *x: differentiated(f, *x), *x),
}
LEAST = {"iterations": 2}, {"query": "BJO"}
KINDS = [(form, options) for form in ("ijod", "votes") for options in LEAST]


@pytest.mark.parametrize(
    ("change", "form", "options"),
    [*((change, "ijod", LEAST[0]) for change in TRANSFORMED), *(("penalty", *kind) for kind in KINDS[1:])],
    ids=str,
)
def test_no_derivative_is_lost(fused, change, form, options):
    """Neither within compiled code nor of what it gives, whether anything outside wants a gradient or not."""
    problem = random_problem((2, 3, 2, 3, 4), form=form, logits="BIJ", **options)
    (function, leaves), (expected, _) = problem.as_function(fused), problem.as_function("reference")
    change, backend = TRANSFORMED[change], "aot_eager" if change == "penalty" else "eager"
    compiled = torch.compile(change, backend=backend, fullgraph=True)
    found, right = compiled(function, *leaves), change(expected, *leaves)
    assert_close(found, right)
    grads = (torch.autograd.grad(square(y), leaves, allow_unused=True, materialize_grads=True) for y in (found, right))
    for x, y in zip(*grads, strict=True):
        assert_close(x, y)
    assert_close(compiled(function, *(x.detach() for x in leaves)), right)
    with torch.no_grad():
        assert_close(compiled(function, *leaves), right)


@pytest.mark.parametrize("options", LEAST, ids=str)
def test_second_derivatives_of_compiled_code(fused, options):
    problem = random_problem((2, 3, 2, 3, 4), logits="BIJ", **options)
    (function, leaves), (expected, _) = problem.as_function(fused), problem.as_function("reference")

    def penalty(function):
        grads = torch.autograd.grad(square(function(*leaves)), leaves, create_graph=True)
        return torch.autograd.grad(sum(map(square, grads)), leaves)

    found = penalty(torch.compile(function, backend="eager", fullgraph=True))  # aot_autograd has none
    for x, y in zip(found, penalty(expected), strict=True):
        assert_close(x, y)


def test_forward_mode_is_the_references(fused):
    functions, leaves = zip(*(random_problem().as_function(x) for x in (fused, "auto", "reference")), strict=True)
    tensors = [x.detach() for x in leaves[0]]
    function, auto, reference = functions
    right = tangents(reference, *tensors)
    for call in (tangents, torch.compile(tangents, backend="eager", fullgraph=True)):
        assert_close(call(auto, *tensors), right)
        with pytest.raises(RuntimeError, match=rf'backend="{fused}" cannot serve this call: it has no forward-mode'):
            call(function, *tensors)


def test_forward_mode_around_compiled_code():
    """It is compiled anew where forward mode is on, or refused, and loses no tangent."""
    function, leaves = random_problem((2, 3, 2, 3, 4)).as_function("auto")
    u, *rest = (x.detach() for x in leaves)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    compiled(u, *rest)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(u, torch.ones_like(u))
        try:
            found = torch.autograd.forward_ad.unpack_dual(compiled(dual, *rest)).tangent
        except torch._dynamo.exc.Unsupported as error:
            if "dual tensor input" not in str(error):
                raise
            return  # torch 2.15 compiles nothing for inputs with tangents, so that none is lost
    reference = random_problem((2, 3, 2, 3, 4)).as_function("reference")[0]
    assert_close(found, torch.func.jvp(lambda u: reference(u, *rest), (u,), (torch.ones_like(u),))[1])


class Layer(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(9, 3, 5, 4))
        self.backend = backend

    def forward(self, u):
        return layer(u, self.weight, self.backend)


def test_export_with_dynamic_batch(fused):
    module = Layer(fused)
    exported = torch.export.export(
        module, (torch.randn(4, 9, 4),), dynamic_shapes={"u": {0: torch.export.Dim("batch", min=2)}}
    )
    u = torch.randn(6, 9, 4, requires_grad=True)
    program = exported.module()
    assert_close(program(u), module(u))
    leaves = (u, program.weight), (u, module.weight)  # it can be trained further
    found, expected = (torch.autograd.grad(square(f(u)), x) for f, x in zip((program, module), leaves, strict=True))
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("name", ["bias", "logits"])
def test_export_of_any_layer(fused, name):
    class Routing(torch.nn.Module):
        def forward(self, u, weight, given):
            return layer(u, weight, fused, **{name: given})

    def arguments(B, I, D, J, O):
        return torch.randn(B, I, D), torch.randn(I, J, O, D), torch.randn(*{"bias": (J, O), "logits": (I, J)}[name])

    given = arguments(3, 5, 4, 6, 2)
    any_size = tuple({dim: torch.export.Dim.DYNAMIC for dim in range(x.dim())} for x in given)
    exported = torch.export.export(Routing(), given, dynamic_shapes=any_size, strict=True).module()
    others = arguments(2, 7, 3, 5, 4)
    assert_close(exported(*others), Routing()(*others))


def test_iterations_may_be_symbolic():
    class Routing(torch.nn.Module):
        def forward(self, u, weight, iterations):
            return capsroute.capsule_linear(u, weight, iterations)

    u, weight = torch.randn(3, 5, 4), torch.randn(5, 3, 2, 4)
    shapes = (None, None, torch.export.Dim.AUTO)
    exported = torch.export.export(Routing(), (u, weight, 2), dynamic_shapes=shapes, strict=False).module()
    assert_close(exported(u, weight, 2), capsroute.capsule_linear(u, weight, 2))


# The ops by hand


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("form", ["ijod", "votes"])
def test_ops_have_derivatives_of_their_own(fused, form, iterations):
    problem = random_problem((2, 3, 2, 3, 4), form=form, logits="BIJ", iterations=iterations)
    function, leaves = problem.as_function(fused)
    function(*leaves)  # defines the ops, where a backend is loaded at its first call
    op = getattr(torch.ops, NAMESPACES[fused]).route
    given = [leaves[0], None if form == "votes" else leaves[1], None, leaves[-1], None]

    def grads(save):
        v = op(*given, iterations, False, False, 1e-9, save, 0, False)[0]
        return torch.autograd.grad(square(v), leaves)

    for x, y in zip(grads(iterations), torch.autograd.grad(square(function(*leaves)), leaves), strict=True):
        assert_close(x, y)
    with pytest.raises(RuntimeError, match="route has no gradient with save=0"):
        grads(0)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given[0], given[0])
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            op(dual, *given[1:], iterations, False, False, 1e-9, 0, 0, False)
