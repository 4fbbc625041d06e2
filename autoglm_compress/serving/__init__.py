"""`serve` and `verify`: an existing engine behind the API of OpenAI, and what a client finds there.

The modules that `serve` imports leave torch and transformers alone: its process stays small beside the engine's.
"""
