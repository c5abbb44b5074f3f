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
    """The numbers behind the tiles. `group`, `alone`, `row` and `held` decide in which order sums are added.

    Attributes:
        warps: of a program, at most.
        forward: numbers of each tile array in a thread's registers, forward; V, s, the votes and one temporary are
            live, so 4 x 32 of 255 registers.
        backward: likewise for one pass of the backward: V, ds, two sums, the votes.
        held: numbers of W_i and of dW_i in a thread's registers in the last stream.
        finish: likewise between passes.
        row: numbers J x O (padded) of a sample up to which one tile takes all j. Above it the softmax over j takes a
            stream of its own, which reads W once more, but tiles hold more samples, so W is read for fewer of them.
        tiled: numbers j x O of a sample in a tile where J takes several.
        group: input capsules whose sum is one part. Fewer make more programs, and more parts to write and read:
            MNIST at B = 128 has 4 tiles of 32 samples x 24 groups = 96 programs of 8 warps.
        alone: up to so many input capsules one program sums all, so that all passes are one launch.
        programs: as many as fill the device, by which the last stream shares out the samples.
        share: samples of a share, at least.
    """

    warps: int = 8
    forward: int = 32
    backward: int = 16
    held: int = 32
    finish: int = 8
    row: int = 1024
    tiled: int = 256
    group: int = 48
    alone: int = 64
    programs: int = 256
    share: int = 4


DEFAULT = Tuning()

# By the name of Triton's target. sm_75 has half the registers for a block of 8 warps in flight; the rest share what
# matters here: 64 Ki registers and 255 of them a thread.
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


def tile(tuning: Tuning, per_thread: int, B: int, J: int, X: int, itemsize: int) -> Tile:
    """The tile of a stream over i: as many samples as fit the registers, so that W is read for all of them."""
    features = power_of_two(X)
    outputs = power_of_two(J)
    if outputs * features > tuning.row:
        outputs = max(1, min(outputs, tuning.tiled // features))
    per_thread = max(1, per_thread * 4 // itemsize)
    fit = max(1, per_thread * 32 * tuning.warps // (outputs * features))
    rows = min(fit, power_of_two(B))
    return Tile(rows, outputs, features, _warps(rows * outputs * features, per_thread, tuning.warps))


def gradient_tile(tuning: Tuning, I: int, J: int, X: int, D: int, itemsize: int) -> Tile:
    """The tile of the last stream: as many input capsules as fit the registers with W_i and dW_i, so that V and ds
    are read for all of them.
    """
    features, deep = power_of_two(X), power_of_two(D)
    outputs = power_of_two(J)
    per_thread = max(1, tuning.held * 4 // itemsize)
    room = per_thread * 32 * 2 * tuning.warps
    if outputs * features > tuning.row or outputs * features * deep > room:
        outputs = max(1, min(outputs, tuning.tiled // features, room // (features * deep)))
    numbers = outputs * features * deep
    rows = min(max(1, room // 2 // numbers), power_of_two(max(I, 1)), max(1, tuning.row * 4 // (outputs * features)))
    return Tile(rows, outputs, features, _warps(rows * numbers, per_thread, 2 * tuning.warps))


def for_device(device: torch.device) -> Tuning:
    """The table's entry for the kind of GPU."""
    return DEFAULT
