"""Whether plain transformers loads a checkpoint."""

from typing import Any

from autoglm_compress.checkpoint.plain_model import loaded_names, meta_model
from autoglm_compress.checkpoint.reader import Checkpoint
from autoglm_compress.errors import UserError


def plain_verdict(checkpoint: Checkpoint) -> dict[str, Any]:
    """Compare the tensors with those of the model that transformers builds from the config, without memory for it."""
    config = checkpoint.whole_unquantized_config()
    try:
        model = meta_model(config, checkpoint.family.auto_class)
    except Exception as error:  # an activation, or a kind of rotary embedding, that this version does not have
        reason = f"{type(error).__name__}: {error}"
        return {"loads": False, "reason": reason, "missing": [], "different_shape": []}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if checkpoint.shape.tie_word_embeddings:
        for inside in loaded_names(model, [checkpoint.family.head]).values():
            expected.pop(inside, None)
    kept = (tensor for tower in checkpoint.shape.kept for tensor in tower.tensors if tensor.elements)
    shapes = dict(checkpoint.shape.tensors()) | {tensor.name: tensor.shape for tensor in kept}
    ours = {inside: shapes[name] for name, inside in loaded_names(model, shapes).items()}
    missing = sorted(set(expected) - set(ours))
    different = sorted(name for name in expected.keys() & ours.keys() if expected[name] != ours[name])
    problems = [f"{name} is missing" for name in missing] + [f"{name} has another shape" for name in different]
    return {
        "loads": not problems,
        "reason": ", ".join(problems[:5]) or None,
        "missing": missing,
        "different_shape": different,
    }


def require_loadable(checkpoint: Checkpoint) -> None:
    """Raise UserError if plain transformers does not load a checkpoint: what is made from it would not load either."""
    verdict = plain_verdict(checkpoint)
    if not verdict["loads"]:
        raise UserError(
            f"{checkpoint.folder}: transformers cannot load it: {' '.join(verdict['reason'].split())}. Correct "
            "config.json, or install a version of transformers that loads it."
        )
