"""What compiled kernels take of a device, and whether their tensor-core products can be overtaken: from machine code.

NVIDIA's is disassembled by the tools in Triton's package; what AMD's takes, its assembler writes down.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton


def describe(compiled: Any) -> dict[str, Any]:
    """Registers of a thread, bytes that spill to memory, whether tensor cores multiply, and what overtakes a product.

    The kernels have no arrays of their own, so that whatever is on a thread's stack was spilled: in the
    loop that holds the product, unless that is known not to touch it.
    """
    if "cubin" in compiled.asm:
        used = _tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
        registers, stack, local = (int(_search(rf"\b{name}:(\d+)", used)) for name in ("REG", "STACK", "LOCAL"))
        products, code, spilled = r"\b(wgmma|mma|tcgen05\.mma)\.", compiled.asm["ptx"], stack + local
        listing = _listing(compiled) if "wgmma." in code or spilled else ""
        found = overtaken(listing) if "wgmma." in code else []
        loop = _product_loop(*_parsed(listing)) if spilled else []
        in_loop = bool(spilled) and (not loop or any(i.name.startswith(("LDL", "STL")) for i in loop))
    else:
        products, code, found = r"\bv_(mfma|wmma)_", compiled.asm["amdgcn"], []
        registers, spilled = (
            int(_search(rf"\.{name}:\s+(\d+)", code)) for name in ("vgpr_count", "private_segment_fixed_size")
        )
        in_loop = bool(spilled)
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "spills_in_loop": in_loop,
        "tensor_cores": bool(re.search(products, code)),
        "overtaken": "; ".join(found),
    }


class Instruction(NamedTuple):
    address: str
    conditional: bool
    name: str
    operands: tuple[str, ...]


def overtaken(listing: str) -> list[str]:
    """Instructions that overwrite a register which a product of a warp group, still running, may read.

    Hopper's products (``HGMMA``) run beside the instructions after them. Those of a group, which ends with the operand
    ``gsb0``, are complete behind ``WARPGROUP.DEPBAR.LE gsb0, n`` that leaves at most n later groups running. Until then
    the registers of their left operand must stay as they are. All paths through the code are followed, with the groups
    that may be running on each.
    """
    code, labels = _parsed(listing)
    found: set[int] = set()
    seen: set[tuple] = set()
    # Where to go on, the registers read by each running group, and those of the group that has not ended yet.
    paths: list[tuple[int, tuple[frozenset[int], ...], frozenset[int]]] = [(0, (), frozenset())]
    while paths:
        at, running, begun = path = paths.pop()
        if path in seen or at >= len(code):
            continue
        seen.add(path)
        instruction = code[at]
        name, operands = instruction.name, instruction.operands
        if name.startswith("HGMMA"):
            begun |= _registers(operands[1], 4)
            if any(operand.startswith("gsb") for operand in operands):
                running, begun = (*running, begun), frozenset()
            assert len(running) < 32, "groups that nobody waits for"
        elif _written(instruction) & begun.union(*running):
            found.add(at)
        if name.startswith("WARPGROUP.DEPBAR"):
            left = int(operands[-1], 16)
            running = running[len(running) - left :] if left else ()
        if name.startswith("BRA"):
            paths.append((labels[_search(r"\((\.L_\w+)\)", operands[-1])], running, begun))
        # A branch may depend on a predicate before its name or among its operands.
        ends = name.split(".")[0] in ("EXIT", "BRA") and not instruction.conditional and len(operands) < 2
        if not ends:
            paths.append((at + 1, running, begun))
    return [f"{code[at].address}: {code[at].name} {', '.join(code[at].operands)}" for at in sorted(found)]


def product_loop(compiled: Any) -> tuple[list[Instruction], list[Instruction]]:
    """All instructions of a kernel for NVIDIA's, and those of the loop that holds its product, if there is one."""
    code, labels = _parsed(_listing(compiled))
    return code, _product_loop(code, labels)


def _product_loop(code: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The instructions of the loop that holds the product; none where there is no loop or no tensor core's product."""
    loops = []
    for end, instruction in enumerate(code):
        if instruction.name.startswith("BRA"):
            begin = labels[_search(r"\((\.L_\w+)\)", instruction.operands[-1])]
            loop = code[begin : end + 1]
            if any(i.name.startswith(("HGMMA", "HMMA")) for i in loop):
                loops.append(loop)
    return min(loops, key=len, default=[])


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):")


def _parsed(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and which one each label stands before."""
    code: list[Instruction] = []
    labels = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            address, condition, name, operands = found.groups()
            parts = tuple(part.strip() for part in operands.split(",")) if operands else ()
            code.append(Instruction(address, condition is not None, name, parts))
    return code, labels


def _written(instruction: Instruction) -> set[int]:
    """The registers that an instruction writes to: its first operand, if that is one, and those that follow it."""
    name = instruction.name
    if "SETP" in name:  # writes to predicates alone
        return set()
    targets = [part for part in instruction.operands if not re.fullmatch(r"!?U?P(\d|T)", part)]
    matrix = re.match(r"LDSM\S*\.(\d)$", name)
    pair = re.match(r"CS2R(?!\.32)|D(ADD|MUL|FMA)|.*(\.64|\.WIDE)", name)
    quad = re.match(r"HMMA|IMMA|.*\.128", name)
    number = int(matrix[1]) if matrix else 4 if quad else 2 if pair else 1
    return set(_registers(targets[0], number)) if targets else set()


def _registers(operand: str, number: int) -> frozenset[int]:
    found = re.match(r"R(\d+)\b", operand)
    return frozenset(range(int(found[1]), int(found[1]) + number)) if found else frozenset()


def _listing(compiled: Any) -> str:
    """The instructions. Analysing data flow would add targets to branches through a stack, which no kernel has."""
    return _tool("nvdisasm", compiled.asm["cubin"], "--print-code", "--no-dataflow")


def _tool(name: str, binary: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([str(tool), *options, file.name], capture_output=True, text=True, check=True).stdout


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text[:200]}"
    return found[1]
