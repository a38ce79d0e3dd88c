"""Any network's dense parts: recorded, recognised, tried, planned, run, reported, restored.

>>> model = make_efficient(torchvision.models.densenet121(), keep="features")
>>> print(report(model))
"""

from __future__ import annotations

from efficient_densenet.adopt.adopted import restore
from efficient_densenet.adopt.block import dense_block
from efficient_densenet.adopt.choice import chosen_keep, make_efficient
from efficient_densenet.adopt.conversion import convert
from efficient_densenet.adopt.decide import Way
from efficient_densenet.adopt.planner import Plan, fastest_that_fits, plan
from efficient_densenet.adopt.report import Entry, Report, report

__all__ = [
    "Entry",
    "Plan",
    "Report",
    "Way",
    "chosen_keep",
    "convert",
    "dense_block",
    "fastest_that_fits",
    "make_efficient",
    "plan",
    "report",
    "restore",
]
