"""Films in DICOM files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from efficient_densenet.errors import MissingExtraError
from efficient_densenet.training.data import Preprocessing
from efficient_densenet.training.data.images import is_image, read_image
from efficient_densenet.training.data.unreadable import UnreadableImageError

VALUES = np.array([[0, 1000], [2000, 4000]], dtype=np.uint16)


def write_dicom(path: Path, values: np.ndarray = VALUES, **elements: object) -> None:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    file = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = values.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    if values.ndim == 3:
        file.NumberOfFrames = len(values)
    file.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(file, name, value)
    file.save_as(path)


@pytest.mark.parametrize(
    ("elements", "value_range", "expected"),
    [
        ({}, None, [[0, 0.25], [0.5, 1]]),
        ({"PhotometricInterpretation": "MONOCHROME1"}, None, [[1, 0.75], [0.5, 0]]),
        ({"WindowCenter": 2000, "WindowWidth": 2001}, None, [[0, 0], [0.5, 1]]),
        ({"RescaleSlope": 2, "RescaleIntercept": -1000}, (-1000, 3000), [[0, 0.5], [1, 1]]),
        ({"PhotometricInterpretation": "MONOCHROME1"}, (0, 2000), [[1, 0.5], [0, 0]]),
    ],
    ids=["all values", "dark is high", "a window", "rescaled, with a range", "dark is high, with a range"],
)
def test_values_become_intensities(tmp_path, elements, value_range, expected):
    write_dicom(tmp_path / "film.dcm", **elements)
    found = read_image(tmp_path / "film.dcm", value_range)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32), atol=1e-3, rtol=0)


def test_a_film_goes_through_preprocessing(tmp_path):
    write_dicom(tmp_path / "film.DCM")
    assert is_image(tmp_path / "film.DCM")
    preprocessing = Preprocessing(in_channels=3, size=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    image = preprocessing.transform()(preprocessing.read(tmp_path / "film.DCM"))
    torch.testing.assert_close(image, torch.tensor([[[-1, -0.5], [0, 1]]]).expand(3, 2, 2))


def test_files_that_hold_no_film(tmp_path):
    write_dicom(tmp_path / "frames.dcm", np.stack([VALUES, VALUES]))
    with pytest.raises(UnreadableImageError, match=r"frames\.dcm.*which is not that of one grey image"):
        read_image(tmp_path / "frames.dcm")
    (tmp_path / "none.dcm").write_bytes(b"no film")
    with pytest.raises(UnreadableImageError, match=r"none\.dcm"):
        read_image(tmp_path / "none.dcm")


def test_without_pydicom_its_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'efficient-densenet\[pydicom\]'"):
        read_image(tmp_path / "film.dcm")
