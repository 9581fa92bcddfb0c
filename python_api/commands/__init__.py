"""The command line `power-kernels`, and the demonstrations."""
