"""llama.cpp's vision towers in a process of their own, run as a module, as `llama_cpp` is.

A job comes as JSON on the standard input: `{"file", "vision", "pixels", "features", "threads"}`. It writes what the
tower in the file `vision` gives to the text model in `file` for an image, uint8 [height, width, 3] in a file of numpy,
to another one: fp32 [tokens, inputs of the text model]. `mtmd` is llama.cpp's name for this part of its library.
"""

import ctypes
import json
import sys
from typing import Any

import numpy as np

from autoglm_compress.export.llama_cpp import BOOL, INT, POINTER, SPARE, LlamaCpp

TEXT, SIZE = ctypes.c_char_p, ctypes.c_size_t
MARKER = b"<__media__>"
IMAGE = 1
"""The type of a chunk of the input that is an image."""


class VisionParameters(ctypes.Structure):
    """`mtmd_context_params`, as far as it is used."""

    _fields_ = (
        ("use_gpu", BOOL),
        ("device", POINTER),
        ("print_timings", BOOL),
        ("n_threads", INT),
        ("image_marker", POINTER),
        ("media_marker", POINTER),
        ("flash_attn_type", INT),
        ("warmup", BOOL),
        ("image_min_tokens", INT),
        ("image_max_tokens", INT),
        ("rest", ctypes.c_uint8 * SPARE),
    )


class InputText(ctypes.Structure):
    """`mtmd_input_text`."""

    _fields_ = (("text", TEXT), ("add_special", BOOL), ("parse_special", BOOL))


class LlamaCppVision(LlamaCpp):
    """The library with its vision towers.

    Raises:
        RuntimeError: it has another interface than this one.
    """

    def __init__(self) -> None:
        super().__init__()
        signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
            "mtmd_context_params_default": (VisionParameters, ()),
            "mtmd_init_from_file": (POINTER, (TEXT, POINTER, VisionParameters)),
            "mtmd_bitmap_init": (POINTER, (ctypes.c_uint32, ctypes.c_uint32, TEXT)),
            "mtmd_input_chunks_init": (POINTER, ()),
            "mtmd_input_chunks_size": (SIZE, (POINTER,)),
            "mtmd_input_chunks_get": (POINTER, (POINTER, SIZE)),
            "mtmd_input_chunk_get_type": (INT, (POINTER,)),
            "mtmd_input_chunk_get_n_tokens": (SIZE, (POINTER,)),
            "mtmd_tokenize": (
                INT,
                (POINTER, POINTER, ctypes.POINTER(InputText), ctypes.POINTER(POINTER), SIZE),
            ),
            "mtmd_encode_chunk": (INT, (POINTER, POINTER)),
            "mtmd_get_output_embd": (ctypes.POINTER(ctypes.c_float), (POINTER,)),
            "llama_model_n_embd_inp": (INT, (POINTER,)),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        found = self.library.mtmd_context_params_default()
        layout = (found.use_gpu, found.print_timings, found.n_threads, found.flash_attn_type, found.warmup)
        if layout != (True, True, 4, -1, True) or (found.image_min_tokens, found.image_max_tokens) != (-1, -1):
            raise RuntimeError("this version of xllamacpp has another interface than the one that is known here")

    def features(self, model: int, file: str, image: np.ndarray, threads: int) -> np.ndarray:
        """What a tower gives a text model for an image, fp32 [tokens, inputs of the text model].

        Raises:
            RuntimeError: llama.cpp does not take the file, or the image.
        """
        context = self.tower(model, file, threads)
        chunks = self.chunks(context, MARKER, image)
        numbers = range(self.library.mtmd_input_chunks_size(chunks))
        found = [self.library.mtmd_input_chunks_get(chunks, number) for number in numbers]
        [chunk] = [chunk for chunk in found if self.library.mtmd_input_chunk_get_type(chunk) == IMAGE]
        if self.library.mtmd_encode_chunk(context, chunk) != 0:
            raise RuntimeError("llama.cpp cannot compute with the file of the vision tower")
        size = self.library.mtmd_input_chunk_get_n_tokens(chunk), self.library.llama_model_n_embd_inp(model)
        return np.ctypeslib.as_array(self.library.mtmd_get_output_embd(context), size).copy()

    def tower(self, model: int, file: str, threads: int) -> int:
        """A vision tower beside a text model, by its address.

        Raises:
            RuntimeError: llama.cpp does not take the file.
        """
        parameters = self.library.mtmd_context_params_default()
        parameters.use_gpu, parameters.warmup, parameters.n_threads = False, False, threads
        parameters.flash_attn_type = 0  # which would round keys and values to 16 bits
        context: int = self.library.mtmd_init_from_file(file.encode(), model, parameters)
        if not context:
            raise RuntimeError("llama.cpp does not load the file of the vision tower")
        return context

    def chunks(self, context: int, text: bytes, image: np.ndarray) -> int:
        """A text in which MARKER stands for an image, in chunks of text and of image, by their address.

        Raises:
            RuntimeError: llama.cpp does not take the image.
        """
        height, width, _ = image.shape
        bitmaps = (POINTER * 1)(self.library.mtmd_bitmap_init(width, height, image.tobytes()))
        chunks: int = self.library.mtmd_input_chunks_init()
        given = InputText(text, False, True)
        if self.library.mtmd_tokenize(context, chunks, ctypes.byref(given), bitmaps, 1) != 0:
            raise RuntimeError("llama.cpp does not take an image")
        return chunks


def main() -> None:
    """Do one job."""
    job: dict[str, Any] = json.loads(sys.stdin.read())
    engine = LlamaCppVision()
    model = engine.load(job["file"], vocab_only=False)
    features = engine.features(model, job["vision"], np.load(job["pixels"]), job["threads"])
    np.save(job["features"], features)
    json.dump(list(features.shape), sys.stdout)


if __name__ == "__main__":
    main()
