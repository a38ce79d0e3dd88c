"""A training run that takes a moment, here or in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from forks import FORKS, preload

from efficient_densenet.cli import main
from efficient_densenet.training import plots

preload(*(f"efficient_densenet.training.{name}" for name in ("lightning_cli", "plots", "data")))
CONFIGS = Path(__file__).parents[1] / "configs"
BRIEF = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=2",
    "--trainer.accelerator=cpu",
    "--data.num_workers=0",
]
CONFIG = """
model:
  network:
    class_path: efficient_densenet.DenseNet
    init_args: {num_init_features: 8, growth_rate: 4, block_config: [1, 1]}
  scheduler: {class_path: torch.optim.lr_scheduler.CosineAnnealingLR}
data: {class_path: Digits, init_args: {num_workers: 0}}
trainer: {accelerator: cpu, devices: 1, max_epochs: 2, limit_train_batches: 2, limit_val_batches: 1}
"""


def run(command: str, folder: Path, *options: str) -> int:
    """The exit code of `command` with `options`; its runs are in ``folder/tiny``. No figures are drawn."""
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    return _run(command, config, folder, *options)


def run_recipe(command: str, recipe: str, folder: Path, *options: str) -> int:
    """Likewise of a configuration in ``configs``, on the CPU and for two batches; its runs are in ``folder/RECIPE``."""
    return _run(command, CONFIGS / f"{recipe}.yaml", folder, *BRIEF[command == "test" :], *options)


def _run(command: str, config: Path, folder: Path, *options: str) -> int:
    with mock.patch.object(plots, "curves"), mock.patch.object(plots, "confusion_matrix"):
        return main([command, "--config", str(config), "--trainer.default_root_dir", str(folder), *options])


def begin_fit(output: Path, config: str, folder: Path, *options: str, first: Sequence[Callable] = ()) -> BaseProcess:
    """A process that fits the configuration `config`, prints to the file `output`, and calls what is `first` before."""
    (folder / "tiny.yaml").write_text(config)
    begun = FORKS.Process(target=_fit, args=(output, folder, options, first))
    begun.start()
    return begun


def _fit(output: Path, folder: Path, options: Sequence[str], first: Sequence[Callable]) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for change in first:
        change()
    sys.exit(_run("fit", folder / "tiny.yaml", folder, *options))
