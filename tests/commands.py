"""The command line in processes that can be killed: a fork server that has imported everything starts them at once.

Their model is a Markov chain in the shape of a Llama: embeddings are unit vectors and the layers add nothing, so that
each logit is one entry of a table, whatever else is in the batch, and answers are identical bit for bit.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from power_kernels.api.commands import output_file
from power_kernels.api.commands.cli import main
from power_kernels.api.engines.huggingface import HuggingFaceEngine

VOCAB = 32
EOS = 2


def markov_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=VOCAB, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.normal_(0, 0.35)  # times sqrt(VOCAB): logits of standard deviation 2
    return model


def save(model, path: Path) -> str:
    """With a word-level tokenizer, w0 to w31."""
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}").save_pretrained(path)
    return str(path)


def records(path: Path) -> list[bytes]:
    """The lines as they stand in the file, without `cost`, which depends on how they were computed."""
    return [line[: line.rindex(b', "cost": ')] for line in Path(path).read_bytes().splitlines()]


def keys(path: Path) -> list[tuple[int, int]]:
    """Of the whole lines."""
    lines = Path(path).read_bytes().split(b"\n")[:-1] if Path(path).exists() else []
    return [(r["prompt_id"], r["chain_id"]) for r in map(json.loads, lines)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun and accelerate launch tell each process."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}


def start(target, *arguments, log: Path, environment: dict[str, str] | None = None):
    """A process that calls target(*arguments) and exits with what it returns. target: a module's function."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.commands", "transformers.models.llama.modeling_llama"])
    process = server.Process(target=_child, args=(target, arguments, str(log), environment or {}), daemon=True)
    process.start()
    return process


def _child(target, arguments, log, environment):
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    status = target(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def joined(process, seconds: float = 1200) -> int:
    """The exit status, negative for a signal. Fails rather than wait for a process that hangs; no slow day takes so
    long."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"the process still ran after {seconds} s")
    return process.exitcode


# -----------------------------------------------------------------------------------------------------------
# The command, killed by its own hand at a certain moment


def command(arguments: list[str], moment: str = "never", number: int = signal.SIGKILL) -> int:
    if moment != "never":
        MOMENTS[moment](lambda: os.kill(os.getpid(), number))
    return main(arguments)


def _at_step(kill) -> None:
    step, count = HuggingFaceEngine.step, 0

    def counted(self, state):
        nonlocal count
        count += 1
        if count == 7:  # of at least 12, the tokens of an answer
            kill()
        return step(self, state)

    HuggingFaceEngine.step = counted


def _in_a_line(kill) -> None:
    write = os.write

    def halved(file, data):
        if not bytes(data).startswith(b'{"prompt_id"'):
            return write(file, data)
        write(file, data[: len(data) // 2])
        kill()
        raise AssertionError("the signal was not seen")

    os.write = halved


def _after_a_line(kill) -> None:
    write = output_file.RecordFile.write

    def killed(self, line):
        write(self, line)
        kill()

    output_file.RecordFile.write = killed


def _before_the_new_file(kill) -> None:
    os.replace = lambda source, target: kill()


def _after_the_new_file(kill) -> None:
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        kill()

    os.replace = killed


def _after_the_first_part_is_gone(kill) -> None:
    unlink = Path.unlink

    def killed(self, missing_ok=False):
        unlink(self, missing_ok)
        if ".part-" in self.name and not missing_ok:
            kill()

    Path.unlink = killed


MOMENTS = {
    "before the first answer": _at_step,
    "in the middle of a line": _in_a_line,
    "after a line": _after_a_line,
    "before the new file is in place": _before_the_new_file,
    "when the new file is in place": _after_the_new_file,
    "when the first part is gone": _after_the_first_part_is_gone,
}
