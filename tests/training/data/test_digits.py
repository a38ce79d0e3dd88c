from __future__ import annotations

import pickle
from collections import Counter

import pytest
import torch

from efficient_densenet.training.data import Digits


@pytest.fixture(scope="module")
def data() -> Digits:
    data = Digits(batch_size=64, num_workers=0)
    data.setup()
    return data


def test_a_third_is_held_out_in_equal_shares(data: Digits) -> None:
    assert data.class_names == tuple("0123456789")
    assert (len(data.splits.train), len(data.splits.val)) == (1198, 599)
    assert data.splits.test is data.splits.val
    counts = Counter(label for _, label in data.splits.val)
    assert max(counts.values()) - min(counts.values()) <= 4  # the classes have 174 to 183 images
    assert not set(data.splits.train.indices) & set(data.splits.val.indices)


def test_the_seed_decides_what_is_held_out(data: Digits) -> None:
    same, other = Digits(), Digits(seed=1)
    same.setup()
    other.setup()
    assert same.splits.val.indices == data.splits.val.indices
    assert other.splits.val.indices != data.splits.val.indices


def test_images_are_normalised(data: Digits) -> None:
    images = torch.cat([images for images, _ in data.val_dataloader()])
    assert images.shape == (599, 1, 8, 8)
    assert images.mean().item() == pytest.approx(0, abs=0.05)
    assert images.std().item() == pytest.approx(1, abs=0.05)


def test_training_shifts_an_image_by_at_most_a_pixel(data: Digits) -> None:
    image = data.splits.train.images[data.splits.train.indices[0]][0]
    still = data.preprocessing.transform()(image)
    black = still.min()
    padded = torch.nn.functional.pad(still, (1, 1, 1, 1), value=black.item())
    shifted = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    drawn = [data.splits.train[0][0] for _ in range(200)]
    matches = [[number for number, shift in enumerate(shifted) if torch.equal(image, shift)] for image in drawn]
    assert all(matches)
    assert {number for match in matches for number in match} == set(range(9))


def test_the_datasets_can_go_to_worker_processes(data: Digits) -> None:
    copy = pickle.loads(pickle.dumps(data.splits.val))
    assert torch.equal(copy[5][0], data.splits.val[5][0])
