"""The networks under names of timm: ``timm.create_model("efficient_densenet121", pretrained=True, num_classes=10)``.

timm is slow to import and not needed here, so that nothing imports it. Where it is imported, before or after this
package, it learns the names: at once, or when its module ``timm.models`` has been run.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from efficient_densenet.errors import UserError
from efficient_densenet.models.densenet import DenseNet
from efficient_densenet.models.variants import densenet121, densenet161, densenet169, densenet201, densenet264

_REGISTERED = (densenet121, densenet161, densenet169, densenet201, densenet264)
_NAMES = {"in_chans": "in_channels", "proj_drop_rate": "drop_rate"}  # timm's and ours
_SAME = {"num_classes", "efficient", "keep"}
_NOT_USED = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}  # what timm passes to every network


def register_with_timm() -> None:
    """Give the names to timm, now or when it is imported."""
    if "timm.models" in sys.modules:
        _register()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(MetaPathFinder):
    """Finds ``timm.models`` as it would be found anyway, and registers the networks behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm.models":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    models = importlib.import_module("timm.models")
    for build in _REGISTERED:
        models.register_model(_entry_point(build, models))


def _entry_point(build: Callable[..., DenseNet], models: ModuleType) -> Callable[..., DenseNet]:
    def entry_point(pretrained: bool = False, **arguments: Any) -> DenseNet:
        ours: dict[str, Any] = {"efficient": True}
        for name, value in arguments.items():
            if name in _SAME or name in _NAMES:
                ours[_NAMES.get(name, name)] = value
            elif name not in _NOT_USED and value:
                raise UserError(f"{entry_point.__name__} has no argument {name}; it has {', '.join([*_NAMES, *_SAME])}")
        network = build(weights=f"timm:{build.__name__}" if pretrained else None, **ours)
        config = models.get_pretrained_cfg(build.__name__)
        # From this, timm takes the size and the normalisation of the images.
        network.pretrained_cfg = network.default_cfg = config.to_dict() if config else {}  # type: ignore[assignment]
        return network

    entry_point.__name__ = entry_point.__qualname__ = f"efficient_{build.__name__}"
    entry_point.__doc__ = build.__doc__
    return entry_point
