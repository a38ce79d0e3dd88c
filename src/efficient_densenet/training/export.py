"""The command `export`: a trained network as an ONNX model or as a `torch.export` program, checked after writing."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efficient_densenet.checkpoints.options import add_reading_arguments, reading_options
from efficient_densenet.errors import UserError, require

for _package in ("lightning", "torchvision"):
    require(_package, "train")

from efficient_densenet.files import replacing
from efficient_densenet.training.trained import load_trained

_DYNAMIC = "dynamic"
_TOLERANCE = 1e-4  # of the largest output; other libraries sum in another order, in single precision


class _DisagreementError(Exception):
    """The file that was written computes something else than the network."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="model.onnx, or model.pt2 for torch.export")
    parser.add_argument(
        "--batch-size", type=_batch_size, default=_DYNAMIC, help=f"images in a batch: a number, or {_DYNAMIC} for any"
    )


def run(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    if output.suffix not in _FORMATS:
        raise UserError(f"the output must end in {' or '.join(_FORMATS)}, not {output.name!r}")
    write, read = _FORMATS[output.suffix]
    trained = load_trained(arguments.checkpoint, **reading_options(arguments))
    shape = (trained.preprocessing.in_channels, trained.preprocessing.size, trained.preprocessing.size)
    dynamic = arguments.batch_size == _DYNAMIC
    # Where any number of images will do, another number than the exporter sees is what the result is compared on.
    traced, compared = (2, 3) if dynamic else (arguments.batch_size, arguments.batch_size)
    try:
        with replacing(output) as beside:
            write(trained.network, torch.randn(traced, *shape), dynamic, beside)
            difference = _compare(trained.network, read(beside), torch.randn(compared, *shape))
    except _DisagreementError as error:
        print(f"{output} was not written: {error}")
        return 1
    print(
        f"{output}: {arguments.batch_size} × {' × '.join(map(str, shape))} images to {len(trained.class_names)} "
        "classes; "
        f"largest difference from the network {difference:.1e} of the largest output"
    )
    return 0


def _compare(network: nn.Module, exported: Callable[[Tensor], Tensor], images: Tensor) -> float:
    with torch.no_grad():
        wanted = network(images)
    difference = ((exported(images) - wanted).abs().max() / wanted.abs().max()).item()
    if not difference <= _TOLERANCE:
        raise _DisagreementError(f"its outputs differ from the network's by {difference:.1e} of the largest")
    return difference


def _write_program(network: nn.Module, images: Tensor, dynamic: bool, path: Path) -> None:
    buffer = io.BytesIO()  # torch's own writer ends the process where a disk is full
    torch.export.save(torch.export.export(network, (images,), dynamic_shapes=_dynamic_shapes(dynamic)), buffer)
    path.write_bytes(buffer.getbuffer())


def _read_program(path: Path) -> Callable[[Tensor], Tensor]:
    program = torch.export.load(path).module()

    def run_program(images: Tensor) -> Tensor:
        with torch.no_grad():
            return program(images)

    return run_program


def _write_onnx(network: nn.Module, images: Tensor, dynamic: bool, path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export")
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_dynamic_shapes(dynamic),
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    onnxruntime = require("onnxruntime", "export")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _dynamic_shapes(dynamic: bool) -> Any:
    return ({0: torch.export.Dim("batch")},) if dynamic else None


def _batch_size(text: str) -> int | str:
    if text == _DYNAMIC:
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, or {_DYNAMIC}, not {text!r}")
    return int(text)


_FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    ".onnx": (_write_onnx, _read_onnx),
    ".pt2": (_write_program, _read_program),
}
