"""Makes a site of what GitHub shows: mkdocs calls `on_files` (see mkdocs.yml).

Beside docs/ the site has the README as its first page, the other pages of the repository, and every
source file and notebook that a page links to. Links lead to the same places as on GitHub.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

import deit_jax

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
_FENCE = re.compile(r"(?ms)(^```.*?^```)")
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
_NAMES = "<!-- every public name -->"  # of docs/api.md


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/, and turns all links to where the site has things."""
    waiting = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    waiting += [ROOT / page for page in PAGES]
    known = set(waiting)
    for path in waiting:  # which grows
        text = _markdown(path)
        for target in _targets(path, text):
            if target not in known and (target.suffix == ".ipynb" or "docs" not in target.parts):
                known.add(target)
                waiting.append(target)
        place = _place(path)
        file = files.get_file_from_path(place)
        if file is None:
            hidden = InclusionLevel.NOT_IN_NAV
            file = File.generated(config, place, content=text, inclusion=hidden)
            files.append(file)
        file.content_string = _turned(path, text)
    return files


def _markdown(path: Path) -> str:
    """What a file is as a page."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        parts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        return "\n\n".join(x if kind == "markdown" else _fenced(x, "python") for kind, x in parts)
    if path.suffix != ".md":
        return f"# {path.relative_to(ROOT)}\n\n{_fenced(text, path.suffix[1:])}"
    homes = (f"::: {home}.{name}" for name, home in sorted(deit_jax._HOME.items()))
    return text.replace(_NAMES, "\n\n".join(homes))


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def _targets(path: Path, text: str) -> Iterator[Path]:
    for name in _LINK.findall(_FENCE.sub("", text)):
        target = (path.parent / name).resolve()
        if not target.is_file():
            raise FileNotFoundError(f"{path.relative_to(ROOT)} links to {name}: no such file")
        yield target


def _place(path: Path) -> str:
    """Where the site has a file of the repository."""
    name = path.relative_to(ROOT)
    if name.parts[0] == "docs":
        return name.relative_to("docs").as_posix()
    if name == Path("README.md"):
        return "index.md"
    return (name if name.suffix == ".md" else name.with_name(f"{name.name}.md")).as_posix()


def _turned(path: Path, text: str) -> str:
    """The text with its links as they must be on the site."""
    here = os.path.dirname(_place(path))

    def turn(link: re.Match) -> str:
        return os.path.relpath(_place((path.parent / link[1]).resolve()), here or ".")

    parts = _FENCE.split(text)  # every second one is code
    return "".join(x if x.startswith("```") else _LINK.sub(turn, x) for x in parts)
