"""The commands `fit`, `validate` and `test`: Lightning's command line with this package's network, data and defaults.

Every option can stand in a YAML file (``--config``, repeatable, later ones win) or on the command line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from efficient_densenet.errors import UserError, require
from efficient_densenet.files import remove_left_over

for _package in ("lightning", "jsonargparse", "torchmetrics", "torchvision", "matplotlib", "tensorboard", "rich"):
    require(_package, "train")

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch import distributed

from efficient_densenet.training import runs
from efficient_densenet.training.callbacks import (
    Announcement,
    EpochSeed,
    EpochTable,
    Figures,
    NetworkFirst,
    OutOfMemory,
    WithinMemory,
)
from efficient_densenet.training.checkpointing import SafeCheckpointIO, is_of_classifier
from efficient_densenet.training.mistakes import check_settings, mistakes_named
from efficient_densenet.training.module import Classifier, mode_of
from efficient_densenet.training.network_factory import (
    add_placeholders,
    factory_of_configuration,
    remove_what_data_decide,
)
from efficient_densenet.training.resuming import length_of_schedule
from efficient_densenet.training.signals import TERMINATED, EndBetweenBatches
from efficient_densenet.training.tasks import MultiLabel, SingleLabel
from efficient_densenet.units import parse_bytes

_LOGGED_NOISE = ("💡", "GPU available", "TPU available", "HPU available", "Seed set to")
_WARNED_NOISE = (
    r"The number of training batches .* is smaller than the logging interval",  # metrics.csv has every epoch
    r"Checkpoint directory .* exists and is not empty",  # that is what resuming means
    r"Be aware that when using `ckpt_path`, callbacks",  # evaluation has no checkpoints to write
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's affair
    r"\s*(By default only one Jsonargparse|``?\w+``? (parameter )?was deprecated)",  # likewise
    r"The '\w+' does not have many workers",  # a folder of small images needs none
    r"Found \d+ module\(s\) in eval mode at the start of training",  # norms of parts that are frozen
)


def main(command: str, options: list[str]) -> int:
    """Run `command` (fit, validate or test) with its `options`; the exit code.

    Raises:
        UserError: the options, the data or a checkpoint are wrong; the message says which and how.
    """
    _silence_noise()
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # classes that a configuration names are found here
    signals = EndBetweenBatches()
    try:
        with signals.listening(), mistakes_named():
            _CLI(command, options, signals)
    except SystemExit as end:  # where a signal ended it, Lightning has exit codes of its own
        if signals.received == signal.SIGINT:
            raise KeyboardInterrupt from end
        if signals.received == signal.SIGTERM:
            print("efficient-densenet: terminated", file=sys.stderr)
            return TERMINATED
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()  # a process that ends with its threads running is taken for a crashed one
    return 0


def _silence_noise() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_news)
    for message in _WARNED_NOISE:
        warnings.filterwarnings("ignore", message)
    # Where in Lightning a warning came up helps nobody who trains.
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED_NOISE)


class _CLI(LightningCLI):
    def __init__(self, command: str, options: list[str], signals: EndBetweenBatches) -> None:
        self.command = command
        self.signals = signals
        parsing = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            Classifier,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=_SaveConfiguration if command == "fit" else None,
            save_config_kwargs={"overwrite": True},  # a resumed run goes on in its folder
            # Without an image, Lightning's summary says 0 FLOPs. The module says how large its network is.
            trainer_defaults={"default_root_dir": "runs", "enable_model_summary": False},
            seed_everything_default=42,
            parser_kwargs=parsing | {name: dict(parsing) for name in self.subcommands()},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=[command, *options],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that runs: a parser for each takes a while to build."""
        # Checkpoints are never unpickled: there is nothing to choose about weights_only.
        return {self.command: LightningCLI.subcommands()[self.command] | {"weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"data": {"class_path": "efficient_densenet.training.data.Digits"}})
        parser.add_argument("--name", type=str | None, help="what the run is called (None: as its configuration file)")
        # Of fit alone, but the other commands read its configurations.
        parser.add_argument(
            "--memory",
            type=str | None,
            help="what a training step may take, such as 11GB: decides what is kept for backward, in place of "
            "model.network.keep, and divides batches where nothing else helps (None: no limit)",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Without Lightning's warning that sys.argv is something else.
        given = parser.parse_args(args, defaults=False, _skip_validation=True)
        options = given[given.subcommand]
        check_settings(options)
        for name, length in length_of_schedule(options).items():
            options[name] = length
        network = options.get("model.network")
        arguments = set((network.get("init_args") or {}).keys()) if isinstance(network, Namespace) else set()
        if isinstance(network, Namespace):
            add_placeholders(network)
        self.config = parser.parse_object(given)
        self.decided_by_data = remove_what_data_decide(self.config[given.subcommand].model.network, arguments)

    def instantiate_classes(self) -> None:
        # As Lightning does, but for the network: it is made when the data are known.
        config = self.config.clone()
        model = config[self.subcommand].model
        model.network = factory_of_configuration(model.network, self.decided_by_data)
        self.config_init = self.parser.instantiate_classes(config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        self.trainer = self.instantiate_trainer()

    def _parse_ckpt_path(self) -> None:
        """Lightning would take the network from the checkpoint; here it is the configuration's, and has to agree."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        fitting = self.subcommand == "fit"
        options = self.config_init[self.subcommand]
        settings = options.trainer
        name = runs.name_of_run(options.name, options.config or [])
        wanted = options.ckpt_path if fitting else options.ckpt_path or "best"
        root = Path(settings.default_root_dir).absolute()  # best scores are restored for the very same folder alone
        options.ckpt_path = runs.find_checkpoint(root / name, wanted)
        if options.ckpt_path is None and wanted is not None:
            nothing = f"there is no {wanted} checkpoint of the run {name!r} in {root}"
            if not fitting:
                raise UserError(f"{nothing}; train first, or give a file with --ckpt_path")
            print(f"{nothing} yet: training starts from the beginning", file=sys.stderr)
        run = runs.folder_of_run(options.ckpt_path)
        if options.ckpt_path is not None:
            of_a_run = is_of_classifier(options.ckpt_path)
            if fitting and not of_a_run:
                raise UserError(
                    f"{options.ckpt_path} is not a checkpoint of a training run, which holds weights, optimiser and "
                    "epoch; to start from its weights, give --model.weights instead"
                )
            if of_a_run:
                self.model.weights = None  # they are the checkpoint's
            else:
                self.model.weights, self.model.keeps_classes, options.ckpt_path = str(options.ckpt_path), True, None

        if settings.logger is not False:
            others = settings.logger if isinstance(settings.logger, list) else [settings.logger]
            others = [logger for logger in others if logger not in (None, True)]
            kwargs["logger"] = others or False
            if fitting:  # a resumed run goes on in its folder
                remove_left_over((root / name).rglob(".*"))
                own = runs.RunLogger(run.parent if run else root / name, run.name if run else None)
                kwargs["logger"] = [own, *others]  # the first one has the folder
            elif run:
                kwargs["default_root_dir"] = run
        show_bar = settings.enable_progress_bar is not False and sys.stdout.isatty()
        save = fitting and settings.enable_checkpointing is not False
        self.trainer_defaults["callbacks"] = self._callbacks(show_bar, save)
        plugins = settings.plugins if isinstance(settings.plugins, list) else [settings.plugins]
        kwargs["plugins"] = [SafeCheckpointIO(), *(plugin for plugin in plugins if plugin is not None)]
        trainer = super().instantiate_trainer(enable_progress_bar=show_bar, **kwargs)
        trainer.callbacks.insert(0, NetworkFirst())
        if fitting and options.memory is not None:
            trainer.callbacks.insert(1, WithinMemory(parse_bytes(options.memory)))
        if settings.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
            raise UserError("sync_batchnorm works on GPUs alone: leave it out, or train on the CPU with one device")
        if self.model.unfreeze_at is not None and trainer.world_size > 1:
            raise UserError(
                "model.unfreeze_at works in one process alone, for several agree at the beginning on what they train: "
                "train with model.freeze first, and then in a new run from the model.weights of its best.ckpt"
            )
        return trainer

    def _callbacks(self, show_bar: bool, save: bool) -> list[Callback]:
        table = EpochTable(print_rows=not show_bar)
        callbacks: list[Callback] = [table, Figures(table), Announcement(), OutOfMemory(), self.signals]
        seed = self.config[self.subcommand].seed_everything
        if seed is not False:
            callbacks.append(EpochSeed(seed))
        if show_bar:
            callbacks.append(RichProgressBar(leave=True))
        if save:
            # Lightning's save_last would write the last epoch only where it is also the best one.
            task = MultiLabel if getattr(self.datamodule, "multi_label", False) else SingleLabel
            monitor = self.model.monitor or task.best
            callbacks += [_checkpoint("best", monitor=monitor, mode=mode_of(monitor)), _checkpoint("last")]
        return callbacks


class _SaveConfiguration(SaveConfigCallback):
    """Saves what a network requires and the data decided too: the parser refuses a configuration without it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name, value in pl_module.network_factory.decided(pl_module.facts, required=True).items():
            self.config[f"model.network.init_args.{name}"] = value
        super().setup(trainer, pl_module, stage)


def _checkpoint(name: str, **which: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        filename=name,
        save_on_train_epoch_end=True,  # so that a resumed run begins with a whole epoch
        enable_version_counter=False,
        **which,
    )
