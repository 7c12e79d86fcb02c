"""Parity with PyTorch, and science."""
