"""Figures of a training run, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from efficient_densenet.files import replacing
from efficient_densenet.weights.formats import shortened

_MAX_COUNTED_CLASSES = 20  # above, numbers in the cells and names on the axes would not be legible

_LONGEST_NAME = 30
_SCORES = {"top1": "top 1", "top5": "top 5", "auroc": "area under the ROC curve", "ap": "average precision"}


def curves(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs.

    Args:
        rows: of each epoch: ``epoch``, ``train/loss``, ``val/top1``, … as `EpochTable` collects them.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    _line(loss, rows, "train/loss_minimised", "training, minimised")
    for part, name in (("train", "training"), ("val", "validation")):
        _line(loss, rows, f"{part}/loss", name)
        for score, what in _SCORES.items():
            _line(accuracy, rows, f"{part}/{score}", f"{name}, {what}", scale=100)
    _line(rate, rows, "lr", None)
    for axes, title, unit in (
        (loss, "Loss", "cross entropy (nats)"),
        (accuracy, "Accuracy", "images classified right (%)" if "val/top1" in rows[-1] else "mean of all labels (%)"),
        (rate, "Learning rate", "learning rate, mean of the epoch"),
    ):
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    _save(figure, path)


def _line(axes: Axes, rows: Sequence[dict[str, float]], column: str, name: str | None, scale: float = 1) -> None:
    points = [(row["epoch"], scale * row[column]) for row in rows if column in row]
    if points:
        marker = "o" if len(points) < 40 else None
        dashed = column.endswith(("top5", "ap", "minimised"))
        color, style = ("C1" if column.startswith("val") else "C0"), ("--" if dashed else "-")
        axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3, color=color, linestyle=style)


def confusion_matrix(counts: Tensor, class_names: Sequence[str], title: str, path: Path) -> None:
    """How often images of one class (row) were taken for another (column).

    Args:
        counts: ``(classes, classes)`` numbers of images; a row's share of its sum is its colour.
        class_names: in the order of rows and columns.
        title: over the figure; the accuracy is added.
        path: the PNG file to write.
    """
    counts = counts.cpu().double()
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    accuracy = 100 * counts.trace() / counts.sum().clamp(min=1)
    few = len(class_names) <= _MAX_COUNTED_CLASSES
    names = [shortened(name, _LONGEST_NAME) for name in class_names]
    side = 3 + 0.5 * min(len(names), _MAX_COUNTED_CLASSES)
    if few:
        side += max(map(len, names)) / 15  # inches that names take beside the cells
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="share of the images of the true class (%)", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(fill(f"{title}: {accuracy:.2f} % right", width=round(10 * side)), fontsize="large")
    if few:
        literally = {"parse_math": False}  # a name may have dollar signs
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", **literally)
        axes.set_yticks(range(len(names)), names, **literally)
        for row, column in counts.nonzero().tolist():
            color = "white" if shares[row, column] > 50 else "black"
            axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=color, fontsize=9)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)  # needs no display
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120)
