"""What a surgery removes: what does nothing goes first, in steps or at once, and the lineage says what is left."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from autoglm_compress.checkpoint import Checkpoint
from autoglm_compress.cutting.lineage import Lineage
from support.models import build_model
from support.running import compress, load, logits, same_tensors, tensors_of

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

# Parts that do nothing can go and nothing changes.


def save_changed(
    family: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    change: Callable[[str, torch.Tensor], None],
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """A tiny model with `change` applied to every tensor, which it is given by name and in place."""
    model = build_model(family, rms_norm_eps=1e-12).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change(name, parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["activation", "magnitude", "contribution"])
def test_dead_neurons_go_first_and_are_not_missed(
    family: str, method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tokens: torch.Tensor
):
    alive = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:48]
    dead = torch.ones(128, dtype=torch.bool).index_fill(0, alive, False)

    def kill(name: str, tensor: torch.Tensor) -> None:
        if ".mlp.down_proj.weight" in name:
            tensor[:, dead] = 0
        elif ".mlp.up_proj" in name:
            tensor[dead] = 0
        elif ".mlp.gate_up_proj" in name:
            tensor[128:][dead] = 0

    source = save_changed(family, tmp_path / "model", tokenizer, kill)
    result = compress(tmp_path, source, {"stage": "ffn", "intermediate_size": 48, "method": method})
    assert set(Lineage.load(result / "lineage.json").neurons) == {tuple(sorted(alive.tolist()))}
    torch.testing.assert_close(logits(load(result), tokens), logits(load(source), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "sizes", "alive"),
    [
        ("magnitude", {"num_attention_heads": 4}, [1, 2, 4, 7]),
        ("magnitude", {"num_attention_heads": 2, "kv_heads": 1}, [5, 6]),
        ("contribution", {"num_attention_heads": 4}, [0, 3, 4, 6]),
        ("contribution", {"num_attention_heads": 2, "kv_heads": 1}, [1, 2]),
        ("activation", {"num_attention_heads": 4, "kv_heads": 1}, [4, 5, 6, 7]),
    ],
)
def test_dead_heads_go_first_and_are_not_missed(
    family: str,
    method: str,
    sizes: dict[str, int],
    alive: list[int],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    tokens: torch.Tensor,
):
    dead = torch.ones(8, dtype=torch.bool).index_fill(0, torch.tensor(alive), False)

    def kill(name: str, tensor: torch.Tensor) -> None:
        if "o_proj.weight" in name:
            tensor.view(64, 8, 16)[:, dead] = 0
        elif "v_proj" in name and method == "activation":  # what the dead heads' outputs are made of
            tensor[:16] = 0

    source = save_changed(family, tmp_path / "model", tokenizer, kill)
    result = compress(tmp_path, source, {"stage": "heads", "method": method} | sizes)
    lineage = Lineage.load(result / "lineage.json")
    assert set(lineage.heads) == {tuple(alive)}
    assert set(lineage.key_value_heads) == {tuple(sorted({head // 4 for head in alive}))}
    assert load(result).config.num_key_value_heads == sizes.get("kv_heads", 2)
    torch.testing.assert_close(logits(load(result), tokens), logits(load(source), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "sizes"), [("activation", [16]), ("magnitude", [16]), ("activation", [40, 16])])
def test_dead_channels_go_first_and_are_not_missed(
    family: str,
    method: str,
    sizes: list[int],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    tokens: torch.Tensor,
):
    """A quarter of the channels is alive, so the norms' gains must double, at once or in two steps."""
    alive = torch.randperm(64, generator=torch.Generator().manual_seed(2))[:16]
    dead = torch.ones(64, dtype=torch.bool).index_fill(0, alive, False)

    def kill(name: str, tensor: torch.Tensor) -> None:
        if "embed_tokens" in name:
            tensor[:, dead] = 0
        elif "o_proj" in name or "down_proj" in name:  # weights and biases
            tensor[dead] = 0

    source = save_changed(family, tmp_path / "model", tokenizer, kill, torch.float32)
    stages = [{"stage": "width", "name": f"to{size}", "hidden_size": size, "method": method} for size in sizes]
    result = compress(tmp_path, source, *stages)
    assert Lineage.load(result / "lineage.json").channels == tuple(sorted(alive.tolist()))
    before, after = tensors_of(source), tensors_of(result)
    norms = [name for name in after if name.endswith("norm.weight") and ".self_attn." not in name]
    assert len(norms) == 1 + 4 * (4 if family == "glm4" else 2)
    for name in norms:
        torch.testing.assert_close(after[name], 2 * before[name][~dead], rtol=1e-4, atol=0, msg=name)
    torch.testing.assert_close(logits(load(result), tokens), logits(load(source), tokens), rtol=1e-4, atol=1e-4)


# What was cut twice refers to the source's statistics.


@pytest.fixture(scope="module")
def uneven(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first and third layers do little, so that `depth` keeps the others and every index shifts."""

    def weaken(name: str, tensor: torch.Tensor) -> None:
        if any(writer in name for writer in ("o_proj", "down_proj", "post_self_attn_layernorm", "post_mlp_layernorm")):
            tensor *= {"0": 0.01, "2": 0.1}.get(name.split(".")[2], 1)

    return save_changed(family, tmp_path_factory.mktemp("uneven"), tokenizer, weaken)


@pytest.mark.parametrize("method", ["activation", "contribution"])
def test_cutting_in_steps_and_in_any_order_is_cutting_at_once(uneven: Path, method: str, tmp_path: Path):
    """All scores of depth, heads and ffn come from the source, so neither steps nor their order matter."""
    at_once = [
        {"stage": "depth", "num_hidden_layers": 2},
        {"stage": "heads", "num_attention_heads": 2, "method": method},
        {"stage": "ffn", "intermediate_size": 64, "method": method},
    ]
    in_steps = [
        {"stage": "ffn", "name": "ffn1", "intermediate_size": 96, "method": method},
        {"stage": "depth", "name": "depth1", "num_hidden_layers": 3},
        {"stage": "heads", "name": "heads1", "num_attention_heads": 4, "method": method},
        *reversed(at_once),
    ]
    one = compress(tmp_path / "one", uneven, *at_once)
    other = compress(tmp_path / "other", uneven, *in_steps)
    assert Lineage.load(one / "lineage.json").layers == (1, 3)
    assert same_tensors(one, other)
    assert (one / "lineage.json").read_bytes() == (other / "lineage.json").read_bytes()


@pytest.mark.parametrize("method", ["activation", "random"])
def test_the_lineage_says_what_every_tensor_was(uneven: Path, method: str, tmp_path: Path):
    """Heads, neurons and channels are each cut twice; what is left is the source at the lineage's indices."""
    stages = [
        {"stage": "width", "name": "w1", "hidden_size": 48, "method": method},
        {"stage": "heads", "name": "h1", "num_attention_heads": 4, "method": method},
        {"stage": "ffn", "name": "f1", "intermediate_size": 96, "method": method},
        {"stage": "depth", "num_hidden_layers": 2},
        {"stage": "width", "name": "w2", "hidden_size": 32, "method": method},
        {"stage": "heads", "name": "h2", "num_attention_heads": 2, "kv_heads": 1, "method": method},
        {"stage": "ffn", "name": "f2", "intermediate_size": 64, "method": method},
    ]
    result = compress(tmp_path, uneven, *stages, seed=3)
    lineage = Lineage.load(result / "lineage.json")
    assert lineage.layers == (1, 3)
    before, after = tensors_of(uneven), tensors_of(result)
    family = Checkpoint(uneven).family
    for name, tensor in after.items():
        original, norm = name, name.endswith("norm.weight") and tensor.shape == (32,)
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        if ".layers." in name:
            original = name.replace(f".{layer}.", f".{lineage.layers[layer]}.", 1)
        kept = before[original]
        for dimension, axis in enumerate(family.axes_of(original)):
            kept = kept.index_select(dimension, _indices(axis, lineage, layer))
        # A gain is multiplied by one number at each of the two cuts, and rounded to bfloat16 after each.
        ratio = (tensor.float() / kept.float()).median() if norm else 1.0
        torch.testing.assert_close(tensor.float(), kept.float() * ratio, rtol=0.02 if norm else 0, atol=0, msg=name)


def _indices(axis: str, lineage: Lineage, layer: int) -> torch.Tensor:
    """Indices into the source along one axis."""

    def rows(heads: tuple[int, ...]) -> list[int]:
        return [head * 16 + dim for head in heads for dim in range(16)]

    neurons = lineage.neurons[layer]
    return torch.tensor(
        {
            "vocab": range(512),
            "hidden": lineage.channels,
            "query": rows(lineage.heads[layer]),
            "key_value": rows(lineage.key_value_heads[layer]),
            "head_dim": range(16),
            "intermediate": neurons,
            "gate_up": [*neurons, *(128 + neuron for neuron in neurons)],
        }[axis]
    )


@pytest.mark.parametrize(("axis", "option"), [("heads", "num_attention_heads"), ("ffn", "intermediate_size")])
def test_the_seed_decides_what_random_keeps(
    axis: str, option: str, make_checkpoint: Callable[..., Path], tmp_path: Path
):
    stage = {"stage": axis, option: "0.5x", "method": "random"}
    kept = [compress(tmp_path / str(n), make_checkpoint("glm"), stage, seed=seed) for n, seed in enumerate((1, 1, 2))]
    assert same_tensors(kept[0], kept[1])
    assert not same_tensors(kept[0], kept[2])
