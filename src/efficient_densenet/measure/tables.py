"""Measurements as tables: in markdown for documents, in columns for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from efficient_densenet.units import format_bytes, megabytes

Rows = Sequence[Sequence[str]]
Records = Sequence[Mapping[str, Any]]

_STATISTICS_RIGHT = 0.01
"""As a share of their norm; in half precision they are some thousandths off, moved twice some hundredths."""


def markdown(header: Sequence[str], rows: Rows, names: int = 2) -> str:
    """A table in markdown; all but the first `names` columns are figures."""
    lines = [header, ["---"] * names + ["---:"] * (len(header) - names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def columns(header: Sequence[str], rows: Rows) -> str:
    """A table for a terminal, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def source(section: Mapping[str, Any], dtype: str = "float32") -> str:
    """On what a section of a file of results was measured, in one line."""
    parts = [
        *(["TINY NETWORKS, a trial"] if section["quick"] else []),
        section["hardware"]["cpu"],
        f"{section['hardware']['cores']} cores",
        f"PyTorch {section['versions']['torch']}",
        dtype,
        f"commit {section['commit'] or 'unknown'}",
        section["date"],
    ]
    return ", ".join(parts) + "."


def contest(summary: Records) -> str:
    """The rows of `contest.summarize`, for a terminal."""
    header = ["devices", "contender", "F ms ± std", "median", "B ms ± std", "median", "R=B/F", "F+B ratio",
              "to ordinary", "step memory", "per image", "ratio", "process"]  # fmt: skip

    def milliseconds(part: Mapping[str, float]) -> list[str]:
        if not part["median"]:  # in evaluation there is no backward
            return ["–", "–"]
        return [f"{part['mean']:.2f} ± {part['std']:.2f}", f"{part['median']:.2f}"]

    return columns(
        header,
        [
            [
                str(row["num_devices"]),
                row["contender"],
                *milliseconds(row["F"]),
                *milliseconds(row["B"]),
                f"{row['B/F']:.2f}" if row["B/F"] else "–",
                f"{row['F+B ratio']:.3f}",
                "–" if row["F+B to ordinary"] is None else f"{row['F+B to ordinary']:.3f}",
                format_bytes(row["step_bytes"]),
                format_bytes(row["step_bytes_per_image"]),
                f"{row['memory ratio']:.3f}",
                format_bytes(row["process_bytes"]),
            ]
            for row in summary
        ],
    )


def times(records: Records) -> str:
    """Several contests in markdown: medians, and ratios to the faster of the two ordinary forms."""
    rows = [
        [
            f"{record['network']}, batch {record['batch_size']}",
            row["contender"],
            *(f"{row[part]['median']:,.0f}" for part in ("F", "B")),
            f"{row['F+B']:,.0f}",
            f"{row['F+B to ordinary']:.3f}",
        ]
        for record in records
        for row in record["summary"]
    ]
    return markdown(["network", "contender", "F ms", "B ms", "F+B ms", "F+B to the faster ordinary form"], rows)


def peers(summary: Records, batch_size: int) -> str:
    """The rows of `contest.summarize` where all were compared with float64, for a terminal."""
    return columns(_PEERS, _peers(summary, batch_size))


def side_by_side(records: Records) -> str:
    """The same of several contests, in markdown."""
    parts = []
    for record in records:
        rows = _peers(record["summary"], record["batch_size"])
        parts.append(f"{record['network']}, batch {record['batch_size']}\n\n{markdown(_PEERS, rows, names=1)}")
        parts += gaps(record["gaps"])
    return "\n\n".join(parts)


def gaps(found: Records) -> list[str]:
    """A sentence for each contender that could not take part."""
    return [f"Not measured: {gap['contender']}: {gap['reason']}." for gap in found]


_PEERS = ("contender", "F ms ± std", "B ms ± std", "images/s", "to ordinary, pair by pair (quartiles)", "MB per image",
          "process MB", "first step after s", "error", "running statistics")  # fmt: skip


def _peers(summary: Records, batch_size: int) -> Rows:
    return [
        [
            row["contender"],
            *(
                f"{row[part]['median']:,.0f} ± {row[part]['std']:,.0f}" if row[part]["median"] else "–"
                for part in ("F", "B")
            ),
            f"{1e3 * batch_size / row['F+B']:,.1f}",
            "{median:.3f} ({low:.3f}–{high:.3f})".format(**row["pairs"]) if row["pairs"] else "–",
            megabytes(row["step_bytes_per_image"], 2) if row["step_bytes"] else "–",  # a runtime's own are not seen
            megabytes(row["process_bytes"], 0),
            f"{row['ready_s']:,.1f}",
            *_errors(row["errors"]),
        ]
        for row in summary
    ]


def _errors(found: Mapping[str, float]) -> list[str]:
    """Of the gradient, in evaluation of the output; and whether running statistics are what one step makes of them."""
    error = found.get("gradient", found.get("output"))
    moved = found.get("statistics")
    right = "" if moved is None else "right" if moved < _STATISTICS_RIGHT else f"{moved:.1%} off"
    return ["" if error is None else f"{error:.1e}", right]


def largest_batches(results: Records) -> str:
    """What `max_batch.run` found, for a terminal."""

    def memory(peak: int | None) -> str:
        return "–" if peak is None else format_bytes(peak)

    first = results[0]["largest_batch"] if results else 0
    return columns(
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


def fitting(records: Records) -> str:
    """What `max_batch.run` found for several networks, in markdown."""
    rows = []
    for record in records:
        first = record["results"][0]["largest_batch"]
        for r in record["results"]:
            times = f"{r['largest_batch'] / first:.1f}" if first else "–"
            limit = f"{record['limit_bytes'] / 1e9:g} GB"
            rows.append([f"{record['network']} in {limit}", r["contender"], str(r["largest_batch"]), times])
    table = markdown(["network", "contender", "largest batch", "times the ordinary"], rows)
    return "\n\n".join([table, *(text for record in records for text in gaps(record.get("gaps", [])))])


def memory(records: Records) -> str:
    """`memory.bytes_per_image` of several contenders, in markdown."""
    ordinary = {r["network"]: r["bytes_per_image"] for r in records if r["contender"] == "ordinary"}
    rows = []
    for r in records:
        image = f", {'×'.join(map(str, r['image']))}" if "image" in r else ""
        batch_size, peak = list(r["peak_bytes"].items())[-1]
        per_image = r["bytes_per_image"]
        less = f"{ordinary[r['network']] / per_image:.1f}"
        whole = f"{megabytes(peak, 2)} ({batch_size})"
        rows.append([r["network"] + image, r["contender"], megabytes(per_image, 2), less, whole])
    return markdown(["network", "contender", "MB per image", "times less", "whole peak, MB (batch)"], rows)


def depth(records: Records) -> str:
    """Bytes per image at several depths, with the straight line nearest to them, in markdown."""
    depths = list(records[0]["points"])
    header = ["contender", *(f"L={layers}, MB per image" for layers in depths), "kB per layer",
              "largest residual of the line"]  # fmt: skip
    rows = [
        [
            r["contender"],
            *(megabytes(r["points"][layers]["bytes_per_image"], 2) for layers in depths),
            f"{r['bytes_per_layer'] / 1e3:.1f}",
            f"{r['largest_residual']:.1%}",
        ]
        for r in records
    ]
    table = markdown(header, rows, names=1)
    return f"{table}\n\nWithout a bottleneck, `features` is the same as `bottleneck`."
