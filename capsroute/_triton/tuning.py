"""How large the tiles are: by rules whose numbers a table gives for each kind of GPU, with its reasons.

No number here was measured: none of these GPUs was at hand. `capsroute tune` measures, and stores what is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tuning:
    """The numbers behind the tiles. `work`, `row`, `tiled` and `held` decide in which order sums are added.

    Attributes:
        warps: of a program, at most; twice as many in the last stream.
        forward: numbers of each array of a tile that a thread holds, forward: V, s, the votes and a temporary of 32
            are half of 255 registers.
        backward: likewise for one pass of the backward, where two sums, V, ds and the votes are held.
        held: numbers of W_i, and as many of dW_i, that a thread holds in the last stream.
        between: likewise between two passes.
        row: numbers J x O (padded) of a sample up to which one tile takes all j. Above it the softmax over j takes a
            stream of its own, which reads W once more, but tiles hold more samples, so W is read for fewer of them.
        tiled: numbers j x O of a sample in a tile where J takes several.
        work: multiply-adds for a sample in one group of input capsules, whose sum is one part. Fewer make more
            programs, and more parts to write and read: MNIST at B = 128 has 4 tiles of 32 samples x 24 groups, 96
            programs of 8 warps.
        groups: input capsules of a group, at least: the parts of s are at most 1/16 of the votes.
        programs: about as many as fill the device. The last stream shares out the samples, and a stream takes fewer
            samples a tile, to have as many.
        fewest: samples of a tile or a share, at least, unless the registers hold no more.
    """

    warps: int = 8
    forward: int = 32
    backward: int = 16
    held: int = 32
    between: int = 8
    row: int = 1024
    tiled: int = 256
    work: int = 48 * 8 * 160
    groups: int = 16
    programs: int = 64
    fewest: int = 8


DEFAULT = Tuning()

# By the name of Triton's target.
TABLE: dict[str, Tuning] = {}


@dataclass(frozen=True)
class Tile:
    """Samples (or input capsules), output capsules, padded features, and the warps that work on them."""

    rows: int
    outputs: int
    features: int
    warps: int


def _warps(numbers: int, per_thread: int, most: int) -> int:
    return max(1, min(most, power_of_two(numbers) // (32 * per_thread)))


def _outputs(tuning: Tuning, J: int, features: int) -> int:
    """Output capsules of a tile: all, or as many as leave room for many samples."""
    outputs = power_of_two(J)
    return outputs if outputs * features <= tuning.row else max(1, min(outputs, tuning.tiled // features))


def group(tuning: Tuning, I: int, J: int, X: int, D: int) -> int:
    """Input capsules whose sum is one part. It depends on one input capsule's work alone, so that a sample's sum is
    added in the same order in any batch.
    """
    work = min(J, _outputs(tuning, J, power_of_two(X))) * X * D
    return max(1, min(I, max(tuning.groups, tuning.work // work)))


def tile(tuning: Tuning, per_thread: int, B: int, J: int, X: int, itemsize: int, groups: int) -> Tile:
    """The tile of a stream over i: as many samples as fit the registers, so that W is read for all of them, but fewer
    where the programs would be few.
    """
    features = power_of_two(X)
    outputs = _outputs(tuning, J, features)
    per_thread = max(1, per_thread * 4 // itemsize)
    rows = min(max(1, per_thread * 32 * tuning.warps // (outputs * features)), power_of_two(B))
    while rows > tuning.fewest and -(-B // rows) * -(-J // outputs) * groups < tuning.programs:
        rows //= 2
    return Tile(rows, outputs, features, _warps(rows * outputs * features, per_thread, tuning.warps))


def gradient_tile(tuning: Tuning, I: int, J: int, X: int, D: int, itemsize: int) -> Tile:
    """The tile of the last stream: as many input capsules as fit the registers with W_i and dW_i, so that V and ds
    are read for all of them.
    """
    features, deep = power_of_two(X), power_of_two(D)
    outputs = _outputs(tuning, J, features)
    per_thread = max(1, tuning.held * 4 // itemsize)
    most = 2 * tuning.warps
    room = per_thread * 32 * most
    outputs = max(1, min(outputs, room // (features * deep)))
    rows = min(max(1, room // 2 // (outputs * features * deep)), power_of_two(max(I, 1)))
    rows = min(rows, max(1, 4 * tuning.row // (outputs * features)))
    return Tile(rows, outputs, features, _warps(rows * outputs * features * deep, per_thread, most))


def share(tuning: Tuning, count: int, programs: int) -> int:
    """How many of `count` samples one program takes, where so many programs take each."""
    shares = max(1, min(-(-tuning.programs * 4 // programs), count // tuning.fewest))
    return max(1, -(-count // shares))


def for_device(device: torch.device) -> Tuning:
    """The table's entry for the kind of GPU."""
    return DEFAULT
