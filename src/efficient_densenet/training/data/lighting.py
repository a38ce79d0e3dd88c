"""PCA lighting (Krizhevsky et al., "ImageNet Classification with Deep CNNs", NIPS 2012, section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

# Square roots of the variances of ImageNet's RGB values in [0, 1] along the principal directions, and these
# directions, one a column.
_EIGENVALUES = torch.tensor([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = torch.tensor(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)


class PCALighting(v2.Transform):
    """Shift an image's colour along the principal directions of the colours of ImageNet.

    The shift is ``Σᵢ αᵢ λᵢ vᵢ`` with ``αᵢ ~ N(0, alphastd²)``, drawn anew for each image. Shape: float tensor
    ``(..., 3, H, W)`` of intensities in [0, 1] → the same shape; values may leave [0, 1].

    Args:
        alphastd: standard deviation of the draws.
    """

    def __init__(self, alphastd: float = 0.1) -> None:
        super().__init__()
        self.alphastd = alphastd

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        alpha = torch.randn(*inpt.shape[:-3], 3) * self.alphastd
        shift = (alpha * _EIGENVALUES) @ _EIGENVECTORS.T
        return inpt + shift[..., None, None]
