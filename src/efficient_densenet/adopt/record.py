"""What a module computes, from a record of its own forward: a dense block, a transition, a stem, or something else.

The forward runs on a few random pixels, and a dispatch mode sees every operation. Each tensor that depends on the input
gets a meaning: features (which pieces, in which order), normed, activated, made by a convolution. How modules are
named, nested, ordered or shared does not matter; they are asked only where the tensors of an operation belong.

An operation with no meaning here is not yet a reason to give up: a module between an activation and new features may
be a convolution of another kind, and one between features and a convolution may be a norm of another kind. Such a block
is a dense block all the same, though not for the shared buffer. Where nothing explains an operation, what remains to be
known is whether the input is concatenated with what convolutions made: that can be recomputed, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from efficient_densenet.adopt.kinds import CONVOLUTIONS, is_norm, is_plain_convolution
from efficient_densenet.adopt.meanings import (
    Active,
    Features,
    Meanings,
    Noise,
    Normed,
    NotDenseError,
    Other,
    OtherWidthError,
    Piece,
    Scaled,
    Stepped,
    Zero,
    normed_of,
    storage,
)
from efficient_densenet.execution.plan import Dropout, Entry, Step

_aten = torch.ops.aten
_BATCH_NORMS = {_aten.native_batch_norm, _aten._native_batch_norm_legit}
# What may follow the convolution of a transition, or the rectifier of a stem.
_STEPS = {
    *(_aten.avg_pool1d, _aten.avg_pool2d, _aten.avg_pool3d, _aten.max_pool2d_with_indices),
    *(_aten.max_pool3d_with_indices, _aten.unsqueeze, _aten.squeeze, _aten.reflection_pad2d, _aten.constant_pad_nd),
}
_SPLITS = {_aten.split, _aten.split_with_sizes, _aten.unsafe_split, _aten.unsafe_split_with_sizes}
_EMPTY = {_aten.empty_like, _aten.new_empty}
_VIEWS = {_aten.view, _aten._unsafe_view, _aten.expand}
_COPIES = {_aten.clone, _aten.detach, _aten.alias}


class _Call(NamedTuple):
    """A module whose forward is running; what it got; how many convolutions ran before."""

    module: nn.Module
    given: Any
    convolutions: int


class Record(Meanings):
    """The meaning of each tensor so far, in terms of dense layers.

    Attributes:
        synchronises: whether the norm is synchronised with other processes, for each module that is a norm in training.
        pieces: see `Piece`.
        size: of the input, in pixels.
        to_the_end: whether to go on where it is known to be none of what is looked for, to see what is concatenated.
        joins_input, joins_again: whether the input, or what had been concatenated before, was concatenated along the
            channels with something, after a convolution had run.
    """

    def __init__(self, modules: Sequence[nn.Module], synchronises: dict[int, bool], to_the_end: bool = False) -> None:
        super().__init__(modules)
        self.synchronises, self.to_the_end = synchronises, to_the_end
        self.pieces: list[Piece] = []
        self.size = torch.Size()
        self.calls: list[_Call] = []
        self.convolutions = 0
        self.joins_input = self.joins_again = False
        self.input = 0  # its memory
        self.joined: set[int] = set()  # the memory of tensors that were concatenated, and of what that made

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run the module, which must return a tensor; the first one gets the input.

        Raises:
            NotDenseError: it does something else.
            OtherWidthError: the input has the wrong channels.
        """
        if not self.pieces:
            self.pieces.append(Piece(x.shape[1]))
            self.size = x.shape[2:]
            self.set(x, Features((0,)))
            self.input = storage(x)
        output = self.watch(module, x)
        if not isinstance(output, Tensor):
            raise NotDenseError(f"it returns {type(output).__name__}, not a tensor of features")
        return output

    def new_piece(self, piece: Piece) -> Features:
        self.pieces.append(piece)
        return Features((len(self.pieces) - 1,))

    # ---- modules -----------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, given: Any) -> None:
        self.calls.append(_Call(module, given, self.convolutions))

    def leave(self, module: nn.Module, output: Any) -> None:
        """Give what a module made a meaning, where its operations have none by themselves."""
        call = self.calls.pop()
        meaning = self.meaning(output)
        if not isinstance(meaning, Other):
            return
        name = type(module).__name__
        otherwise = self._made_otherwise(call.given, output, name)
        if otherwise is not None:
            self.set(output, otherwise)
        elif isinstance(call.given, Features) and is_norm(module):
            self.set(output, Normed(call.given, None, f"{name} is not a batch norm of PyTorch's own"))
        elif isinstance(call.given, Normed | Active):
            if self.convolutions > call.convolutions:
                plain = is_plain_convolution(module)
                kind = "a convolution" if any(True for _ in module.parameters()) else "a pool"
                reason = _no_plain_convolution(module) if plain else f"{name} is not {kind} of PyTorch's own"
                self.set(output, self.new_piece(Piece(output.shape[1], call.given, None, reason)))
            else:
                self.set(output, _active(call.given, f"{name} is not ReLU"))

    @property
    def module(self) -> nn.Module | None:
        """The innermost one whose forward is running."""
        return self.calls[-1].module if self.calls else None

    # ---- operations --------------------------------------------------------------------------------------------

    def before(self, packet: Any, args: Sequence[Any]) -> None:
        """Notice channels that the input should have had, before the operation fails for it."""
        if packet is _aten.convolution and not args[6]:
            self._expect(args[0], args[1].shape[1] * args[8], exact=True)
        elif packet is _aten.mul and isinstance(args[1], Tensor) and args[1].dim() == args[0].dim() > 1:
            self._expect(args[0], args[1].shape[1])
            self._expect(args[1], args[0].shape[1])

    def before_norm(self, x: Any, vectors: Sequence[Tensor]) -> None:
        if vectors:
            self._expect(x, len(vectors[0]))

    def _expect(self, x: Any, width: int, exact: bool = False) -> None:
        """`exact`: unless it is, one channel would do for any number."""
        given = self.meaning(x)
        normed = normed_of(given)
        given = given if normed is None else normed.source
        channels = self.pieces[0].channels
        changed = isinstance(given, Other) and not self.convolutions and x.shape[1] == channels
        if (given == Features((0,)) or changed) and width != channels and (exact or width != 1):
            raise OtherWidthError(width)

    def after(self, function: Any, args: Sequence[Any], named: dict[str, Any], output: Any) -> None:
        """Give what the operation made a meaning."""
        made = output[0] if isinstance(output, tuple | list) else output
        packet = function.overloadpacket
        meanings = [m for m in map(self.meaning, _flat(args)) if m is not None]
        if packet is _aten.zeros and made.dim() == 0:
            self.set(made, Zero())
        if all(isinstance(m, Zero) for m in meanings):  # or there are none
            return
        in_place = packet.__name__.endswith("_")
        if in_place:
            packet = getattr(_aten, packet.__name__.removesuffix("_"), packet)
        if packet in _SPLITS:
            self._split(args[0], output, args[2] if len(args) > 2 else named.get("dim", 0), packet)
            return
        meaning = self._operation(packet, function, args, named, made, meanings)
        if in_place:
            self.written.add(storage(made))
            self.known[storage(made)] = {}
        self.set(made, meaning)

    def _operation(
        self, packet: Any, function: Any, args: Sequence[Any], named: dict[str, Any], made: Any, meanings: list[Any]
    ) -> Any:
        x = self.meaning(args[0])
        self.looks_at_sizes |= packet in _VIEWS and not self.inside_torch
        if not isinstance(made, Tensor):
            raise NotDenseError("its forward looks at the values of its features")
        if packet is _aten.cat:
            return self._cat(args, named, made)
        if packet in _EMPTY:
            return Noise(made.shape)
        if (packet in _COPIES and made.dtype == args[0].dtype) or _changes_nothing(packet, args, made):
            return x
        if isinstance(x, Noise):
            return self._noise(x, packet, args)
        if packet is _aten.mul and isinstance(self.meaning(args[1]), Noise | Zero):
            return self._dropout(x, self.meaning(args[1]), made)
        if isinstance(x, Features):
            if packet in _BATCH_NORMS and len(args) == 8:
                return Normed(x, *self.owners.batch_norm(self.module, args))
            if packet is _aten.mul and _per_channel(args[1], made):
                return Scaled(x, args[1])
            if packet is _aten.slice and args[1] % made.dim() == 1 and args[4:] in ((), [], (1,), [1]):
                start, stop, _ = slice(*(*args[2:4], None, None)[:2]).indices(args[0].shape[1])
                return self._slice(x, start, stop)
            if packet is _aten.convolution and len(self.pieces) == 1:
                return self._first_convolution(x, packet, args, made)
        if isinstance(x, Scaled) and packet in (_aten.add, _aten.sub) and _per_channel(args[1], made):
            return Normed(x.source, *self.owners.frozen_norm(self.module))
        if isinstance(x, Normed | Active):
            if packet is _aten.convolution:
                return self._convolution(x, args, made)
            if packet in _STEPS:
                return Stepped(self.new_piece(Piece(made.shape[1], x)).pieces[0], (Step(function, tuple(args[1:])),))
            if made.shape == args[0].shape and all(isinstance(m, Normed | Active | Noise) for m in meanings):
                rectifies = packet is _aten.relu or (packet is _aten.threshold and args[1:] == (0, 0))
                return _active(x, None if rectifies else f"{self._name(packet)} is not ReLU")
        if isinstance(x, Stepped) and packet is _aten.convolution and x.blur is None:
            *before, pad = x.steps
            blur = self.owners.blur(pad, args, made.shape[1])
            if blur is not None:
                return Stepped(x.piece, tuple(before), blur)
        if packet in _STEPS and not named and not (isinstance(x, Stepped) and x.blur):
            step = Step(function, tuple(args[1:]))
            if isinstance(x, Stepped):
                return x._replace(steps=(*x.steps, step))
            if isinstance(x, Features) and x.single is not None:
                return Stepped(x.single, (step,))
        return self._other(packet, meanings)

    def _other(self, packet: Any, meanings: list[Any]) -> Other:
        self.convolutions += packet is _aten.convolution
        other = next((m for m in meanings if isinstance(m, Other)), None)
        if other is None:
            reason = f"its forward uses {self._name(packet)} where a dense block has nothing like it"
            if packet is _aten.convolution:
                reason = "a convolution reads features without a norm and an activation in front of it"
            reads_input = any(isinstance(m, Features) and 0 in m.pieces for m in meanings) and not self.to_the_end
            if reads_input and not self._inside_a_norm() and (packet not in _VIEWS or self.inside_torch):
                raise NotDenseError(reason)
            other = Other(reason)
        return other

    def _inside_a_norm(self) -> bool:
        return any(is_norm(call.module) for call in self.calls)

    def _name(self, packet: Any) -> str:
        """Of the module that does it, if that does nothing else, or of the operation."""
        module = self.module
        if module is None or module._modules:
            return packet.__name__
        alone = not module._parameters or is_norm(module) or isinstance(module, nn.PReLU)
        return type(module).__name__ if alone else packet.__name__

    def _cat(self, args: Sequence[Any], named: dict[str, Any], made: Tensor) -> Features | Other:
        dim = args[1] if len(args) > 1 else named.get("dim", 0)
        meanings = [self.meaning(t) for t in args[0]]
        if dim % made.dim() != 1:
            return Other("it concatenates along another dimension than channels")
        self._join(args[0], made)
        for i, meaning in enumerate(meanings):
            normed = normed_of(meaning)
            if normed is not None:
                meaning = meanings[i] = self._made_otherwise(normed.source, args[0][i], "a norm")
            if not isinstance(meaning, Features):
                reason = "it concatenates something else than its input and what convolutions made of it"
                other = meaning if isinstance(meaning, Other) else Other(reason)
                if self.to_the_end or all(isinstance(m, Other) for m in meanings):
                    return other
                raise NotDenseError(other.reason)
        return Features(tuple(piece for meaning in meanings for piece in meaning.pieces))

    def _join(self, tensors: Sequence[Tensor], made: Tensor) -> None:
        """Notice what is concatenated, whatever it means."""
        memory = {storage(tensor) for tensor in tensors}
        if self.convolutions and len(memory) > 1:
            self.joins_input |= self.input in memory
            self.joins_again |= not self.joined.isdisjoint(memory)
        self.joined |= {*memory, storage(made)}

    def _made_otherwise(self, x: Any, made: Tensor, what: str) -> Features | None:
        """What a layer made of its last convolution's output `x`, as if the convolution were of another kind."""
        if not isinstance(x, Features) or x.single is None:
            return None
        convolved = self.pieces[x.single]
        reason = f"there is {what} behind the last convolution of a layer"
        if convolved.entry is not None:
            reason = f"there is {what} behind its first convolution, where a batch norm should be"
        obstacle = convolved.obstacle or reason  # what comes first is named
        return self.new_piece(Piece(made.shape[1], convolved.source, None, obstacle, entry=convolved.entry))

    def _split(self, x: Tensor, made: Sequence[Tensor], dim: int, packet: Any) -> None:
        """Give each part a meaning."""
        given, start = self.meaning(x), 0
        for part in made:
            stop = start + part.shape[1] if part.dim() > 1 else start
            along_channels = isinstance(given, Features) and dim % x.dim() == 1
            self.set(part, self._slice(given, start, stop) if along_channels else self._other(packet, [given]))
            start = stop

    def _slice(self, x: Features, start: int, stop: int) -> Features | Other:
        """Channels from `start` to `stop` of these features."""
        kept, at = [], 0
        for piece in x.pieces:
            end = at + self.pieces[piece].channels
            if start <= at and end <= stop:
                kept.append(piece)
            elif max(start, at) < min(stop, end):
                return Other("its forward takes a part of what a layer made")
            at = end
        return Features(tuple(kept))

    # ---- convolutions ------------------------------------------------------------------------------------------

    def _convolution(self, x: Active | Normed, args: Sequence[Any], made: Tensor) -> Features:
        self.convolutions += 1
        _, weight, bias, stride, padding, dilation, transposed, _, groups = args
        module: Any = self.module
        kernel = weight.shape[2:]
        same = all(k % 2 == 1 and p == d * (k // 2) for k, p, d in zip(kernel, padding, dilation, strict=True))
        obstacle = convolution = None
        if not same or set(stride) != {1} or transposed or groups != 1:
            known = module if isinstance(module, CONVOLUTIONS) else f"a window of {tuple(kernel)} with stride {stride}"
            obstacle = _no_plain_convolution(known)
        else:
            convolution = self.owners.convolution(module, weight, bias)
        if obstacle is None and convolution is None:
            obstacle = f"the weight of {'a convolution' if module is None else type(module).__name__} is computed"
        if convolution is not None and set(dilation) != {1}:
            convolution = convolution._replace(dilation=tuple(dilation))
        return self.new_piece(Piece(made.shape[1], x, convolution, obstacle, tuple(kernel)))

    def _first_convolution(self, x: Features, packet: Any, args: Sequence[Any], made: Tensor) -> Any:
        """One of the image, at the beginning of a stem: any that is not transposed."""
        _, weight, bias, stride, padding, dilation, transposed, _, groups = args
        convolution = None if transposed else self.owners.convolution(self.module, weight, bias)
        if convolution is None:
            return self._other(packet, [x])
        self.convolutions += 1
        entry = Entry(tuple(stride), tuple(padding), tuple(dilation), groups)
        return self.new_piece(Piece(made.shape[1], x, convolution, None, tuple(weight.shape[2:]), (), entry))

    # ---- dropout -----------------------------------------------------------------------------------------------

    def _noise(self, noise: Noise, packet: Any, args: Sequence[Any]) -> Noise | Other:
        if packet is _aten.bernoulli and noise.rate is None:
            return noise._replace(rate=1 - (args[1] if len(args) > 1 else 0.5))
        if packet is _aten.div and noise.rate is not None and not noise.scaled and args[1] == 1 - noise.rate:
            return noise._replace(scaled=True)
        return Other("its forward uses random numbers other than those of dropout")

    def _dropout(self, x: Any, noise: Noise | Zero, made: Tensor) -> Any:
        if isinstance(x, Normed | Active):
            return _active(x, "there is dropout in front of a convolution")
        dropout = Dropout(1.0, False)
        if isinstance(noise, Noise):
            whole = noise.shape[:2] == made.shape[:2] and set(noise.shape[2:]) == {1}
            if not noise.scaled or noise.rate is None or not (whole or noise.shape == made.shape):
                return Other("it drops something else than single values or whole channels")
            # Of a single pixel, single values are whole channels.
            dropout = Dropout(noise.rate, whole and noise.shape != made.shape)
        if isinstance(x, Stepped):
            return x._replace(steps=(*x.steps, dropout.step()))
        if isinstance(x, Features) and x.single is not None:
            piece = self.pieces[x.single]
            return self.new_piece(replace(piece, dropouts=(*piece.dropouts, dropout)))
        return Other("there is dropout in front of a norm")


def _active(x: Normed | Active, obstacle: str | None) -> Active:
    if isinstance(x, Active):
        return x if obstacle is None or x.obstacle is not None else Active(x.normed, obstacle)
    return Active(x, obstacle)


def _no_plain_convolution(convolution: object) -> str:
    return f"{convolution} is not a plain convolution that keeps the resolution"


def _changes_nothing(packet: Any, args: Sequence[Any], made: Tensor) -> bool:
    """Whether it multiplies by one or adds zero, numbers that may change: then the module is looked at again."""
    if packet in _VIEWS:
        return made.shape == args[0].shape
    if packet in (_aten.mul, _aten.div):
        return type(args[1]) in (int, float) and args[1] == 1
    return packet in (_aten.add, _aten.sub) and type(args[1]) in (int, float) and args[1] == 0


def _per_channel(x: Any, like: Tensor) -> bool:
    """Whether `x` has one number for each channel of `like`."""
    return isinstance(x, Tensor) and x.dim() == like.dim() and x.numel() == x.shape[1] == like.shape[1]


def _flat(arguments: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    for argument in arguments:
        found += _flat(argument) if isinstance(argument, list | tuple) else [argument]
    return found
