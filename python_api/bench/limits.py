"""What the operators must reach, as lines of a table: the number, its limit, whether it holds in this run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from power_kernels.api.bench.chain import STEPS
from power_kernels.api.bench.report import shape_text, table

MIB = 1 << 20
VOCABULARY = 151_936


@dataclass(frozen=True)
class Limit:
    """A bound on one number of the records that `applies` picks.

    at_most: else at least. worst: of a contender and dtype only the worst point is shown.
    """

    text: str
    device: str
    applies: Callable[[dict], bool]
    value: Callable[[dict], float | None]
    bound: float
    at_most: bool
    unit: str
    worst: bool = False


def _record(contenders: tuple[str, ...], **conditions) -> Callable[[dict], bool]:
    """Records of these contenders whose fields and sizes are among the given ones; a range for sizes."""

    def applies(record: dict) -> bool:
        known = {**record, **record["shape"]}
        return record["contender"] in contenders and all(known[k] in v for k, v in conditions.items())

    return applies


def _memory(record: dict) -> float:
    return max(record["peak_bytes"], record["resident_bytes"] or 0) / MIB


_LOGITS = ("sample_tokens_out", "sample_tokens", "score_tokens_out", "score_tokens")
_LOGITS_OUT = ("sample_tokens_out", "score_tokens_out")
_ODD = ("sample_tokens_out, beta 3.7", "score_tokens_out, beta 3.7")
_PARTICLES = tuple(f"branch_particles_out{what}" for what in ("", ", 4 EOS", ", stop automaton"))
_QWEN = (VOCABULARY,)

LIMITS = (
    Limit(
        "of torch.logsumexp's time", "cpu",
        _record(_LOGITS + _ODD, vocab=_QWEN), lambda r: r["over_yardstick"], 1.7, True, "x", worst=True,
    ),
    Limit(
        "of torch.logsumexp's time", "cpu",
        _record(_PARTICLES, vocab=_QWEN), lambda r: r["over_yardstick"], 1.0, True, "x", worst=True,
    ),
    Limit(
        "of the product's time", "cpu",
        _record(("score_from_hidden", "score_from_hidden_out"), rows=(512,), width=(576,), vocab=(49_152,)),
        lambda r: r["over_yardstick"], 1.2, True, "x",
    ),
    Limit(
        "peak extra memory", "cpu",
        _record(("score_from_hidden",), rows=(512, 3072), vocab=(49_152, VOCABULARY)), _memory, 64, True, " MiB",
    ),
    Limit(
        "of the copy bandwidth, integer alpha", "cuda",
        _record(_LOGITS_OUT, dtype=("bfloat16",), rows=range(64, 1025), vocab=_QWEN),
        lambda r: r["percent_of_copy"], 88, False, "%",
    ),
    Limit(
        "of the copy bandwidth, any alpha", "cuda",
        _record(_ODD, dtype=("bfloat16",), rows=range(64, 1025), vocab=_QWEN),
        lambda r: r["percent_of_copy"], 78, False, "%",
    ),
    Limit(
        "of the copy bandwidth", "cuda",
        _record(_LOGITS_OUT + _ODD, dtype=("float32",), rows=range(64, 1025), vocab=_QWEN),
        lambda r: r["percent_of_copy"], 92, False, "%",
    ),
    Limit(
        "a call", "cuda",
        _record(_LOGITS_OUT, dtype=("bfloat16",), rows=range(1, 17), vocab=_QWEN),
        lambda r: r["median_s"] * 1e6, 10, True, " us",
    ),
    Limit(
        "of the product's time", "cuda",
        _record(("sample_from_hidden_out",), rows=range(1, 17)), lambda r: r["over_yardstick"], 1.05, True, "x",
    ),
    Limit(
        "of the product's time", "cuda",
        _record(("sample_from_hidden_out",), rows=(64,)), lambda r: r["over_yardstick"], 1.10, True, "x",
    ),
    Limit(
        "of the product's operations per second", "cuda",
        _record(("score_from_hidden_out",)), lambda r: 100 / r["over_yardstick"], 80, False, "%",
    ),
    Limit(
        "of the copy bandwidth, 64 suffixes of a 7B", "cuda",
        _record(("kv_copy_ranges",), groups=(56,), rows=(64,)), lambda r: r["percent_of_copy"], 85, False, "%",
    ),
    Limit(
        "a step of 256 lanes", "cuda",
        lambda r: r["contender"] == "mh_advance" and r["shape"]["chains"] * r["shape"]["lanes"] == 256,
        lambda r: r["median_s"] * 1e6 / STEPS, 10, True, " us",
    ),
)  # fmt: skip


def verdicts(results: dict) -> list[dict]:
    """Every limit at every record it applies to, of this device type."""
    device, found = results["environment"]["device_type"], []
    for limit in LIMITS:
        mine = []
        for record in results["records"]:
            if limit.device != device or record["median_s"] is None or not limit.applies(record):
                continue
            value = limit.value(record)
            holds = value <= limit.bound if limit.at_most else value >= limit.bound
            mine.append({"limit": limit, "record": record, "value": value, "holds": holds})
        found += _worst(mine) if limit.worst else mine
    return found


def _worst(found: list[dict]) -> list[dict]:
    worst: dict[tuple, dict] = {}
    for verdict in found:
        key = verdict["record"]["contender"], verdict["record"]["dtype"]
        sign = 1 if verdict["limit"].at_most else -1
        if key not in worst or sign * verdict["value"] > sign * worst[key]["value"]:
            worst[key] = verdict
    return list(worst.values())


def limits_table(results: dict) -> str:
    """Empty when no limit applies to what was run."""
    lines = [
        [
            f"{v['record']['contender']} {v['record']['dtype']} {shape_text(v['record']['shape'])}"
            f"{' (the worst)' if v['limit'].worst else ''}",
            f"{v['value']:.2f}{v['limit'].unit} {v['limit'].text}",
            f"{'at most' if v['limit'].at_most else 'at least'} {v['limit'].bound:g}{v['limit'].unit}",
            "holds" if v["holds"] else "DOES NOT HOLD",
        ]
        for v in verdicts(results)
    ]
    return "\nlimits\n" + table(["", "measured", "limit", ""], lines) if lines else ""
