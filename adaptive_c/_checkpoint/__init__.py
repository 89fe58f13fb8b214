"""Checkpoints: what a run depends on, as one dict; the file; PyTorch's dict."""
