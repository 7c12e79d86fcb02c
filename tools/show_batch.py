"""`deit-jax show-batch`, from a clone."""

from _launch import launch

launch("show-batch")
