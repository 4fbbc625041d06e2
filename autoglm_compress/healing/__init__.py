"""Training a compressed model to predict what its source predicts."""
