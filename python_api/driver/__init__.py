"""The driver: configuration, planning, runs and results. It knows the protocol of an engine and no engine."""
