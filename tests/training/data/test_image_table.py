"""Images with several labels in a CSV file: what entries mean, and who is on which side."""

from __future__ import annotations

import csv
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficient_densenet.errors import UserError
from efficient_densenet.training.data import ImageTable


def make_table(root: Path, rows: list[dict[str, str]], name: str = "table.csv") -> None:
    for row in rows:
        path = root / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(path)
    with (root / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def patients(count: int, images: int = 2) -> list[dict[str, str]]:
    return [
        {"path": f"p{i:02d}/{j}.png", "patient": str(i), "mass": str(i % 2), "edema": str(j % 2)}
        for i in range(count)
        for j in range(images)
    ]


def loaded(root: Path, **arguments: object) -> ImageTable:
    usual = {"label_columns": ["mass", "edema"], "patient_column": "patient", "num_workers": 0, "size": 8}
    data = ImageTable(root=str(root), table="table.csv", **{**usual, **arguments})
    data.setup()
    return data


@pytest.mark.parametrize(
    ("missing", "uncertain", "expected"),
    [
        (None, None, [1, 0, nan, nan]),
        ("negative", "positive", [1, 0, 1, 0]),
        ("unknown", "negative", [1, 0, 0, nan]),
    ],
)
def test_what_entries_mean(tmp_path, missing, uncertain, expected):
    entries = ["1.0", "0", "-1.0", ""]
    make_table(tmp_path, [{"path": f"{i}.png", "patient": str(i), "mass": e} for i, e in enumerate(entries)])
    data = loaded(tmp_path, label_columns=["mass"], missing=missing, uncertain=uncertain, val_fraction=0.25)
    found = [*data.splits.train.targets(), *data.splits.val.targets()]
    assert sorted(map(str, (value for (value,) in found))) == sorted(str(float(value)) for value in expected)


def test_labels_by_name_in_one_column(tmp_path):
    findings = ["Mass|Edema", "No Finding", "Edema", "Mass"]
    for table, folder in (("table.csv", "a"), ("val.csv", "b")):
        make_table(tmp_path, [{"path": f"{folder}/{i}.png", "found": f} for i, f in enumerate(findings)], table)
    data = loaded(tmp_path, label_columns=None, findings_column="found", val_table="val.csv", patient_column=None)
    assert data.class_names == ("Edema", "Mass")
    assert data.splits.val.targets() == [[1, 1], [0, 0], [1, 0], [0, 1]]
    image, target = data.splits.val[0]
    assert image.shape == (3, 8, 8)
    assert target.tolist() == [1, 1]


def test_labels_that_look_like_several_are_named(tmp_path):
    rows = [{"path": f"{i}.png", "patient": str(i), "found": "mass; edema" if i % 2 else "mass"} for i in range(6)]
    make_table(tmp_path, rows)
    with pytest.warns(UserWarning, match=r"'mass; edema' in the column 'found' is taken as one label: several are"):
        loaded(tmp_path, label_columns=None, findings_column="found")


@pytest.mark.parametrize("by", [{"patient_column": "patient"}, {"patient_column": None, "patient_pattern": r"p\d+"}])
def test_no_patient_is_on_both_sides(tmp_path, by):
    make_table(tmp_path, patients(10))
    splits = loaded(tmp_path, val_fraction=0.3, **by).splits
    sides = [{files.images.files[i].parent.name for i in range(len(files))} for files in (splits.train, splits.val)]
    assert [len(side) for side in sides] == [7, 3]
    assert not sides[0] & sides[1]


def test_rows_are_chosen_and_test_images_listed(tmp_path):
    make_table(tmp_path, patients(10))
    (tmp_path / "tested.txt").write_text("p00/0.png\r\np00/1.png\r\n", encoding="utf-8-sig")
    data = loaded(tmp_path, where={"edema": "1"}, test_list="tested.txt")
    assert [path.parts[-2:] for path in data.splits.test.images.files] == [("p00", "1.png")]
    assert len(data.splits.train) + len(data.splits.val) == 9
    assert data.splits.tested == "test images"


def test_names_without_folders_are_searched(tmp_path):
    make_table(tmp_path, [{"path": f"images_{i}/{i}.png", "patient": str(i), "mass": "1"} for i in range(4)])
    text = (tmp_path / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(text.replace("images_0/", "").replace("images_1/", "").replace("images_2/", ""))
    data = loaded(tmp_path, label_columns=["mass"], val_fraction=0.25)
    files = {*data.splits.train.images.files, *data.splits.val.images.files}
    assert files == {tmp_path / f"images_{i}" / f"{i}.png" for i in range(4)}


def test_names_without_folders_are_searched_in_folders_that_are_links(tmp_path):
    make_table(tmp_path / "elsewhere", [{"path": f"{i}.png", "patient": str(i), "mass": "1"} for i in range(4)])
    (tmp_path / "root").mkdir()
    (tmp_path / "root/images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/table.csv").symlink_to(tmp_path / "elsewhere/table.csv")
    splits = loaded(tmp_path / "root", label_columns=["mass"], val_fraction=0.25).splits
    assert {path.parent for path in splits.train.images.files} == {tmp_path / "root/images"}


def test_a_name_of_several_images_is_refused(tmp_path):
    make_table(tmp_path, patients(3))
    text = (tmp_path / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(text.replace("p00/", ""))
    with pytest.raises(UserError, match=r"several images called 0.png, .*p00/0.png and .*p01/0.png among them"):
        loaded(tmp_path)


def test_an_image_that_is_listed_twice_is_on_one_side(tmp_path):
    make_table(tmp_path, patients(5, images=1) * 2)
    with pytest.warns(UserWarning, match="nothing says whose images these are"):
        splits = loaded(tmp_path, patient_column=None, val_fraction=0.2).splits
    assert (len(splits.train), len(splits.val)) == (8, 2)


@pytest.mark.parametrize("again", ["./a/0.png", "0.png"])
def test_an_image_is_the_same_under_another_name(tmp_path, again):
    make_table(tmp_path, [{"path": f"a/{i}.png", "mass": "1"} for i in range(3)])
    (tmp_path / "val.csv").write_text(f"path,mass\n{again},1\n")
    with pytest.raises(UserError, match=r"images .* in the validation .*a/0.png; in all 1.*; leave them out of one of"):
        loaded(tmp_path, label_columns=["mass"], patient_column=None, val_table="val.csv")


@pytest.mark.filterwarnings("ignore:nothing says whose images")
def test_rows_are_held_out_by_their_numbers_whatever_their_images_are_called(tmp_path):
    found = []
    for folder, names in (("up", range(10, 20)), ("down", range(20, 10, -1))):
        (tmp_path / folder).mkdir()
        make_table(tmp_path / folder, [{"path": f"{name}.png", "mass": "1"} for name in names])
        held_out = loaded(tmp_path / folder, label_columns=["mass"], patient_column=None, val_fraction=0.3).splits.val
        found.append([[*names].index(int(path.stem)) for path in held_out.images.files])
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:nothing says whose images")
def test_a_single_image_cannot_be_divided(tmp_path):
    make_table(tmp_path, [{"path": "0.png", "mass": "1"}] * 2)
    with pytest.raises(UserError, match="there is a single image to divide: give the validation images in a val_table"):
        loaded(tmp_path, label_columns=["mass"], patient_column=None)


def test_images_whose_patient_is_not_said_are_split_with_a_warning(tmp_path):
    make_table(tmp_path, patients(5))
    with pytest.warns(UserWarning, match="nothing says whose images these are"):
        splits = loaded(tmp_path, patient_column=None, val_fraction=0.2).splits
    assert (len(splits.train), len(splits.val)) == (8, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_columns": None}, "give label_columns, one a label, or findings_column"),
        ({"findings_column": "mass"}, "give label_columns, one a label, or findings_column"),
        ({"label_columns": None, "findings_column": "mass", "missing": "negative"}, "leave missing and uncertain out"),
        ({"no_finding": "none"}, "with label_columns leave it out"),
        ({"val_fraction": 1.5}, "val_fraction must be above 0 and below 1"),
        ({"val_table": "table.csv", "val_fraction": 0.1}, "leave val_fraction out"),
        ({"test_table": "a", "test_list": "b"}, "give test_table or test_list"),
        ({"patient_pattern": "x"}, "give patient_column or patient_pattern"),
        ({"patient_column": None, "patient_pattern": "("}, "patient_pattern is not a regular expression"),
        ({"patient_column": None, "patient_pattern": "x"}, "patient_pattern finds no patient in p00/0.png"),
        (
            {"label_columns": ["mass", "fracture"]},
            r"table.csv, line \d has no column 'fracture'; there are path, patient",
        ),
        ({"label_columns": ["patient"]}, r"line 6 has '2' for 'patient'; an entry is 1, 0, -1"),
        ({"path_column": "file"}, "has no column 'file'"),
        ({"where": {"mass": "7"}}, "lists no image with {'mass': '7'}"),
        ({"val_table": "table.csv"}, "patients are in the training images and in the validation images (0; in all 4)"),
        (
            {"val_table": "table.csv", "patient_column": None},
            "in all 8): what is measured on them would say too much; leave them out of one",
        ),
        ({"test_list": "no.txt"}, r"there is no file no.txt; test_list names one"),
        ({"sampling": "balanced"}, "with several labels use model.class_weights"),
        ({"label_columns": ["mass", "mass"]}, "label_columns names a column twice: mass, mass"),
        ({"test_list": "other.txt"}, "names images that table.csv does not (0.png; in all 1): write them as the table"),
        ({"test_list": "utf-16.txt"}, "utf-16.txt is not text in UTF-8; save it as such"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    make_table(tmp_path, patients(4))
    (tmp_path / "other.txt").write_text("p00/0.png\n0.png\n")
    (tmp_path / "utf-16.txt").write_text("p00/0.png", encoding="utf-16")
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        loaded(tmp_path, **arguments)


def test_a_table_or_images_that_are_missing(tmp_path):
    with pytest.raises(UserError, match=r"there is no table .*; it should be a CSV file with a header"):
        loaded(tmp_path)
    make_table(tmp_path, patients(4))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "table.csv").rename(tmp_path / "elsewhere" / "table.csv")
    with pytest.raises(UserError, match=r"there is no image .*p0\d/\d\.png: data\.root is the folder"):
        loaded(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [("p00/0.png", "line 2 is too short: it ends before the column 'patient'"), (",0,1,1", "line 2 names no image")],
)
def test_lines_that_lack_something(tmp_path, line, message):
    make_table(tmp_path, patients(4))
    header, _, *others = (tmp_path / "table.csv").read_text().splitlines()
    (tmp_path / "table.csv").write_text("\n".join([header, line, *others]))
    with pytest.raises(UserError, match=message):
        loaded(tmp_path)


@pytest.mark.parametrize("separator", [", ", ";", "\t"])
@pytest.mark.parametrize("end", ["\r\n", ",\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tables_of_other_programs(tmp_path, separator, encoding, end):
    make_table(tmp_path, patients(4))
    header, *lines = (tmp_path / "table.csv").read_text().splitlines()
    expected = loaded(tmp_path).splits.train.targets()
    text = header + "\n" + "".join(line + end for line in lines)
    (tmp_path / "table.csv").write_bytes(text.replace(",", separator).encode(encoding))
    assert loaded(tmp_path).splits.train.targets() == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,patient,mass,mass\n0.png,1,0,1\n", "has the column 'mass' twice"),
        ("path,patient,mass,edema\n0.png,0,5,0,1\n", "line 2 has more entries than there are columns"),
        ("PK\3\4\0\0\0", "is not a CSV file, but of Excel, for example"),
    ],
)
def test_tables_that_cannot_be_understood(tmp_path, content, message):
    (tmp_path / "table.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        loaded(tmp_path)


def test_mixing_leaves_unknown_labels_unknown(tmp_path):
    rows = [row | {"mass": "" if row["path"] == "p00/0.png" else row["mass"]} for row in patients(4)]
    make_table(tmp_path, rows)
    data = loaded(tmp_path, mixup=0.5, batch_size=8, val_fraction=0.1)
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape[1:] == (3, 8, 8)
    assert targets.shape == (len(images), 2)
    assert targets[~targets.isnan()].min() >= 0
    assert any(isnan(value) for (value, _) in data.splits.train.targets()) == bool(targets.isnan().any())
    assert torch.isfinite(targets[:, 1]).all()
