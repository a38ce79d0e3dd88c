"""What evaluation does to one image, as plain data, so that validation, test and prediction do the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.transforms import v2

from efficient_densenet.errors import UserError


@dataclass(frozen=True)
class Preprocessing:
    """One PIL image → the float tensor ``(in_channels, size, size)`` that a network is evaluated on.

    Args:
        in_channels: 3 (colour) or 1 (grey); images of another mode are converted.
        size: side of the centre crop in pixels.
        mean: mean of each channel, for intensities in [0, 1].
        std: standard deviation of each channel.
        resize: length of the shorter side before the crop; None: `size`, which leaves images of that size as they are.

    Raises:
        UserError: the numbers do not fit together.
    """

    in_channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise UserError(f"images are read with 1 channel (grey) or 3 (colour), not {self.in_channels!r}")
        if self.size < 1 or (self.resize is not None and self.resize < self.size):
            raise UserError(f"cannot crop {self.size} pixels from images resized to {self.resize or self.size}")
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise UserError(
                f"mean {self.mean} and std {self.std} need one number for each of {self.in_channels} channels"
            )

    def transform(self) -> v2.Transform:
        """The transform from a PIL image to the tensor ``(in_channels, size, size)``."""
        return v2.Compose([
            convert_mode(self.in_channels),
            v2.Resize(self.resize or self.size),
            v2.CenterCrop(self.size),
            to_tensor(),
            self.normalize(),
        ])  # fmt: skip

    def normalize(self) -> v2.Transform:
        """The last step alone, for a tensor of intensities in [0, 1]; training transforms end with it too."""
        return v2.Normalize(list(self.mean), list(self.std))

    def to_dict(self) -> dict[str, Any]:
        """The same as lists and numbers, which a checkpoint read with ``weights_only=True`` can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`.

        Raises:
            UserError: the dictionary is not one that `to_dict` makes.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            raise UserError(f"preprocessing is described by {sorted(names)}, not by {sorted(values)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


def convert_mode(in_channels: int) -> v2.Transform:
    """A PIL image of any mode → grey (1 channel) or RGB (3)."""
    return v2.RGB() if in_channels == 3 else v2.Grayscale()


def to_tensor() -> v2.Transform:
    """A PIL image → a float tensor ``(C, H, W)`` of intensities in [0, 1]."""
    return v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
