"""Try modules on random tensors, with random weights, and leave no trace in them.

While they are on trial, modules have other dictionaries: with tensors of the trial in place of their own, no hooks,
and copies of containers and objects. Afterwards they have the very dictionaries back that they had.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import log2, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _disable_current_modes

from efficient_densenet.adopt.conditions import DEPTH, OF_EVERY_MODULE, PLAIN, contents, frozen, levels
from efficient_densenet.adopt.meanings import NotDenseError
from efficient_densenet.adopt.turns import trial

_HOOKS = [name for name in vars(nn.Module()) if name.startswith(("_forward", "_backward"))]
_NOTHING = object()
_SOME_PRIME = 7919


class Tensors:
    """Tensors of a trial in place of a module's own: as large, in single precision, random, and not to be changed.

    The large ones are views of a few random values: nothing is copied, however large the model is. On the device "meta"
    they have no values, and nothing is computed.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator().manual_seed(0)
        self.pools: dict[int, Tensor] = {}
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    def instead_of(self, name: str, tensor: Tensor) -> Tensor:
        if is_lazy(tensor):
            return tensor
        if id(tensor) not in self.made:  # one that is tied stays tied
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            self.made[id(tensor)] = self._make(name, tensor, dtype), tensor
        return self.made[id(tensor)][0]

    def activation(self, *shape: int) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.float32, device=self.device)
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def _make(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(like.shape, dtype=dtype, device=self.device)
        if not like.is_floating_point():
            return torch.zeros(like.shape, dtype=dtype, device=self.device)
        # Vectors may be written to, and what is no bias and no mean must not be negative.
        if like.dim() < 2:
            values = self._random(0, like.numel()).clone().mul_(12**-0.5).view(like.shape)
            return values if name.endswith(("bias", "mean")) else values.add_(1)
        # Near to what keeps the size of activations, and few different ones, for each takes memory.
        exponent = 3 * round(-log2(max(1, prod(like.shape[1:]))) / 6)
        return self._random(exponent, like.numel()).view(like.shape)

    def _random(self, exponent: int, count: int) -> Tensor:
        """Uniform, of a standard deviation of two to this power."""
        start = _SOME_PRIME * len(self.made) % 100_003
        if exponent not in self.pools or len(self.pools[exponent]) < start + count:
            size = 2 ** (start + count).bit_length()
            pool = torch.rand(size, generator=self.generator, dtype=torch.float32, device=self.device)
            self.pools[exponent] = pool.sub_(0.5).mul_(12**0.5 * 2.0**exponent)
        return self.pools[exponent][start : start + count]


@contextmanager
def on_trial(modules: Sequence[nn.Module], tensors: Tensors) -> Iterator[None]:
    """While this is open, these modules have other tensors and no hooks, and their forward leaves no trace.

    Raises:
        NotDenseError: one of them is a script of torch.jit, which runs nothing that could be watched.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise NotDenseError("a module of it is a script of torch.jit")
    kept = [(module, module.__dict__) for module in modules]
    copies: dict[int, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        if torch.get_default_device() != tensors.device:  # every operation asks for it
            stack.enter_context(tensors.device)
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.inference_mode(False))  # in which a record would see other operations
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_other_random_states_kept())
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # they would be about the trial
        stack.enter_context(_no_global_hooks())
        stack.enter_context(_own_parametrized())
        stack.enter_context(trial())
        stack.enter_context(_not_compiled())
        try:
            for module, attributes in kept:
                object.__setattr__(module, "__dict__", _instead_of(attributes, tensors, copies))
            yield
        finally:
            for module, attributes in kept:
                object.__setattr__(module, "__dict__", attributes)


def attributes(modules: Sequence[nn.Module]) -> list[dict[str, Any]]:
    """All attributes as they are now, for `stored`: of containers and objects, what is plain in them."""
    found = [dict(module.__dict__) for module in modules]
    for some in found:
        for name, value in _not_plain(some):
            if contents(value) is not None:
                some[name] = frozen(value)
    return found


def _not_plain(attributes: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in attributes.items() if type(v) not in PLAIN and k not in OF_EVERY_MODULE]


def stored(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> str | None:
    """The name of an attribute that a forward has stored or changed in a module between two `attributes`, if any."""
    for old, new in zip(before, after, strict=True):
        for name, value in new.items():
            was = old.get(name, _NOTHING)
            if was is not value and not (type(was) is tuple and was == value):
                return name
    return None


def random_states(modules: Sequence[nn.Module]) -> list[bytes]:
    """Those of Python, of NumPy, and of the generators that these modules hold."""
    numpy, kinds = sys.modules.get("numpy"), _generators()
    states = [random.getstate(), None if numpy is None else numpy.random.get_state()]
    held = [value for m in modules for _, value in _not_plain(m.__dict__) if isinstance(value, kinds)]
    return [pickle.dumps(state) for state in [*states, *held]]


def _generators() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    of_numpy = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return random.Random, torch.Generator, *of_numpy


def _instead_of(attributes: dict[str, Any], tensors: Tensors, copies: dict[int, Any]) -> dict[str, Any]:
    found = attributes | {name: _copy(value, copies) for name, value in _not_plain(attributes)}
    for kind in ("_parameters", "_buffers"):
        found[kind] = {k: None if t is None else tensors.instead_of(k, t) for k, t in attributes[kind].items()}
    for name in _HOOKS:
        found[name] = OrderedDict()
    found.pop("_compiled_call_impl", None)
    return found


def _copy(value: Any, copies: dict[int, Any], depth: int = DEPTH) -> Any:
    """A copy of a container or an object and of those in it, one copy of each; of anything else the thing itself."""
    inside = contents(value, depth)
    if (inside is None and not isinstance(value, _generators())) or hasattr(type(value), "__del__"):
        return value
    if id(value) in copies:
        return copies[id(value)]
    try:
        made = copies[id(value)] = copy.copy(value) if inside is not None else copy.deepcopy(value)
    except Exception:  # whatever it is: it cannot be copied
        made = copies[id(value)] = value
    if inside is None or made is value:
        return made
    depth -= levels(value)
    if isinstance(value, dict):
        for key, entry in value.items():
            made[key] = _copy(entry, copies, depth)
    elif isinstance(value, list):
        made[:] = [_copy(entry, copies, depth) for entry in value]
    elif inside is not value:
        made.__dict__.update({name: _copy(entry, copies, depth) for name, entry in inside.items()})
    return made


@contextmanager
def _other_random_states_kept() -> Iterator[None]:
    state, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    random.seed(0)
    if numpy is not None:
        numpy.random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Without the hooks on all modules of the process, which are for the user's own calls."""
    names = [name for name in vars(global_hooks) if name.startswith(("_global_forward", "_global_backward"))]
    kept = {name: getattr(global_hooks, name) for name in names}
    for name in names:
        setattr(global_hooks, name, OrderedDict())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(global_hooks, name, hooks)


@contextmanager
def _own_parametrized() -> Iterator[None]:
    """Within ``parametrize.cached()``, what the trial's weights make is not remembered for the user's."""
    kept, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = kept


@contextmanager
def _not_compiled() -> Iterator[None]:
    """A compiler that watches this thread leaves the trial alone."""
    compiler = torch._C._dynamo.eval_frame
    before = compiler.set_eval_frame(None)
    try:
        yield
    finally:
        compiler.set_eval_frame(before)
