"""How people run an export to MNN."""


def commands() -> str:
    """The commands for a computer, for Android and for iOS, in Markdown."""
    return """\
The folder is the model: keep its files together. `config.json` says how the engine runs it: `"memory": "low"` rounds
activations to 8 bits and is fast, `"memory": "high"` with `"precision": "high"` computes in fp32.

### Python

```python
import MNN.llm as llm  # pip install mnn

model = llm.create("config.json")
model.load()
print(model.response("The answer is"))
```

### Command line

```sh
llm_demo config.json                                  # of MNN, built with -DMNN_BUILD_LLM=true
```

### Android and iOS

MNN's app, MNN Chat (https://github.com/alibaba/MNN/tree/master/apps), opens models of one's own. On Android, put the
folder on the phone, and choose it there as a local model:

```sh
adb push . /data/local/tmp/mnn_models/my-model
```
"""
