"""`deit-jax compile-for`, from a clone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from deit_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["compile-for", *sys.argv[1:]]))
