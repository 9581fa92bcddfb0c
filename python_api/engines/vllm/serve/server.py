"""vLLM's own server, with the chains in its engine core.

What is set here: the scheduler that has the chains, the class that refuses bad power requests, the plugins, the
self-test in the workers, and the folder by which the engine core's metrics reach /metrics. All else is vLLM's.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import entry_points

from power_kernels.api.engines.serving.versions import VLLM
from power_kernels.errors import ArgumentError

PLUGIN = "power_kernels"
SCHEDULER = "power_kernels.api.engines.vllm.serve.scheduler.PowerScheduler"
_LOADED_UNASKED = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def serve(arguments: list[str]) -> None:
    """arguments: of `vllm serve`. Returns when the server has been shut down.

    Raises UntestedVersionError, or ArgumentError for what cannot be served with chains.
    """
    VLLM.check()
    version = VLLM.installed()
    print(f"power-kernels: vLLM {version}; tested: {', '.join(VLLM.tested)}", file=sys.stderr)
    os.environ["VLLM_PLUGINS"] = ",".join(plugins(os.environ.get("VLLM_PLUGINS")))
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ArgumentError("VLLM_USE_RUST_FRONTEND is set; it must not be, since that front end loads no plugins")
    with tempfile.TemporaryDirectory(prefix="power-kernels-metrics-") as folder:
        # Before prometheus_client is imported, which looks once.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        _run(arguments)


def plugins(named: str | None) -> list[str]:
    """Of `VLLM_PLUGINS`: those that were named, or else what vLLM loads where nothing is named, and ours."""
    if named is not None:
        before = [name for name in named.split(",") if name]
    else:
        before = [plugin.name for group in _LOADED_UNASKED for plugin in entry_points(group=group)]
    return list(dict.fromkeys([*before, PLUGIN]))


def _run(arguments: list[str]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="power-kernels")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(["serve", *arguments])
    _configure(parsed)
    command.validate(parsed)
    command.cmd(parsed)


def _configure(parsed) -> None:
    """Put what is ours into vLLM's parsed arguments. Raises ArgumentError, which names what cannot be beside it."""
    from power_kernels.api.engines.vllm.parameters import UNSUITABLE
    from power_kernels.api.engines.vllm.serve import admission, selftest

    refused = UNSUITABLE | {
        "scheduler_cls": "the chains are in a scheduler of their own",
        "grpc": "it was not tested with power sampling",
    }
    for name, why in refused.items():
        value = getattr(parsed, name, None)
        if value:
            raise ArgumentError(
                f"--{name.replace('_', '-')} is {value!r} in power-kernels serve, which has none: {why}"
            )
    parsed.scheduler_cls = SCHEDULER
    parsed.logits_processors = [admission.NAME]
    if parsed.worker_extension_cls:
        print(
            f"power-kernels: the workers are not tested at the start, since --worker-extension-cls is "
            f"{parsed.worker_extension_cls}",
            file=sys.stderr,
        )
    else:
        parsed.worker_extension_cls = selftest.WORKER
