"""Our integers as MNN's quantized linears have them, bit for bit.

A linear's bytes are a header, the integers, and fp32 numbers that MNN calls alpha. The header is a byte 2 (dimensions),
the outputs and inputs (uint16, or int32 for more than 65,535), the number of values an integer has (0 for 256) and
those values (int8). The integers follow row by row, with 2^(bits - 1) added; of two 4-bit integers the first is in the
high nibble. Alpha has a scale for each row and group, or a pair [-zero * scale, scale] where there are zero points.
(`MNNConverter.write_header` and `torch_utils.quant` of llmexport 0.0.5.)
"""

import numpy as np
import torch


def header(rows: int, columns: int, bits: int) -> tuple[bytes, bool]:
    """What stands before the integers of a linear, and whether its sizes are int32."""
    wide = max(rows, columns) > np.iinfo(np.uint16).max
    sizes = np.array([rows, columns], dtype=np.int32 if wide else np.uint16)
    count = 1 << bits
    values = np.arange(-count // 2, count // 2, dtype=np.int8)
    return b"\x02" + sizes.tobytes() + bytes([count % 256]) + values.tobytes(), wide


def packed_rows(integers: torch.Tensor, bits: int) -> np.ndarray:
    """Rows of int8 integers [out, in] as uint8 [out, in * bits / 8]."""
    stored = (integers.short() + (1 << (bits - 1))).to(torch.uint8)
    if bits == 8:
        return stored.numpy()
    return ((stored[:, 0::2] << 4) | stored[:, 1::2]).numpy()


def alpha(scales: torch.Tensor, zeros: torch.Tensor | None) -> np.ndarray:
    """The numbers of rows of scales [out, groups] and zero points [out, groups]: fp32 [out, groups (, 2)].

    A zero point times a scale of 16 bits is exact in fp32.
    """
    if zeros is None:
        return scales.float().numpy()
    return torch.stack([-zeros.float() * scales.float(), scales.float()], dim=-1).numpy()
