"""The ordinary network as others run it: with checkpoints, and in the runtimes that people use for evaluation.

The runtimes are extras; a contender whose package is missing says how to install it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efficient_densenet.errors import require
from efficient_densenet.measure.networks import Network
from efficient_densenet.models.densenet import DenseLayer


def checkpointing(network: Network) -> nn.Module:
    """Concatenation, norm, relu and convolution up to a layer's bottleneck output run again in backward.

    So do torchvision and timm with ``memory_efficient=True``; a layer without bottleneck runs again whole. Running
    averages then move twice in each step, as they do there.
    """
    ordinary = network.build()
    for module in ordinary.modules():
        if isinstance(module, DenseLayer):
            _checkpoint_first_convolution(module)
    return ordinary


def _checkpoint_first_convolution(layer: DenseLayer) -> None:
    def first(*inputs: Tensor) -> Tensor:
        return layer.conv1(layer.relu1(layer.norm1(torch.cat(inputs, 1))))

    def forward(features: Sequence[Tensor]) -> Tensor:
        x = checkpoint(first, *features, use_reentrant=False)
        if layer.has_bottleneck:
            x = layer.conv2(layer.relu2(layer.norm2(x)))
        return nn.functional.dropout(x, layer.drop_rate, layer.training)

    layer.forward = forward  # type: ignore[method-assign]


class ONNXRuntime(nn.Module):
    """The network in ONNX Runtime, on as many threads as PyTorch has."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        runtime = require("onnxruntime", "peers")
        require("onnxscript", "peers")
        images, _ = network.batch(2)
        batch = {0: torch.export.Dim("batch")}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            torch.onnx.export(
                network.build().eval(), (images,), path, dynamo=True, dynamic_shapes=(batch,), verbose=False
            )
            options = runtime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        (name,) = (made.name for made in self.session.get_inputs())
        return torch.from_numpy(self.session.run(None, {name: x.numpy()})[0])


class OpenVINO(nn.Module):
    """The network in OpenVINO, on as many threads as PyTorch has, in float32."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        openvino = require("openvino", "peers")
        images, _ = network.batch(2)
        size = [-1, *images.shape[1:]]
        model = openvino.convert_model(network.build().eval(), example_input=images, input=size)
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = openvino.compile_model(model, "CPU", settings)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled(x.numpy())[0])
