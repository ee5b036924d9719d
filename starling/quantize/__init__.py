"""A full-precision Mistral or Llama checkpoint → AWQ files, by AutoAWQ's own algorithm. Not needed for serving.

command.py        the command line
calibration.py    text → the blocks of tokens that the search runs on
partial_folder.py the progress on disk, layer by layer, and the checkpoint it ends as
layerwise.py      AutoAWQ's search, one layer in memory at a time
"""
