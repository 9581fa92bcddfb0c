"""Engines: what runs the model for the driver. See `power_kernels.api.engine` for the protocol."""
