from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import imagenet

from efficient_densenet import cli
from efficient_densenet.errors import UserError
from efficient_densenet.training.data import ImageNet
from efficient_densenet.training.prepare_imagenet import prepare

WORDS = {"n01440764": "tench, Tinca tinca", "n02012849": "crane"}
VALIDATION_CLASSES = [2, 1, 2]  # ILSVRC numbers its classes from 1


def _tar(members: Iterable[tuple[str, bytes]], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, contents in members:
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    return file.getvalue()


def _jpeg(brightness: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (brightness,) * 3).save(file, "jpeg")
    return file.getvalue()


def _devkit() -> bytes:
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children"]
    rows = [(1, "n01440764", WORDS["n01440764"], "a fish", 0), (2, "n02012849", WORDS["n02012849"], "a bird", 0)]
    rows.append((3, "n00001740", "entity", "everything", 2))  # an inner node of the hierarchy
    synsets = np.array(rows, dtype=[(field, object) for field in fields])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{number}\n" for number in VALIDATION_CLASSES).encode()
    folder = "ILSVRC2012_devkit_t12/data"
    return _tar(
        [(f"{folder}/meta.mat", meta.getvalue()), (f"{folder}/ILSVRC2012_validation_ground_truth.txt", truth)], "w:gz"
    )


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small archives in the real format; their MD5 sums are taken for the published ones."""
    contents = {
        "train": _tar(
            (f"{wnid}.tar", _tar((f"{wnid}_{number}.JPEG", _jpeg(60 * number)) for number in range(3)))
            for wnid in WORDS
        ),
        "val": _tar((f"ILSVRC2012_val_0000000{number}.JPEG", _jpeg(60 * number)) for number in (3, 1, 2)),
        "devkit": _devkit(),
    }
    folder = tmp_path / "archives"
    folder.mkdir()
    for part, data in contents.items():
        name = imagenet.ARCHIVE_META[part][0]
        (folder / name).write_bytes(data)
        monkeypatch.setitem(imagenet.ARCHIVE_META, part, (name, hashlib.md5(data).hexdigest()))
    return folder


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


PREPARED = [
    "meta.bin",
    "train/n01440764/n01440764_0.JPEG",
    "train/n01440764/n01440764_1.JPEG",
    "train/n01440764/n01440764_2.JPEG",
    "train/n02012849/n02012849_0.JPEG",
    "train/n02012849/n02012849_1.JPEG",
    "train/n02012849/n02012849_2.JPEG",
    "val/n01440764/ILSVRC2012_val_00000002.JPEG",
    "val/n02012849/ILSVRC2012_val_00000001.JPEG",
    "val/n02012849/ILSVRC2012_val_00000003.JPEG",
]


def test_the_command_makes_what_the_data_module_reads(archives: Path, tmp_path: Path) -> None:
    output = tmp_path / "imagenet"
    assert cli.main(["prepare-imagenet", "--archives", str(archives), "--output", str(output)]) == 0
    assert _files(output) == PREPARED
    data = ImageNet(root=str(output))
    data.setup()
    assert data.class_names == ("tench", "crane")
    assert (len(data.splits.train), len(data.splits.val)) == (6, 3)


def test_relative_folders(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare(Path("archives"), Path("imagenet"))
    assert _files(tmp_path / "imagenet") == PREPARED


@pytest.mark.parametrize("interrupted", ["train", "val"])
def test_an_interrupted_run_leaves_what_is_complete_and_the_next_goes_on(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    output = tmp_path / "imagenet"
    parser = f"parse_{interrupted}_archive"

    def interrupt(root: Path, *_: object, **__: object) -> None:
        (Path(root) / interrupted / "n01440764").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, parser, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(archives, output)
    left = {path.name for path in output.iterdir()}
    assert left == (set() if interrupted == "train" else {"train", "meta.bin"})

    if interrupted == "val":  # what is complete is not unpacked again
        (archives / "ILSVRC2012_img_train.tar").unlink()
    prepare(archives, output)
    assert _files(output) == PREPARED


def test_a_second_run_needs_no_archives(archives: Path, tmp_path: Path) -> None:
    output = tmp_path / "imagenet"
    prepare(archives, output)
    shutil.rmtree(archives)
    prepare(archives, output)
    assert _files(output) == PREPARED


def test_what_a_killed_run_left_is_removed(archives: Path, tmp_path: Path) -> None:
    left = tmp_path / "imagenet" / ".unpacking" / "train" / "n01440764"
    left.mkdir(parents=True)
    (left / "half.JPEG").write_bytes(b"\xff")
    prepare(archives, tmp_path / "imagenet")
    assert _files(tmp_path / "imagenet") == PREPARED


def test_missing_archives_are_listed(archives: Path, tmp_path: Path) -> None:
    (archives / "ILSVRC2012_img_val.tar").unlink()
    (archives / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(
        UserError, match=r"lacks ILSVRC2012_devkit_t12\.tar\.gz, ILSVRC2012_img_val\.tar; .*image-net\.org"
    ):
        prepare(archives, tmp_path / "imagenet")


@pytest.mark.parametrize("part", ["train", "val", "devkit"])
def test_a_cut_archive_is_named(archives: Path, tmp_path: Path, part: str) -> None:
    archive = archives / imagenet.ARCHIVE_META[part][0]
    archive.write_bytes(archive.read_bytes()[:-600])
    output = tmp_path / "imagenet"
    with pytest.raises(UserError, match=f"{archive.name} is cut short or corrupt"):
        prepare(archives, output)
    assert not (output / ("meta.bin" if part == "devkit" else part)).exists()
    assert not (output / ".unpacking").exists()


def test_too_little_space(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="make room"):
        prepare(archives, tmp_path / "imagenet")
    assert _files(tmp_path / "imagenet") == []
