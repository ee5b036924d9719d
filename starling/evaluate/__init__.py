"""Numbers on quality. Nothing that serves needs it.

command.py  the command line
text.py     perplexity, and the distance of a quantized checkpoint to its source
answers.py  answers to multi-turn questions, for MT-bench's judge
"""
