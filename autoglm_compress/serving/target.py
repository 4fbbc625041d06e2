"""What is served: a checkpoint or a GGUF file, and what engines and the gateway have to know of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoglm_compress.atomic import read_object
from autoglm_compress.errors import UserError, listed
from autoglm_compress.export.engine_process import has_package
from autoglm_compress.records.files import load_json
from autoglm_compress.records.folders import find_folder

NO_SERVER = {"genai_config.json": "ONNX Runtime", "llm.mnn": "MNN"}
"""Files of exports whose engines have no server of this API, with the engines."""
VISION = "mmproj"
"""How the name of a GGUF file with a vision tower begins."""
CACHE_BYTES = 2
"""Of each number in a cache of keys and values."""


@dataclass(frozen=True)
class Target:
    """A model to serve.

    `path` is a folder, or a GGUF file with its vision tower in `vision`. Sizes are of the text tower.
    `weight_only_bits` are those of a quantization that leaves activations as they are, if there is one.
    """

    path: Path
    name: str
    weight_bytes: int
    context: int
    layers: int
    key_value_heads: int
    head_dim: int
    chat_template: str | None
    model_type: str
    weight_only_bits: int | None = None
    vision: Path | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path.is_file()

    @property
    def thinks(self) -> bool:
        """Whether the chat template speaks of reasoning."""
        return self.chat_template is not None and "think" in self.chat_template

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens."""
        return 2 * self.layers * self.key_value_heads * self.head_dim * CACHE_BYTES * tokens


def find_target(given: Path) -> Target:
    """What a path means: a GGUF file, a folder with one, a checkpoint, or a run and the label of a stage.

    Raises:
        UserError: it is none of them, or no server takes it.
    """
    if given.is_file():
        if given.suffix != ".gguf":
            raise UserError(f"{given}: not a GGUF file. Give a checkpoint's folder, RUN/STAGE, or FILE.gguf.")
        return _of_file(given)
    folder = find_folder(given)
    files = [file for file in sorted(folder.glob("*.gguf")) if not file.name.startswith(VISION)]
    if len(files) > 1:
        names = listed([file.name for file in files])
        raise UserError(f"{folder}: has {len(files)} GGUF files: {names}. Give one of them.")
    if files:
        return _of_file(files[0])
    for name, engine in NO_SERVER.items():
        if (folder / name).exists():
            raise UserError(
                f"{folder}: is for {engine}, which has no server of OpenAI's API. Serve the checkpoint it was made "
                "from, or export that as GGUF."
            )
    return _of_checkpoint(folder)


def _of_checkpoint(folder: Path) -> Target:
    path = folder / "config.json"
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not path.exists() or not weights:
        missing = "config.json" if not path.exists() else "safetensors"
        raise UserError(f"{folder}: no {missing}: not a model checkpoint. Give the folder that holds it.")
    config = load_json(path, "Give a folder that transformers loads.")
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    text = config.get("thinker_config", config)
    text = text.get("text_config", text)
    heads = _number(text, "num_attention_heads", path)
    return Target(
        folder,
        folder.resolve().name,
        weights,
        context=_number(text, "max_position_embeddings", path),
        layers=_number(text, "num_hidden_layers", path),
        key_value_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or _number(text, "hidden_size", path) // heads,
        chat_template=_chat_template(folder),
        model_type=str(config.get("model_type")),
        weight_only_bits=_weight_only_bits(config.get("quantization_config")),
    )


def _number(config: dict[str, Any], name: str, path: Path) -> int:
    found = config.get(name)
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{path}: {name}: given {found!r}: expected a whole number from 1.")
    return found


def _chat_template(folder: Path) -> str | None:
    """The template of a checkpoint; of several, the default one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_object(folder / name).get("chat_template")
        if isinstance(found, list):
            named = {entry["name"]: entry["template"] for entry in found}
            found = named.get("default", next(iter(named.values()), None))
        if found:
            return str(found)
    return None


def _weight_only_bits(quantization: Any) -> int | None:
    """Bits of the weights where no activation is quantized; the most if there are several."""
    groups = (quantization or {}).get("config_groups")
    if not groups or any(group.get("input_activations") for group in groups.values()):
        return None
    return max(group["weights"]["num_bits"] for group in groups.values())


def _of_file(file: Path) -> Target:
    if not has_package("gguf"):
        raise UserError("the package gguf is not installed. Install it with: pip install 'autoglm-compress[gguf]'")
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"{file}: not a whole GGUF file: {error}. Export it again.") from None
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}

    def found(name: str, default: Any = None) -> Any:
        value = fields[name].contents() if name in fields else default
        if value is None:
            raise UserError(f"{file}: no {name} in it: not a file that llama.cpp runs. Export it again.")
        return value

    kind = found("general.architecture")
    heads = found(f"{kind}.attention.head_count")
    vision = list(file.parent.glob(f"{VISION}*.gguf"))
    return Target(
        file,
        file.stem,
        file.stat().st_size,
        context=found(f"{kind}.context_length"),
        layers=found(f"{kind}.block_count"),
        key_value_heads=found(f"{kind}.attention.head_count_kv", heads),
        head_dim=found(f"{kind}.attention.key_length", found(f"{kind}.embedding_length") // heads),
        chat_template=found("tokenizer.chat_template", "") or None,
        model_type=kind,
        vision=vision[0] if len(vision) == 1 else None,
    )
