"""The packages import one way, and importing the package costs torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import efficient_densenet

SOURCE = Path(efficient_densenet.__file__).parent
# A package may import those of a lower rank, and itself.
RANK = {
    "errors": 0,
    "files": 0.5,
    "units": 0.5,
    "ops": 1,
    "execution": 2,
    "adopt": 3,
    "weights": 3,
    "models": 4,
    "checkpoints": 5,
    "training": 6,
    "measure": 6,
    "cli": 7,
}
# Inside these packages a file may import those before it, and those on its own line.
INSIDE = {
    "ops": ["protocol", "layers", "profiled", "reference", "layout", "convolution", "eager", "cpu triton", "shapes"],
    "execution": [
        "__init__ averages buffers casts operands pieces synchronise plan profiling reading recompute transforms",
        "norms",
        "block",
        "operators stage stem_convolutions stem_pools",
        "stage_operators stem",
        "stem_operators ready",
        "shared",
    ],
    "adopt": [
        "conditions kinds turns tools owners meanings",
        "trial unchanged",
        "record",
        "chain",
        "head look",
        "decide",
        "run",
        "adopted block memory",
        "step survey",
        "conversion",
        "report",
        "planner inspect",
        "choice",
        "__init__",
    ],
    "training": [
        "checkpointing data facts mistakes plots resuming runs signals tasks optimisation",
        "networks",
        "freezing network_factory trained",
        "module",
        "callbacks",
        "lightning_cli predict export prepare_imagenet",
    ],
    "measure": [
        "devices memory networks results",
        "clock kinks machine peers processes tables",
        "contenders script",
        "contender plots",
        "exactness",
        "worker",
        "contest max_batch",
        "gpu_worker",
        "deadline",
        "gpu_sections",
        "gradients",
        "benchmark check_gpu check_gradients env plan",
    ],
}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(p for p in SOURCE.rglob("*.py") if package_of(p) in RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_packages_import_one_way(path):
    for name in imports(path):
        if name.startswith("efficient_densenet."):
            other = name.split(".")[1]
            if other in RANK and other != package_of(path):
                assert RANK[other] < RANK[package_of(path)], f"{path} imports {name}"


def inner(name: str) -> tuple[str, str]:
    """The package of a dotted name, and the file or folder in it."""
    parts = [*name.split("."), "__init__", "__init__"]
    return parts[1], parts[2]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_in_a_package_import_one_way(path):
    if package_of(path) not in INSIDE or path.parent == SOURCE:
        return
    rank = {name: i for i, line in enumerate(INSIDE[package_of(path)]) for name in line.split()}
    own = path.relative_to(SOURCE).parts[1].removesuffix(".py")
    if own == "__init__" and package_of(path) == "ops":
        return  # which chooses among all of them
    for name in imports(path):
        if name.startswith(f"efficient_densenet.{package_of(path)}."):
            other = inner(name)[1]
            if other in rank and other != own:
                assert rank[other] <= rank[own], f"{path} imports {name}"


def test_what_is_compared_with_the_reference_uses_nothing_of_it():
    users = {path.name for path in FILES if any("ops.reference" in name for name in imports(path))}
    assert users == {"check.py"}  # which compares the kernels of a GPU with it


@pytest.mark.parametrize(("package", "owner"), [("triton", "ops"), ("lightning", "training")])
def test_packages_stay_in_their_room(package, owner):
    users = {package_of(p) for p in FILES if any(n.split(".")[0] == package for n in imports(p))}
    assert users <= {owner}


def test_importing_the_package_needs_torch_alone():
    heavy = ["torchvision", "lightning", "matplotlib", "sklearn", "safetensors", "triton", "onnx", "torchmetrics"]
    code = (
        "import sys, torch; before = set(sys.modules); import efficient_densenet; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_network_is_made_efficient_and_trained_without_pytorchs_compiler():
    """Importing it takes a second, and is left to whoever compiles."""
    code = (
        "import sys, torch; before = 'torch._dynamo' in sys.modules; from efficient_densenet import DenseNet; "
        "from efficient_densenet import make_efficient; "
        "network = make_efficient(DenseNet(num_init_features=4, block_config=(2, 2), input_size=64)); "
        "network(torch.randn(2, 3, 64, 64)).sum().backward(); network.eval()(torch.randn(2, 3, 64, 64)); "
        "print(before, 'torch._dynamo' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
