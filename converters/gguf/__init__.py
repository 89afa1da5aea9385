"""Hugging Face language models to GGUF, and GGUF to quantized GGUF."""
