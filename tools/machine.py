"""What a measurement says of the machine and the packages it was made with."""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version


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
