"""What the machine says of itself, in its own files and tools."""
