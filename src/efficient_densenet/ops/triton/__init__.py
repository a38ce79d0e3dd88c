"""The operations of `Backend` on a GPU, as Triton kernels: prologue, product, epilogue in one pass each.

What each kernel computes and moves is in its docstring: `forward`, `backward`, `max_pool`, `mean`, `moments`,
`norms`. Products and sums are accumulated in float32; sums over rows are made of partial sums of fixed blocks, merged
in a fixed order, so that results repeat bit for bit. Triton is imported at the first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from efficient_densenet.ops import eager
from efficient_densenet.ops.layers import Layers, LayersBackward
from efficient_densenet.ops.protocol import Affine, BackwardOperands, Statistics
from efficient_densenet.ops.triton import check, launch, trust

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(x: Tensor) -> bool:
    """Whether activations like `x` run here. Warns once with the reason where those of a GPU do not."""
    if not x.is_cuda:
        return False
    reason = obstacle(x.device, x.dtype) or trust.obstacle(x.device, check.kind_of(x.dtype))
    if reason:
        _warn(reason)
    return not reason


def plans(x: Tensor) -> bool:
    """Whether activations like `x`, which have no values, would run here, if the kernels are right."""
    return x.is_cuda and trust.mode_of_trust() != "off" and not obstacle(x.device, x.dtype)


def available() -> str:
    """In words, for people: what there is, and what was found out about it on this machine's current GPU."""
    if not _installed():
        return "plain PyTorch: triton is not installed"
    mode = trust.mode_of_trust()
    if mode == "off":
        return f"plain PyTorch: {trust.VARIABLE} is off"
    text = "Triton kernels for float32, bfloat16 and float16; plain PyTorch for other types"
    if not torch.cuda.is_available():
        return text
    device = torch.device("cuda", torch.cuda.current_device())
    reason = obstacle(device, torch.float32)
    if reason:
        return f"plain PyTorch: {reason}"
    if mode == "trust":
        return f"{text}; used without a check: {trust.VARIABLE} is trust"
    verdicts = {kind: trust.stored(device, kind) or "not checked yet" for kind in check.KINDS}
    return f"{text}; on this GPU {', '.join(f'{kind} {verdict}' for kind, verdict in verdicts.items())}"


def fold_norm(statistics: Statistics, weight: Tensor, bias: Tensor, eps: float, into: Affine) -> None:
    _run("norms.fold_norm", True, into.scale, statistics, weight, bias, eps, into)


def norm_relu_conv(
    x: Tensor, norm: Affine, weight: Tensor, out: Tensor, pool: int = 1, into: Statistics | None = None
) -> None:
    _run("forward.norm_relu_conv", _covered(x, out, weight, pool), x, x, norm, weight, out, pool, into)


def norm_relu_conv_backward(operands: BackwardOperands) -> tuple[Tensor | None, Tensor, Tensor]:
    x, weight = operands.x, operands.weight
    covered = _covered(x, operands.grad_x, weight, operands.pool)
    if covered:
        operands.clear_outside_windows()

    def empty() -> tuple[Tensor | None, Tensor, Tensor]:
        return _gradient_like(weight) if operands.need_weight else None, *_norm_gradients(operands.norm)

    return _run("backward.norm_relu_conv_backward", covered, x, operands, made=empty)


def norm_relu_max_pool(x: Tensor, norm: Affine, out: Tensor) -> None:
    _run("max_pool.norm_relu_max_pool", _covered(x, out), x, x, norm, out)


def norm_relu_max_pool_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    arguments = grad_out, x, norm, grad_x, through
    made = partial(_norm_gradients, norm)
    return _run("max_pool.norm_relu_max_pool_backward", _covered(x, grad_x), x, *arguments, made=made)


def norm_relu_mean(x: Tensor, norm: Affine, out: Tensor) -> None:
    _run("mean.norm_relu_mean", _covered(x, out), x, x, norm, out)


def norm_relu_mean_backward(
    grad_out: Tensor, x: Tensor, norm: Affine, grad_x: Tensor, through: Tensor | None
) -> tuple[Tensor, Tensor]:
    arguments = grad_out, x, norm, grad_x, through
    made = partial(_norm_gradients, norm)
    return _run("mean.norm_relu_mean_backward", _covered(x, grad_x), x, *arguments, made=made)


def statistics(x: Tensor, into: Statistics) -> None:
    _run("moments.statistics", _covered(x, x), x, x, into)


def finish(grad: Tensor, x: Tensor, mean: Tensor, through: Tensor, count: Tensor, out: Tensor) -> None:
    _run("moments.finish", _covered(x, out), x, grad, x, mean, through, count, out)


def run_layers(layers: Layers, fold: bool, measure: bool) -> int:
    return _module("layers").run(layers, fold, measure)


def run_layers_backward(layers: Layers, operands: LayersBackward) -> int:
    return _module("layers").run_backward(layers, operands)


def _run(name: str, covered: bool, x: Tensor, *arguments: Any, made: Callable[[], tuple] | None = None) -> Any:
    """An operation, named with its module, by its kernels; or by plain PyTorch, where they do not cover it.

    An operation whose kernels cannot start is left to plain PyTorch from then on, for such a device and type.

    Args:
        made: makes the empty tensors that are returned; the kernels' operation gets them last, and fills them.
    """
    module, operation = name.split(".")
    attempt = (operation, x.device, x.dtype)
    if covered and attempt not in _state["failed"]:
        result = None if made is None else made()
        run = partial(getattr(_module(module), operation), *arguments, *(() if result is None else (result,)))
        tensors, rest = _apart(run.args)
        try:
            if not _module("recording").repeated((operation, *rest), tensors, lambda: [run]):
                with launch.operation(x.device):
                    run()
            return result
        except launch.CannotStart as error:
            _state["failed"].add(attempt)
            _warn(f"{operation} for {x.dtype}: {error}")
    return getattr(eager, operation)(*arguments)


def _apart(arguments: Iterable[Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors among these arguments and in tuples among them; and all else, with the places of tensors."""
    tensors, rest = [], []
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            rest.append(Tensor)
        elif isinstance(argument, tuple):
            inside, between = _apart(argument)
            tensors += inside
            rest += between
        else:
            rest.append(argument)
    return tensors, rest


def _gradient_like(weight: Tensor) -> Tensor:
    """An empty one, in which taps lie at equal distances."""
    regular = weight.is_contiguous() or launch.is_packed(weight)
    return torch.empty_like(weight, memory_format=torch.preserve_format if regular else torch.contiguous_format)


def _norm_gradients(norm: Affine) -> tuple[Tensor, Tensor]:
    """Empty ones of its weight and bias: two tensors, for an operator's results must not share memory."""
    return torch.empty_like(norm.scale), torch.empty_like(norm.scale)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _covered(x: Tensor, out: Tensor, weight: Tensor | None = None, pool: int = 1) -> bool:
    """Whether the kernels have this shape; plain PyTorch takes the others, with a warning where that may be slow."""
    if not x.numel() or not out.numel():
        return False
    kernel = None if weight is None else weight.shape[2:]
    reason = launch.uncovered(x.shape, out.shape, out.stride(), kernel, pool)
    if reason and not isinstance(x, FakeTensor):  # or the warning would be missing when it runs
        _warn(reason)
    return not reason


@functools.cache  # PyTorch takes microseconds to say what a device can do, and is asked for each operation
def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why there are no kernels for such activations on a GPU, whether they are right or not; or nothing."""
    if dtype not in _TYPES:
        return f"there are none for {dtype}"
    if not _installed():
        return "triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than they need (compute capability 8.0)"
    return ""


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _warn(reason: str) -> None:
    if reason not in _state["warned"]:
        _state["warned"].add(reason)
        warnings.warn(f"plain PyTorch runs instead of the Triton kernels, more slowly: {reason}", stacklevel=4)


_state: dict[str, set] = {"warned": set(), "failed": set()}
