"""What training does to an image, and to a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from efficient_densenet.training.data.preprocessing import Preprocessing, to_tensor


def training_transform(
    preprocessing: Preprocessing,
    geometry: Sequence[v2.Transform],
    augmentation: Sequence[Callable] = (),
    intensities: Sequence[v2.Transform] = (),
) -> v2.Transform:
    """One image as it is read → the tensor that the network is trained on.

    Args:
        preprocessing: what evaluation does; channels and normalisation are its.
        geometry: what makes the image as large as evaluation does.
        augmentation: what follows it; of these, a ``RandomErasing`` (torchvision's or timm's) comes last, so that zero
            is the mean colour.
        intensities: for a tensor of intensities in [0, 1], before it is normalised.
    """
    last = [transform for transform in augmentation if type(transform).__name__ == "RandomErasing"]
    first = [transform for transform in augmentation if transform not in last]
    return v2.Compose(
        [
            preprocessing.convert_mode(),
            *geometry,
            *first,
            to_tensor(),
            *intensities,
            preprocessing.normalize(),
            *last,
        ]
    )


def shifted_crop(preprocessing: Preprocessing, padding: int) -> v2.Transform:
    """Pad every side by `padding` pixels and cut out a random part of the image's size: the image, shifted.

    The padding has the mean colour, which is zero once the image is normalised, as in the paper's experiments.
    """
    fill = {Image.Image: [round(255 * mean) for mean in preprocessing.mean], Tensor: list(preprocessing.mean)}
    return v2.RandomCrop((preprocessing.height, preprocessing.width), padding=padding, fill=fill)


class MixedBatches:
    """Makes batches of images that are mixed with each other: mixup, cutmix, or either at random.

    Args:
        mixup: α of mixup; 0: none.
        cutmix: α of cutmix; 0: none.
        num_classes: for targets that are classes; None: targets are labels ``(N, labels)``.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int | None) -> None:
        kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        self.mix = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0])

    def __call__(self, batch: list[Any]) -> tuple[Tensor, Tensor]:
        return self.mix(*default_collate(batch))
