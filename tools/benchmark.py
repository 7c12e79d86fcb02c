"""Measures speed: starts benchmarks/benchmark.py."""

import sys

import _launch  # noqa: F401  finds the clone

from benchmarks.benchmark import main

if __name__ == "__main__":  # the processes that it starts import this file, too
    sys.exit(main())
