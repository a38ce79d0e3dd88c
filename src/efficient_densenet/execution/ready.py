"""What a call leaves for the next one, as long as nothing in the modules changes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from efficient_densenet.execution import stage, stem
from efficient_densenet.execution.reading import Activations, Reading


class Ready:
    """What is made of nothing but the modules' own tensors: values are read where they are.

    Attributes:
        reading: what was read off the modules; None: there is none so far.
        accepts: whether the modules accept such activations.
        engine: what a call without gradients runs; likewise.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Of modules with these tensors, which live as long."""
        self._own = {id(tensor) for tensor in tensors}
        self.accepts: dict[Activations, bool] = {}
        self.reading: Reading | None = None
        self.engine: stage.Stage | stem.Stem | None = None

    def owns(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all of these are the modules' own: nothing is copied, computed or drawn."""
        return self._own.issuperset(map(id, tensors))

    def run(self, x: Tensor, contiguous: bool) -> Tensor:
        """What it makes of ``x: (N, C, *spatial)``; features are channels-last in memory unless `contiguous`."""
        if isinstance(self.engine, stem.Stem):
            return stem.evaluate(x, self.engine)
        assert self.engine is not None
        output = stage.evaluate(x, self.engine)
        copied = contiguous and not (self.engine.pool or self.engine.head)
        return output.clone(memory_format=torch.contiguous_format) if copied else output
