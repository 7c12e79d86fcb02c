"""`python -m deit_jax` is `deit-jax`."""

import sys

from deit_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
