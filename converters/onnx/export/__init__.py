"""Hugging Face folders, PyTorch modules and other people's files as float ONNX, checked against the original."""
