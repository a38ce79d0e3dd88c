"""Redraw every table and picture of README and docs from the measurements in ``results/``.

    python benchmarks/redraw.py            # write them
    python benchmarks/redraw.py --check    # write nothing; the code is 1 where something is not what it would become

Tables stand between two comments that name them. Measurements without a picture or a table are shown in
``results/*.md``, one document for each script.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import adoption
import cpu
import curves
import engine
import exactness
import peers
import planner

from efficient_densenet.errors import UserError
from efficient_densenet.execution import KEEP
from efficient_densenet.files import replacing
from efficient_densenet.measure import plots, results, tables
from efficient_densenet.measure.results import Record
from efficient_densenet.units import format_bytes, megabytes

ROOT = Path(__file__).parents[1]
PROCESSOR = "AMD EPYC, avx512_bf16"
"""Whose figures stand in README."""


def records(script: str, section: str) -> list[Record]:
    """What a section measured on `PROCESSOR`; nothing where it was not measured."""
    found = results.read(ROOT / "benchmarks" / "results" / f"{script}.json").get(PROCESSOR, {})
    return found[section]["records"] if section in found else []


def bytes_per_image() -> dict[tuple[str, str], float]:
    """The peak of a training step, by network and contender."""
    return {(r["network"], r["contender"]): r["bytes_per_image"] for r in records("engine", "memory")}


def claim() -> str:
    """What DenseNet-121 gains, in a sentence; all times are of one contest."""
    name = "DenseNet-121"
    taken = bytes_per_image()
    (race,) = records("peers", "training")
    rows = {row["contender"]: row for row in race["summary"]}
    shares = {contender: f"{row['pairs']['median']:.2f} of the time" for contender, row in rows.items()}
    flag = rows["torchvision-flag"]["step_bytes_per_image"]
    ways = [f'{format_bytes(taken[name, keep])} an image and {shares[keep]} with `"{keep}"`' for keep in cpu.KEEPS]
    return (
        f"A training step of {name} (float32, 224×224, times with {race['batch_size']} images) takes "
        f"**{format_bytes(taken[name, 'ordinary'])} an image** as an ordinary network, and "
        f"**{'**, or **'.join(ways)}**. torchvision's `memory_efficient=True` takes {format_bytes(flag)} an image and "
        f"{shares['torchvision-flag']}. Measured on two cores of an AMD EPYC processor (AVX-512 with bfloat16, no AMX)."
    )


def memory() -> str:
    """MB per image by what is kept, and the largest batch."""
    ways = ("ordinary", *KEEP)
    found = bytes_per_image()
    rows = [
        [f"{subject.name}, MB per image", *(megabytes(found[subject.name, way]) for way in ways)]
        for subject in engine.FULL.subjects
    ]
    for record in records("engine", "max-batch"):
        largest = {r["contender"]: r["largest_batch"] for r in record["results"]}
        limit = f"{record['limit_bytes'] / 1e9:g} GB"
        rows.append([f"{record['network']}, largest batch in {limit}", *(str(largest[way]) for way in ways)])
    return tables.markdown(["network", "ordinary", *(f'`"{keep}"`' for keep in KEEP)], rows, names=1)


def ratios(section: str) -> dict[tuple[str, int], dict[str, float]]:
    """F+B to the faster ordinary form, by network and batch, then by contender."""
    return {
        (record["network"], record["batch_size"]): {r["contender"]: r["F+B to ordinary"] for r in record["summary"]}
        for record in records("cpu", section)
    }


def times() -> str:
    """The shares of the ordinary network's time, by network and type."""

    def row(label: str, key: tuple[str, int], *sections: str) -> list[str]:
        cells = [ratios(section).get(key) if section else None for section in sections]
        shown = [[f"{cell[keep]:.2f}" for keep in cpu.KEEPS if keep in cell] if cell else [] for cell in cells]
        return [f"{key[0]}, batch {key[1]}{label}", *(" / ".join(parts) for parts in shown)]

    large, single = ("DenseNet-121", 8), ("DenseNet-121", 1)
    rows = [
        *(row("", key, "training", "avx2", "bfloat16") for key in ratios("training")),
        row(", autocast to bfloat16", large, "", "", "autocast"),
        *(row(", evaluation", key, "evaluation", "avx2-evaluation", "bfloat16-evaluation") for key in (large, single)),
    ]
    table = tables.markdown(["network", "float32", "float32, AVX2", "bfloat16"], rows, names=1)
    runtimes = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    sentences = []
    for name, batch_size in (large, single):
        found = ratios("evaluation").get((name, batch_size), {})
        shares = [f"{runtimes[of]} takes {found[of]:.2f}" for of in runtimes if of in found]
        if shares:
            sentences.append(f"In evaluation in float32 with batch {batch_size}, {' and '.join(shares)}.")
    return "\n\n".join([table, " ".join(sentences)] if sentences else [table])


def nearest() -> str:
    """Where the native CPU backend is nearest to the ordinary network."""
    found = [
        (ratio, name, network, batch_size, cpu.SCRIPT.sections[section].title)
        for section in cpu.SCRIPT.sections
        if section != "profile"
        for (network, batch_size), row in ratios(section).items()
        for name, ratio in row.items()
        if name in cpu.KEEPS
    ]
    ratio, name, network, batch_size, title = max(found)
    where = f"{network}, batch {batch_size}, `{name}` ({title})"
    return f"The largest share of the ordinary network's time that was measured: {ratio:.2f}, {where}."


def planned() -> str:
    """What is planned beside what a step took."""
    return planner.table(records("planner", "peaks"))


def gpu_model() -> str:
    """Milliseconds of each part of a step on an H100, by a model: the bounds of DenseNet-121, and what each takes."""
    found = results.read(ROOT / "benchmarks" / "results" / "gpu_model.json")["records"]
    of: dict[str, list] = {}
    for record in found:
        of.setdefault(record["network"], []).append(record)
    bounds = ("memory", "cache", "instructions")
    rows = [
        [parts[0]["part"], *(f"{parts[0][key]:.1f}" for key in bounds), *(f"{part['takes']:.1f}" for part in parts)]
        for parts in zip(*of.values(), strict=True)
    ]
    rows.append(["together", *[""] * len(bounds), *(f"{sum(r['takes'] for r in parts):.1f}" for parts in of.values())])
    return tables.markdown(["kernels", *bounds, *(network.removeprefix("DenseNet-") for network in of)], rows, names=1)


def gpu_times() -> str:
    """Training steps on a GPU, of every contender that there was time for, the fastest first."""
    rows = []
    for sections in results.read(ROOT / "benchmarks" / "results" / "gpu.json").values():
        for name, section in sections.items():
            found = [record for record in section["records"] if "step_ms" in record]
            for record in sorted(found, key=lambda record: record["step_ms"]):
                images, peak = f"{record['images_per_second']:,.0f}", f"{record['peak_bytes'] / 1e9:.2f}"
                rows.append([name, record["contender"], f"{record['step_ms']:.1f}", images, peak])
    return tables.markdown(["network", "contender", "F+B ms", "images per second", "peak GB"], rows, names=2)


def side_by_side() -> str:
    """Other libraries and compiled networks beside ours, and the pictures of that."""
    shown = [
        f"**{section.title}**\n\n{section.table(found)}"
        for name, section in peers.SCRIPT.sections.items()
        if (found := records("peers", name))
    ]
    shown += [
        f"![{picture.name.replace('_', ' ').capitalize()}](../benchmarks/results/{picture.name}.png)"
        for picture in PICTURES
        if picture.script == "peers" and records("peers", picture.section)
    ]
    return "\n\n".join(shown) or "Not measured yet."


@dataclass(frozen=True)
class Table:
    """What stands in a document between ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""

    document: str
    name: str
    make: Callable[[], str]

    def update(self, text: str) -> str:
        begin, end = f"<!-- {self.name}: python benchmarks/redraw.py -->\n", f"\n<!-- end of {self.name} -->"
        before, marked, rest = text.partition(begin)
        _, ended, behind = rest.partition(end)
        if not marked or not ended:
            raise UserError(f"{self.document} has no place for the table {self.name}: write {begin}and{end} there")
        return f"{before}{begin}{self.make()}{end}{behind}"


@dataclass(frozen=True)
class Picture:
    """A PNG in ``benchmarks/results``, and the section that it is drawn from."""

    name: str
    draw: plots.Draw
    script: str
    section: str


TABLES = (
    Table("README.md", "claim", claim),
    Table("README.md", "memory", memory),
    Table("README.md", "time", times),
    Table("docs/cpu.md", "nearest", nearest),
    Table("docs/gpu.md", "model", gpu_model),
    Table("docs/gpu.md", "times", gpu_times),
    Table("docs/measuring.md", "side by side", side_by_side),
    Table("docs/adoption.md", "planned", planned),
)
PICTURES = (
    Picture("memory_against_depth", plots.memory_against_depth, "engine", "depth"),
    Picture("time_against_memory", plots.time_against_memory, "peers", "compiled"),
    Picture("memory_over_a_step", plots.memory_over_a_step, "planner", "traces"),
    Picture("training_curves", plots.training_curves, "curves", "digits"),
    Picture("errors_against_float64", plots.errors_against_float64, "exactness", "every-type"),
)
SCRIPTS = (engine.SCRIPT, cpu.SCRIPT, adoption.SCRIPT, peers.SCRIPT, planner.SCRIPT, curves.SCRIPT, exactness.SCRIPT)


def texts(root: Path) -> dict[Path, str]:
    """Every document with tables, as it should be."""
    folder = root / "benchmarks" / "results"
    found = {
        folder / f"{script.name}.md": script.document(results.read(folder / f"{script.name}.json"))
        for script in SCRIPTS
        if (folder / f"{script.name}.json").exists()
    }
    for table in TABLES:
        file = root / table.document
        found[file] = table.update(found.get(file) or file.read_text())
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write what is not as it should be, or with ``--check`` name it; 1 if that is anything."""
    parser = argparse.ArgumentParser(description="redraw the tables and pictures of README and docs")
    parser.add_argument("--check", action="store_true", help="write nothing, only name what differs")
    arguments = parser.parse_args(argv)
    stale: list[Path] = []
    for file, text in texts(ROOT).items():
        if not file.exists() or file.read_text() != text:
            stale.append(file)
            if not arguments.check:
                with replacing(file) as beside:
                    beside.write_text(text)
    for picture in PICTURES:
        file, measured = (
            ROOT / "benchmarks" / "results" / f"{picture.name}.png",
            records(picture.script, picture.section),
        )
        if measured and not plots.is_current(measured, file):
            stale.append(file)
            if not arguments.check:
                plots.save(picture.draw, measured, file)
    for file in stale:
        print(f"{'differs from its data' if arguments.check else 'written'}: {file.relative_to(ROOT)}")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
