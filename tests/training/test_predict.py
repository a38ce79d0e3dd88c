"""Predictions in files, features, and images that cannot be read."""

from __future__ import annotations

import csv
import json
import os

import pytest
import torch
from PIL import Image

from efficient_densenet import DenseNet
from efficient_densenet.cli import main


@pytest.fixture
def network(tmp_path):
    """A network in evaluation mode; its weights are in ``weights.pth``, and three images in ``images``."""
    torch.manual_seed(0)
    network = DenseNet(num_init_features=8, growth_rate=4, block_config=(1, 1), num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    return network


def predict(folder, *options):
    options = [str(folder / option) if option.endswith((".csv", ".json", ".txt")) else option for option in options]
    return main(["predict", "--checkpoint", str(folder / "weights.pth"), str(folder / "images"), *options])


def images():
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    reds = torch.zeros(3, 3, 32, 32)
    reds[:, 0] = torch.arange(3)[:, None, None] * 80 / 255
    return (reds - mean) / std


@torch.no_grad()
def test_a_table_and_json_hold_all_classes(tmp_path, network):
    expected = network(images()).softmax(1)
    (tmp_path / "names.txt").write_text("cat\ndog\nfox\n", encoding="utf-8-sig")
    assert predict(tmp_path, "--output", "a.csv", "--class-names", "names.txt", "--batch-size", "2") == 0
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row.pop("path") for row in rows] == [str(tmp_path / "images" / f"{i}.png") for i in range(3)]
    assert rows[0].keys() == {"cat", "dog", "fox"}
    found = torch.tensor([[float(value) for value in row.values()] for row in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    assert predict(tmp_path, "--output", "a.json") == 0
    found = torch.tensor([list(row["values"].values()) for row in json.loads((tmp_path / "a.json").read_text())])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_names_of_images_need_not_be_text(tmp_path, network, capsys):
    os.rename(tmp_path / "images/2.png", os.fsencode(tmp_path) + b"/images/caf\xe9.png")
    assert predict(tmp_path, "--output", "a.csv") == 0
    assert b"caf\xe9.png,0." in (tmp_path / "a.csv").read_bytes()
    assert predict(tmp_path) == 0
    assert "caf\\udce9.png\n" in capsys.readouterr().out


def test_classes_of_one_name_are_told_apart(tmp_path, network):
    (tmp_path / "names.txt").write_text("crane\ndog\ncrane\n")
    assert predict(tmp_path, "--output", "a.json", "--class-names", "names.txt") == 0
    values = json.loads((tmp_path / "a.json").read_text())[0]["values"]
    assert list(values) == ["crane (0)", "dog", "crane (2)"]
    assert sum(values.values()) == pytest.approx(1)


@torch.no_grad()
def test_features_are_what_the_classifier_gets(tmp_path, network):
    assert predict(tmp_path, "--output", "a.csv", "--features") == 0
    rows = list(csv.reader((tmp_path / "a.csv").open()))
    assert rows[0] == ["path", *(f"feature{i}" for i in range(network.num_features))]
    expected = network.forward_head(network.forward_features(images()), pre_logits=True)
    found = torch.tensor([[float(value) for value in row[1:]] for row in rows[1:]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_that_cannot_be_read_are_named_counted_and_left_out(tmp_path, network, capsys):
    for name in ("0", "2"):
        (tmp_path / "images" / f"{name}.png").write_bytes(b"\x89PNG cut short")
    assert predict(tmp_path, "--output", "a.csv", "--batch-size", "1") == 1
    error = capsys.readouterr().err
    assert "0.png" in error
    assert error.endswith("images that could not be read and were skipped: 2\n")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere.png"], "there is no file or folder nowhere.png"),
        (["--output", "a.xlsx"], "the output must end in .csv or .json, not 'a.xlsx'"),
        (["--features"], "give a file for them with --output"),
        (["--class-names", "names.txt"], "names.txt has 2 names, one a line, and the network 3 classes"),
        (["--top", "0"], "must be 1 or more"),
    ],
)
def test_mistakes(tmp_path, network, capsys, options, message):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert predict(tmp_path, *options) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pth", "images", "names.txt"}


def test_every_image_has_a_row_in_the_order_given(tmp_path, network):
    folder = tmp_path / "images"
    (folder / "series.png").mkdir()  # a folder, whatever its name is
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    paths = [folder / name for name in ("2.png", "0.png", "2.png", "0.png")]
    assert predict(tmp_path, *map(str, paths), "--output", "a.csv") == 0
    found = [row["path"] for row in csv.DictReader((tmp_path / "a.csv").open())]
    assert found == [str(path) for path in [*sorted(folder.glob("?.png")), *paths]]


def test_an_output_below_a_file_is_refused(tmp_path, network, capsys):
    assert predict(tmp_path, "--output", "weights.pth/a.csv") == 2
    assert f"cannot write {tmp_path}/weights.pth/a.csv: " in capsys.readouterr().err
