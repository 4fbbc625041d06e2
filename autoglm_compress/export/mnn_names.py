"""The files of an export to MNN, named as its `llm` engine looks for them."""

GRAPH, WEIGHTS = "llm.mnn", "llm.mnn.weight"
EMBEDDING = "embeddings_bf16.bin"
TOKENIZER = "tokenizer.mtok"
SETTINGS, MODEL_SETTINGS = "config.json", "llm_config.json"
FILES = (WEIGHTS, EMBEDDING, TOKENIZER, SETTINGS, MODEL_SETTINGS, GRAPH)
"""All that are written, the one that is given to the engine last."""
