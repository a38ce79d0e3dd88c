"""Results as tables to read, and as JSON in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficient_densenet.errors import UserError
from efficient_densenet.files import replacing
from efficient_densenet.measure.memory import format_bytes


def times_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table of `contest.summarize`'s rows."""
    header = ["devices", "contender", "F ms", "± std", "median", "B ms", "± std", "median", "R=B/F", "F+B ratio",
              "to ordinary", "step memory", "per image", "ratio", "process"]  # fmt: skip
    return _table(
        header,
        [
            [
                str(row["num_devices"]),
                row["contender"],
                *(f"{row[part][key]:.2f}" for part in ("F", "B") for key in ("mean", "std", "median")),
                f"{row['B/F']:.2f}",
                f"{row['F+B ratio']:.3f}",
                "–" if row["F+B to ordinary"] is None else f"{row['F+B to ordinary']:.3f}",
                format_bytes(row["step_bytes"]),
                format_bytes(row["step_bytes_per_image"]),
                f"{row['memory ratio']:.3f}",
                format_bytes(row["process_bytes"]),
            ]
            for row in rows
        ],
    )


def batches_table(results: Sequence[dict[str, Any]]) -> str:
    """The table of `max_batch.run`'s results."""

    def memory(peak: int | None) -> str:
        return "–" if peak is None else format_bytes(peak)

    first = results[0]["largest_batch"]
    return _table(
        ["contender", "largest batch", "ratio", "peak", "did not fit", "its peak"],
        [
            [
                result["contender"],
                str(result["largest_batch"]),
                f"{result['largest_batch'] / first:.2f}" if first else "–",
                memory(result["peak_bytes"]),
                str(result["smallest_that_did_not_fit"]),
                memory(result["its_peak_bytes"]),
            ]
            for result in results
        ],
    )


def check_output(file: Path) -> None:
    """Raise `UserError` where `file` could not be written later: known before the long measurement, not after."""
    if file.is_dir():
        raise UserError(f"{file} is a folder: give --output the name of a file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"there is no folder {file.parent} that can be written to: make it, or use another --output")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content` to `file`, all of it or nothing."""
    with replacing(file) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
