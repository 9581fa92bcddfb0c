"""Power sampling as a model of lm-eval, by the name `power_kernels`.

    python -m power_kernels.api.experiments.lm_eval_model --model power_kernels \\
        --model_args pretrained=MODEL,alpha=4,block_size=40 --tasks gsm8k

is lm-eval's own command with this model known to it: lm-eval looks up models in a table of its own and finds none by
entry points. From Python, importing this module does it, before `lm_eval.simple_evaluate(model="power_kernels", ...)`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from power_kernels.api.commands.load import load_sampler
from power_kernels.api.driver.config import PowerConfig
from power_kernels.api.driver.stop import before_stop
from power_kernels.api.driver.text import end_of_turn, text_tokens
from power_kernels.api.experiments.tasks.lm_eval import max_new_tokens, stop_strings
from power_kernels.errors import ArgumentError

_READ = {"until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}  # of generation_kwargs
_LAW = {f.name for f in dataclasses.fields(PowerConfig)} - {"max_new_tokens", "stop"}


@register_model("power_kernels")
class PowerKernelsLM(LM):
    """Answers from p(x)^alpha to lm-eval's tasks that ask for text.

    pretrained, device, dtype, threads: as `power-kernels generate` has them. seed: of the chains; a request's prompt id
    is its place in the call. stop: "law" has a task's stop strings end answers as EOS does, exactly; "text" cuts the
    text afterwards. The other names are PowerConfig's: alpha=1 with mcmc_steps=0 is plain sampling. max_chains: the
    most chains that run at once; lm-eval's batch_size says nothing here, since chains wait for free slots.

    What a task says of temperature, do_sample and the like is not followed: the arguments here are the law.
    Log-likelihoods are refused: those of p^alpha have a normaliser that nobody knows, and those of p are lm-eval's
    model `hf`.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        threads: int | None = None,
        seed: int = 0,
        stop: str = "law",
        max_chains: int | None = None,
        batch_size=None,
        max_batch_size=None,
        **law,
    ):
        super().__init__()
        if unknown := sorted(law.keys() - _LAW):
            raise ArgumentError(f"{unknown[0]} is not known; allowed: {', '.join(sorted(_LAW))}")
        if stop not in ("law", "text"):
            raise ArgumentError(f"stop is {stop!r}; allowed: 'law', 'text'")
        if law.get("block_size") == 0:
            law["block_size"] = None
        if law.get("compat") is not None:
            law.setdefault("early_rejection", False)
        PowerConfig(**law)  # before the model is loaded
        self.law, self.stop, self.seed, self.max_chains = law, stop, seed, max_chains
        options = argparse.Namespace(model=pretrained, device=device, dtype=dtype, threads=threads)
        self.sampler = load_sampler(options)
        self.chat = False

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, request in enumerate(requests):
            kwargs = request.args[1]
            if ignored := sorted(kwargs.keys() - _READ):
                logging.getLogger(__name__).info("not followed: %s of %s", ", ".join(ignored), request.task_name)
            groups.setdefault((stop_strings(kwargs), max_new_tokens(kwargs)), []).append(i)
        texts = [""] * len(requests)
        for (stop, length), members in groups.items():
            config = PowerConfig(
                max_new_tokens=length, **({"stop": stop} if self.stop == "law" and stop else {}), **self.law
            )
            results = self.sampler.stream(
                [text_tokens(self.sampler.tokenizer, requests[i].args[0])[0] for i in members],
                config,
                seed=self.seed,
                eos_token_id=self._eos(),
                prompt_ids=members,
                max_chains=self.max_chains,
                progress=not disable_tqdm,
            )
            for result in results:
                # With the law's stop strings nothing is left to cut.
                texts[result.prompt_id] = text = before_stop(result.text, stop)
                self.cache_hook.add_partial("generate_until", requests[result.prompt_id].args, text)
        return texts

    def loglikelihood(self, requests: list):
        raise NotImplementedError(
            "power_kernels gives no log-likelihoods: those of p^alpha have a normaliser that nobody knows; for those "
            "of p use lm-eval's model hf"
        )

    def loglikelihood_rolling(self, requests: list):
        return self.loglikelihood(requests)

    @property
    def tokenizer_name(self) -> str:
        return self.sampler.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's text, which lm-eval keeps with its results."""
        return self.sampler.tokenizer.chat_template or ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        self.chat = True
        return self.sampler.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _eos(self) -> list[int] | None:
        end = end_of_turn(self.sampler.tokenizer) if self.chat else None
        known = list(self.sampler.engine.eos_token_ids)
        return None if end is None or end in known or end >= self.sampler.engine.vocab_size else [*known, end]


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "lm_eval"
    cli_evaluate()


if __name__ == "__main__":
    main()
