"""Other people's DenseNets: recognised by their structure, made efficient in place, restored.

>>> model = make_efficient(torchvision.models.densenet121(), keep="features")
>>> print(report(model))
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn

from efficient_densenet.adopt import read
from efficient_densenet.adopt.adopted import Adopted, AdoptedBlock, Adoption, adopt, classes_inside, restore
from efficient_densenet.adopt.report import Entry, Report, report
from efficient_densenet.adopt.survey import survey
from efficient_densenet.errors import UserError
from efficient_densenet.execution import check_efficient, layer_by_layer, obstacle, shared, wants_buffer

__all__ = ["Entry", "Report", "dense_block", "make_efficient", "report", "restore"]


def make_efficient(model: nn.Module, keep: str = "bottleneck") -> nn.Module:
    """Make the dense blocks of any model run on the shared buffer, in place, and return the model.

    Dense blocks, transitions and the sequences that run them are recognised by their structure, and only taken if a
    trial shows that they compute what the structure says. Their objects get another class; parameters, buffers, keys,
    hooks and modes stay the very same. Blocks of other norms, activations or convolutions recompute instead, which
    needs more memory and is exact. See `report` for what became of each part, and `restore` to undo it.

    Gradients agree with the ordinary model's up to rounding; running statistics move once per step. Gradients of
    gradients are refused.

    Args:
        model: from torchvision, timm, MONAI, or any other source; calling this again only changes `keep`.
        keep: what stays in memory for backward: ``"bottleneck"`` features and bottleneck outputs (fastest),
            ``"features"`` the features alone, ``"inputs"`` the inputs of the blocks alone (smallest).

    Raises:
        UserError: `keep` is no such word, or nothing in the model is a dense block.
    """
    check_efficient(True, keep)
    found = survey(model)
    if not any(finding.task is AdoptedBlock for finding in found):
        missed = [f"{f.name or 'the model'} ({type(f.module).__name__}): {f.reason}" for f in found if f.reason]
        raise UserError(
            f"{type(model).__name__} has no dense block that can be made efficient. Looked for modules whose parts are "
            "layers of norm, activation and convolution (once or twice), each of which reads what all before it made"
            + "".join(["; close to that came:", *(f"\n  {text}" for text in missed)] if missed else "")
        )
    for _, module, task, way, _ in found:
        if task is not None:
            tried = {} if not isinstance(module, Adopted) else module.adoption.tried
            if task is AdoptedBlock:
                tried[classes_inside(module)] = None
            adopt(module, task, Adoption(keep, way, tried))
    return model


def dense_block(x: Tensor, layers: Iterable[nn.Module], keep: str = "bottleneck") -> Tensor:
    """Run dense layers on one shared buffer, in a network of one's own.

    Shapes: ``(N, C_0, *spatial)`` → ``(N, C_0 + Σk, *spatial)``, the input's channels first, channels-last in memory.

    Args:
        x: the block's input.
        layers: modules that consist of norm, relu and convolution, once or twice, and perhaps dropout, such as
            ``nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, k, 3, padding=1, bias=False))``; each reads the
            channels of `x` and of all layers before it. Only their parts run, not a forward of their own.
        keep: as in `make_efficient`.

    Raises:
        UserError: a layer consists of something else, or does not fit the channels before it.
    """
    check_efficient(True, keep)
    try:
        found = read.block(nn.ModuleList(layers))
    except read.NotDenseError as error:
        raise UserError(f"these modules are no dense block: {error}") from None
    width = found[0].readers[0].conv.in_channels
    if x.shape[1] != width:
        raise UserError(f"the first layer reads {width} channels, and the input has {x.shape[1]}")
    if not wants_buffer(x, True):
        return layer_by_layer(x, found, efficient=False)
    reason = obstacle(found)
    if reason is None:
        return shared.dense_block(x, found, None, keep)
    warnings.warn(f"a dense block does not run on the shared buffer, but recomputes: {reason}", stacklevel=2)
    return layer_by_layer(x, found, True)  # quietly: the reason has been given
