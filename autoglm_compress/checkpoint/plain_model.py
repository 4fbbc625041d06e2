"""What plain transformers would do with a checkpoint, found with a model that has shapes but no values."""

from collections.abc import Iterable
from typing import Any

import torch


def meta_model(config: Any, auto_class: str) -> Any:
    """The model that an Auto class of `transformers` builds from a config object, without memory for its weights.

    Raises:
        Exception: of many kinds, if this version of `transformers` lacks something that the config names.
    """
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(config)


def loaded_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The tensors of a file that `from_pretrained` would load into a model. It calls the others unexpected.

    Returns:
        The name that each of them has in the model.

    Args:
        model: as `meta_model` gives it.
        names: tensor names in the file. `transformers` renames tensors that older versions or other classes wrote.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def in_model(name: str) -> str:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return renamed if renamed in known else name

    found = {name: in_model(name) for name in names}
    return {name: inside for name, inside in found.items() if inside in known}
