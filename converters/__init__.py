"""Converters: Hugging Face models to artifacts that a bundle carries."""
