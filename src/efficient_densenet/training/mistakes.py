"""What a configuration can get wrong, in one sentence each: the reports of parser, Lightning and PyTorch cut short."""

from __future__ import annotations

import re
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from efficient_densenet.errors import UserError
from efficient_densenet.weights.formats import shortened

# Packages to which a configuration goes as it is. What they raise themselves is about the configuration.
_READERS = ("jsonargparse", "lightning", "lightning_utilities", "torch.optim", "torchmetrics")
_COMPLAINTS = (ValueError, TypeError, RuntimeError, ImportError, ZeroDivisionError)
_BUGS = re.compile("CUDA error|INTERNAL ASSERT|NCCL")
_MINIMA = {
    "trainer.accumulate_grad_batches": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.log_every_n_steps": 0,
    "trainer.gradient_clip_val": 0,
    "seed_everything": 0,
}
_LARGEST_SEED = 2**32 - 1


@contextmanager
def mistakes_named() -> Iterator[None]:
    """Turns what a wrong configuration makes the parser, Lightning and PyTorch raise into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ArgumentError, MisconfigurationException) as error:
        raise UserError(fact_of(str(error))) from error
    except UnicodeDecodeError as error:
        raise UserError(f"a configuration is not text in UTF-8 ({error}); save it as such") from error
    except _COMPLAINTS as error:
        # jsonargparse wraps what a constructor raises in a report on every type that it tried.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        if not _module_that_raised(error).startswith(_READERS) or _BUGS.search(str(error)):
            raise
        if isinstance(error, ZeroDivisionError):
            raise UserError("a number in the configuration is 0 and must be more (T_max or step_size, say)") from error
        raise UserError(fact_of(str(error))) from error


def _module_that_raised(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")


def fact_of(report: str) -> str:
    """The fact in a report of jsonargparse on all the types that it has tried for an entry, on one line."""
    if report.startswith("Unexpected config"):
        return "a configuration has no sections, such as model, data and trainer: it is empty, or something else"
    if "backend found" in report:
        return f"{report.rstrip('!')} on this machine; --trainer.accelerator cpu trains without"
    if "cannot start any token" in report:
        return f"{shortened(report, 300)}: YAML is indented with spaces, and a tab is none"
    entry = re.search(r'(?:Parser key|Key) "(?:\.?(?:fit|validate|test)\.)?([^"]+)":?', report)
    key = entry[1].replace(".init_args", "") if entry else ""
    report = report.replace(entry[0], "", 1) if entry else report
    inner = _report_of_an_argument(report)
    if inner:
        return f"{key}.{fact_of(inner)}"
    missing = re.search(r"the following arguments are required: (?:(?:fit|validate|test)\.)?([\w.]*\w)", report)
    if missing:
        return f"{key}.{missing[1]} is required".removeprefix(".")
    unaccepted = re.search(r"Option '(\w+)' is not accepted", report)
    if unaccepted:
        return f"{key} has no option {unaccepted[1]!r}; where it has no class yet, give one first, with --{key} CLASS"
    unknown = re.search(r"Expected a dot import path string: (\S+)", report)
    if unknown:
        return f"{key}: there is no class {shortened(unknown[1])}"
    lines = [line.strip(" -") for line in report.splitlines()]
    facts = [_without_frame(line) for line in lines if line and not line.startswith(_FRAME)]
    types = {line: match[1] or match[2] for line in facts if (match := _TYPE.fullmatch(line))}
    others = list(dict.fromkeys(line for line in facts if line and line not in types))  # each type says it anew
    value = re.search(r"(?:Given|Got) value: (.+)\Z", report, re.DOTALL)
    if types and value and not others:
        return f"{key} must be {' or '.join(types.values())}, not {shortened(value[1])}"
    said = shortened(" ".join(others), 300)
    if said == "is required" or not key:
        return f"{key} {said}".strip()
    return f"{key}: {said}"


def _report_of_an_argument(report: str) -> str:
    """What a report says about an argument of the class that an entry names; empty: nothing."""
    found = re.search(r'^( *)Parser key "[^"].*(?:\n\1 .*)*', report, re.MULTILINE)
    return found[0].lstrip() if found else ""


_FRAME = ("Does not validate against", "Subtypes:", "Errors:", "Given value", "Expected a path but")
_TYPE = re.compile(r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*)\])\.?")


def _without_frame(line: str) -> str:
    """A line of a report without the type that was tried and the value that was given."""
    line = re.sub(
        r"^(?:Type \S.* expects a function or a callable class: |Problem with given class_path '.*?':)", "", line
    )
    return re.sub(r"\.? ?Got value: .*$", "", line)


def check_settings(given: Any) -> None:
    """Refuse settings that Lightning takes and with which it does something nobody wants.

    Args:
        given: the entries of a configuration that somebody gave, as a namespace of jsonargparse. The parser has not
            checked their types yet.

    Raises:
        UserError: an interval is not positive, a limit negative, the seed none, or no epoch would be validated.
    """
    for name, minimum in _MINIMA.items():
        value = _number(given, name)
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum}, not {value}")
    interval = _number(given, "trainer.val_check_interval")
    if interval is not None and interval <= 0:
        raise UserError(f"trainer.val_check_interval must be more than 0, not {interval}")
    epochs, every = _number(given, "trainer.max_epochs"), _number(given, "trainer.check_val_every_n_epoch")
    if epochs is not None and epochs < 1 and epochs != -1:
        raise UserError(f"trainer.max_epochs must be at least 1, or -1 for no end, not {epochs}")
    if epochs is not None and every is not None and 0 < epochs < every:
        raise UserError(f"with trainer.check_val_every_n_epoch {every}, none of {epochs} epochs would be validated")
    seed = _number(given, "seed_everything")
    if seed is not None and seed > _LARGEST_SEED:
        raise UserError(f"seed_everything must be at most {_LARGEST_SEED}, not {seed}")


def refuse_repeated_entries(configuration: Path) -> None:
    """Refuse a configuration in which an entry is there twice: of two, parsers of YAML take the last without a word.

    Raises:
        UserError: the file has one.
    """
    try:
        pending = [yaml.compose(configuration.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)]
    except yaml.YAMLError:  # JSON with tabs, for example, which the parser takes
        return
    seen: set[yaml.Node] = set()  # an alias is the node that it names, and may be inside of it
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, yaml.SequenceNode):
            pending += node.value
        elif isinstance(node, yaml.MappingNode):
            names = [name.value for name, _ in node.value if isinstance(name.value, str)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"{configuration} has the entry {twice[0]} twice: make one of the two")
            pending += [value for _, value in node.value]


def _number(given: Any, name: str) -> int | float | None:
    value = given.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the machine, has no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
