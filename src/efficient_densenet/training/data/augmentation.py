"""What training does to a PIL image before it becomes a tensor."""

from __future__ import annotations

from torchvision.transforms import v2

from efficient_densenet.training.data.preprocessing import Preprocessing


def shifted_crop(preprocessing: Preprocessing, padding: int) -> v2.Transform:
    """Pad every side by `padding` pixels and cut out a random square: the image, shifted.

    The padding has the mean colour, which is zero once the image is normalised, as in the paper's experiments.
    """
    fill = [round(255 * mean) for mean in preprocessing.mean]
    return v2.RandomCrop(preprocessing.size, padding=padding, fill=fill)
