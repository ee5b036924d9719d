"""A full-precision Mistral or Llama checkpoint → AWQ files, by AutoAWQ's own algorithm. Nothing that serves needs it.

command.py        the command line
calibration.py    texts → the blocks of tokens that the search looks at
partial_folder.py what is done so far, layer by layer, and the checkpoint that it becomes
layerwise.py      AutoAWQ's search, one layer in memory at a time
"""
