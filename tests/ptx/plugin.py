"""pytest plugin: backend "triton" on CPU tensors executes the compiled PTX instead of Triton's interpreter.

    python -m pytest -p tests.ptx.plugin tests/test_triton_kernels.py [--ptx-schedules "in order,random often"]

The run ends with what was found, with Python lines, and fails if any of it is a fault.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("ptx")
    group.addoption("--ptx-schedules", default="", help="names of machine.SCHEDULES, comma-separated; default: all")
    group.addoption("--ptx-target", type=int, default=80, help="80 or 90")
    group.addoption("--ptx-noise", type=int, default=0, help="last places that approximate instructions err by")
    group.addoption("--ptx-full", action="store_true", help="as many rows as on a GPU, where tests ask")
    group.addoption("--ptx-report", help="a file for the findings and counts, as JSON")


class Plugin:
    def __init__(self, config):
        from tests.ptx.launcher import Launcher
        from tests.ptx.machine import SCHEDULES

        option = config.getoption
        chosen = [name.strip() for name in option("--ptx-schedules").split(",") if name.strip()] or list(SCHEDULES)
        schedules = [SCHEDULES[name] for name in chosen]
        self.launcher = Launcher(schedules, option("--ptx-noise"), option("--ptx-target"))
        self.report = option("--ptx-report")

    @pytest.fixture
    def ptx_launcher(self):
        return self.launcher

    def pytest_collection_modifyitems(self, config, items):
        """Of tests that name a backend only those that name this one."""
        others = [i for i in items if hasattr(i, "callspec") and i.callspec.params.get("backend", "triton") != "triton"]
        config.hook.pytest_deselected(items=others)
        items[:] = [i for i in items if i not in others]

    def pytest_sessionfinish(self, session):
        faults = self.launcher.findings.faults()
        if faults and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.report:
            ran, not_run = self.launcher.configurations()
            found = {
                "findings": [str(f) for f in faults],
                "schedules": [s.name for s in self.launcher.schedules],
                "configurations": sorted(ran),
                "configurations_not_run": sorted(not_run),
                "counts": self.launcher.counts,
                "seconds": self.launcher.seconds,
            }
            Path(self.report).write_text(json.dumps(found, indent=1))

    def pytest_terminal_summary(self, terminalreporter):
        counts, seconds = self.launcher.counts.values(), self.launcher.seconds
        faults = self.launcher.findings.faults()
        ran, not_run = self.launcher.configurations()
        launches, instructions = (sum(c[name] for c in counts) for name in ("launches", "instructions"))
        terminalreporter.write_line(
            f"ptx: {len(ran)} of {len(ran) + len(not_run)} configurations, {launches} launches under "
            f"{len(self.launcher.schedules)} schedules, {instructions:,} warp instructions, {len(faults)} findings; "
            f"seconds: {seconds['compile']:.0f} compiling, {seconds['run']:.0f} executing"
        )
        for f in faults:
            terminalreporter.write_line(str(f))


@pytest.hookimpl(trylast=True)  # after tests/conftest.py has chosen the interpreter
def pytest_configure(config):
    os.environ.pop("TRITON_INTERPRET", None)
    from tests import op_helpers

    plugin = Plugin(config)
    config.pluginmanager.register(plugin, "ptx launcher")
    plugin.launcher.__enter__()
    if config.getoption("--ptx-full"):
        op_helpers.INTERPRETED = False
    if noise := config.getoption("--ptx-noise"):
        op_helpers.EXP2_ULPS = noise
