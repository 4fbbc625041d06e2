"""llama.cpp's own quantization: `requantize.py FROM.gguf TO.gguf IMPORTANCE.npz TYPE [TYPE_OF_ENDS]`.

An empty name is no importance matrix.
"""

import ctypes
import sys

import llama_cpp
import numpy as np


def main() -> None:
    source, target, importance, kind, *ends = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(kind)
    if ends:
        parameters.token_embedding_type = parameters.output_tensor_type = int(ends[0])
    if importance:
        squares = dict(np.load(importance))
        # The list ends with an entry without a name.
        entries = (llama_cpp.llama_model_imatrix_data * (len(squares) + 1))()
        for entry, (name, values) in zip(entries, squares.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = entries
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise SystemExit("llama.cpp did not quantize the file")


if __name__ == "__main__":
    main()
