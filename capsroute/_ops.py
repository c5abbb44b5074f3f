"""The private dispatcher ops, and the library that holds the C++ kernels.

An op set is a namespace of torch.ops with four ops: `route`, the whole operator; `routing_pass`, one pass of
it; and the backward of each. schemas.txt has their schemas, here are their shapes (fake kernels); _autograd.py has
their derivatives, _vmap.py their rules for vmap.
A backend implements a set: the C++ libraries implement `capsroute`, each for its device.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import torch
from torch.compiler import config as compiler_config

from . import _autograd, _vmap
from .reference import accumulation_dtype, out_capsules

_TEXT = Path(__file__).with_name("schemas.txt").read_text("utf-8")
# Of the ops of a set, by name; schemas.txt says what their tensors are.
SCHEMAS = {
    schema.partition("(")[0]: " ".join(schema.split())
    for schema in re.findall(r"^\w.*(?:\n +.*)*", _TEXT, re.MULTILINE)
}


def define(namespace: str) -> None:
    """Define an op set, if its library does not; whoever calls this also implements it.

    Raises:
        ImportError: if the library defines another, being older or newer than this package.
    """
    ops = getattr(torch.ops, namespace)
    for name, schema in SCHEMAS.items():
        full, known = f"{namespace}::{name}", getattr(ops, name, None)
        if known is None:
            torch.library.define(full, schema.removeprefix(name))
        elif known.default._schema != torch._C.parse_schema(f"{namespace}::{schema}"):
            raise ImportError(
                f"{LIBRARY} was built from other sources than {__file__}: install capsroute again, and load no other "
                "copy of the library first"
            )
        torch.library.register_fake(full, _FAKES[name])
        torch.library.register_vmap(full, _vmap.rule(getattr(ops, name)))
    _autograd.register(namespace)


def _fake_route(u, weight, bias, logits, mask, iterations, over_inputs, leaky, eps, save, room, return_coupling):
    shape = _result_shape(u, weight, bias, logits)
    norm, coupling = _fake_extras(u, save, shape[1], save and over_inputs, return_coupling)
    s = u.new_empty((save, *shape) if save else (0,), dtype=accumulation_dtype(u.dtype))
    last_logits = s.new_empty((*u.shape[:2], shape[1]) if 0 < save < iterations else (0,))
    return u.new_empty(shape), s, norm, last_logits, s.new_empty(room), coupling


def _fake_routing_pass(u, weight, query, logits, mask, over_inputs, leaky, save, return_coupling):
    shape = _result_shape(u, weight, query, logits)
    norm, coupling = _fake_extras(u, 1, shape[1], save and over_inputs, return_coupling)
    return u.new_empty(shape, dtype=accumulation_dtype(u.dtype)), norm, coupling


def _result_shape(u, weight, third, logits):
    """[B, J, O]"""
    return u.shape[0], out_capsules(u, weight, third, logits), u.shape[3] if weight is None else weight.shape[-2]


def _fake_extras(u, saved, outputs, has_norm, has_coupling):
    norm = u.new_empty((2, saved, u.shape[0], outputs) if has_norm else (0,), dtype=accumulation_dtype(u.dtype))
    return norm, u.new_empty((*u.shape[:2], outputs) if has_coupling else (0,))


def _fake_route_backward(grad_v, s, norm, votes, *arguments):
    return _fake_backward(grad_v, s, norm, *arguments)


def _fake_backward(grad, s, norm, u, weight, third, logits, mask, *options):
    per_sample, *needs = options[-5:]
    of_batch = False, True, third is not None and third.dim() == 2, False  # a weight or bias, no query

    def empty(x, need, of_batch):
        if not need:
            return u.new_empty(0)
        grad = torch.empty_like(x) if x is weight and x.dim() == 4 else x.new_empty(x.shape)
        if not (per_sample and of_batch):
            return grad
        return grad.new_empty_strided((u.shape[0], *x.shape), (x.numel(), *grad.stride()))

    return tuple(map(empty, (u, weight, third, logits), needs, of_batch))


_FAKES = {
    "route": _fake_route,
    "route_backward": _fake_route_backward,
    "routing_pass": _fake_routing_pass,
    "routing_pass_backward": _fake_backward,
}


LIBRARY = Path(__file__).with_name("libcapsroute.so")
CUDA_LIBRARY = Path(__file__).with_name("libcapsroute_cuda.so")
AGAIN = "install capsroute again (pip install --no-cache-dir --force-reinstall --no-deps)"


def _load(library: Path, how: str) -> tuple[bool, str]:
    if not library.exists():
        return False, f"{how}, and without CAPSROUTE_NO_EXT=1"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # its cause has the loader's own words
        return False, f"the C++ kernels could not be loaded: {error.__cause__ or error}"
    return True, "C++ kernels"


def _load_cpu() -> tuple[bool, str]:
    # What is registered twice ends the process: a copy of the library may have been loaded by itself (docs/serving.md).
    known = torch._C._jit_get_schemas_for_operator
    if known("capsroute::cpu_capability"):
        can, why = True, "C++ kernels"
    elif known("capsroute::route") and LIBRARY.exists():
        can, why = False, "the operators were defined before there were C++ kernels: start Python anew"
    else:
        can, why = _load(LIBRARY, f"the C++ kernels were not built: {AGAIN} where g++ is and the build sees torch")
    return can, f"{why} for {torch.ops.capsroute.cpu_capability()}" if can else why


def _load_cuda() -> tuple[bool, str]:
    if torch.version.cuda is None:
        return False, "this build of torch has no CUDA"
    how = f"the CUDA kernels were not built: {AGAIN} where nvcc and a CUDA build of torch are present"
    can, why = _load(CUDA_LIBRARY, how)
    return can, f"{why} for CUDA" if can else why


def _mark_caches() -> None:
    """Have torch.compile run nothing that it cached on disk of another version of this package.

    Its caches know an op by its name: what is kept of a graph has the schemas, shapes and derivatives of its time.
    Subpackages have no part in that: torch.compile sees into them.
    """
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).with_name("schemas.txt")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    mark = f"capsroute-{digest[:16]}"
    if mark not in compiler_config.cache_key_tag:
        compiler_config.cache_key_tag = f"{compiler_config.cache_key_tag}-{mark}".lstrip("-")


_mark_caches()
_loaded = _load_cpu()
define("capsroute")
_cuda_loaded = _load_cuda()


def cpu_library() -> tuple[bool, str]:
    """Whether the library of CPU kernels is loaded, and for which instruction set, or why not."""
    return _loaded


def cuda_library() -> tuple[bool, str]:
    """Whether the library of CUDA kernels is loaded, or why not. Whether there is a device is another question."""
    return _cuda_loaded
