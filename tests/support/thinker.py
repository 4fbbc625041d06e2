"""A tiny model that thinks: it has learned one answer, with thoughts before it."""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from support.models import build_model

THOUGHT = "I look it up."
ANSWER = "It is an item of a container."
ASKED = ["Return the number of items in a container.", "Hello"]
TEMPLATE = """\
{%- for message in messages %}
{{- '\\n# ' + message.role + '\\n' }}
{%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{{- message.content }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '\\n# assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think></think>' }}{% endif %}
{%- endif %}"""
"""As those of real models that think: thoughts of earlier answers are shown, and none are asked for by closing them."""
STEPS = 80


def make_thinker(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Teach a model and save it with a chat template."""
    taught = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token, chat_template=TEMPLATE
    )
    rows, labels = [], []
    for question in ASKED:
        for thinking, thought in ((True, f"<think>{THOUGHT}</think>"), (False, "")):
            asked = [{"role": "user", "content": question}]
            prompt = taught.apply_chat_template(
                asked, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            given, said = (taught(text)["input_ids"] for text in (prompt, f"{thought}{ANSWER}<|endoftext|>"))
            rows.append(torch.tensor(given + said))
            labels.append(torch.tensor([-100] * len(given) + said))
    tokens, wanted = pad_sequence(rows, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
    model = build_model("glm", num_hidden_layers=2, head_dim=32, num_attention_heads=4, initializer_range=0.02).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(STEPS):
        model(tokens, labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.bfloat16().save_pretrained(folder)
    taught.save_pretrained(folder)
    return folder
