"""Files of measurements: JSON, by machine and section, each section with hardware, versions, commit and date."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from efficient_densenet.errors import UserError
from efficient_densenet.files import replacing

_BREAK = r"\n\s*"  # strings have none
Record = dict[str, Any]
Results = dict[str, dict[str, Record]]
"""The sections of each machine. A section is `machine.describe`, ``quick``, and its ``records``."""


def check_output(file: Path) -> None:
    """Raise `UserError` where `file` could not be written later: known before the long measurement, not after."""
    if file.is_dir():
        raise UserError(f"{file} is a folder: give --output the name of a file")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UserError(f"there is no folder {file.parent} that can be written to: make it, or use another --output")


def read(file: Path) -> Results:
    """What was measured before; nothing where there is no such file."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write `content` to `file`, all of it or nothing; lists of plain values take one line."""
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\n\s*([^][{}]*?)\n\s*\]", lambda found: f"[{re.sub(_BREAK, ' ', found[1])}]", text)
    with replacing(file) as beside:
        beside.write_text(text + "\n")


def keep(file: Path, machine: str, section: str, content: Record) -> None:
    """Write one section of one machine to `file`; all others stay."""
    found = read(file)
    found.setdefault(machine, {})[section] = content
    write_json(file, found)
