"""Weights from and to PyTorch: files, layouts, surgery. No module here imports torch at import."""
