"""Ranges of activations from what a float model makes of real inputs: streaming, in bounded memory, in one pass."""
