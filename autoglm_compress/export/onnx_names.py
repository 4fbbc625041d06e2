"""What the files of an export to ONNX Runtime are called."""

GRAPH = "model.onnx"
DATA = "model.onnx.data"
SETTINGS = "genai_config.json"
