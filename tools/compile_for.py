"""`deit-jax compile-for`, from a clone."""

from _launch import launch

launch("compile-for")
