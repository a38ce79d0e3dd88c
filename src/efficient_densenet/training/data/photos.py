"""Images of any size, cut to that of the network: what folders and tables of images share."""

from __future__ import annotations

from typing import Any

from torchvision.transforms import v2

from efficient_densenet.errors import UserError
from efficient_densenet.training.data.augmentation import shifted_crop
from efficient_densenet.training.data.base import ImageDataModule
from efficient_densenet.training.data.preprocessing import Cover, Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_GREY_MEAN = (0.449,)  # the average of ImageNet's channels
_GREY_STD = (0.226,)
_MAX_SMALL_SIZE = 32  # the largest images for which the network has the CIFAR stem
_SMALLEST_CROP = 0.08
_ENLARGED = 256 / 224  # before the crop, as for ImageNet


class PhotoDataModule(ImageDataModule):
    """Images of any size. Augmentation: up to 32 pixels, as for CIFAR: resize, pad by an eighth, crop. Above, as for
    ImageNet: a random part of the image, resized.

    Args:
        size: of the images that the network gets in pixels: the side of a square, or height and width.
        in_channels: 3 for colour, 1 for grey; images are converted.
        mean: of each channel, for intensities in [0, 1]; None: ImageNet's.
        std: standard deviation of each channel; None: ImageNet's.
        value_range: the values of grey images with more than 8 bits that become black and white, see `read_image`.
        horizontal_flip: mirror every second training image; not for text, or where left and right differ.
        smallest_crop: the smallest share of an image's area that training sees of it; None: 0.08. For more than 32
            pixels; smaller images are cropped as CIFAR's.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        value_range: tuple[float, float] | None = None,
        horizontal_flip: bool = True,
        smallest_crop: float | None = None,
        **kwargs: Any,
    ) -> None:
        shorter = size if isinstance(size, int) else min(size)
        is_small = shorter <= _MAX_SMALL_SIZE
        preprocessing = Preprocessing(
            in_channels=in_channels,
            size=size if isinstance(size, int) else (size[0], size[1]),
            mean=tuple(mean or (IMAGENET_MEAN if in_channels == 3 else _GREY_MEAN)),
            std=tuple(std or (IMAGENET_STD if in_channels == 3 else _GREY_STD)),
            resize=None if is_small else round(shorter * _ENLARGED),
            value_range=None if value_range is None else (value_range[0], value_range[1]),
        )
        super().__init__(preprocessing, **kwargs)
        if smallest_crop is not None and is_small:
            raise UserError(f"smallest_crop is for images of more than {_MAX_SMALL_SIZE} pixels: leave it out")
        if smallest_crop is not None and not 0 < smallest_crop <= 1:
            raise UserError(f"smallest_crop is a share of the image, above 0 and at most 1, not {smallest_crop}")
        self.is_small = is_small
        self.horizontal_flip = horizontal_flip
        self.smallest_crop = _SMALLEST_CROP if smallest_crop is None else smallest_crop

    def own_training_transform(self) -> v2.Transform:
        """What training does to an image."""
        height, width = self.preprocessing.height, self.preprocessing.width
        if self.is_small:
            crop = [Cover(height, width), shifted_crop(self.preprocessing, padding=self.input_size // 8)]
        else:
            crop = [v2.RandomResizedCrop((height, width), scale=(self.smallest_crop, 1.0))]
        flip = [v2.RandomHorizontalFlip()] if self.horizontal_flip else []
        return self.training_transform(*crop, *flip)
