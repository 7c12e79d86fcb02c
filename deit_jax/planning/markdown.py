"""Markdown files that hold measurements: one section per command, with its date and versions."""

import contextlib
import platform
import re
from collections.abc import Iterable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from deit_jax.console import log
from deit_jax.errors import InputError
from deit_jax.parallel import cpus


def processor() -> str:
    """Returns the processor's name as the system gives it, and how many cores may be used."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.partition(":")[2].strip() for line in file if "model name" in line), name)
    count = cpus.available()
    return f"{name}, {count} core(s)"


def origin(*packages: str) -> dict[str, object]:
    """Returns today's `date` and the `versions`, of Python and of the packages that are here."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"date": str(date.today()), "versions": versions}


def head(title: str, command: str, report: dict[str, object], machine: str = "") -> Iterator[str]:
    """Yields the first lines of a section: its heading, command, and where the report is from.

    Args:
      title: of the section, without "##".
      command: that writes the section.
      report: holds what `origin` returned.
      machine: what the command ran on.
    """
    yield from (f"## {title}", "")
    yield from written_by(command, report, machine)


def written_by(command: str, report: dict[str, object], machine: str = "") -> Iterator[str]:
    """Yields the lines below a heading: what wrote them, when and where; arguments as `head`."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    yield from (f"`{command}`", "")
    yield from (f"{'; '.join(filter(None, (report['date'], machine, versions)))}.", "")


def table(*columns: str, rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Yields the lines of a table."""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for cells in rows:
        yield f"| {' | '.join(map(str, cells))} |"


def publish(section: Iterable[str], file: Path | None) -> None:
    """Prints a section, and writes it into `file` where there is one."""
    lines = list(section)
    log("\n".join(lines))
    if file:
        write_section(file, lines)


def write_section(file: Path, section: list[str]) -> None:
    """Writes a section into a Markdown file, in place of an earlier one with the same heading.

    Args:
      file: made if it is not there.
      section: lines; the first is the heading, `## TITLE`.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else f"# {file.stem}\n"
    before, *after = re.split(rf"^{re.escape(section[0])}\n", text, maxsplit=1, flags=re.MULTILINE)
    rest = re.search(r"^## .*", after[0], re.MULTILINE | re.DOTALL) if after else None
    parts = [before.strip(), "\n".join(section).strip(), rest[0].strip() if rest else ""]
    file.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")


def write_between(file: Path, name: str, section: Iterable[str]) -> None:
    """Writes lines into a Markdown file, between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
      InputError: the file has no such comments.
    """
    before, after = around(file, name)
    file.write_text("\n".join([before, "", *section, "", after]), encoding="utf-8")


def around(file: Path, name: str) -> tuple[str, str]:
    """Returns the text up to and with `<!-- NAME -->`, and that from `<!-- end of NAME -->` on.

    Raises:
      InputError: the file has no such comments.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    before, first, rest = text.partition(start)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise InputError(f"{file} has no {start} ... {end} to put the table between")
    return before + first, last + after
