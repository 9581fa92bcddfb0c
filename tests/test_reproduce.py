"""docs/reproduce.md: its commands are understood, for each benchmark, with `--dry-run`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from power_kernels.api.commands.cli import main
from tests.test_experiment_tasks import harness  # noqa: F401  a fixture

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
ECHO = """power-kernels() { "$PYTHON" -S -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"; }\n"""


def test_the_commands_of_the_page_are_understood(harness, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Three models, four benchmarks; the shell fills in its variables, and each command is then run here."""
    block = next(text for text in re.findall(r"(?:^    .*\n)+", PAGE, re.M) if "power-kernels eval" in text)
    script = ECHO + block.replace("H=reasoning-with-sampling", f"H={harness}")
    done = subprocess.run(["bash", "-ec", script], env={"PYTHON": sys.executable}, capture_output=True, text=True)
    commands = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(commands) == 12, done.stderr
    gpqa = {key: key for key in ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))}
    (tmp_path / "gpqa_diamond.jsonl").write_text(json.dumps(gpqa))
    (tmp_path / "alpaca_eval.json").write_text(json.dumps([{"instruction": "Say so."}]))
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    monkeypatch.chdir(tmp_path)
    benchmarks = []
    for command in commands:
        assert main([*command, "--dry-run"]) == 0, command
        arms, tasks, *_ = zip(*(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]), strict=True)
        assert {"plain", "low-temperature", "published", "power"} <= set(arms)
        benchmarks.append(tasks[0])
    assert benchmarks == ["math500", "humaneval", "gpqa", "alpaca-eval"] * 3
