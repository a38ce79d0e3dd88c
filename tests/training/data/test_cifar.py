from __future__ import annotations

import functools
import hashlib
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from efficient_densenet.errors import UserError
from efficient_densenet.training.data import CIFAR10, CIFAR100

PER_CLASS = {CIFAR10: 4, CIFAR100: 2}


def _batch(module: type[CIFAR10], num_classes: int, seed: int) -> dict[str, object]:
    labels = list(range(num_classes)) * PER_CLASS[module]
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3 * 32 * 32), dtype=np.uint8)
    return {"data": pixels, "labels" if module is CIFAR10 else "fine_labels": labels}


@pytest.fixture
def make_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[type[CIFAR10]], Path]:
    """Makes a small archive in the real format, and lets torchvision take its MD5 sums for the real ones."""

    def make(module: type[CIFAR10]) -> Path:
        source: type[datasets.CIFAR10] = module.source
        num_classes = 10 if module is CIFAR10 else 100
        folder = tmp_path / "original" / source.base_folder
        folder.mkdir(parents=True)
        md5 = {}
        for seed, (name, _) in enumerate(source.train_list + source.test_list):
            (folder / name).write_bytes(pickle.dumps(_batch(module, num_classes, seed)))
        names = [f"class {number}" for number in range(num_classes)]
        (folder / source.meta["filename"]).write_bytes(pickle.dumps({source.meta["key"]: names}))
        for file in folder.iterdir():
            md5[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
        archive = tmp_path / "data" / source.filename
        archive.parent.mkdir()
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, source.base_folder)
        for files in ("train_list", "test_list"):
            monkeypatch.setattr(source, files, [[name, md5[name]] for name, _ in getattr(source, files)])
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5[source.meta["filename"]]})
        monkeypatch.setattr(source, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        return archive

    return make


@pytest.mark.parametrize("module", [CIFAR10, CIFAR100])
def test_an_archive_in_the_folder_is_unpacked_and_read(module: type[CIFAR10], make_archive: Callable) -> None:
    archive = make_archive(module)
    data = module(root=str(archive.parent), batch_size=20, num_workers=0)
    data.prepare_data()
    data.setup()
    assert data.num_classes == (10 if module is CIFAR10 else 100)
    assert data.class_names[3] == "class 3"
    test_images = PER_CLASS[module] * data.num_classes
    assert len(data.splits.test) == test_images
    assert len(data.splits.train) == test_images * len(module.source.train_list)
    assert data.splits.val is data.splits.test
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [number % data.num_classes for number in range(20)]
    pixels = torch.from_numpy(data.splits.test.images.data[0]).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (module.mean, module.std))
    torch.testing.assert_close(images[0], (pixels - mean) / std)


def test_training_images_are_padded_cropped_and_mirrored(make_archive: Callable) -> None:
    data = CIFAR10(root=str(make_archive(CIFAR10).parent))
    data.prepare_data()
    data.setup()
    still = data.preprocessing.transform()(data.splits.train.images[0][0])
    padded = torch.nn.functional.pad(still, (4, 4, 4, 4))
    crops = {
        (y, x, flip): (torch.flip(crop, [2]) if flip else crop)
        for y in range(9)
        for x in range(9)
        for flip in (False, True)
        for crop in [padded[:, y : y + 32, x : x + 32]]
    }
    seen = set()
    for _ in range(40):
        image = data.splits.train[0][0]
        # the padding has the mean colour up to a rounded intensity of 1/255
        found = [place for place, crop in crops.items() if (image - crop).abs().max() < 0.011]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 20
    assert {flip for *_, flip in seen} == {False, True}


def test_a_part_of_the_training_images_is_held_out(make_archive: Callable) -> None:
    root = str(make_archive(CIFAR10).parent)
    data = CIFAR10(root=root, val_fraction=0.25)
    data.prepare_data()
    data.setup()
    assert (len(data.splits.train), len(data.splits.val), len(data.splits.test)) == (150, 50, 40)
    assert sorted([*data.splits.train.indices, *data.splits.val.indices]) == list(range(200))
    assert torch.equal(data.splits.val[0][0], data.splits.val[0][0])  # not augmented


def test_what_is_unpacked_is_enough(make_archive: Callable) -> None:
    archive = make_archive(CIFAR10)
    data = CIFAR10(root=str(archive.parent))
    data.prepare_data()
    archive.unlink()
    data.prepare_data()
    data.setup()


def test_an_interrupted_unpacking_is_repaired(make_archive: Callable) -> None:
    root = make_archive(CIFAR10).parent
    data = CIFAR10(root=str(root))
    data.prepare_data()
    batch = root / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:100])
    with pytest.raises(UserError, match="cifar-10-batches-py is missing or incomplete"):
        data.setup()
    data.prepare_data()
    data.setup()


@pytest.mark.parametrize("step", ["prepare_data", "setup"])
def test_missing_data(tmp_path: Path, step: str) -> None:
    with pytest.raises(UserError, match=r"put cifar-100-python\.tar\.gz from https://.* into .*download to true"):
        getattr(CIFAR100(root=str(tmp_path / "nothing")), step)()


def test_a_cut_archive(make_archive: Callable) -> None:
    archive = make_archive(CIFAR10)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is cut short or corrupt"):
        CIFAR10(root=str(archive.parent)).prepare_data()
    assert not (archive.parent / "cifar-10-batches-py").exists()


def test_a_download_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", f"file://{tmp_path}/nowhere/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="cannot get file:"):
        CIFAR10(root=str(tmp_path / "data"), download=True).prepare_data()


@pytest.fixture
def web_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web site with the files of the folder ``data``."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "data")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("intact", [True, False])
def test_a_download(
    make_archive: Callable, web_site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, intact: bool
) -> None:
    archive = make_archive(CIFAR10)
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{web_site}/{archive.name}")
    data = CIFAR10(root=str(tmp_path / "downloaded"), download=True)
    if intact:
        data.prepare_data()
        data.setup()
        assert len(data.splits.test) == 40
    else:
        archive.write_bytes(archive.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"cannot get http.*corrupt"):
            data.prepare_data()


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(UserError, match="val_fraction"):
        CIFAR10(val_fraction=fraction)
