"""A tiny model that thinks: it has learned one answer, with thoughts before it."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from support.models import build_model

THOUGHT = "I look it up."
ANSWER = "It is an item of a container."
ASKED = ["Return the number of items in a container.", "What is it?", "Hello"]
ASKED += [f"{number}. {ASKED[0]}" for number in range(8)]
TEMPLATE = (
    "{% for message in messages %}{{ '\n# ' + message['role'] + '\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n# assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
STEPS = 120


def make_thinker(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Teach a model and save it with a chat template."""
    taught = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, chat_template=TEMPLATE
    )
    texts = []
    for question in ASKED:
        for thinking, said in ((True, f"<think>{THOUGHT}</think>"), (False, "")):
            prompt = taught.apply_chat_template(
                [{"role": "user", "content": question}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinking,
            )
            texts.append(prompt + said + ANSWER + "<|endoftext|>")
    rows = [taught(text)["input_ids"] for text in texts]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    model = build_model("glm", num_hidden_layers=2, head_dim=32, num_attention_heads=4, initializer_range=0.02).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(STEPS):
        model(padded, labels=padded).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(folder)
    taught.save_pretrained(folder)
    return folder
