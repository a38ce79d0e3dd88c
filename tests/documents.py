"""The code blocks of README and docs: found, run, and what they print written again.

    python tests/documents.py     # run it after a change of what a block prints

A block of ``python`` runs after those before it on its page, with their names. A block of ``text`` behind it is what it
prints. A block of ``console`` holds commands behind ``$``, and what they print. An ellipsis (…) stands for any text in
a line. A block of ``sh`` holds commands whose output is not shown.

The comment ``<!-- needs a GPU -->`` above a block says why it is not run here, but only checked (`test_docs`);
``<!-- run by tests/FILE -->`` names the test that runs it instead.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from efficient_densenet.cli import main as efficient_densenet
from efficient_densenet.files import replacing

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *ROOT.glob("docs/**/*.md")])
LANGUAGES = ("python", "text", "console", "sh", "yaml")
_BLOCK = re.compile(
    r"^(?:<!-- (?:needs (?P<needs>.+)|run by (?P<test>.+)) -->\n)?```(?P<language>.*)\n(?P<text>(?:.*\n)*?)```$", re.M
)
_SMALL = {"check-gradients": ["--batch-size", "2"]}
"""What makes a command short; of options that are given twice, the last one counts."""


@dataclass(frozen=True)
class Block:
    """A block of code: `start` and `stop` are those of its text in the page."""

    page: Path
    start: int
    stop: int
    language: str
    text: str
    needs: str | None
    test: str | None

    def __str__(self) -> str:
        line = self.page.read_text()[: self.start].count("\n") + 1
        return f"{self.page.relative_to(ROOT)}:{line}"

    @property
    def commands(self) -> list[str]:
        """Of ``sh`` and ``console``, one a line, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [line for line in lines if shlex.split(line, comments=True)]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = [
        Block(page, *m.span("text"), m["language"], m["text"], m["needs"], m["test"]) for m in _BLOCK.finditer(text)
    ]
    assert 2 * len(found) == text.count("```"), f"{page} has a block of code that is not read"
    return found


def prepare(here: Path) -> None:
    """Write into a folder what the pages read: a file of another library."""
    small = torchvision.models.DenseNet(growth_rate=4, block_config=(1, 1, 1, 1), num_init_features=8)
    torch.save({"state_dict": small.state_dict(), "state_dict_ema": small.state_dict()}, here / "theirs.pth")


def run(page: Path) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page, in the present folder; blocks that show an output, and it.

    Raises:
        AssertionError: a command failed.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.needs or block.test:
            continue
        if block.language == "text":
            yield block, printed
        elif block.language == "python":
            printed = _printed(block, names)
        elif block.language == "console":
            yield block, "".join(f"$ {command}\n{_output(command)}" for command in block.commands)
        elif block.language == "sh":
            for command in block.commands:
                _output(command)


def _printed(block: Block, names: dict[str, Any]) -> str:
    code = compile("\n" * block.page.read_text()[: block.start].count("\n") + block.text, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, names)
    return output.getvalue()


def _output(command: str) -> str:
    program, name, *options = shlex.split(command, comments=True)
    assert program == "efficient-densenet", f"{command}: write above its block what it needs, or which test runs it"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert efficient_densenet([name, *options, *_SMALL.get(name, [])]) == 0, command
    return output.getvalue()


def agrees(shown: str, obtained: str) -> bool:
    """Whether a page shows what was obtained; … stands for any text in a line."""
    return re.fullmatch(re.escape(shown).replace("…", ".*"), tidy(obtained)) is not None


def tidy(printed: str) -> str:
    """Without spaces and lines at its ends."""
    return "".join(f"{line.rstrip()}\n" for line in printed.rstrip().splitlines())


def main() -> int:
    """Write every output that differs from what its page shows."""
    with tempfile.TemporaryDirectory() as here, contextlib.chdir(here):
        prepare(Path(here))
        for page in PAGES:
            text = page.read_text()
            for block, obtained in [*run(page)][::-1]:  # from the end, so that positions stay true
                if not agrees(block.text, obtained):
                    text = text[: block.start] + tidy(obtained) + text[block.stop :]
                    print(f"written: {block}")
            if text != page.read_text():
                with replacing(page) as beside:
                    beside.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
