"""Whatever looks at a network from outside sees what it sees of the ordinary network: docs/tools.md, row by row."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from tools import FEATURES, PROGRAMS, networks, quietly
from tools_compiled import COMPILED, Compiler
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from efficient_densenet import make_efficient
from efficient_densenet.adopt import run
from efficient_densenet.execution import KEEP, shared

TABLE = Path(__file__).parents[2] / "docs" / "tools.md"
WAYS = {keep: {"keep": keep} for keep in KEEP} | {"recompute": {"way": "recompute"}}


def rows(section: str) -> dict[str, str]:
    """The first two columns of the table in that section."""
    text = TABLE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|", text, re.MULTILINE)[1:])


def test_every_row_has_its_program():
    assert list(rows("Called as it is")) == list(PROGRAMS)
    assert list(rows("Compiled")) == list(COMPILED)


@functools.cache
def made(kind: str, way: str) -> torch.nn.Module:
    network = networks()[kind]
    return network if way == "ordinary" else make_efficient(network, **WAYS[way])


@functools.cache
def expected(kind: str, name: str) -> object:
    return quietly(PROGRAMS[name], lambda: copy.deepcopy(made(kind, "ordinary")))


@pytest.mark.parametrize(
    ("kind", "way"), [*(("torchvision", way) for way in WAYS), ("ours", "bottleneck"), ("ours", "inputs")]
)
@pytest.mark.parametrize(("name", "how"), rows("Called as it is").items())
def test_a_tool_sees_the_ordinary_network(name, how, kind, way, monkeypatch):
    """Ours differs in its forward alone, which no `keep` sees."""
    ways = set()

    def note(function, which):
        return lambda *arguments, **named: ways.add(which) or function(*arguments, **named)

    make = functools.partial(copy.deepcopy, made(kind, way))
    monkeypatch.setattr(shared, "run", note(shared.run, "shared buffer"))
    monkeypatch.setattr(run, "recomputing", note(run.recomputing, "recompute"))
    actual = quietly(PROGRAMS[name], make)
    assert_same(actual, expected(kind, name))
    if how != "as it can":
        if way == "recompute" and how == "shared buffer":
            assert "shared buffer" not in ways
        else:
            assert (how in ways) == (how != "ordinary") and (how == "shared buffer" or "shared buffer" not in ways)


@pytest.mark.parametrize(
    ("name", "kind", "way"),
    [
        *[(name, "torchvision", "features") for name in COMPILED],
        *[
            ("a step of training, with the optimiser", "torchvision", way)
            for way in ("bottleneck", "inputs", "recompute")
        ],
        ("a step of training, with the optimiser", "ours", "features"),
    ],
)
def test_what_is_compiled_computes_the_same_in_one_graph(name, kind, way):
    network, compiler = networks(block_config=(1, 1))[kind], Compiler(really=True)
    efficient = make_efficient(copy.deepcopy(network), **WAYS[way])
    actual = COMPILED[name](efficient, compiler)
    assert_same(actual, COMPILED[name](network, Compiler(really=False)))
    assert compiler.again == 0 or way == "recompute"  # compiled in its ordinary form: the graphs are PyTorch's affair


@pytest.mark.parametrize("way", ["ordinary", *WAYS])
def test_a_checkpoint_around_a_block_moves_averages_once(way):
    """The ordinary block moves them again in backward. Reentrant checkpoints run anything again."""
    tracked = []
    for reentrant in (False, True):
        block, x = copy.deepcopy(made("torchvision", way)).features.denseblock1, FEATURES.clone().requires_grad_()
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        tracked.append({int(t) for name, t in block.named_buffers() if "tracked" in name})
    assert tracked == [{2 if way == "ordinary" else 1}, {2}]


def assert_same(actual: object, expected: object) -> None:
    found, wanted = tree_flatten(actual), tree_flatten(expected)
    assert found[1] == wanted[1]
    largest = max((t.abs().max().item() for t in wanted[0] if is_number(t)), default=0)
    for a, e in zip(found[0], wanted[0], strict=True):
        if isinstance(e, Tensor):
            tolerance = 1e-9 if e.dtype == torch.float64 else 1e-3
            assert a.shape == e.shape and a.dtype == e.dtype
            torch.testing.assert_close(
                a, e, rtol=tolerance, atol=tolerance * max(1e-3, min(1, largest)), equal_nan=True
            )
        else:
            assert a == e


def is_number(t: object) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.numel() > 0
