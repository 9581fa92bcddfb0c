"""Attributes that hold other values during a forward pass, and never outside one."""

from __future__ import annotations

from typing import Any

_INHERITED = object()


class Patches:
    """A context that sets attributes on entry and puts the old values back on exit, exceptions included.

    Between two steps of a run the model is as its owner left it: they may train it, or run it elsewhere.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Any, str, Any]] = []
        self._saved: list[tuple[Any, str, Any]] = []

    def add(self, owner: Any, name: str, value: Any) -> None:
        self._entries.append((owner, name, value))

    def __enter__(self) -> Patches:
        try:
            for owner, name, value in self._entries:
                # What the class provides is uncovered again by deleting, not by a copy in the instance.
                own = name in vars(owner) or not hasattr(type(owner), name)
                self._saved.append((owner, name, getattr(owner, name) if own else _INHERITED))
                setattr(owner, name, value)
        except BaseException:
            self.restore()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.restore()

    def restore(self) -> None:
        """Put every old value back. May be interrupted at any point and called again."""
        while self._saved:
            owner, name, value = self._saved[-1]
            if value is _INHERITED:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)
            self._saved.pop()
