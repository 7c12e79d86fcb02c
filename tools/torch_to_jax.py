"""`deit-jax convert`, from a clone."""

from _launch import launch

launch("convert")
