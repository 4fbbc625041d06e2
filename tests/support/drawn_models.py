"""Models of every family in whatever configuration hypothesis draws, on disk as they come from the field.

A drawn model is what `save_pretrained` writes, and then some edits of the folder, each of a kind that people have met:
fields of config.json that are null, gone or spelled as older versions did, weights in another dtype than the config
says, a head beside a tied embedding, tensors that nothing uses, shards in folders of their own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

CONTEXT = 48
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
SWITCHES = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)} | dict.fromkeys(
    ("glm", "glm4"), ("attention_bias",)
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "glm", "glm4")
DERIVED_HEAD_DIM = ("llama", "mistral", "qwen2")
"""The families that take head_dim from hidden_size and num_attention_heads if it is null or not there."""
DERIVED_GROUPS = ("llama", "qwen2", "qwen3")
"""The families that take num_key_value_heads from num_attention_heads if it is null."""
NULLABLE = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "initializer_range",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
    "tie_word_embeddings",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
)
SCALE = 0.3
"""Of random weights: large enough that every part of a model changes its logits."""

Settings = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Edit:
    """A change to a folder, and its name with what was drawn for it."""

    name: str
    apply: Callable[[Path], None]

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True)
class DrawnModel:
    """A model to build: its config's settings, how its weights are stored, and what is edited afterwards.

    Attributes:
        family: the `model_type`.
        settings: what the config class is given.
        dtype: of the weights.
        equal_head: whether the head, which stands by itself, has the embedding's values.
        shard_size: as `save_pretrained` takes it.
        edits: none for a folder just as `save_pretrained` left it.
    """

    family: str
    settings: Settings
    dtype: str
    equal_head: bool
    shard_size: str
    edits: tuple[Edit, ...] = ()

    def build(self, folder: Path) -> Path:
        """Save the model in a folder."""
        config = AutoConfig.for_model(self.family, **self.settings)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=SCALE)
            if self.equal_head:
                model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.to(getattr(torch, self.dtype)).save_pretrained(folder, max_shard_size=self.shard_size)
        for edit in self.edits:
            edit.apply(folder)
        return folder


@st.composite
def drawn_models(
    draw: st.DrawFn,
    families: tuple[str, ...] = FAMILIES,
    edits: int = 0,
    vocabularies: tuple[int, ...] = (61, 96, 128),
) -> DrawnModel:
    """Models of some families, with at most so many edits."""
    family = draw(st.sampled_from(families))
    settings = draw(_settings(family, vocabularies))
    chosen = draw(st.lists(_edits(family), min_size=min(edits, 1), max_size=edits, unique_by=repr)) if edits else []
    return DrawnModel(
        family,
        settings,
        draw(st.sampled_from(DTYPES)),
        not settings["tie_word_embeddings"] and draw(st.booleans()),
        draw(st.sampled_from(["5GB", "20KB"])),
        tuple(chosen),
    )


@st.composite
def _settings(draw: st.DrawFn, family: str, vocabularies: tuple[int, ...]) -> Settings:
    """What the config class of a family may be given."""
    groups, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    heads, layers = groups * size, draw(st.integers(1, 4))
    hidden = heads * draw(st.sampled_from([8, 16]))
    vocabulary = draw(st.sampled_from(vocabularies))
    head_dim = draw(st.sampled_from([hidden // heads, 8, 24]))
    if family in DERIVED_HEAD_DIM:
        head_dim = draw(st.sampled_from([None, head_dim]))
    settings: Settings = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": draw(st.sampled_from([24, 40])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([None, groups])) if family in DERIVED_GROUPS else groups,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": draw(st.sampled_from(["silu", "gelu_pytorch_tanh", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "pad_token_id": draw(st.sampled_from([None, 0, vocabulary - 1])),
        "bos_token_id": None,
        "eos_token_id": draw(st.sampled_from([0, [0, 1]])),
        "initializer_range": 0.02,
    }
    if head_dim is not None:
        settings["head_dim"] = head_dim
    for switch in SWITCHES.get(family, ()):
        settings[switch] = draw(st.booleans())
    settings |= draw(_windows(family, layers))
    return settings | {"rope_parameters": draw(_rope(family, head_dim or hidden // heads))}


@st.composite
def _windows(draw: st.DrawFn, family: str, layers: int) -> Settings:
    """Sliding windows, of all layers or of some."""
    window = draw(st.sampled_from([None, 1, 7, CONTEXT]))
    if family == "mistral":
        return {"sliding_window": window}
    if family not in ("qwen2", "qwen3"):
        return {}
    settings: Settings = {
        "use_sliding_window": window is not None,
        "sliding_window": window or draw(st.sampled_from([None, 7])),
        "max_window_layers": draw(st.integers(0, layers + 1)),
    }
    kinds = ["full_attention"] + ["sliding_attention"] * (window is not None)
    if draw(st.booleans()):
        settings["layer_types"] = draw(st.lists(st.sampled_from(kinds), min_size=layers, max_size=layers))
    return settings


@st.composite
def _rope(draw: st.DrawFn, family: str, head_dim: int) -> Settings:
    """Rotary embeddings of every type; GLM's rotate a part of each head."""
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope"]))
    rope: Settings = {"rope_type": kind, "rope_theta": draw(st.sampled_from([10_000.0, 500.0]))}
    partial = draw(st.sampled_from([0.5, 1.0])) if family in ("glm", "glm4") else 1.0
    if family in ("glm", "glm4"):
        rope["partial_rotary_factor"] = partial
    original = draw(st.sampled_from([CONTEXT // 2, CONTEXT]))
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([1.0, 2.0, 4.0]))
    if kind == "yarn":
        rope |= draw(st.sampled_from([{}, {"attention_factor": 0.8}, {"beta_fast": 16.0, "beta_slow": 2.0}]))
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = original
    if kind == "longrope":
        pairs = int(head_dim * partial) // 2
        rope |= {"short_factor": [1.0 + 0.1 * n for n in range(pairs)], "long_factor": [2.0 + n for n in range(pairs)]}
    return rope


def _edits(family: str) -> st.SearchStrategy[Edit]:
    """One edit of a folder of a family."""
    fields = st.sampled_from(NULLABLE)
    choices = [
        fields.map(lambda field: _config_edit(f"{field}: null", lambda config: config | {field: None})),
        fields.map(lambda field: _config_edit(f"{field}: absent", lambda config: _without(config, field))),
        st.sampled_from(DTYPES).map(
            lambda dtype: _config_edit(f"dtype: {dtype}", lambda config: config | {"dtype": dtype})
        ),
        st.sampled_from(DTYPES).map(
            lambda dtype: _config_edit(
                f"torch_dtype: {dtype}", lambda config: _without(config, "dtype") | {"torch_dtype": dtype}
            )
        ),
        st.sampled_from(["type", "rope_type"]).map(
            lambda key: _config_edit(f"rope_scaling with {key}", lambda config: _old_rope(config, key))
        ),
        st.sampled_from(["head_dim", "num_key_value_heads", "attention_bias", "mlp_bias", "tie_word_embeddings"]).map(
            lambda field: _config_edit(f"{field}: other", lambda config: _other(config, field))
        ),
        st.sampled_from([-1, 10_000]).map(
            lambda number: _config_edit(f"pad_token_id: {number}", lambda config: config | {"pad_token_id": number})
        ),
        st.sampled_from(["full_attention", "sliding_attention", "chunked_attention"]).map(
            lambda kind: _config_edit(
                f"layer_types: {kind}", lambda config: config | {"layer_types": [kind] * config["num_hidden_layers"]}
            )
        ),
        st.sampled_from([0.5, 0.25]).map(
            lambda part: _config_edit(
                f"partial_rotary_factor: {part}", lambda config: config | {"partial_rotary_factor": part}
            )
        ),
        st.sampled_from(["gelu", "relu2", "no_such_activation"]).map(
            lambda name: _config_edit(f"hidden_act: {name}", lambda config: config | {"hidden_act": name})
        ),
        st.just(_weights_edit("norms in float32", _norms_in_float32)),
        st.just(_weights_edit("a head equal to the embedding", lambda tensors: _with_head(tensors, False))),
        st.just(_weights_edit("another head", lambda tensors: _with_head(tensors, True))),
        st.just(_weights_edit("buffers", _with_buffers)),
        st.just(_weights_edit("biases that nothing uses", _with_biases)),
        st.just(Edit("shards in folders", _shards_in_folders)),
    ]
    return st.one_of(choices)


def _config_edit(name: str, change: Callable[[Settings], Settings]) -> Edit:
    def apply(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return Edit(name, apply)


def _weights_edit(name: str, change: Callable[[Tensors], Tensors]) -> Edit:
    """A change to all tensors, which stand in one file afterwards."""

    def apply(folder: Path) -> None:
        files = sorted(folder.rglob("*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        for file in (*files, folder / INDEX):
            file.unlink(missing_ok=True)
        save_file(change(tensors), folder / SINGLE, metadata={"format": "pt"})

    return Edit(name, apply)


def _shards_in_folders(folder: Path) -> None:
    """Every other tensor in a file of its own folder, named by an index."""
    files = sorted(folder.rglob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in (*files, folder / INDEX):
        file.unlink(missing_ok=True)
    weight_map = {}
    for start, file in enumerate(("first/model-1.safetensors", "second/deep/model-2.safetensors")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        part = {name: tensors[name] for name in sorted(tensors)[start::2]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _without(config: Settings, field: str) -> Settings:
    return {name: value for name, value in config.items() if name != field}


def _old_rope(config: Settings, key: str) -> Settings:
    """Rotary embeddings as configs had them before `rope_parameters`."""
    rope = dict(config.get("rope_parameters") or {})
    if "rope_type" not in rope:
        return config
    kind = rope.pop("rope_type")
    outside = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = None if kind == "default" else rope | {key: kind}
    return _without(config, "rope_parameters") | outside | {"rope_scaling": scaling}


def _other(config: Settings, field: str) -> Settings:
    """Another value than what the weights have."""
    given = config.get(field)
    return config | {field: not given if isinstance(given, bool) or given is None else given * 2}


def _norms_in_float32(tensors: Tensors) -> Tensors:
    return {name: tensor.float() if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}


def _with_head(tensors: Tensors, other: bool) -> Tensors:
    embedding = tensors["model.embed_tokens.weight"]
    return tensors | {"lm_head.weight": embedding.flip(0).contiguous() if other else embedding.clone()}


def _with_buffers(tensors: Tensors) -> Tensors:
    """What old versions wrote beside the weights."""
    buffers: Tensors = {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)}
    buffers["model.layers.0.self_attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    buffers["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    buffers["model.rotary_emb.inv_freq"] = torch.ones(4)
    return tensors | buffers


def _with_biases(tensors: Tensors) -> Tensors:
    """Biases that the model may not have by its config."""
    names = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "lm_head")
    hidden = tensors["model.norm.weight"]
    return tensors | {f"{name}.bias": tensors.get(f"{name}.bias", hidden.clone()) for name in names}
