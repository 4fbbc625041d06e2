"""Continue a text with a GGUF file in llama.cpp: `say.py FILE TEXT`."""

import sys

import xllamacpp


def say(file: str, text: str, tokens: int = 32) -> str:
    """The text and what the model likes best to follow it."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.verbosity = -1  # no log
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions({"prompt": text, "max_tokens": tokens, "temperature": 0})
    return text + answer["choices"][0]["text"]


if __name__ == "__main__":
    print(say(sys.argv[1], sys.argv[2]))
