"""The rows of a CSV file, and what their entries say about labels."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path

from efficient_densenet.errors import UserError

_SEPARATORS = (",", ";", "\t")
_BETWEEN_FINDINGS = "|"
_BEYOND = "beyond the columns"
_MEANINGS = {"unknown": nan, "positive": 1.0, "negative": 0.0}


@dataclass(frozen=True, eq=False)
class Row:
    """One line of a CSV file: its entries by column, and the file and line, for messages."""

    entries: dict[str, str]
    location: str

    def entry(self, column: str) -> str:
        """The text in a column.

        Raises:
            UserError: there is no such column, or the line is too short.
        """
        entry = self.entries.get(column)
        if column in self.entries and entry is None:
            raise UserError(f"{self.location} is too short: it ends before the column {column!r}")
        if entry is None:
            columns = ", ".join(name for name in self.entries if name)
            raise UserError(f"{self.location} has no column {column!r}; there are {columns}")
        return entry.strip()


def read_rows(path: Path) -> list[Row]:
    """All rows of a CSV file with a header; commas separate the entries, or semicolons or tabs, as in the header.

    Raises:
        UserError: there is no such file, it is not text, has a column twice, or a line with more entries than columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            separator = max(_SEPARATORS, key=header.count)
            reader = csv.DictReader(file, restkey=_BEYOND, delimiter=separator, skipinitialspace=True)
            rows = [Row(entries, f"{path}, line {i}") for i, entries in enumerate(reader, start=2)]
            columns = reader.fieldnames or []
    except FileNotFoundError as error:
        raise UserError(f"there is no table {path}; it should be a CSV file with a header") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}); save it as such") from error
    if "\0" in header:
        raise UserError(f"{path} is not a CSV file, but of Excel, for example; save it as CSV in UTF-8")
    if twice := [name for name in columns if name and columns.count(name) > 1]:
        raise UserError(f"{path} has the column {twice[0]!r} twice: which one is meant cannot be told; rename one")
    if longer := [row for row in rows if any(row.entries.get(_BEYOND, ()))]:
        raise UserError(
            f"{longer[0].location} has more entries than there are columns: put quotes around one with commas in it"
        )
    return rows


@dataclass(frozen=True)
class LabelReader:
    """How the labels of an image are written in a row, see `ImageTable`."""

    label_columns: Sequence[str] | None
    findings_column: str | None
    no_finding: str
    missing: str
    uncertain: str

    def names(self, rows: Sequence[Row]) -> list[str]:
        """The labels: the columns, or all that are found in the rows, sorted."""
        if self.label_columns is not None:
            return list(self.label_columns)
        column = str(self.findings_column)
        names = sorted({name for row in rows for name in self._findings(row)})
        if not names:
            raise UserError(f"no image has a label in the column {column!r}")
        joined = [name for name in names if "," in name or ";" in name]
        if joined and not any(_BETWEEN_FINDINGS in row.entry(column) for row in rows):
            warnings.warn(
                f"{joined[0]!r} in the column {column!r} is taken as one label: several are separated by "
                f"{_BETWEEN_FINDINGS}",
                stacklevel=2,
            )
        return names

    def targets(self, row: Row, names: Sequence[str]) -> list[float]:
        """Of each label: 1, 0, or NaN for unknown."""
        if self.label_columns is not None:
            return [self._target(row, name) for name in names]
        findings = self._findings(row)
        if unknown := findings - set(names):
            raise UserError(f"{row.location} has the label {min(unknown)!r}, which no training image has")
        return [float(name in findings) for name in names]

    def _findings(self, row: Row) -> set[str]:
        names = {name.strip() for name in row.entry(str(self.findings_column)).split(_BETWEEN_FINDINGS)}
        return names - {self.no_finding, ""}

    def _target(self, row: Row, column: str) -> float:
        entry = row.entry(column)
        if not entry:
            return _MEANINGS[self.missing]
        try:
            return {1.0: 1.0, 0.0: 0.0, -1.0: _MEANINGS[self.uncertain]}[float(entry)]
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{row.location} has {entry!r} for {column!r}; an entry is 1, 0, -1 (uncertain) or nothing"
            ) from error
