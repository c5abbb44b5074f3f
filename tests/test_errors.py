"""Every wrong argument gets an error that names it, says what was expected and what came."""

import contextlib
import re

import pytest
import torch

import capsroute
from capsroute import functional

# A valid call of each kind: B = 2, I = 5, D = 3, J = 6, O = 4.
VALID = {
    "linear": (capsroute.capsule_linear, {"u": torch.ones(2, 5, 3), "weight": torch.ones(5, 6, 4, 3)}),
    "votes": (capsroute.dynamic_routing, {"votes": torch.ones(2, 5, 6, 4)}),
    "pass": (
        capsroute.routing_pass,
        {"u": torch.ones(2, 5, 3), "weight": torch.ones(5, 6, 4, 3), "query": torch.ones(2, 6, 4)},
    ),
    "votes pass": (capsroute.votes_pass, {"votes": torch.ones(2, 5, 6, 4), "query": torch.ones(2, 6, 4)}),
    "squash": (capsroute.squash, {"s": torch.ones(2, 3)}),
}


def of(dtype):
    return lambda *shape: torch.ones(shape).to(dtype)


ones, ints, halves, doubles = of(torch.float32), of(torch.int64), of(torch.float16), of(torch.float64)
bools, complexes, bytes_, float8 = of(torch.bool), of(torch.complex64), of(torch.uint8), of(torch.float8_e4m3fn)
CAPSULES = "[*, I, D]"
WEIGHTS = "[I, J, O, D], [J, O, D] or [O, D]"
VOTES = "[*, I, J, O]"

# (call, changed arguments, error, what was expected, what came); the changed argument that must be named is the first.
WRONG = [
    ("linear", {"u": [[1.0]]}, TypeError, CAPSULES, "list"),
    ("linear", {"u": ints(2, 5, 3)}, TypeError, "float32, float64, bfloat16 or float16", "int64"),
    ("linear", {"u": complexes(2, 5, 3)}, TypeError, "float32, float64, bfloat16 or float16", "complex64"),
    ("linear", {"u": float8(2, 5, 3)}, TypeError, "float32, float64, bfloat16 or float16", "float8_e4m3fn"),
    ("linear", {"u": ones(2, 5, 3).to_sparse()}, TypeError, "dense", "sparse_coo"),
    ("linear", {"u": ones(3)}, ValueError, CAPSULES, "[3]"),
    ("linear", {"u": ones(2, 5, 0), "weight": ones(5, 6, 4, 0)}, ValueError, "D >= 1", "[2, 5, 0]"),
    ("linear", {"weight": None}, TypeError, WEIGHTS, "NoneType"),
    ("linear", {"weight": ints(5, 6, 4, 3)}, TypeError, "float32, float64, bfloat16 or float16", "int64"),
    ("linear", {"weight": float8(5, 6, 4, 3)}, TypeError, "float32, float64, bfloat16 or float16", "float8"),
    ("linear", {"weight": ones(3)}, ValueError, WEIGHTS, "[3]"),
    ("linear", {"weight": ones(1, 5, 6, 4, 3)}, ValueError, WEIGHTS, "[1, 5, 6, 4, 3]"),
    ("linear", {"weight": ones(5, 6, 4, 2)}, ValueError, "I = 5 and D = 3", "[5, 6, 4, 2]"),
    ("linear", {"weight": ones(1, 6, 4, 3)}, ValueError, "I = 5 and D = 3", "[1, 6, 4, 3]"),
    ("linear", {"weight": ones(6, 4, 2)}, ValueError, "D = 3", "[6, 4, 2]"),
    ("linear", {"weight": ones(4, 2)}, ValueError, "D = 3", "[4, 2]"),
    ("linear", {"weight": ones(5, 0, 4, 3)}, ValueError, "J, O >= 1", "[5, 0, 4, 3]"),
    ("linear", {"weight": ones(5, 6, 0, 3)}, ValueError, "J, O >= 1", "[5, 6, 0, 3]"),
    ("linear", {"weight": ones(0, 4, 3)}, ValueError, "J, O >= 1", "[0, 4, 3]"),
    ("linear", {"weight": ones(0, 3), "bias": ones(6, 0)}, ValueError, "O >= 1", "[0, 3]"),
    ("linear", {"weight": halves(5, 6, 4, 3)}, TypeError, "float32", "float16"),
    ("linear", {"weight": doubles(5, 6, 4, 3)}, TypeError, "float32", "float64"),
    ("linear", {"weight": ones(5, 6, 4, 3).to("meta")}, ValueError, "cpu", "meta"),
    ("linear", {"weight": ones(4, 3)}, ValueError, "[O, D]", "J"),
    ("linear", {"logits": ones(), "weight": ones(4, 3)}, ValueError, "[*, I, J]", "[]"),
    ("linear", {"logits": ones(5, 0), "weight": ones(4, 3)}, ValueError, "J >= 1", "[5, 0]"),
    ("linear", {"bias": ones(0, 4), "weight": ones(4, 3)}, ValueError, "J >= 1", "[0, 4]"),
    ("votes", {"votes": 1.0}, TypeError, VOTES, "float"),
    ("votes", {"votes": ints(2, 5, 6, 4)}, TypeError, "float32, float64, bfloat16 or float16", "int64"),
    ("votes", {"votes": ones(5, 6)}, ValueError, VOTES, "[5, 6]"),
    ("votes", {"votes": ones(2, 5, 0, 4)}, ValueError, "J, O >= 1", "[2, 5, 0, 4]"),
    ("votes", {"votes": ones(2, 5, 6, 0)}, ValueError, "J, O >= 1", "[2, 5, 6, 0]"),
    ("squash", {"s": 3.0}, TypeError, "tensor", "float"),
    ("squash", {"s": ints(2, 3)}, TypeError, "float32, float64, bfloat16 or float16", "int64"),
    ("squash", {"dim": 2}, ValueError, "[2, 3]", "2"),
    ("squash", {"dim": -3}, ValueError, "[2, 3]", "-3"),
    ("squash", {"dim": 1.0}, TypeError, "int", "float"),
    ("squash", {"dim": None}, TypeError, "int", "NoneType"),
    ("squash", {"dim": (0, 1)}, TypeError, "int", "tuple"),
    ("squash", {"dim": True}, TypeError, "int", "bool"),
    ("squash", {"power": 10**400}, ValueError, "finite", "1000"),
    ("squash", {"dim": -1, "s": ones()}, ValueError, "[]", "-1"),
    *((call, *rest) for call in ("linear", "votes") for rest in [
        ({"iterations": 0}, ValueError, "at least 1", "0"),
        ({"iterations": -2}, ValueError, "at least 1", "-2"),
        ({"iterations": 10**20}, ValueError, "less than 2^31", "100000000000000000000"),
        ({"iterations": 2**31}, ValueError, "less than 2^31", "2147483648"),
        ({"iterations": 3.0}, TypeError, "int", "float"),
        ({"iterations": True}, TypeError, "int", "bool"),
        ({"iterations": None}, TypeError, "int", "NoneType"),
        ({"detach_coupling": None}, TypeError, "True or False", "None"),
        ({"bias": [1.0]}, TypeError, "[J, O]", "list"),
        ({"bias": ints(6, 4)}, TypeError, "float32", "int64"),
        ({"bias": doubles(6, 4)}, TypeError, "float32", "float64"),
        ({"bias": ones(4)}, ValueError, "J = 6 and O = 4", "[4]"),
        ({"bias": ones(6, 1)}, ValueError, "J = 6 and O = 4", "[6, 1]"),
        ({"bias": ones(1, 4)}, ValueError, "J = 6 and O = 4", "[1, 4]"),
        ({"bias": ones(6, 4).to("meta")}, ValueError, "cpu", "meta"),
    ]),
    *((call, *rest) for call in ("pass", "votes pass") for rest in [
        ({"query": [1.0]}, TypeError, "[*, J, O]", "list"),
        ({"query": ints(6, 4)}, TypeError, "float32", "int64"),
        ({"query": doubles(6, 4)}, TypeError, "float32", "float64"),
        ({"query": ones(3, 6, 4)}, ValueError, "[*, J, O] = [2, 6, 4]", "[3, 6, 4]"),
        ({"query": ones(5, 4)}, ValueError, "[*, J, O] = [2, 6, 4]", "[5, 4]"),
        ({"query": ones(6, 4).to("meta")}, ValueError, "cpu", "meta"),
        ({"scale": "1"}, TypeError, "float", "str"),
        ({"scale": ones(1)}, TypeError, "multiply the query", "Tensor"),
        ({"scale": float("inf")}, ValueError, "finite", "inf"),
        ({"scale": float("nan")}, ValueError, "finite", "nan"),
        ({"scale": 10**400}, ValueError, "finite", "1000"),
        ({"scale": -(10**400)}, ValueError, "finite", "-1000"),
    ]),
    ("pass", {"query": None, "weight": ones(4, 3)}, ValueError, "[O, D]", "J"),
    ("pass", {"query": ones(4), "weight": ones(4, 3)}, ValueError, "[*, J, O] with J >= 1", "[4]"),
    *((call, *rest) for call in ("linear", "votes", "pass", "votes pass") for rest in [
        ({"logits": 0.0}, TypeError, "[*, I, J]", "float"),
        ({"logits": bools(5, 6)}, TypeError, "float32", "bool"),
        ({"logits": halves(5, 6)}, TypeError, "float32", "float16"),
        ({"logits": ones(5, 4)}, ValueError, "[*, I, J] = [2, 5, 6]", "[5, 4]"),
        ({"logits": ones(3, 5, 6)}, ValueError, "[*, I, J] = [2, 5, 6]", "[3, 5, 6]"),
        ({"logits": ones(1, 2, 5, 6)}, ValueError, "[*, I, J] = [2, 5, 6]", "[1, 2, 5, 6]"),
        ({"logits": ones(5, 6).to("meta")}, ValueError, "cpu", "meta"),
        ({"mask": [True]}, TypeError, "[*, I]", "list"),
        ({"mask": bytes_(2, 5)}, TypeError, "mask.bool()", "uint8"),
        ({"mask": ones(2, 5)}, TypeError, "mask.bool()", "float32"),
        ({"mask": bools(2, 6)}, ValueError, "[*, I] = [2, 5]", "[2, 6]"),
        ({"mask": bools(1, 2, 5)}, ValueError, "[*, I] = [2, 5]", "[1, 2, 5]"),
        ({"mask": bools(2, 5).to("meta")}, ValueError, "cpu", "meta"),
        ({"mask": bools(2, 5).to_sparse()}, TypeError, "dense", "sparse_coo"),
        ({"coupling": "both"}, ValueError, '"out" (softmax over j) or "in" (softmax over i)', "'both'"),
        ({"coupling": None}, ValueError, '"out" (softmax over j) or "in" (softmax over i)', "None"),
        ({"leaky": 1}, TypeError, "True or False", "1"),
        ({"leaky": True, "coupling": "in"}, ValueError, "softmax over j only", 'coupling="in"'),
        ({"return_coupling": "yes"}, TypeError, "True or False", "'yes'"),
        ({"backend": "gpu"}, ValueError, '"auto", "cpu", ', "'gpu'"),
        ({"backend": None}, ValueError, '"auto", "cpu", ', "None"),
        ({"backend": ["cpu"]}, ValueError, '"auto", "cpu", ', "['cpu']"),
    ]),
    *((call, *rest) for call in ("linear", "votes", "squash") for rest in [
        ({"eps": 0.0}, ValueError, "positive", "0.0"),
        ({"eps": -1e-9}, ValueError, "positive", "-1e-09"),
        ({"eps": float("nan")}, ValueError, "positive", "nan"),
        ({"eps": float("inf")}, ValueError, "finite", "inf"),
        ({"eps": 10**400}, ValueError, "finite", "1000"),
        ({"eps": 1e-50}, ValueError, "1.18e-38", "1e-50"),
        ({"eps": "1e-9"}, TypeError, "float", "str"),
        ({"eps": True}, TypeError, "float", "bool"),
    ]),
]  # fmt: skip


def described(value) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def ids(case) -> str:
    call, changes, *_ = case
    return "-".join([call, *(f"{name}={described(value)}" for name, value in changes.items())])


@pytest.mark.parametrize("case", WRONG, ids=ids)
def test_wrong_argument_is_named_with_what_was_expected_and_what_came(case):
    call, changes, error, expected, came = case
    function, arguments = VALID[call]
    function(**arguments)
    with pytest.raises(error) as raised:
        function(**{**arguments, **changes})
    assert raised.type is error
    message = str(raised.value)
    assert re.search(rf"\b{next(iter(changes))}\b", message), message
    assert expected in message
    assert came in message


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize(
    ("call", "name"),
    [*((call, name) for call, (_, valid) in VALID.items() for name in valid), ("linear", "logits"), ("pass", "mask")],
)
def test_nested_tensors_are_refused(call, name, layout):
    function, arguments = VALID[call]
    nested = torch.nested.nested_tensor([ones(5, 3), ones(4, 3)], layout=layout)
    nested = nested > 0 if name == "mask" else nested
    with pytest.raises(TypeError, match=f"{name} must be a dense .* tensor, got a nested tensor of layout {layout}"):
        function(**{**arguments, name: nested})


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
def test_under_autocast_the_dtypes_of_the_caller_are_named(dtypes):
    u, weight = (x.to(dtype) for x, dtype in zip(VALID["linear"][1].values(), dtypes, strict=True))
    message = "weight must have the dtype of u, {}, got {}".format(*dtypes)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        capsroute.capsule_linear(u, weight)


def test_a_query_that_was_remembered_is_no_bias():
    """A bias does not broadcast, whether a query does or not."""
    u, weight, one = ones(2, 5, 3), ones(5, 6, 4, 3), ones(1, 4)
    with contextlib.suppress(ValueError):
        capsroute.routing_pass(u, weight, one)
    with pytest.raises(ValueError, match="bias must be"):
        capsroute.capsule_linear(u, weight, bias=one)


def test_the_smallest_eps_is_fine():
    capsroute.squash(ones(3), eps=torch.finfo(torch.float32).tiny)


def test_integer_eps_and_positional_iterations_are_fine():
    function, arguments = VALID["votes"]
    assert torch.equal(function(*arguments.values(), 2, eps=1), function(**arguments, iterations=2, eps=1.0))


@pytest.mark.parametrize(
    ("call", "name"),
    [("squash", "eps"), ("squash", "power"), ("votes", "eps"), ("pass", "scale"), ("votes pass", "scale")],
)
def test_an_int_beyond_64_bits_is_the_float_that_it_equals(call, name):
    function, arguments = VALID[call]
    backend = {} if call == "squash" else {"backend": "reference"}
    found, expected = (function(**arguments, **backend, **{name: value}) for value in (10**20, 1e20))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ({"iterations": 1}, {"iterations": True}, "int"),
        ({"leaky": False}, {"leaky": 0}, "True or False"),
        ({"eps": 1.0}, {"eps": True}, "float"),
        ({}, {"iterations": [3]}, "int"),  # without a hash
    ],
    ids=str,
)
def test_a_wrong_option_is_not_taken_for_a_right_one_that_equals_it(right, wrong, expected):
    function, arguments = VALID["linear"]
    function(**arguments, **right)
    with pytest.raises(TypeError, match=rf"{next(iter(wrong))} must be .*{expected}"):
        function(**arguments, **wrong)


@pytest.mark.parametrize("name", ["weight", "bias", "mask"])
def test_a_tensor_whose_memory_was_released_is_not_taken_for_none(cpu, name):
    arguments = {"u": torch.randn(2, 6, 4), "weight": torch.randn(6, 3, 8, 4), "bias": torch.randn(3, 8)}
    arguments["mask"] = torch.ones(2, 6, dtype=torch.bool)
    arguments[name].untyped_storage().resize_(0)  # as FSDP does with parameters
    with pytest.raises(RuntimeError, match="a tensor has no memory; its storage was resized to 0"):
        capsroute.capsule_linear(**arguments, backend=cpu)


def test_what_is_remembered_of_arguments_is_bounded():
    for batch in range(functional._MOST_SIZES + 10):
        capsroute.dynamic_routing(torch.ones(1, 1, 1).expand(batch, 1, 1, 1), 1)
    assert 0 < len(functional._sizes) <= functional._MOST_SIZES


def test_what_is_remembered_of_arguments_stays_bounded_when_threads_add_at_once(monkeypatch):
    monkeypatch.setattr(functional, "_sizes", {k: () for k in range(5)})
    monkeypatch.setattr(functional, "_MOST_SIZES", 4)
    capsroute.dynamic_routing(torch.ones(1, 1, 1), 1)
    assert len(functional._sizes) == 1


def test_what_was_saved_must_be_there_however_many_numbers_it_has(cpu):
    none, votes = torch.zeros(0), torch.zeros(()).expand(1, 1, 2**30, 16)
    options = 2**30, False, False, 1e-9, False, False, False, False, False  # R J O is 2^64, which 64 bits take for 0
    with pytest.raises(RuntimeError, match="s and norm must be what the forward saved"):
        torch.ops.capsroute.route_backward(votes[0], none, none, none, votes, None, None, None, None, *options)


def test_sizes_that_would_overflow_are_an_error_also_where_there_is_no_input_capsule():
    u, weight = torch.empty(1, 0, 2**57), torch.zeros(()).expand(1, 1, 2**57)
    with pytest.raises(RuntimeError, match=r"B I D J O must be less than 2\^50"):
        capsroute.capsule_linear(u, weight, backend="cpu")
