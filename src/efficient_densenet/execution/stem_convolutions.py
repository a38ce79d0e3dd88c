"""What makes a stem's activations, a piece at a time: a convolution of the image, one after norm and relu, or none.

Each kind has the same methods: `make` computes some lines of some images, ``(n, lines, …, C)``, and `backward` takes
their gradient (or a part of it, for all that is done here is linear in it) and adds up what that means for the source
and for the parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from efficient_densenet.execution.buffers import empty_like
from efficient_densenet.execution.norms import Norms, NormSums
from efficient_densenet.execution.plan import Entry
from efficient_densenet.ops.protocol import BackwardOperands, statistics_dtype

_aten = torch.ops.aten
# Under these names, PyTorch's profiler counts multiplications.
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Wanted(NamedTuple):
    """Which gradients."""

    x: bool = False
    weight: bool = False


NOTHING = Wanted()


class OnImage:
    """A convolution of ``x: (N, C, *spatial)``, which may lie in memory in any way."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, entry: Entry, wanted: Wanted) -> None:
        self.x, self.weight, self.bias, self.entry, self.wanted = x, weight, bias, entry, wanted
        self.grad_x = x.new_zeros((x.shape[0], *x.shape[2:], x.shape[1])) if wanted.x else None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        # The first direction is padded in `_read`.
        zeros = [0] * len(entry.stride)
        self.arguments = entry.stride, [0, *entry.padding[1:]], entry.dilation, False, zeros, entry.groups

    def make(self, images: slice, lines: slice) -> Tensor:
        stride, padding, dilation, *_, groups = self.arguments
        convolution = _CONVOLUTIONS[len(stride)]
        made = convolution(self._read(images, lines)[0], self.weight, self.bias, stride, padding, dilation, groups)
        return made.movedim(1, -1).contiguous()

    def backward(self, images: slice, lines: slice, grad: Tensor) -> None:
        image, inside, before = self._read(images, lines)
        of_bias = self.bias is not None
        sizes, mask = [len(self.weight)] if of_bias else None, [self.wanted.x, self.wanted.weight, of_bias]
        gradients = _aten.convolution_backward(grad.movedim(-1, 1), image, self.weight, sizes, *self.arguments, mask)
        if self.grad_x is not None:
            of_image = gradients[0].movedim(1, -1)
            self.grad_x[images, inside] += of_image[:, before : before + inside.stop - inside.start]
        if self.wanted.weight:
            self.grad_weight = _plus(self.grad_weight, gradients[1])
        if of_bias:
            self.grad_bias = _plus(self.grad_bias, gradients[2])

    def _read(self, images: slice, lines: slice) -> tuple[Tensor, slice, int]:
        """What these lines are made of; which lines of the image that holds, and after how many lines of zeros."""
        stride, padding, dilation = self.entry.stride[0], self.entry.padding[0], self.entry.dilation[0]
        start, stop = lines.start * stride - padding, (lines.stop - 1) * stride - padding
        stop += dilation * (self.weight.shape[2] - 1) + 1
        inside = slice(min(max(start, 0), self.x.shape[2]), max(0, min(stop, self.x.shape[2])))
        source = self.x[images, :, inside].movedim(1, -1)
        before = inside.start - start
        read = source.new_zeros((len(source), stop - start, *source.shape[2:]))
        read[:, before : before + source.shape[1]] = source
        return read.movedim(-1, 1), inside, before


class Inner:
    """A convolution that keeps the resolution, after norm `i` and relu, of ``x: (N, *spatial, C)``."""

    def __init__(self, x: Tensor, norms: Norms, i: int, weight: Tensor, bias: Tensor | None, wanted: Wanted) -> None:
        self.x, self.norms, self.i, self.weight, self.bias, self.wanted = x, norms, i, weight, bias, wanted
        self.grad_x = torch.zeros_like(x) if wanted.x else None
        self.sums = NormSums(norms, i)
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def make(self, images: slice, lines: slice) -> Tensor:
        read, before = self._read(lines)
        source = self.x[images, read]
        made = empty_like(source, len(self.weight))
        self.norms.run.norm_relu_conv(source, self.norms.affine(self.i), self.weight, made)
        made = made[:, before : before + lines.stop - lines.start]
        return made if self.bias is None else made.add_(self.bias)

    def backward(self, images: slice, lines: slice, grad: Tensor) -> None:
        assert self.grad_x is not None
        read, before = self._read(lines)
        source, grad_source = self.x[images, read], self.grad_x[images, read]
        whole = empty_like(source, len(self.weight)).zero_()
        whole[:, before : before + grad.shape[1]] = grad
        norm, through = self.norms.affine(self.i), self.sums.through
        operands = BackwardOperands(
            whole, source, norm, self.weight, grad_source, True, through, need_weight=self.wanted.weight
        )
        of_weight, *of_norm = self.norms.run.norm_relu_conv_backward(operands)
        self.sums.add(*of_norm)
        if of_weight is not None:
            self.grad_weight = _plus(self.grad_weight, of_weight)
        if self.bias is not None:
            pixels = tuple(range(grad.dim() - 1))
            self.grad_bias = _plus(self.grad_bias, grad.sum(pixels, dtype=statistics_dtype(grad.dtype)))

    def _read(self, lines: slice) -> tuple[slice, int]:
        """The lines that these are made of, and how many of them come before."""
        halo = self.weight.shape[2] // 2
        start = max(0, lines.start - halo)
        return slice(start, min(self.x.shape[1], lines.stop + halo)), lines.start - start


class NoConvolution:
    """The activations are the input ``x: (N, C, *spatial)``."""

    grad_weight = grad_bias = None

    def __init__(self, x: Tensor, wanted: Wanted) -> None:
        self.x = x
        self.grad_x = x.new_zeros((x.shape[0], *x.shape[2:], x.shape[1])) if wanted.x else None

    def make(self, images: slice, lines: slice) -> Tensor:
        return self.x[images, :, lines].movedim(1, -1).contiguous()

    def backward(self, images: slice, lines: slice, grad: Tensor) -> None:
        if self.grad_x is not None:
            self.grad_x[images, lines] += grad


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    """The sum, in the type of statistics."""
    more = more.to(statistics_dtype(more.dtype))
    return more if total is None else total.add_(more)


Convolution = OnImage | Inner | NoConvolution
