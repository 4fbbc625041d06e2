"""What plain transformers would do with a checkpoint, asked of a model that has shapes and no values."""

from collections.abc import Iterable
from typing import Any

import torch


def meta_model(config: Any, auto_class: str) -> Any:
    """The model that an Auto class of `transformers` builds from a config object, without memory for its weights.

    Raises:
        Exception: of many kinds, where this version of `transformers` lacks something that the config names.
    """
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(config)


def loaded_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Those of the tensors of a file that `from_pretrained` would put into a model; it calls the rest unexpected.

    Returns:
        The name that each of them has in the model.

    Args:
        model: as `meta_model` gives it.
        names: as the file has them. `transformers` renames what older versions or other classes wrote.
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
