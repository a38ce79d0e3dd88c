"""What README and docs say is so: every block of code runs and prints what is shown, every command and option exists.

`documents` reads and runs the pages. What cannot run here (it needs data, a GPU, minutes) is checked all the same:
commands by the parsers that would get them, Python by its imports and the signatures of what it calls.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import documents
import pytest
import yaml
from documents import PAGES, ROOT

import efficient_densenet
from efficient_densenet import checkpoints, cli

LIGHTNING = ("fit", "validate", "test")
FIT = ["efficient-densenet", "fit", "--config", str(ROOT / "configs" / "finetune.yaml"), "--data.root", "my_images"]
SHARED = ROOT / "src" / "efficient_densenet" / "measure" / "script.py"
OTHER_OPTIONS = {"--print_config", "--strict", "--compile-only", "--sections"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
BLOCKS = [block for page in PAGES for block in documents.blocks(page)]


def name(page: object) -> str:
    return str(page.relative_to(ROOT)) if isinstance(page, Path) else str(page)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    documents.prepare(folder)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if documents.blocks(page)], ids=name)
@pytest.mark.filterwarnings("ignore")
def test_a_page_runs_and_prints_what_it_shows(page, prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    for block, obtained in documents.run(page):
        assert documents.agrees(block.text, obtained), (
            f"{block} shows something else than was obtained (python tests/documents.py writes it):\n{obtained}"
        )


def test_no_block_escapes():
    assert len(BLOCKS) > 30
    for before, block in zip([None, *BLOCKS], BLOCKS, strict=False):
        assert block.language in documents.LANGUAGES, f"{block} is in no language that a test understands"
        if block.language == "text":
            assert before and before.language == "python" and before.page == block.page, f"{block} is nobody's output"
        if block.test:
            said = f"{block} is said to be run by {block.test}"
            assert (ROOT / block.test).exists(), f"{said}, which is not there"
            for command in block.commands:
                assert Path(shlex.split(command)[1]).stem in (ROOT / block.test).read_text(), (
                    f"{said}, which has no such"
                )
    for page in PAGES:
        indented = re.findall(r"^    +(?:efficient-densenet|python|pip|\./)\b.*", page.read_text(), re.MULTILINE)
        assert not indented, f"{page} has commands outside of a block: {indented}"


REFERENCE = re.findall(r"^::: .*\b(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def test_the_reference_has_every_public_name():
    assert set(REFERENCE) >= set(efficient_densenet.__all__)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_reference_describes_arguments_that_exist(name):
    """By their names, one at a time: otherwise the site is not built."""
    found = getattr(efficient_densenet, name, None) or getattr(checkpoints, name)
    described = re.search(r"^Args:\n((?: {4}.*\n|\n)*)", f"{inspect.getdoc(found)}\n", re.MULTILINE)
    if described:
        names = re.findall(r"^ {4}\**(\S.*?):", described[1], re.MULTILINE)
        assert names and set(names) <= set(inspect.signature(found).parameters)


def test_the_site_shows_every_page():
    """Otherwise it is not built either."""
    site = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    shown = {ROOT / name for name in re.findall(r"(\S+\.md)$", site, re.MULTILINE)}
    named = {ROOT / "docs" / page.relative_to(ROOT) for page in shown if page.name != "index.md"}
    results = {ROOT / "docs" / page.relative_to(ROOT) for page in ROOT.glob("benchmarks/results/*.md")}
    assert named >= results | {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert link.endswith((".md", ".png")) and (page.parent / link).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("sh", "console")], ids=str)
def test_commands_are_understood(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in block.commands:
        understand(shlex.split(command, comments=True))


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python" and b.needs], ids=str)
def test_python_that_is_not_run_fits_what_it_calls(block):
    names: dict[str, object] = {}
    tree = ast.parse(block.text)
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), str(block), "exec"), names)
    fit_signatures(tree, names)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_configurations_are_understood(block, tmp_path):
    (tmp_path / "page.yaml").write_text(block.text)
    understand([*FIT, "--config", str(tmp_path / "page.yaml")])
    assert yaml.safe_load(block.text).keys() <= {"model", "data", "trainer"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_options_and_calls_in_the_text_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for span in sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text()))):
        if span.startswith("--"):
            understand_options(span)
        elif span.startswith(("efficient-densenet ", "python benchmarks/", "python examples/", "./run.sh ", "pip ")):
            words = shlex.split(span)
            if len(words) > 2:  # a name alone, such as `efficient-densenet predict`, has its row in the table below
                understand(words)
            else:
                assert words[0] != "efficient-densenet" or words[1] in command_names(), span
        elif span.split("(")[0] in efficient_densenet.__all__ and span.endswith(")") and "..." not in span:
            fit_signatures(ast.parse(span), vars(efficient_densenet))


def understand(words: list[str]) -> None:
    """Fail unless the program that gets these words would accept them."""
    program, *rest = [word for word in words if not re.match("[A-Z_]+=", word)]  # without variables of the environment
    if program == "efficient-densenet" and rest[0] in LIGHTNING:
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
            cli.main([*rest, "--print_config"])
        assert end.value.code in (0, None), words
    elif program == "efficient-densenet":
        cli.parser(rest[0]).parse_args(rest)
    elif program == "./run.sh":
        devices, config, *options = rest + ["auto", "configs/digits.yaml"][len(rest) :]
        assert re.fullmatch("cpu|auto|[0-9,]+", devices), words
        understand(["efficient-densenet", "fit", "--config", str(ROOT / config), *options])
    elif program == "torchrun":
        understand(["efficient-densenet", *rest[rest.index("efficient_densenet") + 1 :]])
    elif program in ("pip", "mkdocs"):
        assert rest[0] in ("install", "wheel", "serve", "build"), words
        for extra in re.findall(r"\[(\w+)\]", " ".join(rest)):
            assert extra in EXTRAS, f"there is no extra {extra}"
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "page", "exec")
    elif program == "pytest" or rest[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/")), words
    elif program == "python" or program.startswith("benchmarks/"):
        script, *options = rest if program == "python" else words
        assert (ROOT / script).is_file(), f"there is no program {script}"
        if script.endswith(".sh"):
            subprocess.run(["bash", "-n", ROOT / script], check=True)
        else:
            assert {option for option in options if option.startswith("--")} <= options_of(ROOT / script), words
    else:
        pytest.fail(f"no test understands the command {' '.join(words)}")


def command_names() -> set[str]:
    (commands,) = (action.choices for action in cli.parser("")._actions if action.dest == "command")
    return set(commands)


def understand_options(span: str) -> None:
    """The same of options that the text names without their command."""
    option, *values = shlex.split(span)
    if option.startswith(("--model.", "--data", "--trainer.", "--ckpt_path", "--name")):
        if "Logger" not in span:  # those are extras
            understand([*FIT, *([option, *values] if values or "=" in option[:-1] else [option.rstrip("+="), "null"])])
    else:
        assert option in OTHER_OPTIONS | options_of_commands(), f"no command has the option {option}"


def options_of_commands() -> set[str]:
    found = set()
    for command in command_names() - set(LIGHTNING):
        (commands,) = (action.choices for action in cli.parser(command)._actions if action.dest == "command")
        found |= {option for action in commands[command]._actions for option in action.option_strings}
    return found


def options_of(script: Path) -> set[str]:
    """Of a program in benchmarks/ or examples/, by its text and that of what it shares."""
    return set(re.findall(r"--[\w-]+", script.read_text() + SHARED.read_text()))


def fit_signatures(tree: ast.AST, names: dict[str, object]) -> None:
    """Fail unless each call of a function in `names` has arguments that the function takes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(names[node.func.id]).bind(*[None] * len(node.args), **keywords)
