"""The files of an export to MNN, named as its `llm` engine looks for them."""

GRAPH, WEIGHTS = "llm.mnn", "llm.mnn.weight"
EMBEDDINGS = "embeddings.bin"
"""Of a tied model, the embedding is its head, in the file of weights."""
TOKENIZER = "tokenizer.mtok"
SETTINGS, MODEL_SETTINGS = "config.json", "llm_config.json"
FILES = (WEIGHTS, EMBEDDINGS, TOKENIZER, SETTINGS, MODEL_SETTINGS, GRAPH)
"""All that there can be, the one that is given to the engine last."""
