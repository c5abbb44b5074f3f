"""Argument checks: every wrong argument is named, with what was expected in letters and what came."""

from __future__ import annotations

import functools
import math
import operator
import sys

import torch
from torch import Tensor

from .reference import Options

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COUPLINGS = ("out", "in")
WEIGHTS = {4: "[I, J, O, D]", 3: "[J, O, D]", 2: "[O, D]"}  # by the number of dimensions


def check_tensor(name: str, value: object, letters: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {letters}, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    _check_layout(name, value)


def _check_layout(name: str, value: Tensor) -> None:
    # dynamo cannot trace `layout` in a backward, where a recomputed forward comes through here
    if not torch.compiler.is_compiling() and (value.is_nested or value.layout != torch.strided):
        nested = "a nested tensor of " if value.is_nested else ""
        raise TypeError(f"{name} must be a dense (strided) tensor, got {nested}layout {value.layout}")


def check_int(name: str, value: int, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {_kind(value)}{_hint(name, value, int)}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _kind(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def _hint(name: str, value: object, wanted: type) -> str:
    """What makes an int or a float of another library's number."""
    if isinstance(value, (int, float, str)) or getattr(value, "shape", ()) != ():
        return ""
    try:
        operator.index(value) if wanted is int else float(value)
    except (TypeError, ValueError):
        return ""
    return f": {wanted.__name__}({name}) is one"


def check_sizes(**sizes: int) -> None:
    """Every argument, given by its name, is an int of at least 1."""
    for name, size in sizes.items():
        check_int(name, size, least=1)


def check_number(name: str, value: float) -> float:
    """The number as a float: torch takes no int above 64 bits. One beyond all floats is infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {_kind(value)}{_hint(name, value, float)}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return math.inf if value > 0 else -math.inf
    return float(value)


def check_amount(name: str, value: float) -> float:
    amount = check_number(name, value)
    if not 0 <= amount < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return amount


def check_positive(name: str, value: float) -> float:
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return number


def check_eps(eps: float) -> float:
    number = check_positive("eps", eps)
    least = torch.finfo(torch.float32).tiny  # a smaller one is 0 to most processors, and squash divides by its root
    if number < least:
        raise ValueError(f"eps must be at least {least:.3g}, the least normal float32, got {eps}")
    return number


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_options(*options) -> Options:
    """The options of the public operators; those that were checked before are taken at once."""
    if not torch.compiler.is_compiling():  # dynamo warns of a cache
        try:
            return _remembered_options(*options)
        except TypeError:
            pass  # one is of a wrong type, or has not even a hash: the check itself says which
    return _checked_options(*options)


def _checked_options(iterations: int, coupling: str, leaky: bool, detach_coupling: bool, eps: float) -> Options:
    check_int("iterations", iterations, least=1)
    if iterations >= 2**31:
        raise ValueError(f"iterations must be less than 2^31, got {iterations}")
    check_flag("detach_coupling", detach_coupling)
    check_coupling(coupling, leaky)
    return Options(iterations, coupling, leaky, detach_coupling, check_eps(eps))


_remembered_options = functools.lru_cache(typed=True)(_checked_options)  # True is not 1


def check_coupling(coupling: str, leaky: bool) -> None:
    if coupling not in COUPLINGS:
        raise ValueError(f'coupling must be "out" (softmax over j) or "in" (softmax over i), got {coupling!r}')
    check_flag("leaky", leaky)
    if leaky and coupling == "in":
        raise ValueError('leaky must be False with coupling="in": a leak is defined for the softmax over j only')


def check_scale(scale: float) -> float:
    if isinstance(scale, Tensor):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}: multiply the query by a tensor instead")
    number = check_number("scale", scale)
    if not abs(number) < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    return number


def check_input(u: Tensor) -> None:
    check_tensor("u", u, "[*, I, D]")
    if u.dim() < 2:
        raise ValueError(f"u must be [*, I, D], got {list(u.shape)}")
    if u.size(-1) == 0:
        raise ValueError(f"u must be [*, I, D] with D >= 1, got {list(u.shape)}")


def check_votes(votes: Tensor) -> None:
    check_tensor("votes", votes, "[*, I, J, O]")
    if votes.dim() < 3:
        raise ValueError(f"votes must be [*, I, J, O], got {list(votes.shape)}")
    if 0 in votes.shape[-2:]:
        raise ValueError(f"votes must be [*, I, J, O] with J, O >= 1, got {list(votes.shape)}")


def check_weight(weight: Tensor, u: Tensor, has_same_dtype: bool) -> None:
    shape, dims = weight.shape, weight.dim()
    letters = WEIGHTS.get(dims)
    if letters is None:
        raise ValueError(f"weight must be [I, J, O, D], [J, O, D] or [O, D], got {list(shape)}")
    inputs, features = u.size(-2), u.size(-1)
    if shape[-1] != features or (dims == 4 and shape[0] != inputs):
        known = f"I = {inputs} and D = {features}" if dims == 4 else f"D = {features}"
        raise ValueError(f"weight must be {letters} with {known} as in u {list(u.shape)}, got {list(shape)}")
    if shape[-2] == 0 or (dims > 2 and shape[-3] == 0):  # u has D >= 1; I = 0 is allowed
        raise ValueError(f"weight must be {letters} with J, O >= 1, got {list(shape)}")
    if not has_same_dtype:
        raise TypeError(f"weight must have the dtype of u, {u.dtype}, got {weight.dtype}")
    check_device("weight", weight, u)


def check_device(name: str, value: Tensor, u: Tensor) -> None:
    if value.device != u.device:
        raise ValueError(f"{name} must be on the device of the input capsules, {u.device}, got {value.device}")


def check_parameter(name: str, value: Tensor, letters: str, u: Tensor) -> None:
    """bias and logits: the dtype of the input capsules, or float32."""
    check_tensor(name, value, letters)
    if value.dtype not in (u.dtype, torch.float32):
        others = "float32" if u.dtype == torch.float32 else f"float32 or {u.dtype}"
        raise TypeError(f"{name} must be {others}, the dtype of the input capsules, got {value.dtype}")
    check_device(name, value, u)


def check_bias(bias: Tensor, out_capsules: int | None, out_features: int, u: Tensor) -> int:
    """J, which the bias decides where nothing else does."""
    check_parameter("bias", bias, "[J, O]", u)
    if bias.dim() != 2 or bias.shape[1] != out_features or bias.shape[0] != (out_capsules or bias.shape[0]):
        # not before: to put a size into words makes dynamo compile for that one alone
        known = f"O = {out_features}" if out_capsules is None else f"J = {out_capsules} and O = {out_features}"
        raise ValueError(f"bias must be [J, O] with {known}, got {list(bias.shape)}")
    if bias.shape[0] == 0:
        raise ValueError(f"bias must be [J, O] with J >= 1, got {list(bias.shape)}")
    return bias.shape[0]


def check_query(query: Tensor, lead: list[int], out_capsules: int | None, out_features: int, u: Tensor) -> int:
    """J, which the query decides where nothing else does."""
    check_parameter("query", query, "[*, J, O]", u)
    if out_capsules is None:
        out_capsules = query.shape[-2] if query.dim() >= 2 else 0
        if out_capsules == 0:
            raise ValueError(f"query must be [*, J, O] with J >= 1, got {list(query.shape)}")
    check_broadcast("query", query, (*lead, out_capsules, out_features), "[*, J, O]")
    return out_capsules


def is_known(condition: bool) -> bool:
    """Whether a condition on sizes is known to hold; nothing is guessed of a symbolic size that depends on data."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def is_one(size: int) -> bool:
    return is_known(size == 1)


def check_broadcast(name: str, value: Tensor, target: tuple[int, ...], letters: str) -> None:
    fits = value.dim() <= len(target) and all(
        is_one(have) or have == want or have == 1  # dynamo does not trace `in` of a size that it does not know
        for have, want in zip(reversed(value.shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} must broadcast to {letters} = {list(target)}, got {list(value.shape)}")


def check_mask(mask: Tensor, target: tuple[int, ...], u: Tensor, letters: str = "[*, I]") -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a bool tensor that broadcasts to {letters}, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where the capsule takes part, got {mask.dtype}: pass mask.bool()")
    _check_layout("mask", mask)
    check_device("mask", mask, u)
    check_broadcast("mask", mask, target, letters)


def pair(name: str, value: int | tuple[int, int], least: int = 1) -> tuple[int, int]:
    """(height, width) from one int or two."""
    both = (value, value) if isinstance(value, int) else value
    ints = isinstance(both, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in both)
    if not ints or len(both) != 2:
        raise TypeError(f"{name} must be an int or (height, width), got {value!r}")
    if min(both) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return tuple(both)


def check_image_shape(image_shape: tuple[int, int, int]) -> None:
    """Three sizes: channels, height and width."""
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
        raise ValueError(f"image_shape must be (channels, height, width), got {image_shape!r}")
    check_widths("image_shape", image_shape)


def check_widths(name: str, widths: tuple[int, ...]) -> None:
    """A tuple or list of sizes; it may be empty."""
    if not isinstance(widths, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of ints, got {type(widths).__name__}")
    check_sizes(**{f"{name}[{k}]": width for k, width in enumerate(widths)})


def check_images(images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """A batch of images of a known size."""
    check_tensor("images", images, "[B, C, H, W]")
    if images.dim() != 4 or tuple(images.shape[1:]) != image_shape:
        channels, height, width = image_shape
        raise ValueError(
            f"images must be [B, C, H, W] with C = {channels}, H = {height} and W = {width}, got {list(images.shape)}"
        )


def check_labels(labels: Tensor, batch: int, several: bool = True) -> None:
    """One or, where that may be, K class indices for each image; that they are below J is left to what reads them."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an int64 tensor, got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    letters = "[B] or [B, K]" if several else "[B]"
    if not 1 <= labels.dim() <= 1 + several or labels.shape[0] != batch:
        raise ValueError(f"labels must be {letters} with B = {batch}, got {list(labels.shape)}")
