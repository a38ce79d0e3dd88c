"""The stem of an ImageNet network, convolutions with norm and relu after each, then a max pool: forward and backward.

The output of the last convolution is the largest tensor of the network, and is kept only where that is wanted
(`Stem.keeps_last`): else backward makes it again, a few images or lines at a time (see `pieces`), so that neither it
nor its gradient exists whole. The gradient of a norm that uses the batch's statistics needs two sums over all pixels
before its first value is known. Backward then goes over the pieces twice: for the sums, and for the gradients of what
lies before the norm. As many pieces as there is memory for wait for the second time (`held_values`): a small batch is
not made twice.

Kept besides are the input and the outputs of the convolutions before the last. Everything here is on tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from efficient_densenet import ops
from efficient_densenet.execution.buffers import empty_activation, empty_like
from efficient_densenet.execution.norms import Folded, Norm, Norms, NormSums, empty_folded
from efficient_densenet.execution.pieces import Piece, held_values, pieces
from efficient_densenet.execution.plan import Entry
from efficient_densenet.execution.stage import Gradients
from efficient_densenet.execution.stem_convolutions import (
    NOTHING,
    Convolution,
    Inner,
    NoConvolution,
    OnImage,
    Wanted,
)
from efficient_densenet.execution.stem_pools import BlurredPool, MaxPool
from efficient_densenet.ops.convolution import gradient_like
from efficient_densenet.ops.layers import Reader


@dataclass(frozen=True)
class Stem:
    """Its convolutions and norms in their order.

    Attributes:
        norms: one after each convolution; or one that reads the input, without a convolution.
        weights: of the convolutions; all but the first keep the resolution.
        biases: of the convolutions, or nothing where none has one.
        entry: how the first convolution goes over the image.
        pool: after the last norm and relu.
        group: names the processes that share their statistics; "" if none do.
        keeps_last: whether the output of the last convolution stays for backward. On a GPU that is much faster, and the
            blocks have several times as much to keep.
    """

    norms: Sequence[Norm]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    entry: Entry
    pool: MaxPool | BlurredPool
    group: str
    keeps_last: bool = False

    @cached_property
    def sources(self) -> list[tuple[int, int]]:
        """First and last channel (exclusive) that each norm reads, numbered through."""
        ends = list(accumulate((norm.weight.shape[0] for norm in self.norms), initial=0))
        return list(pairwise(ends))

    @cached_property
    def kept(self) -> list[int]:
        """The convolutions, by their number, whose outputs stay for backward.

        Not the last one if the norm after it has constants: then its output never exists whole. Without a convolution,
        the norm reads the input, which is kept in any case.
        """
        last = len(self.norms) - 1
        keeps_last = self.keeps_last and bool(self.weights) and self.norms[last].constants is None
        return [*range(last + keeps_last)]

    @cached_property
    def reader(self) -> Reader | None:
        """The convolution and its norm, of constants, for `ops.evaluate_stem`; None where the stem is anything else."""
        usual = len(self.weights) == 1 and self.entry.groups == 1 and set(self.entry.dilation) == {1}
        plain = isinstance(self.pool, MaxPool) and not (self.biases or self.group)
        norm = self.norms[0]
        return Reader(self.weights[0], *norm, 0) if usual and plain and norm.constants is not None else None

    def like(self, x: Tensor) -> Tensor:
        """``(N, *spatial, 1)`` of the size that all norms see, which takes no memory, for the input ``x``."""
        size = self.entry.size(x.shape[2:], self.weights[0].shape[2:]) if self.weights else x.shape[2:]
        return x.new_empty(()).expand(x.shape[0], *size, 1)


class Kept(NamedTuple):
    """What the backward pass needs besides the input: small tensors, and convolutions' outputs ``(N, *spatial, C)``."""

    folded: Folded
    made: Sequence[Tensor]


def forward(x: Tensor, stem: Stem) -> tuple[Tensor, Kept]:
    """Convolution, norm and relu, as often as there are, and the max pool, of ``x: (N, C, *spatial)``.

    Returns:
        The output, channels-last in memory and channels first in shape; and what backward needs.
    """
    like = stem.like(x)
    folded = empty_folded(like, stem.sources[-1][1], stem.sources[-1][1])
    norms = Norms(like, stem.norms, stem.sources, folded, stem.group)
    output = empty_activation(x, len(stem.norms[-1].weight), stem.pool.size(like.shape[1:-1]))
    out = output.movedim(1, -1)
    made: list[Tensor] = []
    for i, norm in enumerate(stem.norms):
        last, convolution = i == len(stem.norms) - 1, _convolution(i, x, made, stem, norms)
        parts = _pieces(i, like, stem)
        if not last or norm.constants is None:
            whole = _whole(convolution, parts, like, len(norm.weight))
            if norm.constants is None:
                norms.measure(whole, *stem.sources[i])
        affine = norms.fold(i)
        if i in stem.kept:
            made.append(whole)
        if not last:
            continue
        if norm.constants is None:
            stem.pool.forward(norms.run, whole, affine, out)
        else:
            for piece in parts:
                activations = convolution.make(piece.images, piece.lines)
                size = stem.pool.size(activations.shape[1:-1])
                windows = activations.new_empty((len(activations), *size, len(norm.weight)))
                stem.pool.forward(norms.run, activations, affine, windows)
                out[piece.images, piece.windows] = windows[:, piece.front // 2 :]
    return output, Kept(folded, made)


def evaluate(x: Tensor, stem: Stem) -> Tensor:
    """The output of `forward`, where nothing is kept for backward; in one call, where the backend has one."""
    if stem.reader is not None and ops.evaluates_stem(x, stem.reader):
        size = stem.like(x).shape[1:-1]
        output = empty_activation(x, len(stem.norms[0].weight), stem.pool.size(size))
        if ops.evaluate_stem(x, stem.reader, *stem.entry[:2], size, output.movedim(1, -1)):
            return output
    return forward(x, stem)[0]


def backward(
    grad_out: list[Tensor],
    x: Tensor,
    stem: Stem,
    kept: Kept,
    need_x: bool,
    types: Sequence[torch.dtype | None],
) -> Gradients:
    """The gradients of `forward` for the gradient of its output.

    Args:
        grad_out: in a list of one, out of which it is taken: ``(N, C, *spatial)``.
        x, stem, kept: as `forward` had and returned them.
        need_x: whether the gradient of `x` is wanted.
        types: of the gradient of each convolution's weight; None where it is not wanted.
    """
    like, made = stem.like(x), list(kept.made)
    norms = Norms(like, stem.norms, stem.sources, kept.folded, stem.group)
    norms.begin_backward()
    of_norms, of_weights, of_biases = [], [], []
    convolution: Convolution | None = None
    for i in reversed(range(len(stem.norms))):
        parts = _pieces(i, like, stem)
        wanted = Wanted(i > 0 or need_x, bool(stem.weights) and types[i] is not None)
        whole = made.pop() if i in stem.kept else None
        later, convolution = convolution, _convolution(i, x, made[:i], stem, norms, wanted)
        if later is None:
            of_norms.append(
                _backward_of_pool(
                    grad_out.pop().movedim(1, -1), stem.pool, convolution, whole, parts, norms, any(wanted)
                )
            )
        else:
            assert isinstance(later, Inner) and later.grad_x is not None and whole is not None
            grad = later.grad_x
            of_norms.append(later.sums.gradients())
            norms.finish(grad, whole, *stem.sources[i], grad)
            del later, whole
            for images, lines, front, _ in parts:
                own = slice(lines.start + front, lines.stop)
                convolution.backward(images, own, grad[images, own])
        if stem.weights:
            dtype = types[i]
            of_weights.append(None if dtype is None else gradient_like(convolution.grad_weight, stem.weights[i], dtype))
        if stem.biases:
            of_biases.append(gradient_like(convolution.grad_bias, stem.biases[i]))
    assert convolution is not None
    grad_x = x.new_empty(0) if convolution.grad_x is None else convolution.grad_x.movedim(-1, 1)
    return Gradients(grad_x, of_norms[::-1], of_weights[::-1], of_biases[::-1])


def _backward_of_pool(
    grad_out: Tensor,
    pool: MaxPool | BlurredPool,
    convolution: Convolution,
    whole: Tensor | None,
    parts: Sequence[Piece],
    norms: Norms,
    go_on: bool,
) -> tuple[Tensor, Tensor]:
    """Backward through max pool, relu and the last norm, and, to `go_on`, into the convolution.

    Args:
        whole: what the convolution has made, if that was kept.

    Returns:
        The gradients of the norm's weight and bias.
    """
    last = len(norms.norms) - 1
    affine, sums = norms.affine(last), NormSums(norms, last, single=len(parts) == 1)

    def backward_of_piece(piece: Piece, activations: Tensor, first: bool) -> Tensor:
        """``scale·g``; and, at the first time, its share of the sums."""
        grad, windows = empty_like(activations), grad_out[piece.images, piece.windows]
        if piece.front:  # the window there belongs to another piece
            windows = torch.cat([torch.zeros_like(windows[:, :1]), windows], 1)
        of_norm = pool.backward(norms.run, windows, activations, affine, grad, sums.through if first else None)
        if first:
            sums.add(*of_norm)
        return grad

    def activations_of(piece: Piece) -> Tensor:
        return convolution.make(piece.images, piece.lines) if whole is None else whole[piece.images, piece.lines]

    again = sums.through is not None and go_on
    held: list[tuple[Tensor, Tensor]] = []
    may_be_held = held_values(grad_out)
    for piece in parts:
        activations = activations_of(piece)
        grad = backward_of_piece(piece, activations, first=True)
        may_be_held -= activations.numel() + grad.numel()
        if not again and go_on:
            convolution.backward(piece.images, piece.lines, grad)
        elif again and may_be_held >= 0:
            held.append((activations, grad))
        del activations, grad
    found = sums.gradients()
    if not again:
        return found
    through = norms.all_through(*norms.sources[last])
    assert through is not None
    held.reverse()
    for piece in parts:
        if held:
            activations, grad = held.pop()
        else:
            activations = activations_of(piece)
            grad = backward_of_piece(piece, activations, first=False)
        own = grad[:, piece.front :]
        norms.run.finish(own, activations[:, piece.front :], affine.mean, through, norms.total, own)
        convolution.backward(piece.images, piece.lines, grad)
        del activations, grad, own
    return found


def _convolution(
    i: int, x: Tensor, made: Sequence[Tensor], stem: Stem, norms: Norms, wanted: Wanted = NOTHING
) -> Convolution:
    """What makes the activations before norm `i`."""
    if not stem.weights:
        return NoConvolution(x, wanted)
    bias = stem.biases[i] if stem.biases else None
    if i == 0:
        return OnImage(x, stem.weights[0], bias, stem.entry, wanted)
    return Inner(made[i - 1], norms, i - 1, stem.weights[i], bias, wanted)


def _pieces(i: int, like: Tensor, stem: Stem) -> list[Piece]:
    """Of the activations before norm `i`."""
    shape = (*like.shape[:-1], len(stem.norms[i].weight))
    return pieces(shape, like.dtype, like.device, stem.pool.by_lines)


def _whole(convolution: Convolution, parts: Sequence[Piece], like: Tensor, channels: int) -> Tensor:
    """All activations, made by the pieces by which backward makes them again."""
    if len(parts) == 1:
        return convolution.make(parts[0].images, parts[0].lines)
    out = empty_like(like, channels)
    for images, lines, front, _ in parts:
        out[images, lines.start + front : lines.stop] = convolution.make(images, lines)[:, front:]
    return out
