"""What a backend is given that runs several layers of a dense block in one call, or in evaluation the whole block.

Such a call does what the engine (execution/stage.py) would do layer by layer with the operations of `Backend`. That
spares the time between the operations: on a CPU a third of the evaluation of one image, on a GPU most of the host's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from efficient_densenet.ops.protocol import Statistics


class Reader(NamedTuple):
    """A norm–relu–convolution of the layers of a block, of the norm's parameters.

    Attributes:
        constants: the norm's statistics; None where it uses the batch's.
        first: the first channel that it reads, numbered through: the features, then the outputs of each bottleneck.
    """

    weight: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    constants: Statistics | None
    eps: float
    first: int


class Layers(NamedTuple):
    """Consecutive layers of a dense block on one buffer, see execution/stage.py.

    Attributes:
        features: ``(N, *spatial, C_T)``.
        width: the channels before the first layer.
        readers: `per_layer` for each layer; of two, the first makes the bottleneck output that the second reads.
        bottlenecks: ``(N, *spatial, O)`` for each layer that is run and has one; layers may share one.
        statistics: ``(2, channels)``, means and variances of all that readers read.
        folded: ``(3, ΣC)``, inverse, scale and shift of all norms in sequence, `Affine`.
        memo: what a backend keeps for other calls with the same readers.
    """

    features: Tensor
    width: int
    readers: Sequence[Reader]
    per_layer: int
    bottlenecks: Sequence[Tensor | None]
    statistics: Tensor
    folded: Tensor
    memo: dict[Any, Any]


class Evaluation(NamedTuple):
    """A dense block whose norms all have constants, and the transition or head after it; nothing is kept.

    Attributes:
        x: ``(N, *spatial, C_0)``.
        features: ``(N, *spatial, C_T)``, which are filled.
        readers, per_layer, memo: as in `Layers`.
        end: norm and convolution of the transition, or the norm of the head, with a weight ``(0, C_T, 1, 1)``; None:
            nothing follows.
        pool: window and stride of the transition's average pool; 0: there is no transition.
        scratch: as large as the largest bottleneck output, and as what the pool makes.
        out: ``(N, *(spatial // pool), O)`` of the transition, or ``(N, C_T)`` of the head; None: nothing follows.
    """

    x: Tensor
    features: Tensor
    readers: Sequence[Reader]
    per_layer: int
    end: Reader | None
    pool: int
    scratch: Tensor
    out: Tensor | None
    memo: dict[Any, Any]


class LayersBackward(NamedTuple):
    """What the backward pass of layers reads and writes besides.

    Attributes:
        grad: of the features' shape: the gradients of the layers' readers are added to it.
        start: layers before this one are left out.
        made_again: whether bottleneck outputs have to be made first.
        grad_bottleneck: a scratch, as large as the largest bottleneck output.
        used: features before this one have statistics that norms use.
        values: ``()``, how many values per channel the statistics are of.
        through: as in `BackwardOperands`, for all channels of the statistics; None: all are constants.
        grad_weights: for each reader where the gradient of its weight goes, or None where it is not wanted; in the
            memory format of the weight, and in its type or in what `ops.converts_gradients` allows.
        grad_norms: ``(2, ΣC)``, where the gradients of the norms' weights and biases go, in sequence.
    """

    grad: Tensor
    start: int
    made_again: bool
    grad_bottleneck: Tensor
    used: int
    values: Tensor
    through: Tensor | None
    grad_weights: Sequence[Tensor | None]
    grad_norms: Tensor
