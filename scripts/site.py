"""What mkdocs does beside its own: pages from outside docs/, and the links between them and docs/.

In the repository a link is right where the file stands; here it is turned to where the page stands. The README is the
first page.
"""

import os.path
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/results/*.md"]
PICTURES = ["benchmarks/results/*.png"]
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, config) -> Files:
    for pattern in OUTSIDE + PICTURES:
        for path in ROOT.glob(pattern):
            files.append(File.generated(config, _on_site(_name(path)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    source = Path(page.file.abs_src_path)

    def turned(link: re.Match) -> str:
        target = _name(Path(os.path.normpath(source.parent / link[0])))
        return posixpath.relpath(_on_site(target), posixpath.dirname(page.file.src_uri) or ".")

    return _LINK.sub(turned, markdown)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _on_site(name: str) -> str:
    """Where a file of the repository is on the site."""
    return "index.md" if name == "README.md" else name.removeprefix("docs/")
