"""llama.cpp in a process of its own, run as a module: what breaks it takes no other process along.

A job comes as JSON on the standard input. `{"file", "texts"}` answers the token ids of texts, as JSON on the standard
output. `{"file", "rows", "continuation", "logits", "threads"}` writes the logits of rows of token ids and of what the
model continues them with greedily, fp32 [rows, tokens + continuation, vocab_size], to a file of numpy, and answers
`{"continuations"}`. `xllamacpp` brings the library, whose functions are called as `llama.h` has them; the layout of its
structures is compared with the defaults in them before anything is done.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

INT, POINTER, BOOL = ctypes.c_int32, ctypes.c_void_p, ctypes.c_bool
SPARE = 512
"""Bytes for structures of which only the beginning is known: the library reads what it knows of them."""


class ModelParameters(ctypes.Structure):
    """`llama_model_params`, as far as it is used."""

    _fields_ = (
        ("pointers", POINTER * 2),
        ("n_gpu_layers", INT),
        ("modes", INT * 4),
        ("more_pointers", POINTER * 4),
        ("vocab_only", BOOL),
        ("check_tensors", BOOL),
        ("use_extra_bufts", BOOL),
        ("rest", ctypes.c_uint8 * SPARE),
    )


class ContextParameters(ctypes.Structure):
    """`llama_context_params`, as far as it is used."""

    _fields_ = (
        ("n_ctx", INT),
        ("n_batch", INT),
        ("n_ubatch", INT),
        ("n_seq_max", INT),
        ("rest", ctypes.c_uint8 * SPARE),
    )


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", INT),
        ("token", ctypes.POINTER(INT)),
        ("embd", POINTER),
        ("pos", ctypes.POINTER(INT)),
        ("n_seq_id", ctypes.POINTER(INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class LlamaCpp:
    """The library that the package `xllamacpp` brings.

    Raises:
        RuntimeError: it has another interface than this one.
    """

    def __init__(self) -> None:
        import xllamacpp

        self.library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp.*"))))
        signatures = {
            "llama_backend_init": (None, ()),
            "llama_model_default_params": (ModelParameters, ()),
            "llama_context_default_params": (ContextParameters, ()),
            "llama_model_load_from_file": (POINTER, (ctypes.c_char_p, ModelParameters)),
            "llama_model_get_vocab": (POINTER, (POINTER,)),
            "llama_vocab_n_tokens": (INT, (POINTER,)),
            "llama_init_from_model": (POINTER, (POINTER, ContextParameters)),
            "llama_n_ctx": (ctypes.c_uint32, (POINTER,)),
            "llama_set_n_threads": (None, (POINTER, INT, INT)),
            "llama_get_memory": (POINTER, (POINTER,)),
            "llama_memory_clear": (None, (POINTER, BOOL)),
            "llama_batch_init": (Batch, (INT, INT, INT)),
            "llama_batch_free": (None, (Batch,)),
            "llama_decode": (INT, (POINTER, Batch)),
            "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (POINTER, INT)),
            "llama_tokenize": (INT, (POINTER, ctypes.c_char_p, INT, ctypes.POINTER(INT), INT, BOOL, BOOL)),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        self.library.llama_backend_init()
        self._require_known_layout()

    def _require_known_layout(self) -> None:
        model, context = self.library.llama_model_default_params(), self.library.llama_context_default_params()
        found = (model.n_gpu_layers, model.vocab_only, model.check_tensors, model.use_extra_bufts)
        sizes = (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max)
        if found != (-1, False, False, True) or sizes != (512, 2048, 512, 1):
            raise RuntimeError("this version of xllamacpp has another interface than the one that is known here")

    def load(self, file: str, *, vocab_only: bool) -> int:
        """A model, by its address.

        Raises:
            RuntimeError: llama.cpp does not take the file.
        """
        parameters = self.library.llama_model_default_params()
        parameters.vocab_only = vocab_only
        # Weights in another order are faster, and a second time in memory.
        parameters.use_extra_bufts = False
        model = self.library.llama_model_load_from_file(file.encode(), parameters)
        if not model:
            raise RuntimeError("llama.cpp does not load the file")
        return model

    def token_ids(self, model: int, text: str) -> list[int]:
        """The ids of a text, in which special tokens are found, without any around it."""
        vocabulary, data = self.library.llama_model_get_vocab(model), text.encode()
        room = (INT * (len(data) + 8))()
        count = self.library.llama_tokenize(vocabulary, data, len(data), room, len(room), False, True)
        return list(room[:count])

    def logits(self, model: int, rows: np.ndarray, continuation: int, threads: int, out: np.ndarray) -> list[list[int]]:
        """Fill `out` [rows, tokens + continuation, vocab_size]; returns what each row was continued with."""
        length = rows.shape[1]
        context = self.context(model, length + continuation, threads)
        batch = self.library.llama_batch_init(length, 0, 1)
        continued = []
        for row, found in zip(rows, out, strict=True):
            self.library.llama_memory_clear(self.library.llama_get_memory(context), True)
            self._decode(context, batch, row.tolist(), 0, found[:length])
            made: list[int] = []
            for place in range(length, length + continuation):
                made.append(int(found[place - 1].argmax()))
                self._decode(context, batch, made[-1:], place, found[place : place + 1])
            continued.append(made)
        self.library.llama_batch_free(batch)
        return continued

    def vocabulary_size(self, model: int) -> int:
        """How many logits there are."""
        return self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(model))

    def context(self, model: int, length: int, threads: int) -> int:
        """Room for so many tokens, by its address."""
        parameters = self.library.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
        context = self.library.llama_init_from_model(model, parameters)
        if not context or self.library.llama_n_ctx(context) < length:
            raise RuntimeError(f"llama.cpp makes no context of {length} tokens")
        self.library.llama_set_n_threads(context, threads, threads)
        return context

    def _decode(self, context: int, batch: Batch, tokens: list[int], start: int, out: np.ndarray) -> None:
        """Send tokens through the model after `start` others; their logits go to `out` [tokens, vocab_size]."""
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if self.library.llama_decode(context, batch) != 0:
            raise RuntimeError("llama.cpp cannot compute with the file")
        for place in range(len(tokens)):
            out[place] = np.ctypeslib.as_array(self.library.llama_get_logits_ith(context, place), (out.shape[1],))


def main() -> None:
    """Do one job."""
    job: dict[str, Any] = json.loads(sys.stdin.read())
    engine = LlamaCpp()
    if "texts" in job:
        model = engine.load(job["file"], vocab_only=True)
        answer: Any = [engine.token_ids(model, text) for text in job["texts"]]
    else:
        model, rows = engine.load(job["file"], vocab_only=False), np.array(job["rows"], dtype=np.int32)
        size = (len(rows), rows.shape[1] + job["continuation"], engine.vocabulary_size(model))
        logits = np.lib.format.open_memmap(job["logits"], mode="w+", dtype=np.float32, shape=size)
        answer = {"continuations": engine.logits(model, rows, job["continuation"], job["threads"], logits)}
        logits.flush()
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
