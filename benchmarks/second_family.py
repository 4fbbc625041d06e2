"""Train a small Qwen3 for the benchmarks: 12 layers, on the reference model's data, tokenizer and optimizer.

    python benchmarks/second_family.py --output runs/qwen3-12x128 [--minutes 15] [--text-folder FOLDER]

All layers train from the start (the reference model is deepened on the way); the matrices that write to the residual
stream start small. `python reference_model/evaluate.py runs/qwen3-12x128` measures the result.
"""

import math
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "reference_model"))

from train import Phase, Trainer, arguments, prepare  # noqa: E402

LAYERS = 12
PHASES = (
    Phase(0.08, LAYERS, 256, {"docs": 0.40, "text": 0.15, "statements": 0.10, "quiz": 0.35}, 0.30, False),
    Phase(0.42, LAYERS, 64, {"docs": 0.12, "text": 0.05, "statements": 0.08, "quiz": 0.75}, 0.60, True),
    Phase(0.50, LAYERS, 256, {"docs": 0.45, "text": 0.15, "statements": 0.05, "quiz": 0.35}, 0.05, True),
    Phase(1.00, LAYERS, 256, {"docs": 0.45, "text": 0.35, "statements": 0.03, "quiz": 0.17}, 0.0, False),
)


class SecondFamily(Trainer):
    """Trains a Qwen3 through its own phases, with the reference model's tokenizer."""

    phases = PHASES

    def make_tokenizer(self, texts: list[str]) -> PreTrainedTokenizerFast:
        """Return the reference model's tokenizer."""
        return AutoTokenizer.from_pretrained(ROOT / "reference_model" / "checkpoint")

    def build(self, layers: int) -> Qwen3ForCausalLM:
        """Return a fresh Qwen3 whose attention and MLP outputs start small."""
        end = self.tokenizer.eos_token_id
        config = Qwen3Config(
            vocab_size=len(self.tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            attention_bias=False,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            pad_token_id=end,
            eos_token_id=end,
            bos_token_id=None,
            dtype="bfloat16",
        )
        model = prepare(Qwen3ForCausalLM, config)
        with torch.no_grad():
            for layer in model.model.layers:
                for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                    matrix.div_(math.sqrt(2 * layers))
        return model


def main() -> None:
    """Read the options and train."""
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, help="threads to compute and to compile with (default: all cores)")
    parser.set_defaults(minutes=15.0, quiz=ROOT / "calib_data" / "quiz", work=Path("runs/second_family"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        torch._inductor.config.compile_threads = options.threads
    SecondFamily(options).run()


if __name__ == "__main__":
    main()
