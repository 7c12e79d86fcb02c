"""Pillow's operations on uint8 pixels, bit for bit, in compiled TensorFlow operations."""
