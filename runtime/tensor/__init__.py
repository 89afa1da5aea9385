"""Sessions of models that are called with arrays."""
