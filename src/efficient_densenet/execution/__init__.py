"""How dense blocks run: what is stored for backward, and what is computed again.

Two ways compute the same function as the ordinary one, with the same parameters; only time and memory differ:

- `shared`: a whole block on one buffer, from its `plan`, see `stage`; equal up to rounding, smallest and fastest;
- `recompute`: the same autograd graph, whose activations are computed again; bit-identical, and without a plan.

Which way a part of a network runs is decided in `adopt`, where plans are made.
"""

from __future__ import annotations

from typing import Literal, get_args

from efficient_densenet.errors import UserError

Keep = Literal["bottleneck", "features", "inputs"]
"""What the shared buffer keeps for backward."""

KEEP: tuple[Keep, ...] = get_args(Keep)

Auto = Literal["auto"]
"""As `keep`: the fastest of these that fits into memory; `adopt` chooses it before anything runs."""

AUTO: Auto = "auto"

Efficient = bool | Literal["recompute"]
"""``False``: the ordinary way; ``"recompute"``: bit-identical, less memory; ``True``: the shared buffer."""


def check_efficient(efficient: Efficient, keep: str) -> None:
    """Raise `UserError` unless these name a way to run."""
    if efficient not in (False, True, "recompute") or not isinstance(efficient, bool | str):
        raise UserError(f"efficient must be False, True or 'recompute', not {efficient!r}")
    check_keep(keep, AUTO)


def check_keep(keep: str, *others: str) -> None:
    """Raise `UserError` unless `keep` is one of `KEEP` or of `others`."""
    if keep not in (*KEEP, *others):
        raise UserError(f"keep must be one of {', '.join(map(repr, (*KEEP, *others)))}, not {keep!r}")
