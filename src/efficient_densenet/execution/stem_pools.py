"""The pools that a stem ends with, after norm and relu, of activations ``(N, *spatial, C)``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_densenet.ops.eager import norm_gradients
from efficient_densenet.ops.protocol import Affine, Backend

_aten = torch.ops.aten
# The window, stride, padding, dilation and rounding up of a blurred max pool.
_WINDOW = [3, 3], [1, 1], [1, 1], [1, 1], False


class MaxPool:
    """Of window 3, stride 2 and padding 1."""

    by_lines = True  # whether a part of an image can be pooled by itself, see `pieces`

    def size(self, size: Sequence[int]) -> list[int]:
        """The spatial size of what it makes."""
        return [(n + 1) // 2 for n in size]

    def forward(self, run: Backend, x: Tensor, affine: Affine, out: Tensor) -> None:
        run.norm_relu_max_pool(x, affine, out)

    def backward(
        self, run: Backend, grad_out: Tensor, x: Tensor, affine: Affine, grad_x: Tensor, through: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `Backend.norm_relu_max_pool_backward`."""
        return run.norm_relu_max_pool_backward(grad_out, x, affine, grad_x, through)


class BlurredPool:
    """A max pool of window 3, stride 1 and padding 1, and a constant filter of each channel, in two dimensions.

    By PyTorch, each image by itself, for what lies between is several times as large as the activations.

    Source: Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019.
    """

    by_lines = False

    def __init__(self, filter_: Tensor, padding: Sequence[int], mode: str, stride: Sequence[int]) -> None:
        self.filter, self.padding, self.mode = filter_, list(padding), mode
        self.arguments = list(stride), [0, 0], [1, 1], False, [0, 0], len(filter_)

    def size(self, size: Sequence[int]) -> list[int]:
        left, right, above, below = self.padding
        pads, stride = (above + below, left + right), self.arguments[0]
        directions = zip(size, pads, self.filter.shape[2:], stride, strict=True)
        return [(n + pad - window) // step + 1 for n, pad, window, step in directions]

    def forward(self, run: Backend, x: Tensor, affine: Affine, out: Tensor) -> None:
        for i in range(len(x)):
            padded = self._padded(_aten.max_pool2d_with_indices(_rectified(x[i : i + 1], affine), *_WINDOW)[0])
            out[i : i + 1] = _aten.convolution(padded, self.filter, None, *self.arguments).movedim(1, -1)

    def backward(
        self, run: Backend, grad_out: Tensor, x: Tensor, affine: Affine, grad_x: Tensor, through: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros((2, x.shape[-1]), dtype=affine.mean.dtype, device=x.device)
        for i in range(len(x)):
            s = _rectified(x[i : i + 1], affine)
            largest, indices = _aten.max_pool2d_with_indices(s, *_WINDOW)
            g, _, _ = _aten.convolution_backward(
                grad_out[i : i + 1].movedim(-1, 1),
                self._padded(largest),
                self.filter,
                None,
                *self.arguments,
                [True, False, False],
            )
            if self.mode == "reflect":
                g = _aten.reflection_pad2d_backward(g, largest, self.padding)
            else:
                g = F.pad(g, [-pad for pad in self.padding])
            g = _aten.max_pool2d_with_indices_backward(g, s, *_WINDOW, indices) * (s > 0)
            g = g.movedim(1, -1).to(affine.scale.dtype)
            grad_x[i : i + 1] = g * affine.scale
            sums += torch.stack([g.sum((0, 1, 2)), (g * (x[i : i + 1] - affine.mean)).sum((0, 1, 2))])
        return norm_gradients(affine, sums, through)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, self.mode)


def _rectified(x: Tensor, affine: Affine) -> Tensor:
    return torch.relu(x * affine.scale + affine.shift).to(x.dtype).movedim(-1, 1)
