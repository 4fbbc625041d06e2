"""Which sizes a model is cut to for a target that says only how large the result may be."""
