"""llama.cpp on a text with an image, in a process of its own.

A job comes as JSON on the standard input: `{"file", "vision", "pixels", "text", "logits"}`. The logits after the text
go to a file, fp32 [vocab_size]. The answer is the chunks that llama.cpp makes of the text: the ids of each, or how many
tokens an image is.
"""

import ctypes
import json
import sys

import numpy as np

from autoglm_compress.export.llama_cpp import INT, POINTER
from autoglm_compress.export.llama_cpp_vision import IMAGE, LlamaCppVision

LENGTH = 1024


def main() -> None:
    job = json.loads(sys.stdin.read())
    engine = LlamaCppVision()
    library = engine.library
    tokens, evaluate = library.mtmd_input_chunk_get_tokens_text, library.mtmd_helper_eval_chunks
    tokens.restype, tokens.argtypes = ctypes.POINTER(INT), (POINTER, ctypes.POINTER(ctypes.c_size_t))
    evaluate.argtypes = (POINTER, POINTER, POINTER, INT, INT, INT, ctypes.c_bool, ctypes.POINTER(INT))
    model = engine.load(job["file"], vocab_only=False)
    tower, context = engine.tower(model, job["vision"], 1), engine.context(model, LENGTH, 1)
    chunks = engine.chunks(tower, job["text"].encode(), np.load(job["pixels"]))
    answer = []
    for number in range(library.mtmd_input_chunks_size(chunks)):
        chunk, count = library.mtmd_input_chunks_get(chunks, number), ctypes.c_size_t()
        if library.mtmd_input_chunk_get_type(chunk) == IMAGE:
            answer.append(library.mtmd_input_chunk_get_n_tokens(chunk))
        else:
            found = tokens(chunk, ctypes.byref(count))
            answer.append(found[: count.value])
    assert evaluate(tower, context, chunks, 0, 0, LENGTH, True, ctypes.byref(INT())) == 0
    logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, -1), (engine.vocabulary_size(model),))
    np.save(job["logits"], logits)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
