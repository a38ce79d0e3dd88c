from __future__ import annotations

import torch
from torch.utils.data import DataLoader, Dataset

from efficient_densenet.training.data.lighting import PCALighting

EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
EIGENVECTORS = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


class GreyImages(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return PCALighting()(torch.full((3, 2, 2), 0.5))


def test_every_image_of_a_batch_gets_its_own_shift() -> None:
    (batch,) = DataLoader(GreyImages(), batch_size=4)
    assert len({tuple(image[:, 0, 0].tolist()) for image in batch}) == 4


def test_all_pixels_of_an_image_are_shifted_alike() -> None:
    image = torch.rand(3, 5, 7)
    shift = PCALighting()(image) - image
    torch.testing.assert_close(shift, shift[:, :1, :1].expand_as(shift))
    assert shift.abs().max() > 0


def test_the_shifts_have_the_covariance_of_the_principal_components() -> None:
    torch.manual_seed(0)
    shifts = PCALighting(alphastd=0.1)(torch.zeros(100_000, 3, 1, 1)).flatten(1)
    directions = EIGENVECTORS * (0.1 * EIGENVALUES)
    expected = directions @ directions.T
    torch.testing.assert_close(shifts.T.cov(), expected, rtol=0.03, atol=1e-6)
    torch.testing.assert_close(shifts.mean(0), torch.zeros(3), rtol=0, atol=3e-4)
