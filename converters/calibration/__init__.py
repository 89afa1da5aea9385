"""Texts that models are observed on and judged by: files, built-in prose, and what a model writes itself."""
