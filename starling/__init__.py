"""Starling-LM-7B-alpha, served: a prompt in, the model's text streamed out."""

__version__ = "0.1.0"
