"""What reports share: the machine, the versions, a section in a Markdown file."""

import contextlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> str:
    """The processor's name as the system gives it, else its architecture."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.partition(":")[2].strip() for line in file if "model name" in line), name)
    return name


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_section(file: Path, section: list[str]) -> None:
    """Puts a section, whose first line is `## TITLE`, in the earlier one's place or at the end."""
    text = file.read_text(encoding="utf-8") if file.exists() else "# Benchmarks\n"
    before, *after = re.split(rf"^{re.escape(section[0])}\n", text, maxsplit=1, flags=re.MULTILINE)
    rest = re.search(r"^## .*", after[0], re.MULTILINE | re.DOTALL) if after else None
    parts = [before.strip(), "\n".join(section).strip(), rest[0].strip() if rest else ""]
    file.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8")
