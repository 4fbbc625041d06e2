"""Hidden states through a model, one decoder layer at a time, and what is measured on the way."""
