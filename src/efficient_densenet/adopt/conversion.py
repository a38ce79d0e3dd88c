"""What the recognised parts of a model become: `convert`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from efficient_densenet.adopt.adopted import (
    AdoptedNetwork,
    AdoptedPart,
    AdoptedSequence,
    adopt,
    adopted_modules,
    adoptions,
)
from efficient_densenet.adopt.decide import Adoption, Segment, Way
from efficient_densenet.adopt.survey import Finding, networks, survey
from efficient_densenet.errors import UserError
from efficient_densenet.execution import Keep
from efficient_densenet.execution.stage_operators import run_stage
from efficient_densenet.execution.stem_operators import run_stem


def convert(
    model: nn.Module,
    keep: Keep,
    way: Way = "shared",
    tried: bool = True,
    findings: Sequence[Finding] | None = None,
) -> None:
    """`make_efficient`.

    Args:
        model, keep, way: as there.
        tried: False for a model whose parts are known to be what they look like.
        findings: of `survey`, where they are known.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"make_efficient takes a torch.nn.Module, not {type(model).__name__}{_graph_advice(model)}")
    for passes in (run_stage, run_stem):
        passes.count()
    if adopted_modules(model):
        for adoption in adoptions(model):
            adoption.keep, adoption.way = keep, way
        return
    if findings is None:
        findings = survey(model, tried)
    if not any(finding.has_layers for finding in findings):
        raise UserError(_nothing_found(model, findings))
    segments: dict[nn.Module, list[Segment]] = {}
    for finding in findings:
        if not finding.left:
            name = "the stem" if finding.segment is not None and not finding.has_layers else ""
            looks, promised = list(finding.looks), finding.reason is None
            adoption = Adoption(way, keep, name, finding.where, looks=looks, promised=promised)
            if finding.segment is None:
                adopt(finding.module, AdoptedPart, adoption)
            else:
                segments.setdefault(finding.module, []).append(Segment(*finding.segment, adoption))
    for network, name, looks in networks(model, findings):
        block, norm = list(network.get_submodule(name).named_children())[-2:]
        where = f"{name}.{block[0]} and {norm[0]}"
        adoption = Adoption(way, keep, where=where, looks=looks, head=True)
        last = (Segment(-2, 0, adoption),)
        adopt(network, AdoptedNetwork, Adoption(way, keep, segments=last, features=name))
        segments.setdefault(network.get_submodule(name), [])
    for sequence, some in segments.items():
        adopt(sequence, AdoptedSequence, Adoption(way, keep, segments=tuple(some)))


def _nothing_found(model: nn.Module, findings: Sequence[Finding]) -> str:
    missed = [f"{f.name or 'the model'} ({type(f.module).__name__}): {f.reason}" for f in findings if f.reason]
    graph = next(filter(None, map(_graph_advice, model.modules())), "")
    return (
        f"{type(model).__name__} has no dense block that can be made efficient. Looked for modules that compute layers "
        "of norm, activation and convolution (once or twice), each of which reads what all before it made"
        + graph
        + "".join(["; close to that came:", *(f"\n  {text}" for text in missed)] if missed else "")
    )


_GRAPHS = {
    torch.fx.GraphModule: "torch.fx or torch.export traces it",
    torch.jit.ScriptModule: "torch.jit scripts or traces it",
    torch.export.ExportedProgram: "torch.export traces it",
}


def _graph_advice(model: object) -> str:
    """What to do instead, where a tool has put something in the place of a model's modules."""
    kind = type(model)
    tool = next((tool for graph, tool in _GRAPHS.items() if isinstance(model, graph)), None)
    if tool is None and kind.__module__.startswith("torch.ao.nn.") and "quantized" in kind.__module__:
        tool = "it is quantized"
    return "" if tool is None else f"; {kind.__name__} is what a tool has made of it: call make_efficient before {tool}"
