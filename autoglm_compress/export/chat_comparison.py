"""Whether an engine writes a chat as a prompt as the chat template of `transformers` does."""

from collections.abc import Callable
from typing import Any

from autoglm_compress.export.engine_process import EngineError

CHAT = [
    {"role": "system", "content": "You are helpful."},
    {"role": "user", "content": "What is 7 × 6?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": " Thank you!\n"},
]


def chat_problem(tokenizer: Any, engine: str, write: Callable[[list[dict[str, str]]], str]) -> str | None:
    """What an engine makes of a chat template that `transformers` does not; None if nothing.

    Args:
        tokenizer: of `transformers`.
        engine: the engine's name, for messages.
        write: gives the engine's prompt of a chat; raises EngineError where it has none.
    """
    if not tokenizer.chat_template:
        return None
    try:
        expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    except Exception:  # a template may refuse a chat with whatever exception: other chats are not known here
        return None
    try:
        found = write(CHAT)
    except EngineError as error:
        return f"{engine} does not take the chat template ({error}): write prompts without it"
    return None if found == expected else f"{engine} writes another prompt by the chat template: write prompts"
