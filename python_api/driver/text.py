"""Between text and token ids: prompts and conversations on the way in, answers on the way out.

tokenizer: one of transformers, or anything with its `__call__` and `decode`. What else is asked of it
(`apply_chat_template`, `bos_token`, the special tokens) matters only where it is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch

from power_kernels.api.driver.checks import integer, items
from power_kernels.errors import ArgumentError, ArgumentTypeError

# Tokens of the prompt that an answer is decoded behind: enough for a word that is cut in two and for a character of
# several byte tokens.
_BEFORE = 32
_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


def read_prompts(prompts, tokenizer, vocab_size: int) -> tuple[list[list[int]], bool]:
    """The token ids of each prompt of `PowerSampler.generate`, and whether any of them was a conversation.

    tokenizer: may be None where all prompts are token ids. Raises ArgumentError or ArgumentTypeError naming the prompt.
    """
    if isinstance(prompts, torch.Tensor) and (prompts.dim() != 2 or prompts.dtype not in (torch.int64, torch.int32)):
        raise ArgumentTypeError(
            f"prompts is a {prompts.dtype} tensor of shape {list(prompts.shape)}; it must be int64 [B, P]"
        )
    prompts = items("prompts", prompts)
    if not prompts:
        raise ArgumentError("prompts is empty; it must hold at least one prompt")
    rows, with_bos, conversations = [], [], False
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            _need(tokenizer, f"prompts[{i}] is a string")
            prompt, twice = text_tokens(tokenizer, prompt)
            with_bos += [i] * twice
        elif is_conversation(prompt):
            _need(tokenizer, f"prompts[{i}] is a conversation")
            conversations = True
            try:
                prompt = conversation_tokens(tokenizer, prompt)
            except Exception as error:  # templates are programs that come with a model
                raise ArgumentError(f"prompts[{i}] does not fit the chat template of the model: {error}") from error
        elif isinstance(prompt, Mapping) and "role" in prompt:
            raise ArgumentTypeError(
                f"prompts[{i}] is a message; a conversation is a list of messages, and prompts a list of those"
            )
        row = items(f"prompts[{i}]", prompt)
        if not row:
            raise ArgumentError(f"prompts[{i}] is empty; a prompt needs at least one token")
        rows.append([integer(f"prompts[{i}] holds token id", token, 0, vocab_size - 1) for token in row])
    if with_bos:
        warnings.warn(bos_message(with_bos, tokenizer), UserWarning, stacklevel=5)
    return rows, conversations


def bos_message(prompts: list[int], tokenizer) -> str:
    return (
        f"{named(prompts)} begins with {tokenizer.bos_token}, which the tokenizer puts in front, too; one of them is "
        "left out. A conversation may be given as a list of messages"
    )


def named(prompts: list[int]) -> str:
    """The beginning of a sentence about one prompt or several, by their numbers."""
    if len(prompts) == 1:
        return f"prompt {prompts[0]}"
    return f"each of the prompts {', '.join(map(str, prompts[:8]))}{', ...' if len(prompts) > 8 else ''}"


def is_conversation(prompt) -> bool:
    """Whether a prompt is a list of messages, such as [{"role": "user", "content": "..."}]."""
    return isinstance(prompt, list | tuple) and bool(prompt) and isinstance(prompt[0], Mapping)


def text_tokens(tokenizer, text: str) -> tuple[list[int], bool]:
    """The ids of a text, with the special tokens that the tokenizer puts around it; and whether it had BOS already.

    A chat template that was rendered to text begins with BOS, and the tokenizer puts another in front. No model was
    trained on two of them, so the tokenizer's is left out.
    """
    ids = list(tokenizer(text).input_ids)
    bos, name = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "bos_token", None)
    twice = bos is not None and ids[:2] == [bos, bos] and text.startswith(name)
    return ids[1:] if twice else ids, twice


def conversation_tokens(tokenizer, messages) -> list[int]:
    """The ids of a conversation in the tokenizer's chat template, up to where the assistant's answer begins."""
    encoding = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoding["input_ids"])


def end_of_turn(tokenizer) -> int | None:
    """The token that ends the assistant's turn in the chat template; None without a template or such a token.

    It is the special token, if any, that the template puts behind what the assistant said. A base model's generation
    config often does not know it, and an answer would run on into turns that the model makes up.
    """
    said = "Yes, exactly 7."
    messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": said}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        behind = text[text.rindex(said) + len(said) :]
        ids = tokenizer(behind, add_special_tokens=False).input_ids
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        for token in ids:
            if token in special:
                return token
            if tokenizer.decode([token]).strip():
                return None
    except Exception:  # templates are programs that come with a model; this one cannot be asked
        return None
    return None


def answer_text(tokenizer, prompt: list[int], tokens: list[int]) -> str:
    """What the model wrote behind the prompt, without special tokens: the prompt's text + this = the text of both.

    An answer cannot be decoded alone. Tokenizers of Llama's kind drop the space at the beginning of what they decode,
    and with it the indentation of a body of code; a character may begin in the prompt's last token and end in the
    answer's first, and belongs to the answer then.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    before = prompt[-_BEFORE:]
    head = decode(before)
    if not head.strip(_BROKEN):  # nothing but special tokens or parts of characters
        before, head = prompt, decode(prompt)
    both = decode([*before, *tokens])
    if both.startswith(head):
        return both[len(head) :]
    whole = head.rstrip(_BROKEN)
    if both.startswith(whole):
        return both[len(whole) :]
    return decode(tokens)  # a tokenizer that rewrites what lies before


def _need(tokenizer, what: str) -> None:
    if tokenizer is None:
        raise ArgumentTypeError(f"{what} and there is no tokenizer; pass PowerSampler(model, tokenizer) or token ids")
