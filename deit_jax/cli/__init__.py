"""The commands of `deit-jax`."""
