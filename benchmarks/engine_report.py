"""Tables and a plot from the measurements of ``engine.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[dict[str, Any]]

# What the shared buffer is to reach, in bytes per image.
_BARS = {
    ("L=40 k=12", "bottleneck"): 2.1e6,
    ("L=40 k=12", "features"): 2.1e6,
    ("L=40 k=12", "inputs"): 1.8e6,
    ("BC L=100 k=12", "bottleneck"): 6.5e6,
    ("BC L=100 k=12", "features"): 2.9e6,
    ("BC L=100 k=12", "inputs"): 2.4e6,
    ("DenseNet-121", "bottleneck"): 34e6,
    ("DenseNet-121", "features"): 16e6,
    ("DenseNet-121", "inputs"): 14.5e6,
}


def tables(found: dict[str, Any]) -> str:
    """All sections that were measured, in markdown."""
    parts = ["# The shared buffer, measured\n\nMade by `python benchmarks/engine.py` from `engine.json`."]
    for name, (title, make) in _TABLES.items():
        if name in found:
            section = found[name]
            parts.append(f"## {title}\n\n{make(section['records'])}\n\n{source(section)}")
    return "\n\n".join(parts) + "\n"


def source(section: dict[str, Any], dtype: str = "float32") -> str:
    """On what a section was measured, in one line."""
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


def plot(records: Records, file: Path) -> None:
    """Draw memory against depth: all contenders, and those on the shared buffer with their straight lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, record in enumerate(records):
        depths = [int(depth) for depth in record["points"]]
        megabytes = [point["bytes_per_image"] / 1e6 for point in record["points"].values()]
        left.plot(depths, megabytes, "o-", color=f"C{i}", label=record["contender"])
        if record["contender"] != "ordinary":
            ends = [0, max(depths)]
            line = [(record["bytes_at_depth_0"] + record["bytes_per_layer"] * x) / 1e6 for x in ends]
            right.plot(depths, megabytes, "o", color=f"C{i}", label=record["contender"])
            right.plot(ends, line, "-", color=f"C{i}", linewidth=1)
    for axes, title in ((left, "Activation memory, plain DenseNet, k=12, 32×32"), (right, "The shared buffer alone")):
        axes.set(title=title, xlabel="depth L", ylabel="MB per image", xlim=(0, None), ylim=(0, None))
        axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _memory(records: Records) -> str:
    ordinary = {r["network"]: r["bytes_per_image"] for r in records if r["contender"] == "ordinary"}
    rows = []
    for r in records:
        bar = _BARS.get((r["network"], r["contender"]))
        batch, peak = list(r["peak_bytes"].items())[-1]
        rows.append(
            [
                r["network"],
                r["contender"],
                megabytes(r["bytes_per_image"]),
                "" if bar is None else f"{megabytes(bar)} {'reached' if r['bytes_per_image'] <= bar else 'MISSED'}",
                f"{ordinary[r['network']] / r['bytes_per_image']:.1f}",
                f"{megabytes(peak / int(batch))} ({batch})",
            ]
        )
    return table(
        ["network", "contender", "MB per image", "at most", "times less", "with scratch (batch)"],
        rows,
    )


def _resident(records: Records) -> str:
    rows = []
    for r in records:
        batch, peak = list(r["peak_bytes"].items())[-1]
        rows.append([r["network"], r["contender"], megabytes(r["bytes_per_image"]), f"{megabytes(peak)} ({batch})"])
    return table(["network", "contender", "MB per image", "whole process, MB (batch)"], rows)


def _depth(records: Records) -> str:
    depths = list(records[0]["points"])
    lines = table(
        [
            "contender",
            *(f"L={depth}, MB per image" for depth in depths),
            "kB per layer",
            "largest residual of the line",
        ],
        [
            [
                r["contender"],
                *(megabytes(r["points"][depth]["bytes_per_image"]) for depth in depths),
                f"{r['bytes_per_layer'] / 1e3:.1f}",
                f"{r['largest_residual']:.1%}",
            ]
            for r in records
        ],
    )
    return f"{lines}\n\nWithout a bottleneck, `features` is the same as `bottleneck`."


def _time(records: Records) -> str:
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
    return table(["network", "contender", "F ms", "B ms", "F+B ms", "F+B to the faster ordinary form"], rows)


def _max_batch(records: Records) -> str:
    rows = []
    for record in records:
        first = record["results"][0]["largest_batch"]
        for r in record["results"]:
            times = f"{r['largest_batch'] / first:.1f}" if first else "–"
            limit = f"{record['limit_bytes'] / 1e9:g} GB"
            rows.append([record["network"], limit, r["contender"], str(r["largest_batch"]), times])
    return table(["network", "memory of the process", "contender", "largest batch", "times the ordinary"], rows)


_TABLES: dict[str, tuple[str, Callable[[Records], str]]] = {
    "memory": ("Activation memory: live tensor bytes over a training step, constant scratch left out", _memory),
    "resident": ("The same, as peak resident memory of a process", _resident),
    "depth": ("Memory against depth: plain networks, k=12, 32×32", _depth),
    "time": ("Time of forward and backward in plain PyTorch, without native kernels: medians", _time),
    "max-batch": ("The largest batch in a fixed memory", _max_batch),
}


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In markdown; all but the first two columns are figures."""
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
