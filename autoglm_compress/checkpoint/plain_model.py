"""What plain transformers would do with a checkpoint, asked of a model that has shapes and no values."""

from collections.abc import Iterable
from typing import Any

import torch

from autoglm_compress.architecture import Family


def meta_model(config: Any, family: Family) -> Any:
    """The model that the family's Auto class builds from a whole config, on the meta device: it takes no memory.

    Raises:
        Exception: of many kinds, where this version of `transformers` lacks something that the config names.
    """
    import transformers

    with torch.device("meta"):
        return getattr(transformers, family.auto_class).from_config(config)


def loaded_names(model: Any, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the tensors of a file that `from_pretrained` would put into a model; it calls the rest unexpected.

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

    def loads(name: str) -> bool:
        renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return renamed in known or name in known

    return tuple(name for name in names if loads(name))
