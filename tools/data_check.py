"""`deit-jax check-data`, from a clone."""

from _launch import launch

launch("check-data")
