"""Measures of quality. Not needed for serving.

command.py  the command line
text.py     perplexity, and the distance of a quantized checkpoint from its source
answers.py  answers to multi-turn questions, for MT-bench's judge
"""
