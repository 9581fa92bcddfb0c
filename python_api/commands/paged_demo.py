"""Power sampling of a small real model on a paged KV cache, and what sharing blocks saves.

    python -m power_kernels.api.commands.paged_demo [--tiny] [--check] [--lanes 2] [--kv-block 16] [--seed 0]
    python -m power_kernels.api.commands.paged_demo --particles 16

A chain's lanes share the blocks of its past; a proposal copies at most the beginning of one block where a cache of one
row a lane copies suffixes (`engines/huggingface/paged.py`). Particles share, too, as they fork from each other. --check
draws the same chains from the engine with rows of their own too. --tiny takes a random model of two
layers, which needs no download.
"""

from __future__ import annotations

import argparse
import sys
import textwrap

QUESTIONS = [
    "Why is the sky blue? Answer in one sentence.",
    "How do bees make honey? Answer in two sentences.",
]


def tiny_model():
    """A random Llama of two layers and 97 tokens, its weights drawn wide enough that attention matters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def report(counts) -> list[str]:
    """What the run moved and held, in lines. counts: `paged_rows.PagedCounts`."""

    def amount(tokens: int) -> str:
        return f"{tokens:,} tokens ({tokens * counts.token_bytes / 1e6:,.1f} MB)"

    shared, copied, slab = (int(n) for n in (counts.shared, counts.copied, counts.slab_copied))
    held = int(counts.peak_blocks) * counts.block_size
    return [
        f"KV cache: blocks of {counts.block_size} positions, {counts.token_bytes:,} bytes a token",
        f"  forks shared {shared // counts.block_size:,} blocks, {amount(shared)}",
        f"  copied from split blocks: {amount(copied)}",
        f"  a row of its own for each lane would have copied {amount(slab)}: saved {1 - copied / max(slab, 1):.0%}",
        f"  blocks in use at most: {int(counts.peak_blocks):,}, {amount(held)}; rows of their own would have reserved "
        f"{amount(counts.slab_tokens)}: saved {1 - held / counts.slab_tokens:.0%}",
    ]


def same_chains(ours: list, theirs: list) -> bool:
    return all(
        (a.tokens, a.steps, a.accepted, a.outcomes) == (b.tokens, b.steps, b.accepted, b.outcomes)
        for a, b in zip(ours, theirs, strict=True)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m power_kernels.api.commands.paged_demo", description="Power sampling on a paged KV cache."
    )
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers instead of a real one")
    parser.add_argument("--check", action="store_true", help="draw the chains on rows of their own too, and compare")
    parser.add_argument("--question", action="append", help="ask this instead; may be given several times")
    parser.add_argument("--alpha", type=float, default=4.0, help="the power (4)")
    parser.add_argument("--max-new-tokens", type=int, default=72, help="longest answer (72)")
    parser.add_argument("--block-size", type=int, default=24, help="tokens of a stage (24)")
    parser.add_argument("--steps", type=int, default=5, help="steps after each stage (5)")
    parser.add_argument("--particles", type=int, help="particles in the place of proposals, so many of them")
    parser.add_argument("--chains", type=int, default=2, help="answers to each question (2)")
    parser.add_argument("--lanes", type=int, default=2, help="proposals that a chain runs at once (2)")
    parser.add_argument("--kv-block", type=int, default=16, help="positions of a block of the cache (16)")
    parser.add_argument("--kv-blocks", type=int, help="blocks of the cache; by default as many as could be needed")
    parser.add_argument("--seed", type=int, default=0)
    # Two threads on a machine that is busy otherwise can be several times slower than one.
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (1)")
    arguments = parser.parse_args(argv)

    import torch

    from power_kernels.api import PowerConfig, PowerSampler
    from power_kernels.api.commands import packaged_model
    from power_kernels.api.engines.huggingface.paged import PagedEngine
    from power_kernels.api.engines.huggingface.paged_rows import OutOfBlocksError
    from power_kernels.errors import ArgumentError

    torch.set_num_threads(arguments.threads)
    try:
        if arguments.particles is None:
            kernel = dict(block_size=arguments.block_size, mcmc_steps=arguments.steps, lanes=arguments.lanes)
        else:
            kernel = dict(kernel="particles", particles=arguments.particles)
        config = PowerConfig(alpha=arguments.alpha, max_new_tokens=arguments.max_new_tokens, **kernel)
        if arguments.tiny:
            model, tokenizer = tiny_model(), None
            prompts = [list(range(3, 30)), [5, 7, 11]]
        else:
            model, tokenizer = packaged_model.load()
            questions = arguments.question or QUESTIONS
            prompts = [packaged_model.chat_prompt(tokenizer, question) for question in questions]
        engine = PagedEngine(model, block_size=arguments.kv_block, num_blocks=arguments.kv_blocks)

        def draw(source):
            sampler = PowerSampler(source, tokenizer)
            return sampler.generate(prompts, config, num_chains=arguments.chains, seed=arguments.seed)

        results = draw(engine)
        for result in results:
            head = f"prompt {result.prompt_id}, chain {result.chain_id}: {len(result.tokens)} tokens, "
            head += f"{result.accepted} of {result.steps} steps changed the answer"
            print(head)
            body = " ".join(map(str, result.tokens)) if result.text is None else result.text.strip()
            print(textwrap.fill(body, 100, initial_indent="    ", subsequent_indent="    "))
        print("\n".join(report(engine.counts)))
        if arguments.check:
            same = same_chains(results, draw(model))
            print(f"the same chains on rows of their own: {'yes' if same else 'NO'}")
            return 0 if same else 1
    except (ArgumentError, OutOfBlocksError, packaged_model.ModelUnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
