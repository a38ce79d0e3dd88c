"""Other people's DenseNets, small and large, and how they are compared with their efficient copies."""

from __future__ import annotations

import copy
from collections.abc import Callable

import monai.networks.nets
import timm
import torch
import torchvision
from comparison import assert_close, training_step, weighted_sum
from torch import Tensor, nn

from efficient_densenet import make_efficient


def torchvision_small(**arguments) -> nn.Module:
    arguments = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 6, "bn_size": 2} | arguments
    return torchvision.models.DenseNet(num_classes=5, **arguments)


def timm_small(name: str = "densenet121", **arguments) -> nn.Module:
    arguments = {"growth_rate": 8, "block_config": (2, 3), "bn_size": 2, "num_classes": 5} | arguments
    if arguments.get("features_only"):
        del arguments["num_classes"]
        arguments |= {"out_indices": (0, 1, 2)}
    return timm.create_model(name, **arguments)


def monai_small(dims: int = 2, **arguments) -> nn.Module:
    arguments = {"growth_rate": 4, "block_config": (2, 3), "init_features": 6, "bn_size": 2} | arguments
    return monai.networks.nets.DenseNet(spatial_dims=dims, in_channels=3, out_channels=5, **arguments)


def xray_small(**arguments) -> nn.Module:
    arguments = {"growth_rate": 4, "block_config": (2, 3), "num_init_features": 6, "bn_size": 2} | arguments
    import torchxrayvision  # slow to import, and not for every process that imports this file

    return torchxrayvision.models.DenseNet(num_classes=5, in_channels=3, **arguments)


def unet(depth: int = 5) -> nn.Module:
    """Of a depth of 3, it runs two of the encoder's four blocks."""
    import segmentation_models_pytorch

    decoder = {"encoder_depth": depth, "decoder_channels": (8, 8, 4, 4, 4)[:depth]}
    return segmentation_models_pytorch.Unet("densenet121", encoder_weights=None, **decoder)


def images(*size: int, n: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 3, *(size or (33, 35)), dtype=dtype)


def randomised(model: nn.Module) -> nn.Module:
    """In float64, the same each time, and nothing trivial in the norms: no gain of one, no mean of zero."""
    generator = torch.Generator().manual_seed(0)
    model.double()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                low = -0.5 if name.endswith(("bias", "mean")) else 0.5
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + low)
            elif tensor.is_floating_point() and tensor.dim() > 1:
                normal = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_(normal * (2 / tensor[0].numel()) ** 0.5)
    return model


def ordinary_copy(model: nn.Module) -> nn.Module:
    """A deep copy without the library's own checkpointing, which moves running averages twice."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for flag in ("memory_efficient", "grad_checkpointing"):
            if hasattr(module, flag):
                setattr(module, flag, False)
    return model


def pair(
    model: nn.Module, keep: str = "bottleneck", change: Callable[[nn.Module], object] = lambda model: None
) -> tuple[nn.Module, nn.Module]:
    """The model, ordinary, and an efficient copy; both are passed through `change` afterwards."""
    ordinary = ordinary_copy(randomised(model))
    efficient = make_efficient(copy.deepcopy(model), keep)
    for network in (ordinary, efficient):
        torch.manual_seed(1)
        change(network)
    return ordinary, efficient


def loss(output: Tensor | list[Tensor] | dict[str, Tensor]) -> Tensor:
    outputs = list(output.values()) if isinstance(output, dict) else output
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.stack([weighted_sum(t) / t.numel() for t in tensors]).sum()


class OneOutput(nn.Module):
    """A network with many outputs, as one with a single one, so that `training_step` can compare them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x)
        return output if isinstance(output, Tensor) else torch.cat([t.flatten() for t in output])


def three_steps(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the third of three steps of SGD produced."""
    network = OneOutput(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(2)  # dropout
    for _ in range(3):
        found = training_step(network, x, loss)
        optimizer.step()
    return found


def assert_trains_alike(ordinary: nn.Module, efficient: nn.Module, x: Tensor) -> None:
    assert_close(three_steps(efficient, x), three_steps(ordinary, x))
