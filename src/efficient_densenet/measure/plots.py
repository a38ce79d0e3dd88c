"""Measurements as pictures. Each PNG carries the digest of what it was drawn from, so that a stale one is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efficient_densenet.errors import require
from efficient_densenet.files import replacing
from efficient_densenet.measure.contenders import ORDINARY, OURS
from efficient_densenet.measure.tables import Records

_KEY = "Source"


def memory_against_depth(figure: Any, records: Records) -> None:
    """Bytes per image of plain networks: all contenders, and those on the shared buffer with their straight lines."""
    left, right = figure.subplots(1, 2)
    for i, record in enumerate(records):
        name, colour = record["contender"], f"C{i}"
        depths = [int(depth) for depth in record["points"]]
        megabytes = [point["bytes_per_image"] / 1e6 for point in record["points"].values()]
        point = {"color": colour, "label": name, "markersize": 9 - 2 * i}  # those that lie on each other are seen
        left.plot(depths, megabytes, "o-", **point)
        if name != "ordinary":
            ends = [0, max(depths)]
            line = [(record["bytes_at_depth_0"] + record["bytes_per_layer"] * x) / 1e6 for x in ends]
            right.plot(depths, megabytes, "o", **point)
            right.plot(ends, line, "-", color=colour, linewidth=1)
    for axes, title in ((left, "Activation memory, plain DenseNet, k=12, 32×32"), (right, "The shared buffer alone")):
        axes.set(title=title, xlabel="depth L", ylabel="MB per image", xlim=(0, None), ylim=(0, None))
        axes.legend()


def time_against_memory(figure: Any, records: Records) -> None:
    """A contest of contenders for each network: what a step takes, and what it adds in memory."""
    for axes, record in zip(figure.subplots(1, len(records), squeeze=False)[0], records, strict=True):
        for i, row in enumerate(record["summary"]):
            marker = "s" if row["contender"] in ORDINARY else "o" if row["contender"] in OURS else "^"
            x, y = row["step_bytes_per_image"] / 1e6, row["F+B"]
            axes.plot(x, y, marker, color=f"C{i}", markersize=9, label=row["contender"])
        axes.set(
            title=f"{record['network']}, batch {record['batch_size']}",
            xlabel="activation memory, MB per image",
            ylabel="forward and backward, ms",
            xlim=(0, None),
            ylim=(0, None),
        )
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def errors_against_float64(figure: Any, records: Records) -> None:
    """The errors of outputs and gradients, as shares of their norms: the ways to run a network, by type."""
    types = list(dict.fromkeys(record["dtype"] for record in records))
    ways = list(dict.fromkeys(record["contender"] for record in records))
    titles = {"output": "Output in evaluation", "gradient": "Gradient of a training step"}
    for axes, (what, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for i, way in enumerate(ways):
            aside = (i - (len(ways) - 1) / 2) / 9  # or the points of a type would lie on each other
            x = [types.index(record["dtype"]) + aside for record in records if record["contender"] == way]
            y = [record[what] for record in records if record["contender"] == way]
            style = (
                {"marker": "s", "color": f"{0.3 + 0.3 * i}"} if way in ORDINARY else {"marker": "o", "color": f"C{i}"}
            )
            axes.plot(x, y, linestyle="", label=way, **style)
        axes.set(title=title, xticks=range(len(types)), xticklabels=types, yscale="log")
        axes.grid(axis="y", color="0.9")
    figure.suptitle(f"{records[0]['network']}, batch {records[0]['batch_size']}")
    figure.axes[0].set_ylabel("error against float64, as a share of the norm")
    figure.axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))


def memory_over_a_step(figure: Any, records: Records) -> None:
    """Megabytes alive at each operation: all ways, and those on the shared buffer."""
    for axes, shown in zip(figure.subplots(1, 2), (records, [r for r in records if r["way"] in OURS]), strict=True):
        for record in shown:
            # Ways differ in how many operations they have: each half of the step gets half of the axis.
            halves = [record["forward"], record["backward"]]
            x = [half + (i + 1) / len(values) for half, values in enumerate(halves) for i in range(len(values))]
            megabytes = [nbytes / 1e6 for half in halves for nbytes in half]
            axes.plot(x, megabytes, color=f"C{records.index(record)}", label=record["way"], linewidth=1.2)
        axes.axvline(1, color="0.7", linewidth=0.8)
        axes.set(xticks=[0.5, 1.5], xticklabels=["forward", "backward"], ylabel="MB", xlim=(0, 2), ylim=(0, None))
        ways = "every way" if shown is records else "the efficient ways"
        axes.set_title(f"{shown[0]['network']}, batch {shown[0]['batch_size']}: {ways}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")


def training_curves(figure: Any, records: Records) -> None:
    """Loss and held-out error by epoch: means over the seeds as lines, and the range of the ordinary network's."""
    ways = list(dict.fromkeys(record["way"] for record in records))
    styles = dict(zip(ways, ("-", "--", "-.", ":"), strict=False))
    for axes, what in zip(figure.subplots(1, 2), ("loss", "error"), strict=True):
        for way in ways:
            runs = list(zip(*(record[what] for record in records if record["way"] == way), strict=True))
            epochs = range(1, len(runs) + 1)
            if way in ORDINARY:
                low, high = [min(run) for run in runs], [max(run) for run in runs]
                axes.fill_between(epochs, low, high, color="0.85", label=f"{way}, all seeds")
            axes.plot(epochs, [sum(run) / len(run) for run in runs], styles[way], label=f"{way}, mean")
        axes.set(xlabel="epoch", yscale="log")
        axes.legend()
    left, right = figure.axes
    left.set_title("Training loss, scanned digits")
    right.set_title("Share of held-out digits that is wrong")


Draw = Callable[[Any, Records], None]


def save(draw: Draw, records: Records, file: Path) -> None:
    """Draw what was measured into a PNG."""
    require("matplotlib", "peers")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    draw(figure, records)
    with replacing(file) as beside:
        figure.savefig(beside, dpi=120, metadata={_KEY: _digest(records)})


def is_current(records: Records, file: Path) -> bool:
    """Whether a PNG was drawn from these measurements by this code."""
    image = require("PIL.Image", "peers")
    if not file.exists():
        return False
    with image.open(file) as picture:
        return picture.text.get(_KEY) == _digest(records)


def _digest(records: Records) -> str:
    """Of the measurements and of this file. Not of the picture, which depends on the version of Matplotlib."""
    return hashlib.sha256(json.dumps(records).encode() + Path(__file__).read_bytes()).hexdigest()
