"""The processors beside a model with towers, which make of images and sounds what the towers read."""

import json
from pathlib import Path
from typing import Any

from autoglm_compress.architecture import Family
from autoglm_compress.errors import UserError, in_one_line

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


def load_processor(folder: Path) -> Any:
    """The processor beside a model: tokenizer, chat template, and what reads images and sounds. It reads no videos.

    The processors of `transformers` that also read videos need torchvision for it. They are put together without that
    part, so that images and sounds need no more than Pillow and soundfile.

    Raises:
        UserError: there is none, or `transformers` cannot read it.
    """
    import transformers
    from transformers.processing_utils import ProcessorMixin

    try:
        kind = _processor_class(folder)
        assert issubclass(kind, ProcessorMixin)
        loaders: dict[str, Any] = {
            "image_processor": transformers.AutoImageProcessor,
            "feature_extractor": transformers.AutoFeatureExtractor,
            "tokenizer": transformers.AutoTokenizer,
        }
        parts = {
            name: loaders[name].from_pretrained(folder, trust_remote_code=False) if name in loaders else None
            for name in kind.get_attributes()
        }
        described, _ = kind.get_processor_dict(folder)
        return _without_videos(kind)(**parts, chat_template=described.get("chat_template"))
    except Exception as error:  # transformers raises many kinds; the user needs one sentence
        raise UserError(
            f"{folder}: transformers cannot read the processor: {in_one_line(error)[:300]}. Copy {FILE}, the chat "
            "template and the tokenizer of the original model into the folder."
        ) from None


def _processor_class(folder: Path) -> Any:
    """The class that a folder's processor is of: named in its files, or the one of the model's type."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for name in ("processor_config.json", FILE, "tokenizer_config.json"):
        if (folder / name).is_file():
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("processor_class")
            if named is not None:
                return getattr(transformers, named)
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    return getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])


def _without_videos(kind: Any) -> Any:
    """The same class, one of whose parts may be None."""

    class WithoutVideos(kind):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return type(None) if argument is None else super().check_argument_for_proper_class(name, argument)

    return WithoutVideos
