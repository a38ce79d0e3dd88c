"""What the data decide about a network and its training, read from a data module of anybody."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from efficient_densenet.errors import UserError


@dataclass(frozen=True)
class DataFacts:
    """What a data module says of its images. None: it says nothing, and the network's configuration decides.

    Attributes:
        class_names: in the order of the network's outputs.
        in_channels: channels of the images.
        input_size: the shorter side of the images in pixels.
        multi_label: whether an image can have several classes or none; targets are then ``(N, classes)`` numbers from
            0 to 1, and NaN where nothing is known.
        preprocessing: what evaluation does to an image, as plain data.
        tested: what the test set is, for people to read.
        divided: how many images are for what, likewise; empty: nothing is said.
        held_out_by: where validation images are drawn from the training images, what says which they are.
    """

    class_names: list[str] | None
    in_channels: int | None
    input_size: int | None
    multi_label: bool
    preprocessing: dict[str, Any] | None
    tested: str
    divided: str
    held_out_by: dict[str, int] | None

    def __str__(self) -> str:
        said = []
        if self.in_channels is not None:
            size = self.preprocessing["size"] if self.preprocessing else self.input_size
            side = f" of {'×'.join(map(str, size)) if isinstance(size, list) else size} pixels" if size else ""
            said.append(f"images{side} with {self.in_channels} channel{'s' if self.in_channels != 1 else ''}")
        if self.class_names is not None:
            kind = "labels" if self.multi_label else "classes"
            names = ", ".join(self.class_names[:6]) + (", …" if len(self.class_names) > 6 else "")
            said.append(f"{len(self.class_names)} {kind} ({names})")
        return ", ".join(said)


def facts_of(data: LightningDataModule) -> DataFacts:
    """Read the attributes ``class_names`` (or ``num_classes``), ``in_channels``, ``input_size``, ``multi_label``,
    ``preprocessing``, ``tested``, ``divided`` and ``held_out_by`` of `data`, as far as it has them.

    Raises:
        UserError: there are fewer than two classes, or not even one label.
    """
    names, number = getattr(data, "class_names", None), getattr(data, "num_classes", None)
    if names is None and number is not None:
        names = numbered(number)
    multi_label = bool(getattr(data, "multi_label", False))
    if names is not None and len(names) < 2 - multi_label:
        raise UserError(f"the data have a single class ({', '.join(names)}); give images of at least two")
    preprocessing = getattr(data, "preprocessing", None)
    return DataFacts(
        class_names=None if names is None else [str(name) for name in names],
        in_channels=getattr(data, "in_channels", None),
        input_size=getattr(data, "input_size", None),
        multi_label=multi_label,
        preprocessing=None if preprocessing is None else preprocessing.to_dict(),
        tested=getattr(data, "tested", "test images"),
        divided=getattr(data, "divided", ""),
        held_out_by=getattr(data, "held_out_by", None),
    )


def numbered(classes: int) -> list[str]:
    """The names of classes that have none."""
    return [str(i) for i in range(classes)]


def refuse_other_classes(trained: list[str] | None, given: list[str], checkpoint: str | Path | None) -> None:
    """Refuse a checkpoint that was trained for other classes.

    Outputs of a network say nothing of other classes than it was trained for, also where there are as many. Classes
    that are numbers have no names: any names of as many classes may be theirs, and are accepted. So are all where the
    checkpoint, of another program, does not name any.

    Raises:
        UserError: the names of the classes of a checkpoint, and of those given, are not the same in the same order.
    """
    if trained is None or trained == given:
        return
    if len(trained) != len(given):
        others = f"for {len(trained)} classes and the data have {len(given)}"
    elif numbered(len(given)) in (trained, given):
        return
    else:
        first, second = next((a, b) for a, b in zip(trained, given, strict=True) if a != b)
        others = f"for other classes than the data have, {first!r} in the place of {second!r} for one"
    raise UserError(
        f"the checkpoint {checkpoint} was trained {others}: give the data that it was trained on, or start a new run "
        "with --model.weights"
    )


def refuse_other_division(
    trained: dict[str, int] | None, given: dict[str, int] | None, checkpoint: str | Path | None
) -> str:
    """Refuse a checkpoint that was trained on images of which others were held out for validation than now.

    Where there are more or fewer images than in training, they may be others: that is said, not refused.

    Args:
        trained: the `DataFacts.held_out_by` of the checkpoint.
        given: that of the data.
        checkpoint: its name.

    Returns:
        What is to be said; empty: nothing.

    Raises:
        UserError: it would be validated on images that it was trained on.
    """
    if trained is None or given is None or trained == given:
        return ""
    then, now = (division["kept"] + division["held_out"] for division in (trained, given))
    if then != now:
        return (
            f"{now} images are divided, and {then} were when the checkpoint was trained: those that it was trained on "
            "may be among the validation images"
        )
    raise UserError(
        f"the checkpoint {checkpoint} was trained on {trained['kept']} images, drawn with data.seed {trained['seed']}, "
        f"and here {given['kept']} are drawn with {given['seed']}: it would be validated on images that it was trained "
        "on; give the same data.seed and data.val_fraction"
    )
