"""A small fully convolutional DenseNet for segmentation, its dense blocks on shared buffers.

    python examples/fc_densenet.py

trains it for a few steps on made-up images: bright discs on a noisy background are to be found. The blocks are written
with `dense_block`; `make_efficient` finds them, and the transitions on the way down too.

Source: Jégou, Drozdzal, Vazquez, Romero, Bengio, "The One Hundred Layers Tiramisu: Fully Convolutional DenseNets for
Semantic Segmentation", 2017. On the way up only what a block adds is upsampled.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from efficient_densenet import dense_block, make_efficient


class DenseBlock(nn.Module):
    """Shapes: ``(N, C, H, W)`` → ``(N, C + layers·growth, H, W)``, the input's channels first."""

    def __init__(self, channels: int, layers: int, growth: int, keep: str) -> None:
        super().__init__()
        self.keep = keep
        self.layers = nn.ModuleList(self._layer(channels + i * growth, growth) for i in range(layers))

    @staticmethod
    def _layer(channels: int, growth: int) -> nn.Sequential:
        return nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, growth, 3, padding=1, bias=False),
            nn.Dropout2d(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return dense_block(x, self.layers, self.keep)


class FCDenseNet(nn.Module):
    """Shapes: images ``(N, 3, H, W)`` → scores ``(N, classes, H, W)``; H and W divisible by ``2**len(blocks)``.

    Args:
        blocks: dense layers of each block on the way down, and in reverse order up again.
        bottom: dense layers of the block at the lowest resolution.
        growth: channels that each layer adds.
        keep: as in `efficient_densenet.dense_block`.
    """

    def __init__(
        self, classes: int, blocks: tuple[int, ...] = (3, 4), bottom: int = 5, growth: int = 8, keep: str = "features"
    ) -> None:
        super().__init__()
        width = 24
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.narrow, skipped = nn.ModuleList(), nn.ModuleList(), []
        for layers in blocks:
            self.down.append(DenseBlock(width, layers, growth, keep))
            width += layers * growth
            skipped.append(width)
            self.narrow.append(
                nn.Sequential(
                    nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1), nn.Dropout2d(0.1), nn.MaxPool2d(2)
                )
            )
        self.bottom = DenseBlock(width, bottom, growth, keep)
        added = bottom * growth
        self.widen, self.up = nn.ModuleList(), nn.ModuleList()
        for layers, skip in zip(reversed(blocks), reversed(skipped), strict=True):
            self.widen.append(nn.ConvTranspose2d(added, added, 2, stride=2))
            self.up.append(DenseBlock(added + skip, layers, growth, keep))
            width, added = added + skip + layers * growth, layers * growth
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.stem(x), []
        for block, narrow in zip(self.down, self.narrow, strict=True):
            x = block(x)
            skips.append(x)
            x = narrow(x)
        before = x.shape[1]
        x = self.bottom(x)
        for widen, block in zip(self.widen, self.up, strict=True):
            x = torch.cat([widen(x[:, before:]), skips.pop()], 1)
            before = x.shape[1]
            x = block(x)
        return self.head(x)


def discs(n: int, size: int) -> tuple[Tensor, Tensor]:
    """Images ``(n, 3, size, size)`` with a bright disc each, and which pixels belong to it."""
    centre, radius = torch.rand(n, 2, 1, 1) * size, (torch.rand(n, 1, 1) * 0.2 + 0.15) * size
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    inside = (y - centre[:, 0]).square() + (x - centre[:, 1]).square() < radius.square()
    return torch.randn(n, 3, size, size) + 1.5 * inside[:, None], inside.long()


def main(steps: int = 20, size: int = 48) -> float:
    """Train, and return the share of pixels that are right in new images."""
    torch.manual_seed(0)
    network = make_efficient(FCDenseNet(classes=2), keep="features")
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        images, inside = discs(4, size)
        loss = F.cross_entropy(network(images), inside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    images, inside = discs(8, size)
    with torch.no_grad():
        right = (network.eval()(images).argmax(1) == inside).float().mean().item()
    print(f"{right:.1%} of the pixels of new images are right")
    return right


if __name__ == "__main__":
    main()
