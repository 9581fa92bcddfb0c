"""Typed errors. Each message names the argument, the value it had and what is allowed."""


class ArgumentError(ValueError):
    """An argument has a value, shape or stride that is not allowed."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument has a dtype, device or Python type that is not allowed."""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""
