"""Exact, fused power sampling: the operators. See README.md; the driver is `power_kernels.api`."""
