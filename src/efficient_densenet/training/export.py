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
from efficient_densenet.training.trained import TrainedNetwork, load_trained

_DYNAMIC = "dynamic"
# Of the largest output. In single precision other libraries sum in another order; in half precision every layer rounds.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2}


class _DisagreementError(Exception):
    """The file that was written computes something else than the network."""


class _Whole(nn.Module):
    """A network with what comes before and behind it inside.

    Shapes: images ``(N, C, H, W)``, normalised or (with `normalize`) of intensities in [0, 1] → logits ``(N, classes)``
    or probabilities.
    """

    def __init__(self, trained: TrainedNetwork, normalize: bool, probabilities: bool) -> None:
        super().__init__()
        self.network = trained.network
        self.activation: Callable[[Tensor], Tensor] | None = trained.probabilities if probabilities else None
        self.normalize = normalize
        mean, std = trained.preprocessing.mean, trained.preprocessing.std
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network((images - self.mean) / self.std if self.normalize else images)
        return outputs if self.activation is None else self.activation(outputs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_reading_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="model.onnx, or model.pt2 for torch.export")
    parser.add_argument(
        "--batch-size", type=_batch_size, default=_DYNAMIC, help=f"images in a batch: a number, or {_DYNAMIC} for any"
    )
    parser.add_argument(
        "--size", type=_size, metavar="H,W", help="of the images in pixels, a side or H,W (None: as in training)"
    )
    parser.add_argument("--half", action="store_true", help="weights, images and outputs in half precision")
    parser.add_argument(
        "--normalize", action="store_true", help="the model takes intensities from 0 to 1 and normalises them itself"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="the model ends with the softmax, or the sigmoid of several labels"
    )


def run(arguments: argparse.Namespace) -> int:
    output: Path = arguments.output
    if output.suffix not in _FORMATS:
        raise UserError(f"the output must end in {' or '.join(_FORMATS)}, not {output.name!r}")
    write, read = _FORMATS[output.suffix]
    trained = load_trained(arguments.checkpoint, **reading_options(arguments))
    whole = _Whole(trained, arguments.normalize, arguments.probabilities).eval()
    preprocessing = trained.preprocessing
    shape = (preprocessing.in_channels, *(arguments.size or (preprocessing.height, preprocessing.width)))
    dynamic = arguments.batch_size == _DYNAMIC
    # Where any number of images will do, another number than the exporter sees is what the result is compared on.
    traced, compared = (2, 3) if dynamic else (arguments.batch_size, arguments.batch_size)
    images = torch.rand(compared, *shape) if arguments.normalize else torch.randn(compared, *shape)
    with torch.no_grad():
        wanted = whole(images)
    dtype = torch.float16 if arguments.half else torch.float32
    try:
        with replacing(output) as beside:
            write(whole.to(dtype), torch.rand(traced, *shape).to(dtype), dynamic, beside)
            difference = _compare(wanted, read(beside)(images.to(dtype)), dtype)
    except _DisagreementError as error:
        print(f"{output} was not written: {error}")
        return 1
    what = "probabilities of" if arguments.probabilities else "logits of"
    print(
        f"{output}: {arguments.batch_size} × {' × '.join(map(str, shape))} images to {what} {len(trained.class_names)} "
        f"classes; largest difference from the network {difference:.1e} of the largest output"
    )
    return 0


def _compare(wanted: Tensor, found: Tensor, dtype: torch.dtype) -> float:
    difference = ((found.float() - wanted).abs().max() / wanted.abs().max()).item()
    if not difference <= _TOLERANCE[dtype]:
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


def _write_onnx(network: _Whole, images: Tensor, dynamic: bool, path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export")
    program = torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["probabilities" if network.activation else "logits"],
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


def _size(text: str) -> tuple[int, int]:
    sides = text.split(",")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be a number of pixels, or two as in 224,320, not {text!r}")
    return int(sides[0]), int(sides[-1])


_FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path], Callable[[Tensor], Tensor]]]] = {
    ".onnx": (_write_onnx, _read_onnx),
    ".pt2": (_write_program, _read_program),
}
