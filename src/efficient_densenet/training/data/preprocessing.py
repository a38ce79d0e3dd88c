"""What evaluation does to one image, as plain data, so that validation, test and prediction do the same."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.images import read_image


@dataclass(frozen=True)
class Preprocessing:
    """One image → the float tensor ``(in_channels, height, width)`` that a network is evaluated on.

    Args:
        in_channels: 3 (colour) or 1 (grey); images of another mode are converted.
        size: of the centre crop in pixels: its side, or its height and width.
        mean: mean of each channel, for intensities in [0, 1].
        std: standard deviation of each channel.
        resize: length of the shorter side before the crop; None: `size`, which leaves images of that size as they are.
            For a crop of two sides, that of its shorter side; the image then covers the crop, enlarged likewise.
        value_range: the values of grey images with more than 8 bits that become 0 and 1, see `read_image`.

    Raises:
        UserError: the numbers do not fit together.
    """

    in_channels: int
    size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.in_channels not in (1, 3):
            raise UserError(f"images are read with 1 channel (grey) or 3 (colour), not {self.in_channels!r}")
        shorter = min(self.height, self.width)
        if shorter < 1 or (self.resize is not None and self.resize < shorter):
            raise UserError(f"cannot crop {self.size} pixels from images resized to {self.resize or self.size}")
        if not len(self.mean) == len(self.std) == self.in_channels:
            raise UserError(
                f"mean {self.mean} and std {self.std} need one number for each of {self.in_channels} channels"
            )
        if min(self.std) <= 0:
            raise UserError(f"std must be above 0, not {self.std}")
        if self.value_range is not None and self.value_range[0] >= self.value_range[1]:
            raise UserError(f"value_range goes from a smaller value to a larger one, not {self.value_range}")

    @property
    def height(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[0]

    @property
    def width(self) -> int:
        return self.size if isinstance(self.size, int) else self.size[1]

    def read(self, path: str | os.PathLike[str]) -> Image.Image | Tensor:
        """The image at `path`, for `transform`."""
        return read_image(path, self.value_range)

    def transform(self) -> v2.Transform:
        """The transform from an image to the tensor ``(in_channels, height, width)``."""
        enlarged = (self.resize or min(self.height, self.width)) / min(self.height, self.width)
        if isinstance(self.size, int):
            resize: v2.Transform = v2.Resize(self.resize or self.size)
        else:
            resize = Cover(round(self.height * enlarged), round(self.width * enlarged))
        return v2.Compose([
            self.convert_mode(),
            resize,
            v2.CenterCrop((self.height, self.width)),
            to_tensor(),
            self.normalize(),
        ])  # fmt: skip

    def convert_mode(self) -> v2.Transform:
        """An image of any mode → grey (1 channel) or RGB (3)."""
        return v2.RGB() if self.in_channels == 3 else v2.Grayscale()

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
        fields = dataclasses.fields(cls)
        names, needed = {f.name for f in fields}, {f.name for f in fields if f.default is dataclasses.MISSING}
        if not needed <= values.keys() <= names:
            raise UserError(f"preprocessing is described by {sorted(names)}, not by {sorted(values)}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)


class Cover(v2.Transform):
    """Resize an image so that it just covers so many pixels, with its own aspect.

    Args:
        height: that it has at least.
        width: likewise.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height = height
        self.width = width

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        scale = max(self.height / height, self.width / width)
        return {"size": [max(self.height, round(height * scale)), max(self.width, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return v2.functional.resize(inpt, params["size"])


def to_tensor() -> v2.Transform:
    """An image → a float tensor ``(C, H, W)`` of intensities in [0, 1]."""
    return v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
