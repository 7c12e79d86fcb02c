"""Markdown files that hold measurements: versions, the processor, and one section per command."""

import contextlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> str:
    """Returns the processor's name as the system gives it, else its architecture."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.partition(":")[2].strip() for line in file if "model name" in line), name)
    return name


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of Python and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def listed(found: dict[str, str]) -> str:
    """Returns the versions as text, "python 3.13.0, jax 0.11.2"."""
    return ", ".join(f"{name} {number}" for name, number in found.items())


def write_section(file: Path, section: list[str]) -> None:
    """Writes a section into a Markdown file, in place of an earlier one with the same heading.

    Args:
      file: the file; made if it is not there.
      section: lines; the first is the heading, `## TITLE`.
    """
    text = file.read_text(encoding="utf-8") if file.exists() else "# Benchmarks\n"
    before, *after = re.split(rf"^{re.escape(section[0])}\n", text, maxsplit=1, flags=re.MULTILINE)
    rest = re.search(r"^## .*", after[0], re.MULTILINE | re.DOTALL) if after else None
    parts = [before.strip(), "\n".join(section).strip(), rest[0].strip() if rest else ""]
    file.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
