"""The processors beside a model with towers, which make of images and sounds what the towers read."""

import json
from pathlib import Path

from autoglm_compress.architecture import Family
from autoglm_compress.errors import UserError

FILE = "preprocessor_config.json"
CLASSES = {"image_processor_type": "AutoImageProcessor", "feature_extractor_type": "AutoFeatureExtractor"}
"""The Auto classes of `transformers` that load a processor, by the field that names its type."""


def require_processor(folder: Path, family: Family) -> None:
    """Raise UserError if a model with towers has a processor that `transformers` does not load.

    A package that is not installed, such as torchvision, is not the checkpoint's fault. Remote code is never run.
    """
    where = folder / FILE
    if not family.kept or not where.exists():
        return
    import transformers

    try:
        found = json.loads(where.read_text(encoding="utf-8"))
        fields = [field for field in CLASSES if field in found]
        # Without a type, the model's own is meant.
        default = "image_processor_type" if "vision" in family.kept else "feature_extractor_type"
        for field in fields or [default]:
            getattr(transformers, CLASSES[field]).from_pretrained(folder, trust_remote_code=False)
    except ImportError:
        return
    except Exception as error:  # transformers raises many kinds; the user needs one sentence
        reason = " ".join(str(error).split()).removesuffix(".")
        shown = reason if len(reason) <= 300 else f"{reason[:300]}…"
        raise UserError(
            f"{where}: transformers cannot read the processor: {shown}. Copy the file of the original model again."
        ) from None
