"""Tables of stop strings, built beside the engine's loop and kept: what a request waits for before its chain begins."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from power_kernels.api.driver.stop import StopStrings

_MOST_BYTES = 512 << 20  # of the tables that are kept


class StopTables:
    """load_tokenizer: called once, when the first table is asked for, in the thread that builds them."""

    def __init__(self, load_tokenizer: Callable[[], object], vocab_size: int):
        self._load_tokenizer, self._vocab_size = load_tokenizer, vocab_size
        self._tokenizer = None
        self._known: OrderedDict[tuple[str, ...], Future[StopStrings]] = OrderedDict()
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="power-kernels-stop")

    def get(self, strings: tuple[str, ...]) -> Future[StopStrings]:
        """The table of these strings, at once if it is known. It raises ArgumentError where there can be none."""
        if strings not in self._known:
            self._known[strings] = self._builder.submit(self._build, strings)
            self._forget_the_oldest()
        self._known.move_to_end(strings)
        return self._known[strings]

    def close(self) -> None:
        self._builder.shutdown(wait=False, cancel_futures=True)

    def _build(self, strings: tuple[str, ...]) -> StopStrings:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return StopStrings.of(self._tokenizer, strings, self._vocab_size)

    def _forget_the_oldest(self) -> None:
        sizes = {key: _size(future) for key, future in self._known.items()}
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total <= _MOST_BYTES:
                break
            if size:
                del self._known[key]
                total -= size


def _size(future: Future[StopStrings]) -> int:
    """Bytes of a table that is there."""
    done = future.done() and not future.cancelled() and future.exception() is None
    return future.result().table.nbytes if done else 0
