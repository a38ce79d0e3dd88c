"""Images with labels in a CSV file: any number of labels an image, some of them unknown or uncertain."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, tensor

from efficient_densenet.errors import UserError, require
from efficient_densenet.files import read_lines
from efficient_densenet.training.data.base import HELD_OUT, NO_TEST_SET, Splits
from efficient_densenet.training.data.images import TransformedImages, files_below
from efficient_densenet.training.data.photos import PhotoDataModule
from efficient_densenet.training.data.preprocessing import Preprocessing
from efficient_densenet.training.data.rows import LabelReader, Row, read_rows

_VAL_FRACTION = 0.1


class LabelledFiles:
    """A dataset of images and label vectors.

    Args:
        files: the images.
        targets: of each, one number a label: 1 has it, 0 has it not, NaN unknown.
        preprocessing: reads the files.
    """

    def __init__(self, files: Sequence[Path], targets: Sequence[list[float]], preprocessing: Preprocessing) -> None:
        self.files = files
        self.targets = targets
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.preprocessing.read(self.files[index]), tensor(self.targets[index])


class ImageTable(PhotoDataModule):
    """Images with several labels each, listed in CSV files with a header, as chest X-rays are.

    A label's entry is 1 (has it), 0 (has it not), -1 (uncertain) or nothing (missing). Where validation images are held
    out from the table, no patient is on both sides.

    Args:
        root: the folder that paths in the table begin from. A name without a folder is searched in all folders below.
        table: the CSV file, in that folder or anywhere.
        path_column: where the path or name of an image stands.
        label_columns: the columns of the labels, one each.
        findings_column: in their place, one column with the names of all labels that an image has, separated by ``|``.
        no_finding: what stands there where it has none; None: ``No Finding``.
        missing: what a missing entry in `label_columns` means; None: that nothing is known, so that it takes no part in
            loss and measures.
        uncertain: what -1 means there, likewise.
        patient_column: where the patient stands; None: see `patient_pattern`.
        patient_pattern: a regular expression that finds the patient in the path.
        where: only rows with these entries: ``{Frontal/Lateral: Frontal}``.
        val_fraction: the share of the patients that is held out for validation; None: a tenth, where there is no
            `val_table`.
        val_table: a CSV file of the validation images, likewise.
        test_table: of the test images; None: the validation images are tested.
        test_list: a file with the paths or names of the images in `table` that are test images, one a line.
        kwargs: those of `PhotoDataModule` and `ImageDataModule`.

    Raises:
        UserError: an argument is wrong; from `setup`, a file or column is missing, or an entry is none of these.
    """

    multi_label = True

    def __init__(
        self,
        root: str,
        table: str,
        path_column: str = "path",
        label_columns: list[str] | None = None,
        findings_column: str | None = None,
        no_finding: str | None = None,
        missing: Literal["unknown", "negative"] | None = None,
        uncertain: Literal["unknown", "positive", "negative"] | None = None,
        patient_column: str | None = None,
        patient_pattern: str | None = None,
        where: dict[str, str] | None = None,
        val_fraction: float | None = None,
        val_table: str | None = None,
        test_table: str | None = None,
        test_list: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (label_columns is None) == (findings_column is None):
            raise UserError("give label_columns, one a label, or findings_column, with the names of all labels in one")
        if findings_column is not None and (missing or uncertain):
            raise UserError("a findings_column has no missing and uncertain entries: leave missing and uncertain out")
        if label_columns is not None and len(label_columns) > len({*label_columns}):
            raise UserError(f"label_columns names a column twice: {', '.join(label_columns)}")
        if label_columns is not None and no_finding is not None:
            raise UserError("no_finding is an entry of a findings_column: with label_columns leave it out")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise UserError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
        if val_fraction is not None and val_table is not None:
            raise UserError("val_table has the validation images: leave val_fraction out")
        if test_table is not None and test_list is not None:
            raise UserError("give test_table or test_list, not both")
        if patient_column is not None and patient_pattern is not None:
            raise UserError("give patient_column or patient_pattern, not both")
        self.root = Path(root).expanduser()
        self.table = table
        self.reader = LabelReader(
            label_columns, findings_column, no_finding or "No Finding", missing or "unknown", uncertain or "unknown"
        )
        self.path_column = path_column
        self.patient_column = patient_column
        self.patient_pattern = _compiled(patient_pattern)
        self.where = where or {}
        self.val_fraction = val_fraction or _VAL_FRACTION
        self.val_table = val_table
        self.test_table = test_table
        self.test_list = test_list

    def load(self) -> Splits:
        table = read_rows(self._path_of(self.table))
        rows = self._wanted(table, self.table)
        tested = self._tested(rows, table)
        if tested is not None and self.test_list is not None:
            listed = set(tested)
            rows = [row for row in rows if row not in listed]
        labels = self.reader.names(rows)
        if self.val_table is not None:
            validated = self._rows(self.val_table)
        else:
            rows, validated = self._held_out(rows)
        for other, name in ((validated, "validation"), (tested or [], "test")):
            self._refuse_shared(rows, other, name)
        evaluate = self.preprocessing.transform()
        val = TransformedImages(self._files(validated, labels), evaluate)
        return Splits(
            class_names=tuple(labels),
            train=TransformedImages(self._files(rows, labels), self.own_training_transform()),
            val=val,
            test=val if tested is None else TransformedImages(self._files(tested, labels), evaluate),
            validated=HELD_OUT if self.val_table is None else "validation images",
            tested=NO_TEST_SET if tested is None else "test images",
        )

    def _path_of(self, table: str) -> Path:
        return self.root / table if (self.root / table).exists() else Path(table).expanduser()

    def _rows(self, table: str) -> list[Row]:
        return self._wanted(read_rows(self._path_of(table)), table)

    def _wanted(self, rows: list[Row], table: str) -> list[Row]:
        wanted = [row for row in rows if all(row.entry(column) == value for column, value in self.where.items())]
        if not wanted:
            raise UserError(f"{self._path_of(table)} lists no image" + (f" with {self.where}" if self.where else ""))
        return wanted

    def _tested(self, rows: list[Row], table: list[Row]) -> list[Row] | None:
        """The rows of `test_table`, or those of `rows`, the wanted ones of `table`, that `test_list` names."""
        if self.test_table is not None:
            return self._rows(self.test_table)
        if self.test_list is None:
            return None
        path = self.root / self.test_list if (self.root / self.test_list).exists() else Path(self.test_list)
        if not path.is_file():
            raise UserError(f"there is no file {path}; test_list names one with a path or name of an image a line")
        names = set(read_lines(path))
        tested = [row for row in rows if row.entry(self.path_column) in names]
        if not tested:
            raise UserError(f"no image of the table is in {path}")
        if unknown := names - {row.entry(self.path_column) for row in table}:
            raise UserError(
                f"{path} names images that {self.table} does not ({min(unknown)}; in all {len(unknown)}): write them "
                "as the table does, so that they are not trained on, or leave them out"
            )
        return tested

    def _files(self, rows: list[Row], labels: list[str]) -> LabelledFiles:
        if nameless := [row for row in rows if not row.entry(self.path_column)]:
            raise UserError(f"{nameless[0].location} names no image in the column {self.path_column!r}")
        files = [self._image(row) for row in rows]
        if absent := [file for file in files[:1] if not file.exists()]:
            raise UserError(
                f"there is no image {absent[0]}: data.root is the folder that paths in the table begin from"
            )
        return LabelledFiles(files, [self.reader.targets(row, labels) for row in rows], self.preprocessing)

    def _image(self, row: Row) -> Path:
        """Its file, which rows may name in several ways: ``1.png``, ``./1.png`` and ``folder/1.png``."""
        name = row.entry(self.path_column)
        path = self.root / name
        if "/" in name or path.exists():
            return path
        first, *others = self._files_by_name.get(name, [path])
        if others:
            raise UserError(
                f"{self.root} has several images called {name}, {first} and {others[0]} among them: write paths that "
                f"begin from there into the column {self.path_column!r}"
            )
        return first

    @cached_property
    def _files_by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in sorted(files_below(self.root)):
            found.setdefault(path.name, []).append(path)
        return found

    def _patient(self, row: Row) -> str | None:
        if self.patient_column is not None:
            return row.entry(self.patient_column)
        if self.patient_pattern is None:
            return None
        found = self.patient_pattern.search(row.entry(self.path_column))
        if found is None:
            raise UserError(f"patient_pattern finds no patient in {row.entry(self.path_column)}")
        return found[0]

    def _held_out(self, rows: list[Row]) -> tuple[list[Row], list[Row]]:
        split: Any = require("sklearn.model_selection", "train").GroupShuffleSplit
        patients: list[Any] = [self._patient(row) for row in rows]
        if None in patients:
            warnings.warn(
                "nothing says whose images these are (data.patient_column, data.patient_pattern): images of one "
                "patient may be trained on and validated on",
                stacklevel=2,
            )
            first: dict[Path, int] = {}  # row of an image; others that list it too go with that one
            patients = [first.setdefault(self._image(row), i) for i, row in enumerate(rows)]
            if len(first) < 2:
                raise UserError("there is a single image to divide: give the validation images in a val_table")
        if len(set(patients)) < 2:
            raise UserError("all images are of one patient: give the validation images in a val_table")
        splitter = split(n_splits=1, test_size=self.val_fraction, random_state=self.seed)
        kept, held_out = next(splitter.split(rows, groups=patients))
        return [rows[i] for i in kept], [rows[i] for i in held_out]

    def _refuse_shared(self, rows: list[Row], others: list[Row], name: str) -> None:
        ways: tuple[tuple[str, Callable[[Row], Any], str], ...] = (
            ("patients", self._patient, "split by patient"),
            ("images", self._image, "leave them out of one of the two"),
        )
        for what, of, way_out in ways:
            shared = {of(row) for row in rows} & {of(row) for row in others} - {None}
            if shared:
                raise UserError(
                    f"{what} are in the training images and in the {name} images ({min(map(str, shared))}; in all "
                    f"{len(shared)}): what is measured on them would say too much; {way_out}"
                )


def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise UserError(f"patient_pattern is not a regular expression ({error}): {pattern}") from error
