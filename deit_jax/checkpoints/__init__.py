"""Checkpoints of training and model folders."""
