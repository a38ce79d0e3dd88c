"""From the record of a forward to what it is: dense layers, each of which reads all made before, and a tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from efficient_densenet.adopt.meanings import Active, Features, Normed, NotDenseError, Other, Piece, Stepped
from efficient_densenet.adopt.record import Record
from efficient_densenet.execution.plan import Blur, Entry, Norm, Plan, Ranges, Step, sources

_AVERAGE_POOLS = ("avg_pool1d", "avg_pool2d", "avg_pool3d")
_MAX_POOLS = ("max_pool2d_with_indices", "max_pool3d_with_indices")


@dataclass(frozen=True)
class Chain:
    """What a module, or several in a row, compute: dense layers, a transition, both, or a stem.

    Attributes:
        dims: spatial dimensions of the input.
        width: channels of the input.
        made: channels that each layer makes.
        bottlenecks: channels of each layer's bottleneck output; empty without bottlenecks.
        tail: channels that the transition or stem makes; 0 without one.
        is_stem: whether the tail is one.
        pools: whether the transition or stem makes the resolution smaller, or has a pool at least.
        plan: how it runs on the shared buffer, if it can.
        reason: why not. For the layers, if there are any, whatever follows.
        tail_reason: why the tail cannot run there, if so, whether the layers can or not.
    """

    dims: int
    width: int
    made: tuple[int, ...]
    bottlenecks: tuple[int, ...]
    tail: int
    is_stem: bool
    pools: bool
    plan: Plan | None
    reason: str | None
    tail_reason: str | None


def conclude(record: Record, made: Tensor, head: bool = False) -> Chain:
    """What the record of a forward that returned this tensor is.

    Args:
        record, made: the record, and what came out.
        head: whether it is dense layers and a norm, which relu and the mean over all pixels follow.

    Raises:
        NotDenseError: neither dense layers nor a transition nor a stem.
    """
    output = record.meaning(made)
    if isinstance(output, Other):
        raise NotDenseError(output.reason)
    if head:
        if not isinstance(output, Normed):
            raise NotDenseError("it does not end with a norm")
        output = record.new_piece(Piece(0, Active(output, None)))
    last, steps = _last(record, output)
    stem = None if last is None or head else _stem(record, last)
    layers = _layers(record, output, last) if stem is None else []
    if last is None and (not layers or not isinstance(output, Features)):
        raise NotDenseError("what it returns is not a concatenation of features")
    width = record.pieces[0].channels
    growths = tuple(record.pieces[layer[-1]].channels for layer in layers)
    bottlenecks = tuple(record.pieces[layer[0]].channels for layer in layers if len(layer) == 2)
    reason = _layers_obstacle(record, layers)
    blur = output.blur if isinstance(output, Stepped) else None
    tail_reason = (
        None if last is None else _tail_obstacle(last, blur) if stem is None else _stem_obstacle(stem, steps, blur)
    )
    reason = reason or tail_reason or _norms_obstacle(record)
    plan = None
    if reason is None:
        plan = _plan(record, output, layers, last, steps) if stem is None else _plan_of_stem(width, stem, blur)
        if _wastes(record, plan):
            plan, reason = None, "it makes features that it does not hand out"
    tail = 0 if last is None else last.channels
    pools = bool(steps) or (tail > 0 and made.shape[2:] != record.size)
    return Chain(
        len(record.size), width, growths, bottlenecks, tail, stem is not None, pools, plan, reason, tail_reason
    )


def join(block: Chain, tail: Chain, offset: int) -> Chain | None:
    """Layers, and a transition or norm that reads all that they hand out, as one; None where they cannot be one.

    Args:
        block, tail: what each is.
        offset: the number of the tail's first module behind those of the block.
    """
    first, second, width = block.plan, tail.plan, block.width + sum(block.made)
    if first is None or second is None or block.tail or tail.made or tail.is_stem or first.output:
        return None
    if tail.width != width or tail.dims != block.dims:
        return None
    norms = [norm._replace(part=norm.part + offset, source=(0, width)) for norm in second.norms]
    convolutions = [convolution._replace(part=convolution.part + offset) for convolution in second.convolutions]
    plan = replace(
        first,
        made=first.made + second.made,
        norms=(*first.norms, *norms),
        convolutions=(*first.convolutions, *convolutions),
        pool=second.pool,
        steps=second.steps,
    )
    return replace(block, tail=tail.tail, pools=tail.pools, plan=plan)


def _last(record: Record, output: Any) -> tuple[Piece | None, tuple[Step, ...]]:
    """What a transition or a stem made, and what followed; None where features come out."""
    steps: tuple[Step, ...] = ()
    if isinstance(output, Stepped):
        number, steps, _ = output
    elif isinstance(output, Features) and output.single is not None:
        number = output.single
    else:
        return None, ()
    piece = record.pieces[number]
    if piece.entry is not None:
        alone = piece.obstacle is None
        raise NotDenseError("it is a convolution alone" if alone else "no batch norm follows its first convolution")
    return piece, (*(dropout.step() for dropout in piece.dropouts), *steps)


def _stem(record: Record, last: Piece) -> list[Piece] | None:
    """What a stem's convolutions made, each behind the one before, and then `last`; None if it is no stem."""
    if last.convolution is not None or last.obstacle is not None:
        return None
    found = [last]
    while (read := _read(found[0])) != (0,) and len(read) == 1:
        found.insert(0, record.pieces[read[0]])
    return found if found == [last] or found[0].entry is not None else None


def _read(piece: Piece) -> tuple[int, ...]:
    """The pieces that its norm reads, or its convolution of the image."""
    source = piece.source if piece.normed is None else piece.normed.source
    return source.pieces if isinstance(source, Features) else ()


def _layers(record: Record, output: Any, last: Piece | None) -> list[tuple[int, ...]]:
    """The pieces that each layer made, in their order: its bottleneck output, if it has one, and its features.

    Raises:
        NotDenseError: a layer, or what follows, reads other features than all that were made before it.
    """
    end = _read(last) if last is not None else output.pieces if isinstance(output, Features) else ()
    found: list[tuple[int, ...]] = []
    wanted = _concatenated(record, end)
    for number in sorted(wanted):
        piece = record.pieces[number]
        if piece.source is None or (piece.convolution is None and piece.obstacle is None):
            raise NotDenseError("it concatenates what no convolution made")
        chain = [number]
        while (
            len(chain) < 3
            and len(_read(record.pieces[chain[0]])) == 1
            and not wanted.union({0}) & set(_read(record.pieces[chain[0]]))
        ):
            chain.insert(0, *_read(record.pieces[chain[0]]))
        if any(record.pieces[number].entry is not None for number in chain):
            raise NotDenseError("its first convolution has no norm before it")
        found.append(tuple(chain))
    known = {0}
    for i, layer in enumerate(found, start=1):
        read = _read(record.pieces[layer[0]])
        if set(read) != known or len(read) != len(known):
            raise NotDenseError(f"its layer {i} does not read all features that were made before it, each once")
        known.add(layer[-1])
    if last is not None and (set(end) != known or len(end) != len(known)):
        raise NotDenseError("its last convolution does not read all features, each once")
    return found


def _concatenated(record: Record, pieces: Sequence[int]) -> set[int]:
    """These pieces and all others that they were made of, but the input and bottleneck outputs."""
    found: set[int] = set()
    left = [*pieces]
    while left:
        number = left.pop()
        if number != 0 and number not in found:
            found.add(number)
            read = _read(record.pieces[number])
            while len(read) == 1 and read != (0,):
                read = _read(record.pieces[read[0]])
            left += read
    return found


# ---- obstacles to the shared buffer ----------------------------------------------------------------------------


def _layers_obstacle(record: Record, layers: Sequence[tuple[int, ...]]) -> str | None:
    for layer in layers:
        for number in layer:
            reason = _obstacle(record.pieces[number])
            if reason is not None:
                return reason
        if len(layer) > 2:
            return "a layer has more than two convolutions"
        if len(layer) == 2 and record.pieces[layer[0]].dropouts:
            return "there is dropout between the two convolutions of a layer"
    return None if len({len(layer) for layer in layers}) <= 1 else "its layers are not all of one form"


def _tail_obstacle(piece: Piece, blur: Blur | None) -> str | None:
    return _obstacle(piece) or (None if blur is None else "there is a filter behind its convolution")


def _stem_obstacle(stem: Sequence[Piece], steps: Sequence[Step], blur: Blur | None) -> str | None:
    for piece in stem:
        reason = _obstacle(piece) if piece.entry is None else piece.obstacle
        if reason is not None:
            return reason
        if piece.dropouts:
            return "there is dropout in it"
    if not _is_stems_pool(steps, 2 if blur is None else 1):
        return "it does not end with the max pool of a DenseNet's stem (window 3, stride 2, padding 1)"
    return None


def _obstacle(piece: Piece) -> str | None:
    source, normed = piece.source, piece.normed
    assert normed is not None
    if normed.obstacle is not None:
        return normed.obstacle
    if not isinstance(source, Active):
        return "there is no rectifier between a norm and what follows it"
    return source.obstacle or piece.obstacle


def _norms_obstacle(record: Record) -> str | None:
    """Synchronised norms and others cannot share statistics."""
    norms = [_norm(piece) for piece in record.pieces]
    kinds = {record.synchronises.get(norm.part) for norm in norms if norm is not None and not norm.frozen} - {None}
    return "some of its norms are synchronised and others are not" if len(kinds) > 1 else None


def _wastes(record: Record, plan: Plan) -> bool:
    """Whether a convolution ran whose gradient is zero in the ordinary network, and that the plan leaves out."""
    used = {convolution.part for convolution in plan.convolutions}
    made = [piece for piece in record.pieces if piece.convolution is not None or piece.obstacle is not None]
    return any(piece.convolution is None or piece.convolution.part not in used for piece in made)


def _norm(piece: Piece) -> Norm | None:
    return None if piece.normed is None else piece.normed.norm


# ---- the plan --------------------------------------------------------------------------------------------------


def _plan(
    record: Record,
    output: Any,
    layers: Sequence[tuple[int, ...]],
    last: Piece | None,
    steps: tuple[Step, ...],
) -> Plan:
    pieces = record.pieces
    chain = [pieces[number] for layer in layers for number in layer]
    per_layer = len(layers[0]) if layers else 1
    width = pieces[0].channels
    read = sources(width, [piece.channels for piece in chain], per_layer, last is not None)
    chain += [] if last is None else [last]
    norms, convolutions = [], []
    for piece, source in zip(chain, read, strict=True):
        norm, order = _norm(piece), _order(record, _read(piece))
        assert norm is not None
        norms.append(norm._replace(source=source, order=order))
        if piece.convolution is not None:
            convolutions.append(piece.convolution._replace(order=order))
    pool = 0
    if last is not None and last.convolution is not None:
        pool, steps = _pool_first(last, steps)
    # A head makes a channel for each that its norm reads, in the order of that norm.
    features = output.pieces if last is None else _read(last) if last.convolution is None else ()
    return Plan(
        width,
        tuple(piece.channels for piece in chain if piece.convolution is not None),
        tuple(norms),
        tuple(convolutions),
        per_layer,
        tuple(pieces[layer[-1]].dropouts for layer in layers),
        pool,
        steps,
        output=_positions(record, layers, features),
    )


def _ranges(record: Record, held: Sequence[int], wanted: Sequence[int]) -> Ranges:
    """First channel and number of channels of the `wanted` pieces, where those `held` lie one behind the other."""
    ranges, at = {}, 0
    for number in held:
        ranges[number] = (at, record.pieces[number].channels)
        at += record.pieces[number].channels
    return tuple(ranges[number] for number in wanted)


def _plan_of_stem(width: int, stem: Sequence[Piece], blur: Blur | None) -> Plan:
    """Of convolutions, if there are any, each with the norm behind it."""
    *made, _ = stem
    read = pairwise(accumulate([piece.channels for piece in made] or [width], initial=0))
    norms = []
    for piece, source in zip(stem[1:] or stem, read, strict=True):
        norm = _norm(piece)
        assert norm is not None
        norms.append(norm._replace(source=source))
    entry = made[0].entry if made else Entry()
    convolutions = tuple(piece.convolution for piece in made if piece.convolution is not None)
    return Plan(width, tuple(piece.channels for piece in made), tuple(norms), convolutions, entry=entry, blur=blur)


def _order(record: Record, read: Sequence[int]) -> Ranges:
    """Where the oldest, the second oldest, ... of the pieces that a norm reads lie among its channels."""
    return () if list(read) == sorted(read) else _ranges(record, read, sorted(read))


def _positions(record: Record, layers: Sequence[tuple[int, ...]], output: Sequence[int]) -> Ranges:
    """Where the pieces that come out lie in the buffer; empty where they are all of it in its order."""
    held = [0, *(layer[-1] for layer in layers)]
    if list(output) == held:
        return ()
    joined: list[tuple[int, int]] = []
    for start, count in _ranges(record, held, output):
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((start, count))
    return tuple(joined)


def _pool_first(last: Piece, steps: tuple[Step, ...]) -> tuple[int, tuple[Step, ...]]:
    """The average pool that may run before the convolution, 1 if there is none; and what is left to run behind it."""
    pool, used = _pool(steps, _AVERAGE_POOLS)
    if pool is None or set(last.kernel) != {1}:
        return 1, steps
    window, *more = pool
    size: int = window[0]
    defaults: list[Any] = [[], [0], False, True, None]
    stride, padding, ceil_mode, _, divisor = more + defaults[len(more) :]
    simple = list(stride or window) == list(window) and not any(padding) and not ceil_mode and divisor is None
    return (size, steps[used:]) if simple and len(set(window)) == 1 else (1, steps)


def _is_stems_pool(steps: Sequence[Step], stride: int) -> bool:
    pool, used = _pool(steps, _MAX_POOLS)
    if pool is None or used != len(steps):
        return False
    defaults: list[Any] = [[1], False]
    dilation, ceil_mode = pool[3:] + defaults[len(pool) - 3 :]
    return [set(p) for p in (*pool[:3], dilation)] == [{3}, {stride}, {1}, {1}] and not ceil_mode


def _pool(steps: Sequence[Step], names: Sequence[str]) -> tuple[list[Any] | None, int]:
    """The arguments of the pool of this kind that `steps` begin with, and how many of them it is.

    In one dimension it is a pool in two, on lines.
    """
    of_lines = [getattr(getattr(step.function, "overloadpacket", None), "__name__", "") for step in steps[:3]]
    if len(of_lines) == 3 and of_lines[0] == "unsqueeze" and of_lines[1] in names and of_lines[2] == "squeeze":
        return [a[1:] if isinstance(a, list) and len(a) == 2 else a for a in steps[1].arguments], 3
    if of_lines and of_lines[0] in names:
        return list(steps[0].arguments), 1
    return None, 0
