"""Look through a model for what can be made efficient: what each candidate is, how it would run, and why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from efficient_densenet.adopt.adopted import Adopted, AdoptedPart
from efficient_densenet.adopt.chain import Chain
from efficient_densenet.adopt.head import ends_with_a_head
from efficient_densenet.adopt.kinds import CONVOLUTIONS, has_forward, modules_of, runs_in_order
from efficient_densenet.adopt.look import Joins, Look, find, joins, look, look_at_both
from efficient_densenet.adopt.meanings import NotDenseError
from efficient_densenet.adopt.trial import Tensors

_LEAVES = (*CONVOLUTIONS, nn.modules.batchnorm._NormBase, nn.Linear)


_WINDOW = 6  # modules to look at first, for where a run of them ends


class Finding(NamedTuple):
    """A module, or some of a sequence that run as one, that look like a part of a DenseNet.

    Attributes:
        name: in the model; empty for the model itself.
        module: the module, or the sequence.
        looks: what it computes in evaluation and in training; empty where it stays as it is.
        segment: first and last (exclusive) of the sequence's modules; None for a whole module.
        reason: why it does not run on the shared buffer, if so.
        joins: whether it is none of what is looked for, and recomputes all the same, because of what it concatenates.
        nearly: whether it looks like a dense block, of what is left.
    """

    name: str
    module: nn.Module
    looks: tuple[Look, ...]
    segment: tuple[int, int] | None = None
    reason: str | None = None
    joins: bool = False
    nearly: bool = False

    @property
    def left(self) -> bool:
        """Whether it stays as it is."""
        return not self.looks and not self.joins

    @property
    def has_layers(self) -> bool:
        """Whether it is made efficient, and concatenates."""
        return self.joins or (bool(self.looks) and bool(self.chain.made))

    @property
    def chain(self) -> Chain:
        chain = self.looks[0].chain
        assert chain is not None
        return chain

    @property
    def where(self) -> str:
        """The names of all its modules in the model."""
        if self.segment is None:
            return self.name
        names = [name for name, module in self.module._modules.items() if module is not None][slice(*self.segment)]
        return f"{self.name}.{' and '.join(names)}"

    @property
    def roots(self) -> list[nn.Module]:
        if self.segment is None:
            return [self.module]
        return modules_of(self.module)[slice(*self.segment)]


def survey(model: nn.Module, tried: bool = True) -> list[Finding]:
    """Every dense block and transition, and every run of modules in a sequence that is one, in the model's order.

    Args:
        model: is left as it is, and what is adopted in it is left out.
        tried: as in `look`.
    """
    findings: list[Finding] = []
    others: list[Finding] = []
    tensors = Tensors("cpu")
    inside: set[nn.Module] = set()  # what was found, with all in it
    inside_others: set[nn.Module] = set()  # what looks like a dense block and is none, with all in it
    for name, module in model.named_modules():
        if isinstance(module, AdoptedPart):
            inside.update(module.modules())
        finding = None if module in inside else _whole(name, module, tensors, tried)
        if finding is None:
            continue
        if finding.left:
            others.append(finding)
            inside_others.update(module.modules() if finding.nearly else ())
        elif module not in inside_others or len(finding.chain.made) > 1:  # or it is a layer, or a part of one
            findings.append(finding)
            inside.update(module.modules())
    whole = {finding.module: finding for finding in findings}
    for name, module in model.named_modules():
        if module not in inside and runs_in_order(module) and not isinstance(module, Adopted):
            findings += _segments(name, module, whole, tensors, tried)
    findings += _others(model, findings, others, tensors)
    numbers = {module: i for i, module in enumerate(model.modules())}
    return sorted(findings, key=lambda finding: (finding.segment is not None, numbers[finding.module]))


def _others(
    model: nn.Module, findings: Sequence[Finding], others: Sequence[Finding], tensors: Tensors
) -> Iterator[Finding]:
    """The outermost of the others without layers in them: those that recompute, and those to say why they are left."""
    found = {module for finding in findings if finding.has_layers for module in finding.roots}
    found |= {module for module in model.modules() if isinstance(module, AdoptedPart)}
    candidates = []
    for other in others:
        replaced = "forward" in vars(other.module)  # which would be called instead of that of another class
        candidates.append((other, Joins() if replaced or _overlap(other, found) else joins(other.module, tensors)))
    # A block joins its input. A network with the blocks in its own forward joins what it has made and joined before.
    for recomputes, wanted in (
        (True, lambda other, joined: joined.input),
        (True, lambda other, joined: joined.again),
        (False, lambda other, joined: other.nearly),
    ):
        for other, joined in candidates:
            if wanted(other, joined) and not _overlap(other, found):
                found.update(other.module.modules())
                yield other._replace(joins=recomputes)


def _overlap(finding: Finding, found: set[nn.Module]) -> bool:
    return not found.isdisjoint(finding.module.modules())


def _whole(name: str, module: nn.Module, tensors: Tensors, tried: bool) -> Finding | None:
    """The module, if it is a dense block (perhaps with its transition), a transition, or nearly one."""
    if isinstance(module, _LEAVES) or not has_forward(module):
        return None
    if not _has_convolutions(module):
        return None
    try:
        looks = look([module], tensors, tried=tried)
    except NotDenseError as error:
        nearly = (error.concatenates and not runs_in_order(module)) or _looks_dense(module)
        return Finding(name, module, (), None, str(error), nearly=nearly)
    finding = _finding(name, module, looks, None)
    chain = finding.chain
    if not _by_itself(chain) or (runs_in_order(module) and chain.made and chain.tail_reason):
        return None
    if "forward" in vars(module):  # which would be called instead of that of another class
        return Finding(name, module, (), None, "its forward was replaced for this one object", nearly=True)
    return finding


def _shares(chain: Chain) -> bool:
    """Whether there is anything that its parts can share."""
    return len(chain.made) > 1 or chain.tail > 0


def _by_itself(chain: Chain) -> bool:
    """Whether a module that computes this is worth adopting by itself."""
    return bool(chain.made) or chain.is_stem or (chain.tail > 0 and chain.pools)


def _finding(name: str, module: nn.Module, looks: Sequence[Look], segment: tuple[int, int] | None) -> Finding:
    reason = next((one.reason for one in looks if one.reason is not None), None)
    return Finding(name, module, tuple(looks), segment, reason)


def _segments(
    name: str, sequence: nn.Module, whole: dict[nn.Module, Finding], tensors: Tensors, tried: bool
) -> Iterator[Finding]:
    """The runs of modules in a sequence that are to be run as one."""
    modules, i = modules_of(sequence), 0
    while i < len(modules):
        length, looks = _run(modules[i:], whole, tensors, tried)
        if looks:
            yield _finding(name, sequence, looks, (i, i + length))
        i += length


def _run(
    modules: Sequence[nn.Module], whole: dict[nn.Module, Finding], tensors: Tensors, tried: bool
) -> tuple[int, list[Look]]:
    """How many of these modules, from the first, belong together, and what they compute; nothing if they run singly."""
    first, *others = modules
    block = whole.get(first)
    if block is not None and block.chain.plan is not None and not block.chain.tail:
        if not any(_has_convolutions(module) for module in others):
            return 1, []
        tail = whole.get(others[0])
        if tail is not None and not tail.chain.made and not tail.chain.is_stem:
            both = look_at_both(first, others[0], block.looks, tail.looks)
            return (2, both) if both else (1, [])
    window, chains = _WINDOW, find(modules[:_WINDOW], tensors)
    while len(chains) == window < len(modules):
        window *= 2
        chains = find(modules[:window], tensors)
    length = _longest(chains)
    if length == 0 or (length == 1 and block is not None):
        return 1, []
    try:
        return length, look(modules[:length], tensors, tried=tried)
    except NotDenseError:  # the trial shows that it is something else
        return length, []


def _has_convolutions(module: nn.Module) -> bool:
    return any(is_lazy(p) or p.dim() > 2 for p in module.parameters())


def networks(model: nn.Module, findings: Sequence[Finding]) -> Iterator[tuple[nn.Module, str, list[Look]]]:
    """Networks whose head can join the last block of their features.

    Returns:
        Each network, the name of its features, and what their last block and norm compute with the head.
    """
    blocks = {f.module: f for f in findings if f.looks and f.segment is None and f.chain.made and not f.chain.tail}
    for network in list(model.modules()):
        for name, features in network.named_children():
            if runs_in_order(features) and not runs_in_order(network) and len(features) > 1:  # type: ignore[arg-type]
                *_, block, norm = modules_of(features)
                if block in blocks and isinstance(norm, _BatchNorm) and ends_with_a_head(network, features):
                    with suppress(NotDenseError):
                        of_norm = look([norm], Tensors("cpu"), head=True, tried=False)
                        looks = look_at_both(block, norm, blocks[block].looks, of_norm)
                        yield network, name, looks or look([block, norm], Tensors("cpu"), head=True, tried=False)


def _longest(chains: Sequence[Chain | None]) -> int:
    """The longest run that fits the shared buffer, but for its layers perhaps; else the longest that is anything."""
    useful = [(n, c) for n, c in enumerate(chains, start=1) if c is not None and _by_itself(c) and _shares(c)]
    fitting = [n for n, chain in useful if chain.tail_reason is None]
    return max(fitting or [n for n, _ in useful], default=0)


def _looks_dense(module: nn.Module) -> bool:
    """Whether its parts read more and more channels, each at least one norm and one convolution: a near miss."""
    children = list(module.children())
    while any(not has_forward(child) for child in children):
        children = [part for child in children for part in ([child] if has_forward(child) else child.children())]
    widths = []
    for child in children:
        convolutions = [m for m in child.modules() if isinstance(m, CONVOLUTIONS)]
        has_norm = any("norm" in type(m).__name__.lower() for m in child.modules())
        if not convolutions or not has_norm or isinstance(child, CONVOLUTIONS):
            return False
        widths.append(convolutions[0].in_channels)
    return len(widths) > 1 and all(b > a or b == 0 for a, b in pairwise(widths))  # 0: nobody knows yet
