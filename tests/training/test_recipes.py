"""The recipes for medical images, on generated films and volumes in the layouts of the data sets."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import CONFIGS, run_recipe

from efficient_densenet.cli import main

TINY = [
    "--model.network=efficient_densenet.DenseNet",
    *("--model.network.num_init_features=8", "--model.network.growth_rate=4", "--model.network.block_config=[1,1]"),
]


def film(seed: int, bright: bool) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 156, (40, 44), dtype=np.uint8)
    return Image.fromarray(pixels + 100 * bright)


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def chest_xray14(tmp_path):
    """30 films of 15 patients in two folders of images; those of the last five patients are test images."""
    rows = []
    for number in range(30):
        patient = number // 2
        bright = patient % 2 == 0
        name = f"{patient:08d}_{number % 2:03d}.png"
        folder = tmp_path / f"images_{1 + patient % 2:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        film(number, bright).save(folder / name)
        findings = "Effusion|Mass" if bright and number % 2 else "Effusion" if bright else "No Finding"
        rows.append({"Image Index": name, "Finding Labels": findings, "Patient ID": patient, "View Position": "PA"})
    write_table(tmp_path / "Data_Entry_2017.csv", rows)
    (tmp_path / "test_list.txt").write_text("\n".join(row["Image Index"] for row in rows[20:]))
    return tmp_path


@pytest.fixture
def chexpert(tmp_path):
    """Films of 12 patients, frontal and lateral, with uncertain and missing entries, and of four others."""
    labels = ["No Finding", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
    for table, patients in (("train", range(12)), ("valid", range(12, 16))):
        rows = []
        for patient in patients:
            for view in ("frontal", "lateral"):
                path = f"CheXpert-v1.0-small/{table}/patient{patient:05d}/study1/view1_{view}.jpg"
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                film(patient, patient % 2 == 0).save(tmp_path / path)
                entries = [["1.0", "0.0"][(patient + i) % 2] for i in range(len(labels))]
                if table == "train":
                    entries[patient % 6], entries[(patient + 1) % 6] = "", "-1.0"
                rows.append({"Path": path, "Frontal/Lateral": view.title(), **dict(zip(labels, entries, strict=True))})
        write_table(tmp_path / "CheXpert-v1.0-small" / f"{table}.csv", rows)
    return tmp_path


def last_row(folder: Path, recipe: str) -> dict[str, str]:
    return list(csv.DictReader((folder / recipe / "version_0" / "metrics.csv").open()))[-1]


def test_chest_xray14(chest_xray14, tmp_path, capsys):
    options = [f"--data.root={chest_xray14}", *TINY, "--data.size=40", "--data.val_fraction=0.5"]
    assert run_recipe("fit", "chest_xray14", tmp_path, *options) == 0
    assert "2 labels (Effusion, Mass)" in capsys.readouterr().out
    row = last_row(tmp_path, "chest_xray14")
    assert {"val/auroc", "val/ap", "val/auroc/Effusion", "val/ap/Mass", "train/loss_minimised"} <= row.keys()
    assert run_recipe("test", "chest_xray14", tmp_path, *options) == 0
    assert "measured on 10 test images" in capsys.readouterr().out

    best = tmp_path / "chest_xray14" / "version_0" / "checkpoints" / "best.ckpt"
    images, output = chest_xray14 / "images_001", tmp_path / "findings.csv"
    assert main(["predict", "--checkpoint", str(best), "--output", str(output), str(images)]) == 0
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == 16
    assert rows[0].keys() == {"path", "Effusion", "Mass"}
    assert any(abs(float(row["Effusion"]) + float(row["Mass"]) - 1) > 1e-3 for row in rows)  # each by itself


def test_chexpert(chexpert, tmp_path, capsys):
    assert run_recipe("fit", "chexpert", tmp_path, f"--data.root={chexpert}", *TINY, "--data.size=40") == 0
    assert "5 labels (Atelectasis, Cardiomegaly, Consolidation, Edema, Pleural Effusion)" in capsys.readouterr().out
    row = last_row(tmp_path, "chexpert")
    assert all(f"val/auroc/{label}" in row for label in ("Atelectasis", "Edema", "Pleural Effusion"))


@pytest.mark.filterwarnings("ignore")
def test_volumes(tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    pytest.importorskip("monai")
    for name, brightness in (("healthy", 0), ("tumour", 50)):
        (tmp_path / "scans" / name).mkdir(parents=True)
        for number in range(4):
            voxels = np.random.default_rng(number).normal(brightness, 10, (18, 20, 17)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "scans" / name / f"{number}.nii.gz")
    small = ["--data.size=16", "--model.network.arguments={spatial_dims: 3, block_config: [2, 2], init_features: 8}"]
    assert run_recipe("fit", "volumes", tmp_path, f"--data.root={tmp_path / 'scans'}", *small) == 0
    assert "2 classes (healthy, tumour)" in capsys.readouterr().out
    state = torch.load(tmp_path / "volumes" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["state_dict"]["network.features.conv0.weight"].shape == (8, 1, 7, 7, 7)


def test_without_nibabel_its_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert run_recipe("fit", "volumes", tmp_path, f"--data.root={tmp_path}") == 2
    assert "pip install 'efficient-densenet[monai]'" in capsys.readouterr().err


def test_there_is_a_recipe_for_each():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= {"finetune", "chest_xray14", "chexpert", "volumes"}
