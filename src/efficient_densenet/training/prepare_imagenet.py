"""The command `prepare-imagenet`: the ILSVRC 2012 archives → the folders that `data.ImageNet` reads.

Torchvision checks the archives' MD5 sums and parses them. Everything is unpacked in a folder beside the results and
renamed when it is complete, so that what is there is complete, and a second run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from efficient_densenet.errors import UserError, require

_STAGING = ".unpacking"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--archives", type=Path, required=True, help="folder with the three ILSVRC2012 archives")
    parser.add_argument("--output", type=Path, required=True, help="folder for train, val and meta.bin")


def run(arguments: argparse.Namespace) -> int:
    prepare(arguments.archives, arguments.output)
    print(f"{arguments.output} is ready")
    return 0


def prepare(archives: Path, output: Path) -> None:
    """Make ``train/WNID/*.JPEG``, ``val/WNID/*.JPEG`` and ``meta.bin`` in `output`, as far as they are not there.

    Raises:
        UserError: an archive is missing or damaged, or the disk has too little space.
    """
    imagenet = require("torchvision.datasets.imagenet", "train")
    require("scipy.io", "train")  # torchvision reads the names of the classes with it

    def parse_val(root: Path, file: Path) -> None:
        imagenet.parse_val_archive(root, file, wnids=imagenet.load_meta_file(output)[1])

    # In this order: the classes of the validation images are in the devkit.
    parsers = {"train": imagenet.parse_train_archive, "devkit": imagenet.parse_devkit_archive, "val": parse_val}
    results = {"train": output / "train", "devkit": output / imagenet.META_FILE, "val": output / "val"}
    pending = {part for part, result in results.items() if not result.exists()}
    if "val" in pending:
        pending.add("devkit")
    files = {part: (archives / imagenet.ARCHIVE_META[part][0]).resolve() for part in parsers if part in pending}

    output.mkdir(parents=True, exist_ok=True)
    staging = output / _STAGING
    _remove(staging)  # of a run that was killed
    _check_archives(list(files.values()))
    _check_space(list(files.values()), output)
    try:
        staging.mkdir()
        for part, file in files.items():
            print(f"checking and unpacking {file}", flush=True)
            try:
                parsers[part](staging, file)
            except RuntimeError as error:
                raise UserError(
                    f"{file} is cut short or corrupt (its MD5 sum is not the published one); download it again"
                ) from error
            os.replace(staging / results[part].name, results[part])
    finally:
        _remove(staging)


def _check_archives(files: list[Path]) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{missing[0].parent} lacks {', '.join(file.name for file in missing)}; get the ILSVRC 2012 archives from "
            "https://image-net.org/download.php (after registration) and put them there"
        )


def _check_space(files: list[Path], output: Path) -> None:
    needed = sum(file.stat().st_size for file in files) * 1.05  # the last files' blocks are not full
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"unpacking into {output} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room or give "
            "another --output"
        )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
