"""The progress bar of long runs: answers, steps, acceptance rate, tokens per second."""

from __future__ import annotations

import sys
import time

from tqdm.auto import tqdm

from power_kernels.api.driver.results import PowerResult


class ProgressBar:
    """A tqdm bar over answers. `advance_to` is cheap enough for every decode step."""

    INTERVAL = 0.5 if (sys.stderr is not None and sys.stderr.isatty()) else 10.0  # seconds between refreshes

    def __init__(self, total: int, initial: int = 0):
        self.bar = tqdm(total=total, initial=initial, unit="answer", dynamic_ncols=True)
        self.started = self.refreshed = time.monotonic()
        self.tokens = self.steps = self.accepted = 0

    def advance_to(self, tokens: int) -> None:
        """tokens: lane-steps made so far. Fewer than before when a run began anew."""
        self.tokens = max(self.tokens, tokens)
        now = time.monotonic()
        if now - self.refreshed > self.INTERVAL:
            self.refreshed = now
            self.show()

    def finished(self, result: PowerResult) -> None:
        self.steps += result.steps
        self.accepted += result.accepted + result.unchanged
        self.bar.update(1)
        self.show()

    def show(self) -> None:
        rate = self.tokens / max(time.monotonic() - self.started, 1e-9)
        accepted = f"{self.accepted / self.steps:.2f}" if self.steps else "-"
        self.bar.set_postfix_str(f"steps {self.steps}, acceptance rate {accepted}, {rate:.0f} tokens/s")

    def close(self) -> None:
        self.bar.close()
