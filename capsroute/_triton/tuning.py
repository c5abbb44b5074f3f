"""How large the tiles are: by rules whose numbers a table gives for each kind of GPU, with its reasons.

No number here was measured: no GPU was at hand. `capsroute tune` measures on one, and stores what is better in a file
that is read here.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._files import write_atomically

# Programs that a grid takes at most in its second dimension, tiles of output capsules, and in its third, groups of
# input capsules or shares of samples. Where there would be more, they are fewer and larger.
MOST = 65535


def divide_up(a: int, b: int) -> int:
    """The smallest integer that is at least a / b."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tuning:
    """The numbers behind the tiles. `work`, `groups`, `row`, `tiled` and `held` decide in which order sums are added,
    those over samples `programs`, `fewest` and `longest` too.

    Attributes:
        forward, backward: warps of a program at most, and numbers of each array of a tile that a thread holds, in a
            stream. Forward holds V, s, the votes and temporaries: 16 warps leave 128 registers, of which 4 x 16 are
            half; 32 numbers in 8 warps spilled on sm_90. Backward holds V, ds, two sums and the votes, so half as many
            numbers: in 16 warps of 8, not in 8 of 16, where W_id has a number for each thread, and Triton shares out u
            and the sums over features by shuffles and barriers: 1098 instructions for a sample and an input capsule of
            MNIST on sm_90 instead of 287.
        loaded: instead of `forward` where a stream reads a mask or statistics, or keeps maxima. With prior logits,
            whose addresses take registers, half the warps have twice the numbers.
        between: likewise, between two streams, and where one launch makes the streams and what runs between them.
        held: likewise of W_i, and as many of dW_i, in the last stream.
        row: numbers J x O (padded) of a sample up to which one tile takes all j. Above it the softmax over j takes a
            stream of its own, which reads W once more, but tiles hold more samples, so W is read for fewer of them.
        tiled: numbers j x O of a sample in a tile where J takes several.
        work: multiply-adds for a sample in one group of input capsules, whose sum is one part. Fewer make more
            programs, and more parts to write and read: MNIST at B = 128 has 4 tiles of 32 samples x 24 groups, 96
            programs of 16 warps.
        groups: input capsules of a group, at least: the parts of s are at most 1/16 of the votes.
        programs: half the processors, about. The last stream shares out the samples, and a stream takes fewer samples a
            tile, to have as many; not more, since a tile of half the samples reads W twice as often.
        fewest: samples of a tile or a share, at least, unless the registers hold no more.
        longest: samples of a share, at most, so that a running sum over them keeps its digits: of numbers all alike it
            loses up to 3e-8 of itself with each.
        lanes: of a warp.
    """

    forward: tuple[int, int] = (16, 16)
    loaded: tuple[int, int] = (16, 8)
    backward: tuple[int, int] = (16, 8)
    between: tuple[int, int] = (8, 8)
    held: tuple[int, int] = (16, 32)
    row: int = 1024
    tiled: int = 256
    work: int = 48 * 8 * 160
    groups: int = 16
    programs: int = 64
    fewest: int = 8
    longest: int = 256
    lanes: int = 32


DEFAULT = Tuning()

# AMD's CDNA: warps of 64 lanes, so half of them hold the same tile in as many threads. 8 warps on the 4 SIMDs of a
# processor leave each lane 256 registers.
CDNA = Tuning((8, 16), (8, 8), (8, 8), (4, 8), (8, 32), lanes=64)

# By the kind of GPU. All have 64 Ki registers of 32 bits for a processor and 255 for a thread, AMD's no fewer, and the
# tiles never ask for more shared memory than the 48 KiB that each has, so the largest tiles are of one size, and a sum
# of the forward is added in one order, on all. What differs is how many processors there are to fill: here those of a
# GPU of the kind, on a real one its own number.
ARCHITECTURES = {
    "sm_75": replace(DEFAULT, programs=40 // 2),  # T4
    "sm_80": replace(DEFAULT, programs=108 // 2),  # A100
    "sm_86": replace(DEFAULT, programs=72 // 2),  # A10
    "sm_89": replace(DEFAULT, programs=58 // 2),  # L4
    "sm_90": replace(DEFAULT, programs=132 // 2),  # H100
    "sm_100": replace(DEFAULT, programs=148 // 2),  # B200
    "sm_120": replace(DEFAULT, programs=170 // 2),  # RTX 5090
    "gfx90a": replace(CDNA, programs=104 // 2),  # half of an MI210 or MI250, which are two devices
    "gfx942": replace(CDNA, programs=304 // 2),  # MI300X
    "gfx1100": replace(DEFAULT, programs=96 // 2),  # RX 7900 XTX
}


@dataclass(frozen=True)
class Tile:
    """Samples (or input capsules), output capsules, padded features, and the warps that work on them."""

    rows: int
    outputs: int
    features: int
    warps: int


def _warps(tuning: Tuning, numbers: int, per_thread: int, most: int) -> int:
    return max(1, min(most, power_of_two(numbers) // (tuning.lanes * per_thread)))


def _outputs(tuning: Tuning, J: int, features: int) -> int:
    """Output capsules of a tile: all, or as many as leave room for many samples."""
    outputs = power_of_two(J)
    return outputs if outputs * features <= tuning.row else max(_least(J), min(outputs, tuning.tiled // features))


def _least(J: int) -> int:
    """Output capsules of a tile, where one less, to the next power of two, would make too many tiles."""
    return power_of_two(divide_up(J, MOST))


def tiled(tuning: Tuning, J: int, X: int) -> bool:
    """Whether J takes several tiles in the streams."""
    return _outputs(tuning, J, power_of_two(X)) < J


def group(tuning: Tuning, I: int, J: int, X: int, D: int) -> int:
    """Input capsules whose sum is one part. It depends on one input capsule's work alone, so that a sample's sum is
    added in the same order in any batch.
    """
    work = min(J, _outputs(tuning, J, power_of_two(X))) * X * D
    return max(1, min(I, max(tuning.groups, tuning.work // work, divide_up(I, MOST))))


def tile(tuning: Tuning, shape: tuple[int, int], B: int, J: int, X: int, itemsize: int, groups: int) -> Tile:
    """The tile of a stream over i: as many samples as fit the registers, so that W is read for all of them, but fewer
    where the programs would be few.
    """
    features = power_of_two(X)
    outputs = _outputs(tuning, J, features)
    warps, per_thread = shape[0], max(1, shape[1] * 4 // itemsize)
    rows = min(max(1, per_thread * tuning.lanes * warps // (outputs * features)), power_of_two(B))
    warps = _warps(tuning, rows * outputs * features, per_thread, warps)
    while rows > tuning.fewest and divide_up(B, rows) * divide_up(J, outputs) * groups < tuning.programs:
        rows //= 2
    # Then the warps remain, but not where one launch makes all passes: it spilled in 8 warps, and not in 4.
    per_thread = per_thread if groups == 1 else max(1, per_thread // 2)
    return Tile(rows, outputs, features, _warps(tuning, rows * outputs * features, per_thread, warps))


def gradient_tile(tuning: Tuning, I: int, J: int, X: int, D: int, itemsize: int, narrow: bool) -> Tile:
    """The tile of the last stream: as many input capsules as fit the registers with W_i and dW_i, so that V and ds
    are read for all of them. Narrow types are converted in registers: with all of those full they spilled.
    """
    features, deep = power_of_two(X), power_of_two(D)
    outputs = _outputs(tuning, J, features)
    most, per_thread = tuning.held[0], max(1, tuning.held[1] * 4 // itemsize)
    room = per_thread * tuning.lanes * most
    while outputs > _least(J) and outputs * features * deep > room // (2 if narrow else 1):
        outputs //= 2
    rows = min(max(1, room // 2 // (outputs * features * deep)), power_of_two(max(I, 1)))
    rows = min(rows, max(1, 4 * tuning.row // (outputs * features)))
    return Tile(rows, outputs, features, _warps(tuning, rows * outputs * features * deep, per_thread, most))


def share(tuning: Tuning, count: int, programs: int) -> int:
    """How many of `count` samples one program takes, where so many programs take each."""
    wanted = divide_up(tuning.programs * 4, programs)
    shares = max(1, min(wanted, count // tuning.fewest), divide_up(count, tuning.longest))
    return max(1, divide_up(count, min(shares, MOST)))


def for_shape(device: torch.device, form: str, J: int, O: int, D: int, dtype: torch.dtype) -> Tuning:
    """What was measured best for a layer on this GPU, else what is thought best for its kind."""
    if device.type != "cuda":
        return DEFAULT
    stored = measured().get(torch.cuda.get_device_name(device), {})
    return stored.get(key(form, J, O, D, dtype)) or for_device(torch.cuda.get_device_properties(device))


def for_device(properties: Any) -> Tuning:
    """By the kind of a GPU and its processors, from what torch says of it."""
    amd = getattr(properties, "gcnArchName", "").partition(":")[0]
    name = amd if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    known = ARCHITECTURES.get(name, CDNA if properties.warp_size == 64 else DEFAULT)
    return replace(known, programs=max(1, properties.multi_processor_count // 2))


def key(form: str, J: int, O: int, D: int, dtype: torch.dtype) -> str:
    """The layer in the file: not its batch, so that a sample is added up alike in any."""
    return f"{form} J={J} O={O} D={D} {str(dtype).removeprefix('torch.')}"


def cache_file() -> Path:
    """CAPSROUTE_TUNING, else tuning.json in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("CAPSROUTE_TUNING") or cache / "capsroute" / "tuning.json")


@functools.cache
def measured() -> dict[str, dict[str, Tuning]]:
    """By the name of the GPU and the layer, as `store` has written them; read once."""
    path = cache_file()
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {gpu: {layer: _tuning(numbers) for layer, numbers in layers.items()} for gpu, layers in stored.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what `capsroute tune` writes, delete it: {error}") from error


def _tuning(numbers: dict) -> Tuning:
    return Tuning(**{name: tuple(x) if isinstance(x, list) else x for name, x in numbers.items()})


def store(gpu: str, layer: str, best: Tuning) -> Path:
    """Add what was measured to the file."""
    path = cache_file()
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored.setdefault(gpu, {})[layer] = asdict(best)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(stored, indent=1).encode())
    measured.cache_clear()
    return path


# What `search` tries for each number.
ALTERNATIVES: dict[str, tuple] = {
    "forward": ((16, 16), (8, 16), (8, 32), (4, 16), (4, 32)),
    "loaded": ((8, 16), (4, 16), (16, 8), (8, 8)),
    "backward": ((8, 16), (4, 16), (16, 8), (8, 8)),
    "held": ((16, 32), (8, 32), (8, 16), (16, 16)),
    "work": tuple(n * 8 * 160 for n in (48, 24, 96, 192)),
    "row": (1024, 512, 2048),
    "programs": (64, 128, 256),
}


def search(seconds: Callable[[Tuning], float], start: Tuning = DEFAULT) -> tuple[Tuning, float, float]:
    """The best of ALTERNATIVES, one number after another: what it is, its seconds, and those of `start`."""
    best, at_start = start, seconds(start)
    least = at_start
    for name, values in ALTERNATIVES.items():
        for value in values:
            candidate = replace(best, **{name: value})
            if candidate != best and (found := seconds(candidate)) < least:
                best, least = candidate, found
    return best, least, at_start
