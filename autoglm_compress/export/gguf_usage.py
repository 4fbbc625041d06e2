"""How people run a GGUF file."""


def modelfile(file: str) -> str:
    """Ollama's `Modelfile`; the chat template is in the GGUF file, where Ollama finds it."""
    return f"FROM ./{file}\n"


def commands(file: str) -> str:
    """The commands for a computer, for Android and for Ollama, in Markdown."""
    return f"""\
### llama.cpp

```sh
llama-cli -m {file} -p "The answer is" -n 64          # continue a text
llama-server -m {file} --port 8080                    # chat at http://localhost:8080
```

### Android, in Termux

```sh
pkg install llama-cpp                                 # or build it: pkg install git cmake clang
cp /sdcard/Download/{file} ~                          # after termux-setup-storage
llama-cli -m ~/{file} -t 4 -p "The answer is" -n 64
```

Apps that run llama.cpp, such as PocketPal and ChatterUI, open the file too.

### Ollama

```sh
ollama create my-model -f Modelfile && ollama run my-model
```

### Python

```python
import xllamacpp  # pip install xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = "{file}"
server = xllamacpp.Server(parameters)
answer = server.handle_completions({{"prompt": "The answer is", "max_tokens": 64}})
print(answer["choices"][0]["text"])
```
"""
