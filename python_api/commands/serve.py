"""`power-kernels serve MODEL [vLLM's own arguments]`."""

from __future__ import annotations

import argparse
import sys

DESCRIPTION = """\
vLLM's OpenAI server, which answers with power samples where a request asks for them:

  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{
      "model": "MODEL", "prompt": "1 + 1 =", "max_tokens": 64,
      "vllm_xargs": {"alpha": 4, "mcmc_steps": 10, "block_size": 192}}'

Every other request is vLLM's own. POST /v1/power/completions tells what a chain does while it runs, and what it did.

Ours: nothing but the model and what follows. All arguments are those of `vllm serve` (`--help=all` shows them), except
--scheduler-cls, --logits-processors and --speculative-config, which are refused. docs/serve.md has the rest."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name or a folder, as vLLM takes it")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="vLLM's own")


def wanted(argv: list[str]) -> bool:
    """Whether a command line is vLLM's from its second word on: our parser must not take it apart."""
    return argv[:1] == ["serve"] and len(argv) > 1 and argv[1] not in ("-h", "--help")


def run(arguments: list[str]) -> int:
    from power_kernels.api.engines.serving.versions import UntestedVersionError
    from power_kernels.api.engines.vllm.serve.server import serve

    try:
        serve(arguments)
    except UntestedVersionError as error:
        print(f"power-kernels: {error}", file=sys.stderr)
        return 2
    return 0
