"""How people run a model with ONNX Runtime."""


def commands() -> str:
    """Python, Android and iOS, in Markdown."""
    return """\
The folder is the model: keep its files together.

### Python

```python
import onnxruntime_genai as og  # pip install onnxruntime-genai

model = og.Model(".")  # this folder
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=256)
generator = og.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("The answer is"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

### Android

Put the folder on the phone, and the package `onnxruntime-genai-android` (an AAR, on
https://github.com/microsoft/onnxruntime-genai/releases) into the app:

```sh
adb push . /sdcard/Download/my-model                  # then copy it into the app's own files
```

```java
Model model = new Model(folder);                      // import ai.onnxruntime.genai.*
Tokenizer tokenizer = new Tokenizer(model);
GeneratorParams parameters = new GeneratorParams(model);
parameters.setSearchOption("max_length", 256);
Generator generator = new Generator(model, parameters);
generator.appendTokenSequences(tokenizer.encode("The answer is"));
while (!generator.isDone()) generator.generateNextToken();
String text = tokenizer.decode(generator.getSequence(0));
```

### iOS

The same functions are in the C interface (`ort_genai_c.h`) of the frameworks on that page.
"""
