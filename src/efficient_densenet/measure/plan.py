"""The command `plan`: what a training step of a model needs in memory, for every way to run it."""

from __future__ import annotations

import argparse
from typing import get_args

import torch

from efficient_densenet.adopt.inspect import add_model, model_and_image
from efficient_densenet.adopt.planner import Optimizer, plan
from efficient_densenet.measure.networks import positive_int
from efficient_densenet.units import parse_bytes

_TYPES = {"float32": (torch.float32, None), "bf16": (torch.bfloat16, None), "amp-bf16": (torch.float32, torch.bfloat16)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images of a step")
    parser.add_argument("--memory", type=parse_bytes, help="that there is for tensors, such as 11GB")
    parser.add_argument(
        "--dtype", choices=tuple(_TYPES), default="float32", help="amp-bf16: float32 under autocast to bfloat16"
    )
    parser.add_argument(
        "--optimizer", choices=get_args(Optimizer), default="sgd", help="what keeps state; sgd: with momentum"
    )


def run(arguments: argparse.Namespace) -> int:
    model, image = model_and_image(arguments)
    dtype, autocast = _TYPES[arguments.dtype]
    print(
        plan(
            model.to(dtype),
            image,
            batch_size=arguments.batch_size,
            memory=arguments.memory,
            optimizer=arguments.optimizer,
            autocast=autocast,
        )
    )
    return 0
