"""What ggml's kernels cost on a machine: measured points, and the rules between them."""
