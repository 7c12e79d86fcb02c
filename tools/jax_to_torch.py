"""`deit-jax export-torch`, from a clone."""

from _launch import launch

launch("export-torch")
