"""X-rays and other images in DICOM files, read by pydicom."""

from __future__ import annotations

import os

import numpy as np

from efficient_densenet.errors import require
from efficient_densenet.training.data.unreadable import unreadable

DICOM_SUFFIXES = (".dcm", ".dicom")
_DARK_IS_HIGH = "MONOCHROME1"


def read_dicom(
    path: str | os.PathLike[str], value_range: tuple[float, float] | None = None
) -> tuple[np.ndarray, tuple[float, float]]:
    """The values ``(H, W)`` of a grey image, bright where they are high, and the range of them that is shown.

    The values are the file's, rescaled as it says (Hounsfield units, for example). Without a `value_range`, they go
    through its window or table of values of interest, and the range is from the smallest to the largest.

    Raises:
        MissingExtraError: pydicom is not installed.
        UnreadableImageError: the file is damaged, is compressed in a way that pydicom cannot read, or holds several
            images or colours.
    """
    pydicom, pixels = require("pydicom", "pydicom"), require("pydicom.pixels", "pydicom")
    try:
        file = pydicom.dcmread(path)
        values = pixels.apply_modality_lut(file.pixel_array, file)
        if values.ndim != 2:
            raise ValueError(f"its pixels have the shape {values.shape}, which is not that of one grey image")
        if value_range is None:
            values = pixels.apply_voi_lut(values, file)
            value_range = float(values.min()), max(float(values.max()), float(values.min()) + 1)
    except Exception as error:  # pydicom and its decoders raise anything for files that they cannot read
        raise unreadable(path, error) from error
    if file.get("PhotometricInterpretation") == _DARK_IS_HIGH:
        values = value_range[0] + value_range[1] - values.astype(np.float64)
    return values, value_range
