"""`efficient-densenet inspect`: what would become of a model, without training anything."""

from __future__ import annotations

import argparse
import ast
import importlib
from typing import Any

from torch import nn

from efficient_densenet.adopt.report import report
from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP

_SIZES = {1: 224, 2: 224, 3: 64}  # of images and volumes, by their dimensions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--keep", choices=KEEP, default="bottleneck", help="what would stay in memory for backward")


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a model and its images."""
    parser.add_argument(
        "model",
        help="torchvision:NAME, timm:NAME, monai:NAME, torchxrayvision:NAME, smp:ENCODER, or package.module:NAME of "
        "something that returns a model",
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        dest="arguments",
        help="arguments of the model, such as spatial_dims=3",
    )
    parser.add_argument(
        "--image", type=_shape, metavar="C,H,W", help="the shape of one image or volume (None: as usual for the model)"
    )


def run(arguments: argparse.Namespace) -> int:
    model, image = model_and_image(arguments)
    print(report(model, arguments.keep, image))
    return 0


def model_and_image(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...]]:
    """What the options name."""
    given, image = dict(_assignment(text) for text in arguments.arguments), arguments.image
    channels = 1 if arguments.model.startswith("torchxrayvision:") else 3
    if arguments.model.startswith("monai:"):  # these have no defaults of their own
        dims = 2 if image is None else len(image) - 1
        given = {"spatial_dims": dims, "in_channels": image[0] if image else 3, "out_channels": 1000} | given
        channels, dims = given["in_channels"], given["spatial_dims"]
        image = image or (channels, *[_SIZES.get(dims, 64)] * dims)
    return _build(arguments.model, given), image or (channels, 224, 224)


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    source, _, attribute = name.partition(":")
    if not source or not attribute:
        raise UserError(f"{name!r} names no model: write for example torchvision:densenet121 or mypackage.nets:Net")
    if source == "torchvision":
        source = "torchvision.models"
    elif source == "timm":
        attribute, arguments = "create_model", {"model_name": attribute, **arguments}
    elif source == "monai":
        source = "monai.networks.nets"
    elif source == "torchxrayvision":
        source = "torchxrayvision.models"
    elif source == "smp":
        source, attribute, arguments = (
            "segmentation_models_pytorch.encoders", "get_encoder", {"name": attribute, "weights": None, **arguments}
        )  # fmt: skip
    try:
        builder = getattr(importlib.import_module(source), attribute)
    except (ImportError, AttributeError) as error:
        package = source.split(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        way_out = f"; install it with: pip install {package}" if missing else ""
        raise UserError(f"{name} was not found: {error}{way_out}") from error
    except Exception as error:  # whatever a module of the user's raises, or a path where a module's name should stand
        is_path = source.startswith(".") or "/" in source
        way_out = "write for example mypackage.nets:Net" if is_path else "see what it does when it is imported"
        raise UserError(f"{source} cannot be imported: {type(error).__name__}: {error}; {way_out}") from error
    try:
        model = builder(**arguments)
    except Exception as error:
        raise UserError(f"{name} could not be built: {error}; give its arguments with --set NAME=VALUE") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returns {type(model).__name__}, which is no torch.nn.Module")
    return model


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"--set takes NAME=VALUE, not {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word without quotes


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) < 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 3,224,224")
    return tuple(map(int, parts))
