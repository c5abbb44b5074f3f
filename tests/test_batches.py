"""What a training step sees of a data set: augmented images, overlapping digits, shuffled batches."""

import pytest
import torch

from capsroute.training import data, overlap
from capsroute.training.augment import Augmentation, warp
from capsroute.training.batches import Batch, Share, evaluation_batches, steps_per_epoch, training_batches
from capsroute.training.data import Split

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.digits()


# Augmentation


def dot_at(y: int, x: int, height: int = 9, width: int = 9) -> torch.Tensor:
    image = torch.zeros(1, 1, height, width)
    image[..., y, x] = 1
    return image


def draw(count: int = 200, **most) -> torch.Tensor:
    return Augmentation(**{"shift": 0.0, **most}).draw(count, torch.Generator().manual_seed(0))


def test_no_augmentation_changes_nothing():
    images = torch.rand(200, 3, 5, 8)
    torch.testing.assert_close(warp(images, draw()), images)


def test_shifts_move_images_by_at_most_the_fraction():
    moved = warp(dot_at(4, 4).expand(200, -1, -1, -1), draw(shift=1 / 9))  # one pixel
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.ones(200))  # nothing is lost inside the image
    place = torch.arange(9.0)
    for marginal in (moved.sum((1, 2)), moved.sum((1, 3))):  # over y, over x
        offset = (marginal * place).sum(1) - 4
        assert offset.abs().max() <= 1 + 1e-5
        assert offset.min() < -0.8
        assert offset.max() > 0.8


def centre(images: torch.Tensor) -> torch.Tensor:
    """Where the mass of each image lies, (y, x) from its middle."""
    height, width = images.shape[2:]
    mass = images.sum((1, 2, 3))
    y = (images.sum((1, 3)) * (torch.arange(height) - (height - 1) / 2)).sum(1) / mass
    x = (images.sum((1, 2)) * (torch.arange(width) - (width - 1) / 2)).sum(1) / mass
    return torch.stack([y, x], 1)


def test_rotations_keep_distances_also_where_an_image_is_not_square():
    moved = centre(warp(dot_at(10, 14, 21, 29).expand(200, -1, -1, -1), draw(rotation=90)))
    image = centre(dot_at(10, 14, 21, 29))
    torch.testing.assert_close(moved, image.expand(200, -1), rtol=0, atol=1e-4)  # the centre stays
    moved = centre(warp(dot_at(10, 22, 21, 29).expand(200, -1, -1, -1), draw(rotation=90)))  # 8 to the right of it
    torch.testing.assert_close(moved.norm(dim=1), torch.full((200,), 8.0), rtol=0, atol=0.1)
    angle = torch.atan2(*moved.unbind(1)).rad2deg()
    assert -91 < angle.min() < -75
    assert 75 < angle.max() < 91


def test_zooms_and_shears_go_as_far_as_they_may():
    eight_right = dot_at(10, 18, 21, 21).expand(200, -1, -1, -1)
    distance = centre(warp(eight_right, draw(scale=0.2))).norm(dim=1)
    assert 8 / 1.2 - 0.1 < distance.min() < 7
    assert 9.2 < distance.max() < 8 * 1.2 + 0.1
    below = centre(warp(dot_at(18, 10, 21, 21).expand(200, -1, -1, -1), draw(shear=45)))
    torch.testing.assert_close(below[:, 0], torch.full((200,), 8.0), rtol=0, atol=0.1)
    assert -8.1 < below[:, 1].min() < -7
    assert 7 < below[:, 1].max() < 8.1


# Overlapping digits


def test_a_shear_with_a_rotation_keeps_areas():
    linear = draw(rotation=40, shear=30)[:, :, :2]
    torch.testing.assert_close(torch.linalg.det(linear), torch.ones(200))
    torch.testing.assert_close(linear[:, :, 0].norm(dim=1), torch.ones(200))


def test_zeros_come_in():
    maps = draw(shift=0.25)
    moved = warp(torch.ones(200, 1, 8, 8), maps)
    left = 1 - maps[:, :, 2].abs() / 2  # of the width and height
    torch.testing.assert_close(moved.mean((1, 2, 3)), left.prod(1), rtol=0, atol=0.02)


def test_the_canvas_is_the_papers_for_mnist():
    assert overlap.canvas((1, 28, 28)) == (1, 36, 36)
    assert overlap.canvas((1, 8, 8)) == (1, 10, 10)


def test_partners_are_of_another_class_and_all_images_serve():
    labels = torch.arange(40) % 4
    of = torch.arange(40).repeat(50)
    partners = overlap.draw_partners(labels, of, torch.Generator().manual_seed(0))
    assert (labels[partners] != labels[of]).all()
    assert partners.unique().tolist() == list(range(40))
    for labels in ([0, 0, 0], [0, 2, 2]):  # of two classes any network would name both
        with pytest.raises(ValueError, match="at least three classes"):
            overlap.draw_partners(torch.tensor(labels), torch.arange(3), torch.Generator())


def test_digits_are_moved_whole_as_far_as_the_canvas_goes():
    images = torch.rand(500, 2, 8, 7)
    moves = overlap.draw_moves(500, (2, 8, 7), torch.Generator().manual_seed(0))
    assert [moves[:, k].unique().tolist() for k in (0, 1)] == [[0, 1, 2], [0, 1, 2]]
    placed = overlap.place(images, moves)
    assert placed.shape == (500, 2, 10, 9)
    for image, (down, right), on_canvas in zip(images, moves.tolist(), placed, strict=True):
        assert torch.equal(on_canvas[:, down : down + 8, right : right + 7], image)
        assert on_canvas.sum() == pytest.approx(image.sum().item(), rel=1e-5)  # and nothing else


def test_parts_are_added_up_to_white():
    parts = torch.tensor([0.25, 0.5, 0.75, 1.0]).view(1, 2, 1, 1, 2)
    torch.testing.assert_close(overlap.lay_over(parts), torch.tensor([1.0, 1.0]).view(1, 1, 1, 2))
    torch.testing.assert_close(overlap.lay_over(parts / 4), torch.tensor([0.25, 0.375]).view(1, 1, 1, 2))


# Batches


@pytest.fixture
def split(digits) -> Split:
    return digits.train[:50]


STILL = Augmentation(shift=0.0)


def test_an_epoch_sees_every_image_once_in_another_order_each_time(split):
    def seen(**which):
        batches = list(training_batches(split, 16, STILL, **{"seed": 0, "epoch": 1, **which}))
        assert [len(batch.images) for batch in batches] == [16, 16, 16, 2]
        assert all(torch.equal(batch.images.unsqueeze(1), batch.parts) for batch in batches)
        return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])

    images, labels = seen()
    order = [int((split.images - image).abs().sum((1, 2, 3)).argmin()) for image in images]
    assert sorted(order) == list(range(50))
    assert torch.equal(labels.squeeze(1), split.labels[order])
    assert torch.equal(seen()[0], images)
    for other in ({"epoch": 2}, {"seed": 1}, {"seed": 1 << 31}):
        assert not torch.equal(seen(**other)[0], images), other


def test_no_epoch_of_one_seed_is_one_of_another(split):
    first, second = (
        torch.cat([batch.labels for batch in training_batches(split, 16, STILL, seed=seed, epoch=epoch)])
        for seed, epoch in ((0, 2), (1, 1))
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("overlapping", [False, True])
def test_processes_together_see_what_one_would(split, overlapping):
    def batches(share):
        options = {"seed": 3, "epoch": 2, "overlapping": overlapping, "share": share}
        return list(training_batches(split, 16, Augmentation(rotation=20), **options))

    for whole, *parts in zip(batches(Share()), *(batches(Share(rank, 3)) for rank in range(3)), strict=False):
        for name in ("images", "labels", "parts"):
            x = torch.empty_like(getattr(whole, name))
            for rank, part in enumerate(parts):
                x[rank::3] = getattr(part, name)
            torch.testing.assert_close(x, getattr(whole, name))
        assert {part.whole for part in parts} == {len(whole.images)}


def test_a_last_batch_of_fewer_images_than_processes_is_left_out(split):
    assert [steps_per_epoch(50, 16, count) for count in (1, 2, 3)] == [4, 4, 3]
    with pytest.raises(ValueError, match="batch_size must be at least 1 for each of 3 processes, got 2"):
        steps_per_epoch(50, 2, 3)
    with pytest.raises(ValueError, match="there must be a training image for each of 3 processes, got 2"):
        steps_per_epoch(2, 16, 3)
    assert len(list(training_batches(split, 16, STILL, seed=0, epoch=1, share=Share(0, 3)))) == 3


def test_overlapping_test_pairs_are_the_same_always(split):
    def pairs(size: int) -> list[torch.Tensor]:
        batches = list(evaluation_batches(split, overlapping=True, batch_size=size))
        return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "labels", "parts")]

    first, again = pairs(7), pairs(50)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    images, labels, parts = first
    assert images.shape == (50, 1, 10, 10)
    assert (labels[:, 0] != labels[:, 1]).all()
    assert torch.equal(labels[:, 0], split.labels)  # every image is tested
    torch.testing.assert_close(parts.sum(1).clamp(max=1), images)


@pytest.mark.parametrize("overlapping", [False, True])
def test_batches_are_where_the_images_are(split, overlapping):
    """Whatever torch's default device is; their random numbers are the CPU's."""

    def batches() -> list[Batch]:
        training = training_batches(split, 16, Augmentation(rotation=20), seed=0, epoch=1, overlapping=overlapping)
        return [*training, *evaluation_batches(split, overlapping=overlapping)]

    expected = batches()
    with torch.device("meta"):
        found = batches()
    for batch, same in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(batch[:3], same[:3], strict=True))
