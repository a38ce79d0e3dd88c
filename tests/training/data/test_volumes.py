"""Folders of volumes by class."""

from __future__ import annotations

from pathlib import Path

import pytest

from efficient_densenet.training.data.volumes import Volumes

pytest.importorskip("monai")
pytest.importorskip("nibabel")


def test_hidden_files_and_folders_are_no_volumes(tmp_path: Path) -> None:
    for name in ("healthy", "tumour", ".trash"):
        (tmp_path / name).mkdir()
        for file in ("0.nii.gz", "1.nii.gz", "._0.nii.gz"):
            (tmp_path / name / file).touch()
    data = Volumes(str(tmp_path), val_fraction=0.5)
    data.setup()
    assert data.class_names == ["healthy", "tumour"]
    assert (len(data.train), len(data.val)) == (2, 2)
