"""The same network from other libraries, with their checkpoints, and in the runtimes that people use for evaluation.

All of them have the weights of ours. They are extras; a contender whose package is missing says how to install it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efficient_densenet.errors import UserError, require
from efficient_densenet.measure.networks import Network
from efficient_densenet.models.densenet import DenseBlock, DenseLayer, DenseNet


def torchvision(network: Network, memory_efficient: bool = False) -> nn.Module:
    """torchvision's; its flag checkpoints each layer up to its bottleneck output."""
    library = require("torchvision", "peers").models
    return _with_the_weights_of(
        network, lambda **shape: library.DenseNet(memory_efficient=memory_efficient, **shape), "torchvision"
    )


def timm(network: Network, memory_efficient: bool = False) -> nn.Module:
    """timm's, whose stem makes twice the growth rate; its flag does what torchvision's does."""
    library = require("timm", "peers").models.densenet

    def build(num_init_features: int, drop_rate: float, **shape: Any) -> nn.Module:
        return library.DenseNet(memory_efficient=memory_efficient, proj_drop_rate=drop_rate, **shape)

    return _with_the_weights_of(network, build, "timm")


def monai(network: Network) -> nn.Module:
    """MONAI's in two dimensions, which concatenates after each layer."""
    library = require("monai.networks.nets", "peers")

    def build(num_init_features: int, num_classes: int, drop_rate: float, **shape: Any) -> nn.Module:
        return library.DenseNet(2, 3, num_classes, num_init_features, dropout_prob=drop_rate, **shape)

    return _with_the_weights_of(network, build, "MONAI")


def resnet50(network: Network) -> nn.Module:
    """torchvision's ResNet-50: another network of about the same accuracy."""
    return require("torchvision", "peers").models.resnet50(num_classes=network.num_classes)


def _with_the_weights_of(network: Network, build: Callable[..., nn.Module], library: str) -> nn.Module:
    """Another library's network with the shape and the weights of ours."""
    ours = network.build()
    found = build(**_shape(ours)) if _layer(ours).has_bottleneck else nn.Identity()
    if not copy_state(ours, found):
        raise UserError(f"{library} has no network of the shape of {network}: leave it out of --contenders")
    return found


def copy_state(source: nn.Module, target: nn.Module) -> bool:
    """Copy parameters and buffers in their order, whatever they are called; False where the shapes differ.

    Every library registers the layers of a DenseNet in the same order.
    """
    values, tensors = source.state_dict().values(), target.state_dict().values()
    if [value.shape for value in values] != [tensor.shape for tensor in tensors]:
        return False
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)
    return True


def _shape(ours: DenseNet) -> dict[str, Any]:
    layer, blocks = _layer(ours), [part for part in ours.features if isinstance(part, DenseBlock)]
    return {
        "growth_rate": layer.conv2.out_channels,
        "block_config": tuple(len(list(block.children())) for block in blocks),
        "num_init_features": ours.features[0].out_channels,
        "bn_size": layer.conv1.out_channels // layer.conv2.out_channels,
        "drop_rate": layer.drop_rate,
        "num_classes": ours.num_classes,
    }


def _layer(ours: DenseNet) -> DenseLayer:
    return next(module for module in ours.modules() if isinstance(module, DenseLayer))


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
