"""Find known layers, check by probes that the fused forward computes the same, and swap it in."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves

from .. import _autocast
from . import attributes
from .recipes import Recipe, find

# The seeds of the probes: of a batch; of one of its samples alone, which a layer may squeeze away; of inputs so small
# that the largest output is about LITTLE, where an epsilon in squash weighs most.
PROBES = BATCH, ALONE, SMALL = range(3)
LITTLE = 1e-3
# A part of the largest expected value: what another order of summation may change, or no epsilon in squash instead of
# our 1e-9, and less than an epsilon of 1e-6 does or any other definition. In low precision, where others are within
# it, outputs must agree, and all in float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LOW = torch.float16, torch.bfloat16
GRADIENT = "gradient of "


class Entry(NamedTuple):
    """What was done with one layer: its name in the model, its class, whether it was swapped, and why or why not."""

    name: str
    layer: str
    swapped: bool
    reason: str


class Probe(NamedTuple):
    """In which mode, whether in float32 though the layer is in low precision, of which seed, and if it is in that."""

    training: bool
    wide: bool
    seed: int
    low: bool


class Report(NamedTuple):
    """What :func:`accelerate` did, layer by layer; printed as a list."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        if not self.entries:
            return "accelerate: the model has no known capsule layer; capsroute.acceleration.register adds one"
        lines = (f"{e.name or '(the model)'} ({e.layer}): {e.reason}" for e in self.entries)
        return "\n".join(f"accelerate: {line}" for line in lines)


def accelerate(module: nn.Module, *, quiet: bool = False) -> Report:
    """Swap the known capsule layers of a model, in place, for fused ones that share their parameters.

    A layer is swapped only when, with random parameters and inputs, in training and in evaluation, in its own dtype
    and, if that is of low precision, in float32, the fused forward gives the same outputs, the same gradients of every
    parameter and input, and leaves the buffers and the random generator in the same state; and when the layer's own
    forward takes no more arguments, sets no attributes, and reads no buffers or modules that the fused one leaves out.
    The layer stays the same object, an instance of its class, with its parameters, hooks, attributes and ``state_dict``
    keys; only its forward changes. An attribute, the class's too, that its own forward reads and the fused one does not
    must keep its value: a forward after a change raises RuntimeError. Subclasses of known layers are left alone.

    Args:
        module: the model; itself a known layer, or with such layers anywhere inside.
        quiet: do not print the report.

    Returns:
        What was swapped, what was not, and why.

    Raises:
        TypeError: if ``module`` is not a :class:`torch.nn.Module`.
    """
    _check_module(module)
    entries = []
    for name, layer in module.named_modules():
        original = type(layer)
        if issubclass(original, _Accelerated):
            entries.append(Entry(name, _swapped_class(original).__name__, True, "already swapped"))
        elif recipe := find(original):
            own = "forward" in vars(layer)
            reason, fixed = ("the instance overrides forward", {}) if own else _probed(layer, recipe)
            if reason is None:
                layer.__class__ = _accelerated(original, recipe)
                layer._accelerated_with = fixed
            shown = f"not swapped: {reason}" if reason else "swapped: the same outputs and gradients on a probe"
            entries.append(Entry(name, original.__name__, reason is None, shown))
        else:
            parent = next((base for base in original.__mro__[1:] if issubclass(base, nn.Module) and find(base)), None)
            if parent:
                reason = f"not swapped: a subclass of {parent.__name__} may compute something else; register it"
                if is_parametrized(layer):
                    reason = "not swapped: it is parametrized; accelerate it before that"
                entries.append(Entry(name, original.__name__, False, reason))
    report = Report(tuple(entries))
    if not quiet:
        print(report)
    return report


def restore(module: nn.Module) -> None:
    """Give the layers of a model that :func:`capsroute.accelerate` swapped their own forward back, in place.

    Args:
        module: the model.

    Raises:
        TypeError: if ``module`` is not a :class:`torch.nn.Module`.
    """
    _check_module(module)
    for layer in module.modules():
        if isinstance(layer, _Accelerated):
            layer.__class__ = _swapped_class(type(layer))
            del layer._accelerated_with


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")


class _Accelerated:
    """Marks a class whose forward is a recipe's; pickled as the class that it was made from."""

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _restore, (_swapped_class(type(self)),), *state

    def __prepare_scriptable__(self):
        name = _swapped_class(type(self)).__name__
        raise RuntimeError(f"accelerate swapped this {name}, which torch.jit.script would undo: trace or restore() it")


def _swapped_class(accelerated: type[nn.Module]) -> type[nn.Module]:
    """The class whose forward was swapped; a parametrization may have made a subclass since."""
    return next(base for base in accelerated.__mro__ if _Accelerated in base.__bases__).__bases__[1]


def _restore(original: type[nn.Module]) -> nn.Module:
    recipe = find(original)
    if recipe is None:
        raise RuntimeError(
            f"an accelerated {original.__name__} can only be loaded where capsroute.acceleration knows {original}: "
            "register its recipe first"
        )
    made = _accelerated(original, recipe)
    return made.__new__(made)


@functools.cache
def _accelerated(original: type[nn.Module], recipe: Recipe) -> type[nn.Module]:
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    names = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        reason = recipe.refuses(self)  # an option was changed since the swap, or what the recipe knows nothing of
        for name, value in self._accelerated_with.items():
            if getattr(self, name) != value:
                reason = f"{name} is {getattr(self, name)!r}, and was {value!r}"
        if reason:
            raise RuntimeError(f"accelerate swapped this {original.__name__}, but now {reason}")
        for name in names[len(args) :]:  # which the recipe may call otherwise
            if name not in kwargs:
                break
            args += (kwargs.pop(name),)
        return recipe.forward(self, *args, **kwargs)

    body = {"forward": forward, "__doc__": original.__doc__, "__module__": original.__module__}
    return type(f"Accelerated{original.__name__}", (_Accelerated, original), body)


def _probed(layer: nn.Module, recipe: Recipe) -> tuple[str | None, dict[str, Any]]:
    """Why the layer is not swapped, or None; and its attributes that must stay, as its own forward alone reads them."""
    read: set[str] = set()
    known: set[str] = set()
    reason = _unready(layer) or _objection(layer, recipe, read, known) or _takes_more(layer, recipe)
    if reason:
        return reason, {}
    unseen, values = attributes.fixed(layer, read - known)
    return (f"its forward reads {unseen}, which the fused one leaves out" if unseen else None), values


def _unready(layer: nn.Module) -> str | None:
    """Why the layer cannot be probed, or None."""
    if any(x.is_meta for x in layer.parameters()):
        return "its parameters are on the meta device; accelerate it when they have values"
    for path, part in layer.named_modules():
        made = [name for name, x in vars(part).items() if isinstance(x, Tensor) and not x.is_leaf]
        if made:
            name = f"{path}.{made[0]}".lstrip(".")
            return f"{name} is made of other tensors, as torch.nn.utils.prune does; accelerate it before that"
    try:
        copy.deepcopy(layer)
    except Exception as error:  # of whatever it, or a hook on it, holds
        return f"it cannot be copied for a probe, with its hooks and attributes: {error}"
    return None


def _takes_more(layer: nn.Module, recipe: Recipe) -> str | None:
    own, known = (inspect.signature(forward).parameters for forward in (type(layer).forward, recipe.forward))
    more = list(own)[len(known) :]
    takes_any = any(x.kind is x.VAR_POSITIONAL for x in known.values())
    return f"its forward also takes {', '.join(more)}" if more and not takes_any else None


def _objection(layer: nn.Module, recipe: Recipe, read: set[str], known: set[str]) -> str | None:
    """Why the recipe refuses the layer, or where the two differ on probes, or None.

    The names that the layer's own forward reads of it are added to `read`, those that the recipe reads to `known`.
    """
    tensors = *layer.parameters(), *layer.buffers()
    devices = sorted({x.device.index for x in tensors if x.is_cuda})
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),  # which enable_grad does not leave
        torch.enable_grad(),
        contextlib.ExitStack() as without_autocast,
    ):
        for x in (torch.empty(0, device="cpu"), *tensors):  # whose rounding would differ by more than is allowed
            without_autocast.enter_context(_autocast.off(x))
        try:
            if reason := recipe.refuses(layer):
                return reason
            for probe in _probes(layer):
                if reason := _compared(layer, recipe, probe, read, known, devices):
                    return reason
        except Exception as error:  # whatever a foreign layer does on its probe, the model must live on
            return f"the probe failed with {type(error).__name__}: {error}"
    return None


def _probes(layer: nn.Module) -> list[Probe]:
    low = any(x.dtype in LOW for x in layer.parameters())
    modes = layer.training, not layer.training
    return [Probe(*each, low) for each in itertools.product(modes, (False, True) if low else (False,), PROBES)]


def _compared(
    layer: nn.Module, recipe: Recipe, probe: Probe, read: set[str], known: set[str], devices: list[int]
) -> str | None:
    """Where the two differ in one probe, or None; and the names that they read, as above."""
    training, wide, seed, low = probe
    rough = low and not wide
    _seed(seed, devices)
    probed = _drawn(layer, wide).train(training)
    arguments = recipe.probe(probed)
    if not isinstance(arguments, tuple):
        return f"its recipe's probe must return a tuple, got {type(arguments).__name__}"
    if seed == ALONE and recipe.batched:
        arguments = tuple(x[:1] for x in arguments)
    if seed == SMALL and not rough:
        arguments = _smaller(probed, arguments)
    expected, found = (  # of copies, since buffers may change
        _run(forward, attributes.watched(copy.deepcopy(probed), names), arguments, seed, devices)
        for forward, names in ((type(layer).forward, read), (recipe.forward, known))
    )
    # Near s = 0 an epsilon changes outputs within a bound, and gradients without one; those of low precision are noise.
    if seed == SMALL or rough:
        expected, found = ({k: x for k, x in run.items() if not k.startswith(GRADIENT)} for run in (expected, found))
    recipe.refuses(attributes.watched(probed, known))
    if reason := _difference(found, expected):
        mode = "" if training == layer.training else f"in {'training' if training else 'evaluation'} mode, "
        return f"{mode}{'in float32, ' if wide else ''}{reason}"
    return None


def _drawn(layer: nn.Module, wide: bool) -> nn.Module:
    """A copy with random parameters, as they may be 0 or not yet set, and frozen may be trained later."""
    drawn = copy.deepcopy(layer)
    drawn = drawn.float() if wide else drawn
    for parameter in filter(_is_float, drawn.parameters()):
        parameter.requires_grad_()
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() else 1.0)
    return drawn


def _smaller(layer: nn.Module, arguments: tuple) -> tuple:
    """The arguments, scaled until the largest output is about LITTLE, if outputs become small with them at all."""
    scaled = arguments
    for _ in range(16):
        with torch.no_grad():
            outputs = tree_leaves(type(layer).forward(copy.deepcopy(layer), *scaled))
        largest = max((x.abs().max().item() for x in outputs if _is_float(x) and x.numel()), default=0.0)
        if LITTLE / 4 <= largest <= LITTLE:
            return scaled
        if not largest > 0:
            break
        scale = (LITTLE / 2 / largest) ** 0.5  # squash makes n2 of n = |s|
        scaled = tuple(x * scale if _is_float(x) else x for x in scaled)
    return arguments


def _seed(seed: int, devices: list[int]) -> None:
    """Those generators alone that are put back: torch.manual_seed seeds all, CUDA's even before they are there."""
    for generator in (torch.default_generator, *(torch.cuda.default_generators[k] for k in devices)):
        generator.manual_seed(seed)


def _run(forward, layer: nn.Module, arguments: tuple, seed: int, devices: list[int]) -> dict[str, Any]:
    """The state of the generators, the attributes and the buffers after one run, outputs, and gradients by name."""
    _seed(seed, devices)
    inputs = [x.detach().requires_grad_() if _is_float(x) else x for x in arguments]
    before = attributes.state(layer)
    outputs = [x for x in tree_leaves(forward(layer, *inputs)) if isinstance(x, Tensor)]
    states = torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)])
    wanted = {f"argument {k}": x for k, x in enumerate(inputs) if _is_float(x)}
    wanted |= {name: x for name, x in layer.named_parameters() if x.requires_grad}
    differentiable = [x for x in outputs if x.requires_grad]
    grads = [None] * len(wanted)
    if differentiable and wanted:
        # not randn_like, which would give the same numbers to other places of an output with other strides
        cotangents = [torch.randn(x.shape, dtype=x.dtype, device=x.device) for x in differentiable]
        grads = torch.autograd.grad(differentiable, list(wanted.values()), cotangents, allow_unused=True)
    results = {"generators": states, "attributes": attributes.changed(before, attributes.state(layer))}
    results |= {f"output {k}": x.detach() for k, x in enumerate(outputs)}
    results |= {f"buffer {name}": x.detach() for name, x in layer.named_buffers()}
    return results | {f"{GRADIENT}{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    if odd := found.keys() ^ expected.keys():
        is_buffer = any(name.startswith("buffer") for name in odd)
        return "it makes or drops a buffer" if is_buffer else "it returns a different number of tensors"
    for name, want in expected.items():
        have = found[name]
        if want is None or have is None:
            if want is not have:
                return f"{name}: only {'the fused forward' if want is None else 'the layer'} returns one"
        elif name == "attributes":
            if have != want:
                return f"its forward sets {', '.join(want or have)}"
        elif name == "generators":
            if not torch.equal(have, want):
                return "it draws different random numbers"
        elif have.shape != want.shape or have.dtype != want.dtype:
            return f"{name}: {want.dtype} {list(want.shape)}, the fused forward {have.dtype} {list(have.shape)}"
        elif not torch.equal(have, want):
            if not want.is_floating_point():
                return f"{name}: differs"
            allowed = TOLERANCE.get(want.dtype, 0.0) * want.abs().max().item()
            error = (have - want).abs().max().item()
            if not error <= allowed:
                return f"{name}: differs by {error:.2g}, allowed {allowed:.2g}"
    return None


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
