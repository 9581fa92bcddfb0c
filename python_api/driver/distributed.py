"""Several processes draw one list of answers: prompts and chains divided over the ranks that torchrun or accelerate
started, each with the whole model.

    # torchrun --nproc-per-node 8 script.py
    results = generate_sharded(PowerSampler(model, tokenizer), prompts, config, num_chains=4, seed=0)

An answer depends on its prompt, prompt id, chain id and seed, and not on who draws it, so every division gives the same
list. The answers left to draw, in prompt-major order, are dealt out in turn: rank r of n takes each n-th from the r-th
on. Shares differ by one answer at most, one prompt's chains, which are about equally long, go to different ranks, and
one prompt is enough to occupy all of them. A prompt is then prefilled once a rank, little beside its answers.

No tensors travel. The ranks meet when they begin and when they have finished, over gloo, whatever else the process
group uses, so that nobody's clock runs out while another one is computing.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.launcher import from_environment
from power_kernels.api.driver.results import PowerResult
from power_kernels.api.driver.sampler import PowerSampler
from power_kernels.errors import ArgumentError

JOINING = timedelta(minutes=10)  # before models are loaded
PATIENCE = timedelta(hours=6)


class RankLostError(RuntimeError):
    """Another process of the run stopped, or did not come in time."""


class Ranks:
    """The processes of one run, and this one's place among them: `rank` of `world`, `local_rank` on its machine."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0, group=None):
        self.rank, self.world, self.local_rank, self.group = rank, world, local_rank, group

    def broadcast(self, value):
        """Rank 0's value, on every rank."""
        values = [value]
        if self.world > 1:
            _meet(lambda: dist.broadcast_object_list(values, group=self.group, group_src=0))
        return values[0]

    def gather(self, value) -> list:
        """Every rank's value, on every rank, in the order of ranks."""
        values = [value] * self.world
        if self.world > 1:
            _meet(lambda: dist.all_gather_object(values, value, group=self.group))
        return values


def _meet(collective: Callable[[], object]):
    """What the call returns, made in a thread of its own: this one must see Ctrl-C and SIGTERM, and may then leave
    while others are awaited."""
    returned, errors = [], []

    def call():
        try:
            returned.append(collective())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1)
    try:
        if errors:
            raise errors[0]
        return returned[0]
    except RuntimeError as error:
        raise RankLostError(
            f"another process of this run stopped, as its own output should explain, or did not come in time: {error}"
        ) from error


def launched() -> int:
    """Processes that a launcher says there are (WORLD_SIZE), or that the process group has."""
    return dist.get_world_size() if dist.is_initialized() else from_environment("WORLD_SIZE", 1, least=1)


@contextmanager
def join(patience: timedelta = PATIENCE) -> Iterator[Ranks]:
    """The ranks that torchrun or accelerate started: those of the process group, which is made where there is none.

    patience: how long to wait for another rank. A process that ends closes its connections, which is noticed at once;
    one that fails here and lives on is not. Raises RankLostError when not everyone comes.
    """
    if launched() == 1:
        yield Ranks()
        return
    made = not dist.is_initialized()
    if made:
        try:
            _meet(lambda: dist.init_process_group("gloo", timeout=JOINING))
        except ValueError as error:
            raise ArgumentError(f"WORLD_SIZE is {launched()}, but {error}; start with torchrun") from None
    group = _meet(lambda: dist.new_group(backend="gloo", timeout=patience))
    rank = dist.get_rank()
    try:
        yield Ranks(rank, dist.get_world_size(), from_environment("LOCAL_RANK", rank, least=0), group)
    finally:
        dist.destroy_process_group(None if made else group)


def generate_sharded(
    sampler: PowerSampler,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    config: PowerConfig | None = None,
    *,
    num_chains: int = 1,
    seed: int = 0,
    patience: timedelta = PATIENCE,
    progress: bool = False,
    **options,
) -> list[PowerResult]:
    """`sampler.generate(prompts, config, ...)`, divided over the ranks. Called by every rank with the same arguments.

    Every rank gets the whole list, prompt-major, the same that one process would draw. Uses the process group that is
    there, of any backend; where there is none and the environment tells of several processes (torchrun, accelerate
    launch), makes one for the call; alone, it is `sampler.generate`. The model is wherever each rank has put it.
    patience: how long to wait for slower ranks. progress: a bar over rank 0's share, on rank 0 alone. options: the
    other arguments of `generate`.

    Raises what `generate` raises, on the rank where it happens (let it end the process, so that the others notice),
    RankLostError when another rank stops or is late, and on every rank ArgumentError when they were given different
    prompts (do not divide them before) or other different work.
    """
    rows, eos = sampler.read(prompts, options.pop("eos_token_id", None))
    texts = hashlib.sha256(repr(rows).encode()).hexdigest()
    # repr leaves out the middle of a long tensor, and tells an array from the list that it stands for.
    options = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in options.items()}
    work = repr((config, num_chains, seed, eos, sorted(options.items())))
    with join(patience) as ranks:
        all_texts, all_work = map(set, zip(*ranks.gather((texts, work)), strict=True))
        if len(all_texts) > 1:
            raise ArgumentError("the ranks were given different prompts; each must be given the whole list")
        if len(all_work) > 1:
            raise ArgumentError("the ranks were given different configs, seeds, num_chains or options")
        mine = sampler.generate(
            rows,
            config,
            num_chains=num_chains,
            seed=seed,
            eos_token_id=eos,
            share=(ranks.rank, ranks.world),
            progress=progress and ranks.rank == 0,
            **options,
        )
        shares = ranks.gather(mine)
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]
