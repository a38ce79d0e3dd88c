"""A forward and a backward pass as one node of autograd; and as two operators of PyTorch, for compilers.

An operator takes and returns tensors and lists of tensors (no None among them), and its outputs must not share memory.
What runs without a compiler is a node that is no operator: its backward can let go of what it was given, the gradient
of the output first of all, as soon as it has no use for it any more. (PyTorch 2.11 holds that gradient to the end.)
Where a counter of operations watches, it is the operators too, for which the counter is told what they multiply. None
has forward-mode derivatives, and all refuse tangents, which PyTorch would drop without a word.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import prod
from typing import Any, ClassVar, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from efficient_densenet.execution.casts import cast_one_by_one, cast_together, copies_in, types_of
from efficient_densenet.execution.operands import UnsuitableError, unsuitable
from efficient_densenet.execution.profiling import labelled_backward
from efficient_densenet.execution.transforms import (
    for_each,
    is_watched,
    one_by_one,
    refuse_gradients,
    refuse_tangents,
)


class Given(NamedTuple):
    """What backward is given, in lists out of which it takes what it has no further use for: nobody else has it.

    Attributes:
        grad_output: the gradient of the output.
        x: the input; nothing where it was not saved.
        packed: what else was saved.
    """

    grad_output: list[Tensor]
    x: list[Tensor]
    packed: list[Tensor]


class Passes(ABC):
    """What a node does with its input and a named tuple of arguments, in which lists of tensors come first.

    The first four of these are the weights and biases of norms, then of convolutions; they have gradients.

    Attributes:
        name: of the operators.
        arguments: the class of the named tuple; names and types are the operators' schema.
    """

    name: ClassVar[str]
    arguments: ClassVar[Any]

    def __init__(self) -> None:
        types = get_type_hints(self.arguments)
        self.lists = list(types.values()).count(Sequence[Tensor])
        schema = ", ".join(
            f"{get_args(type_)[0].__name__}[] {name}" if get_args(type_) else f"{type_.__name__} {name}"
            for name, type_ in types.items()
        )
        self.forward_operator = torch.library.custom_op(
            f"efficient_densenet::{self.name}_forward",
            self._forward,
            mutates_args=(),
            schema=f"(Tensor x, {schema}) -> Tensor[]",
        )
        self.forward_operator.register_fake(self._forward_fake)
        self.forward_operator.register_autograd(self._operators_gradients, setup_context=self._save_of_operator)
        given = "Tensor[] grad_output, Tensor[] x, Tensor[] packed"
        self.backward_operator = torch.library.custom_op(
            f"efficient_densenet::{self.name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"({given}, bool need_x, bool[] need_weights, {schema}) -> Tensor[]",
        )
        self.backward_operator.register_fake(self._backward_fake)
        self.backward_operator.register_autograd(refuse_gradients)
        self.backward_operator.register_vmap(one_by_one(self.backward_operator))

    @abstractmethod
    def first_normed(self, x: Tensor, arguments: Any) -> torch.Size:
        """The shape ``(N, C, *spatial)`` of what the first norm reads."""

    @abstractmethod
    def forward(self, x: Tensor, arguments: Any) -> list[Tensor]:
        """The output, and all else that backward may need."""

    @abstractmethod
    def saves(self, x: Tensor, made: Sequence[Tensor], arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
        """What backward needs of the input (it or nothing), and of all that `forward` made."""

    @abstractmethod
    def backward(self, given: Given, need_x: bool, types: Sequence[torch.dtype | None], arguments: Any) -> list[Tensor]:
        """The gradients of the input (anything, if not wanted), of weights and biases of norms, and of convolutions'
        wanted weights and biases.

        Args:
            types: for each convolution the type that its weight's gradient will have in the end, None where it is not
                wanted. Here it may have the weight's.
        """

    @abstractmethod
    def forward_fake(self, x: Tensor, arguments: Any) -> list[Tensor]:
        """Tensors like those that `forward` makes."""

    @abstractmethod
    def grad_x_fake(self, given: Given, need_x: bool, arguments: Any) -> Tensor:
        """A tensor like the first that `backward` returns."""

    @abstractmethod
    def forward_flops(self, x: Tensor, arguments: Any) -> int:
        """Two for each multiplication of a convolution. The shapes count, as everywhere in PyTorch."""

    @abstractmethod
    def backward_flops(self, given: Given, need_x: bool, need_weights: Sequence[bool], arguments: Any) -> int:
        """Likewise, for the gradients that are wanted, and for what runs again."""

    def __call__(
        self, x: Tensor, arguments: Any, cast: torch.dtype | None = None, checked: bool = False
    ) -> list[Tensor]:
        """`forward`, with a gradient if one can be wanted; the operator, where somebody compiles or watches.

        Args:
            x: the input.
            arguments: of the class `self.arguments`.
            cast: the type in which convolutions get their weights and biases; None: as they are.
            checked: whether all tensors but `x` are known to be on its device and fit for kernels: see `operands`.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.count()
        if compiling or is_watched():
            return self.forward_operator(x, *cast_one_by_one(arguments, cast))
        _check(x, *(() if checked else arguments))
        self._check_values(x, arguments)
        if not torch.is_grad_enabled():
            return self.forward(x, cast_together(arguments, cast))
        lengths = [len(group) for group in arguments[: self.lists]]
        return list(_Node.apply(self, lengths, arguments[self.lists :], cast, x, *self.tensors(arguments)))

    def tensors(self, arguments: Any) -> Iterator[Tensor]:
        """All that are in lists among these arguments."""
        return chain.from_iterable(arguments[: self.lists])

    def save(self, ctx: Any, x: Tensor, arguments: Any, made: Sequence[Tensor], types: Sequence[torch.dtype]) -> None:
        """Have autograd save what backward needs; `types` are those of the gradients of weights and biases."""
        groups = [*self.saves(x, made, arguments), *arguments[: self.lists]]
        ctx.lengths, ctx.plain = [len(group) for group in groups], arguments[self.lists :]
        ctx.types = types
        ctx.save_for_backward(*chain(*groups))
        ctx.mark_non_differentiable(*made[1:])
        ctx.set_materialize_grads(False)

    def gradients(
        self, ctx: Any, grad_output: list[Tensor], need_x: bool, need_weights: Sequence[bool], as_operator: bool
    ) -> tuple[Tensor | None, list[list[Tensor | None]]]:
        """The gradients of the input and of the first four groups of arguments."""
        x, packed, *groups = _split(ctx.saved_tensors, ctx.lengths)
        if not as_operator:
            ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        arguments = self.arguments(*groups, *ctx.plain)
        grad_output[0] = grad_output[0].resolve_neg()  # as the input of `shared.run`
        first = 1 + len(arguments.norm_weights) + len(arguments.norm_biases)
        weight_types = _wanted(ctx.types[: len(need_weights)], need_weights)
        types = [*filter(None, weight_types), *ctx.types[len(need_weights) :]]

        def run(*lists: list[Tensor]) -> list[Tensor]:
            given = Given(*lists)
            if as_operator:
                weights = arguments.weights
                if torch.is_grad_enabled():  # cast weights need no gradient, and the operator would refuse nothing
                    weights = [
                        w.detach().requires_grad_() if need and not w.requires_grad else w
                        for w, need in zip(weights, need_weights, strict=True)
                    ]
                made = self.backward_operator(*given, need_x, need_weights, *arguments._replace(weights=weights))
                return [*made[:first], *(g.to(t) for g, t in zip(made[first:], types, strict=True))]
            _check(*given, *arguments)
            made = self.backward(given, need_x, weight_types, arguments)
            return [*made[:first], *copies_in(made[first:], types)]

        # A context of autocast around backward would cast what the convolutions that run again read.
        with labelled_backward(ctx), torch._C._DisableAutocast():
            found = iter(for_each(run, grad_output, x, packed))
        of_x = next(found)
        of_norms: list[list[Tensor | None]] = [[next(found) for _ in group] for group in groups[:2]]
        of_weights = [next(found) if need else None for need in need_weights]
        return of_x if need_x else None, [*of_norms, of_weights, [*found]]

    def count(self) -> None:
        """Have PyTorch's counter of operations count ours, if somebody has imported it, which takes a while."""
        counter = sys.modules.get("torch.utils.flop_counter")
        if counter is None:
            return
        namespace = torch.ops.efficient_densenet
        forward, backward = (getattr(namespace, f"{self.name}_{way}") for way in ("forward", "backward"))
        if forward not in counter.flop_registry:
            counter.register_flop_formula(forward, get_raw=True)(self._forward_flops)
            counter.register_flop_formula(backward, get_raw=True)(self._backward_flops)

    def _forward_flops(self, x: Tensor, *arguments: Any, **_: Any) -> int:
        return self.forward_flops(x, self.arguments(*arguments))

    def _backward_flops(
        self, grad_output: Any, x: Any, packed: Any, need_x: bool, need_weights: Any, *arguments: Any, **_: Any
    ) -> int:
        given = Given(list(grad_output), list(x), list(packed))
        return self.backward_flops(given, need_x, need_weights, self.arguments(*arguments))

    def _forward(self, x: Tensor, *given_arguments: Any) -> list[Tensor]:
        _check(x, *given_arguments)
        arguments = self.arguments(*given_arguments)
        self._check_values(x, arguments)
        return self.forward(x, arguments)

    def _forward_fake(self, x: Tensor, *given_arguments: Any) -> list[Tensor]:
        arguments = self.arguments(*given_arguments)
        self._check_values(x, arguments)
        return self.forward_fake(x, arguments)

    def _check_values(self, x: Tensor, arguments: Any) -> None:
        """As batch norms do it; for tensors without values too, so that a compiler has the same error."""
        if any(arguments.uses_batch) and not arguments.group:
            shape = self.first_normed(x, arguments)
            if prod(shape) == shape[1]:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")

    def _save_of_operator(self, ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        x, arguments = inputs[0], self.arguments(*inputs[1:])
        self.save(ctx, x, arguments, output, types_of(arguments))

    def _operators_gradients(self, ctx: Any, grads: Sequence[Tensor | None]) -> tuple:
        # An empty list of numbers may be one of tensors to PyTorch.
        rest: list[list | None] = [[] if plain == [] else None for plain in ctx.plain]
        nothing: list[list] = [[None] * length for length in ctx.lengths[2:]]
        if grads[0] is None:
            return None, *nothing, *rest
        need_x, *needs = ctx.needs_input_grad
        need_weights = self.arguments(*needs).weights
        of_x, parameters = self.gradients(ctx, [grads[0]], need_x, need_weights, as_operator=True)
        return of_x, *parameters, *nothing[4:], *rest

    def _backward(
        self, grad_output: Any, x: Any, packed: Any, need_x: bool, need_weights: Any, *arguments: Any
    ) -> list[Tensor]:
        _check(grad_output, x, packed, *arguments)
        given = Given(list(grad_output), list(x), list(packed))
        named = self.arguments(*arguments)
        types = _wanted([weight.dtype for weight in named.weights], need_weights)
        made = self.backward(given, need_x, types, named)
        return [gradient.clone() if _shares_memory(gradient) else gradient for gradient in made]

    def _backward_fake(
        self, grad_output: Any, x: Any, packed: Any, need_x: bool, need_weights: Any, *given_arguments: Any
    ) -> list[Tensor]:
        arguments = self.arguments(*given_arguments)
        wanted = [w for w, need in zip(arguments.weights, need_weights, strict=True) if need]
        parameters = (*arguments.norm_weights, *arguments.norm_biases, *wanted, *arguments.biases)
        of_x = self.grad_x_fake(Given(grad_output, x, packed), need_x, arguments)
        return [of_x, *(torch.empty_like(parameter) for parameter in parameters)]


class _Node(torch.autograd.Function):
    """`Passes` without a compiler. PyTorch wants all tensors in one row."""

    boxed_grads_call = True  # backward gets gradients in a list, which it may empty; before PyTorch 2.12 it does not

    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        lengths: Sequence[int],
        plain: Sequence[Any],
        cast: torch.dtype | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> Any:
        arguments = passes.arguments(*_split(tensors, lengths), *plain)
        types = types_of(arguments)
        arguments = cast_together(arguments, cast)
        made = passes.forward(x, arguments)
        passes.save(ctx, x, arguments, made, types)
        ctx.passes = passes
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        grads = gradients[0] if isinstance(gradients[0], list) else list(gradients)
        grad_output = grads[:1]
        grads.clear()
        lengths = ctx.lengths[2:]
        if grad_output == [None]:
            return (None,) * (5 + sum(lengths))
        need_x, *needs = ctx.needs_input_grad[4:]
        need_weights = _split(needs, lengths)[2]
        # Where gradients of gradients could be wanted, the operator refuses them; and it has a rule for `vmap`.
        as_operator = torch.is_grad_enabled() or is_watched()
        of_x, parameters = ctx.passes.gradients(ctx, grad_output, need_x, need_weights, as_operator)
        return None, None, None, None, of_x, *chain(*parameters), *[None] * sum(lengths[4:])


def _wanted(types: Sequence[torch.dtype], needs: Sequence[bool]) -> list[torch.dtype | None]:
    """Those of the gradients that are needed."""
    return [dtype if need else None for dtype, need in zip(types, needs, strict=True)]


def _split(row: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """Groups of these lengths."""
    found, start = [], 0
    for length in lengths:
        found.append(list(row[start : start + length]))
        start += length
    return found


def _check(*arguments: Any) -> None:
    """Refuse what operators cannot take, and tangents."""
    tensors = [*_tensors(arguments)]
    reason = unsuitable(tensors, tensors[0].device)
    if reason is not None:
        raise UnsuitableError(f"the shared buffer cannot take {reason}: make_efficient(model, way='recompute') can")
    refuse_tangents(tensors)


def _shares_memory(tensor: Tensor) -> bool:
    """Whether it is a part of a larger tensor, as an operator's result must not be."""
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """All that are among these arguments, and in lists among them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor):
            yield from argument
