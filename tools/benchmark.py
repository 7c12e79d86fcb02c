"""Measures speed: starts benchmarks/benchmark.py."""

import sys

import _launch  # noqa: F401  finds the clone

from benchmarks.benchmark import main

sys.exit(main())
