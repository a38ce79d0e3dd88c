"""What the scripts in ``benchmarks/`` share: sections are measured one by one and kept, and a document shows them.

A script lists what to measure; how, and how it is shown, is written here and in the files beside this one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from efficient_densenet.files import replacing
from efficient_densenet.measure import machine, results, tables
from efficient_densenet.measure.networks import positive_int
from efficient_densenet.measure.results import Record


@dataclass(frozen=True)
class Section:
    """A part of a script that can be measured by itself.

    Attributes:
        title: its heading.
        measure: what the script's plan says → plain data, in JSON.
        table: the same data → markdown.
        dtype: of weights and images, for the line that names the source.
    """

    title: str
    measure: Callable[[Any], list[Record]]
    table: Callable[[list[Record]], str]
    dtype: str = "float32"


@dataclass(frozen=True)
class Script:
    """Sections that are kept in ``NAME.json``, by processor, and shown in ``NAME.md`` beside it."""

    name: str
    title: str
    sections: Mapping[str, Section]

    def main(self, argv: Sequence[str] | None, folder: Path, full: Any, quick: Any) -> int:
        """Run the script with the options `argv`; the plan is `full`, or `quick` where that is asked for."""
        arguments = self.parser(folder, full).parse_args(argv)
        return self.run(arguments, self.plan(arguments, full, quick))

    def parser(self, folder: Path, full: Any) -> argparse.ArgumentParser:
        """With the options that every script has; results are kept in `folder`."""
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument(
            "--sections",
            nargs="*",
            choices=tuple(self.sections),
            default=list(self.sections),
            help="what to measure; nothing: only write the tables again",
        )
        parser.add_argument("--quick", action="store_true", help="tiny networks, to try this program")
        parser.add_argument("--output", type=Path, default=folder, help="folder of the results")
        if hasattr(full, "rounds"):
            parser.add_argument("--rounds", type=positive_int, help=f"turns of each contender (None: {full.rounds})")
        return parser

    def plan(self, arguments: argparse.Namespace, full: Any, quick: Any) -> Any:
        """`full` or `quick`, with as many rounds as are asked for."""
        plan = quick if arguments.quick else full
        return replace(plan, rounds=arguments.rounds) if getattr(arguments, "rounds", None) else plan

    def run(self, arguments: argparse.Namespace, plan: Any) -> int:
        """Measure the sections that were asked for, each kept at once, and write the document again."""
        arguments.output.mkdir(parents=True, exist_ok=True)
        file = arguments.output / f"{self.name}.json"
        for name in arguments.sections:
            about = machine.describe("cpu")
            content = {"quick": arguments.quick, **about, "records": self.sections[name].measure(plan)}
            results.keep(file, machine.processor(), name, content)  # at once: what comes later may fail
        text = self.document(results.read(file))
        print(text, end="")
        with replacing(file.with_suffix(".md")) as beside:
            beside.write_text(text)
        return 0

    def document(self, found: results.Results) -> str:
        """All sections of all processors, in markdown."""
        parts = [f"# {self.title}\n\nMade by `python benchmarks/{self.name}.py` from `{self.name}.json`."]
        for processor, sections in found.items():
            parts.append(f"## {processor}")
            for name, section in self.sections.items():
                if name in sections:
                    kept = sections[name]
                    table = section.table(kept["records"])
                    parts.append(f"### {section.title}\n\n{table}\n\n{tables.source(kept, section.dtype)}")
        return "\n\n".join(parts) + "\n"
