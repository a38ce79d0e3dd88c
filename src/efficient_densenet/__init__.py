"""DenseNets that train in a fraction of the memory, with the same results."""

from efficient_densenet.adopt import Entry, Plan, Report, dense_block, make_efficient, plan, report, restore
from efficient_densenet.errors import EfficiencyWarning, MissingExtraError, UserError
from efficient_densenet.execution.recompute import recomputing
from efficient_densenet.models import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
)
from efficient_densenet.models.timm_registry import register_with_timm
from efficient_densenet.ops import backends

__version__ = "0.1.0"

__all__ = [
    "DenseNet",
    "EfficiencyWarning",
    "Entry",
    "MissingExtraError",
    "Plan",
    "Report",
    "UserError",
    "backends",
    "dense_block",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_cifar",
    "make_efficient",
    "plan",
    "recomputing",
    "report",
    "restore",
]

register_with_timm()
