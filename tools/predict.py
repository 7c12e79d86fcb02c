"""`deit-jax predict`, from a clone."""

from _launch import launch

launch("predict")
