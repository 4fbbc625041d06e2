"""Sending hidden states through a model, one decoder layer at a time, and measuring on the way."""
