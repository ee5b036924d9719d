"""A step's inputs as the device gets them: nothing of an earlier step remains, whatever the sizes of the two."""

import numpy as np
import torch

from starling.engine.cache import BlockCache
from starling.engine.frame import Frame, Shape, Upload
from starling.engine.inputs import StepInputs
from starling.engine.scheduler import Work
from starling.engine.sequence import SamplingParams, Sequence


def test_what_a_step_leaves_unused_of_a_frame_is_padding() -> None:
    books = BlockCache(blocks=8, block_size=4, rows=2, max_positions=16)
    plan = []
    for arrival, prompt in enumerate(([10, 11, 12, 13, 14, 15], [20])):
        sequence = Sequence(arrival, prompt, SamplingParams(9, frozenset(), seed=0))
        books.admit(sequence)
        assert books.grow(sequence, len(prompt))
        plan.append(Work(sequence, len(prompt) - 1, 1, [], True))
    inputs = StepInputs.of(plan, books)
    shape = Shape(tokens=4, works=4, blocks=3, rows=5)
    upload = Upload(torch.device("cpu"), Frame(shape).size)
    frame = Frame(shape, upload)
    for turn in range(2):
        upload.host[turn].fill_(77)  # what an earlier step has left
        frame.write(turn, inputs)
        upload.send(turn, frame.size)
        found = {name: tensor.numpy() for name, tensor in frame.device.items()}
        assert found["token_ids"].tolist() == [15, 20, 0, 0]
        assert found["positions"].tolist() == [5, 0, 0, 0]
        assert found["slots"].tolist() == [*inputs.slots, -1, -1], "nothing is written for padding"
        assert found["query_starts"].tolist() == [0, 1, 2, 2, 2], "it has no queries"
        assert found["context_lens"].tolist() == [6, 1, 0, 0], "and attends to nothing"
        assert np.array_equal(found["block_tables"][:2, :2], inputs.block_tables)
        assert found["logit_rows"].tolist() == [0, 1, 0, 0, 0]
