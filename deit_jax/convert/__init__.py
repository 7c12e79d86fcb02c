"""Weights from and to PyTorch; see README.md here. No module imports torch at import."""
