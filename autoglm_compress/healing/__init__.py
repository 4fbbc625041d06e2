"""Training a compressed model to predict what the model it came from predicts."""
