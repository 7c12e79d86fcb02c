"""`deit-jax train`, `eval` or `plan`: python main.py --config=... --workdir=... [--mode=MODE]."""

import sys

from deit_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(by_mode=True))
