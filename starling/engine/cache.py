"""Who owns which KV block: allocation, sharing of equal prefixes by content, and the blocks a window leaves behind.

A block is idle (held by none), owned by one sequence, or shared by several. Only full blocks whose keys and values are
computed are published, and a published block is never written again, so sharing needs no copy.

Steps may be in flight while this bookkeeping changes; the device runs steps in the order in which they were started.
- A block released while a step in flight still reads or writes it may be reallocated at once: its next owner writes it
  in a later step, which runs after that one.
- A block is published when the step that filled it completes, not when that step starts: only then are all its tokens
  known, as its content key requires (the last may be one that the previous step sampled), and only then is it certain
  that the step did not fail. So every block that can be found is complete, and a failed step affects no other
  sequence. `Sequence.settled` counts the positions of completed steps; `computed` runs ahead of it.
- Blocks behind the window are released by `settled` too, so a block is published before it leaves its sequence.
"""

import hashlib
from array import array
from collections import OrderedDict

import numpy as np

from starling.engine.sequence import Sequence


class BlockCache:
    """Bookkeeping for `blocks` blocks of `block_size` positions, and the block tables of up to `rows` sequences.

    `window` is the sliding window in positions, or None; blocks that no later token can see are released.
    """

    def __init__(self, blocks: int, block_size: int, rows: int, max_positions: int, window: int | None = None) -> None:
        assert blocks > 0 and block_size > 0
        self.blocks = blocks
        self.block_size = block_size
        self.window = window
        self.tables = np.full((rows, -(-max_positions // block_size)), -1, dtype=np.int32)
        self._free_rows = list(range(rows))
        self._ref_counts = [0] * blocks  # sequences that hold each block
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # reused in this order
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated now, including those that only hold a reusable prefix."""
        return len(self._idle)

    def blocks_needed(self, tokens: int, chunk: int) -> int:
        """The most blocks that a sequence of `tokens` ever holds, computed in steps of at most `chunk`."""
        whole = -(-tokens // self.block_size)
        if self.window is None:
            return whole
        # The window and a chunk, wherever they begin, touch one block more than they fill; and a block that the window
        # has passed is released only when the next one is full.
        return min(whole, -(-(self.window + chunk) // self.block_size) + 2)

    def held(self, sequence: Sequence) -> int:
        return len(sequence.blocks) - self._passed(sequence.settled)

    def shared(self, sequence: Sequence) -> int:
        """How many of the blocks that `admit` would find for it are already held by others."""
        found = self._longest_cached(sequence)
        keys = sequence.keys[self._passed(found) : found // self.block_size]
        return sum(self._ref_counts[self._block_of_key[key]] > 0 for key in keys)

    def keys_between(self, sequence: Sequence, begin: int, end: int) -> list[bytes]:
        """Content keys of the blocks that end at positions in (begin, end]; their tokens must be known."""
        first, last = begin // self.block_size, end // self.block_size
        self._extend_keys(sequence, last)
        return sequence.keys[first:last]

    # -- a sequence's life ---------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence) -> None:
        """Give the sequence a table row and whatever prefix of it is cached."""
        assert sequence.row < 0 and not sequence.blocks and sequence.computed == 0
        sequence.row = self._free_rows.pop()
        found = self._longest_cached(sequence)
        full, passed = found // self.block_size, self._passed(found)
        for index in range(full):
            block = -1 if index < passed else self._block_of_key[sequence.keys[index]]
            if block >= 0:
                self._hold(block)
            sequence.blocks.append(block)
        self.tables[sequence.row, :full] = sequence.blocks
        sequence.computed = sequence.settled = found
        sequence.published = full

    def catch_up(self, sequence: Sequence) -> None:
        """Skip ahead over blocks that others have published since. None of its steps may be in flight."""
        assert sequence.settled == sequence.computed
        if len(sequence.blocks) * self.block_size != sequence.computed:
            return  # its own blocks have room for what comes next
        while (block := self._block_of_key.get(self.next_key(sequence, sequence.computed))) is not None:
            self._hold(block)
            self.tables[sequence.row, len(sequence.blocks)] = block
            sequence.blocks.append(block)
            sequence.computed = sequence.settled = sequence.computed + self.block_size
            sequence.published += 1
        self._release_passed(sequence)

    def next_key(self, sequence: Sequence, position: int) -> bytes:
        """Content key of the block that begins at `position`; empty if no shareable block begins there."""
        if position % self.block_size:
            return b""
        # At least one token must be computed: its logits are wanted.
        end = min(position + self.block_size, len(sequence.tokens) - 1)
        return b"".join(self.keys_between(sequence, position, end))

    def grow(self, sequence: Sequence, positions: int) -> bool:
        """Allocate blocks for `positions` positions in all. False, with nothing allocated, when too few are free."""
        have = len(sequence.blocks)
        if positions <= have * self.block_size:
            return True
        wanted = -(-positions // self.block_size) - have
        if wanted > len(self._idle):
            return False
        for index in range(have, have + wanted):
            block, _ = self._idle.popitem(last=False)
            key = self._key_of_block.pop(block, None)
            if key is not None:
                del self._block_of_key[key]
            self._ref_counts[block] = 1
            sequence.blocks.append(block)
            self.tables[sequence.row, index] = block
        return True

    def advance(self, sequence: Sequence) -> None:
        """After a completed step: publish the blocks that it filled and release those that the window has passed."""
        full = sequence.settled // self.block_size
        self._extend_keys(sequence, full)
        for index in range(sequence.published, full):
            key, block = sequence.keys[index], sequence.blocks[index]
            # If another sequence has published an equal block in the meantime, that one stays findable.
            if key not in self._block_of_key:
                self._block_of_key[key] = block
                self._key_of_block[block] = key
        sequence.published = full
        self._release_passed(sequence)

    def release(self, sequence: Sequence) -> None:
        """Release all its blocks. Published ones stay findable until they are reallocated."""
        assert sequence.row >= 0
        # Last block first: a prefix is worth more than what follows it.
        for block in reversed(sequence.blocks):
            if block >= 0:
                self._release(block)
        self.tables[sequence.row, : len(sequence.blocks)] = -1
        self._free_rows.append(sequence.row)
        sequence.row = -1
        sequence.blocks = []
        sequence.computed = sequence.settled = 0
        sequence.published = 0

    def forget(self) -> None:
        """Make every idle block unfindable, as after a step that may have left damaged blocks behind."""
        for block in self._idle:
            key = self._key_of_block.pop(block, None)
            if key is not None:
                del self._block_of_key[key]

    def check(self, sequences: list[Sequence]) -> None:
        """Assert every invariant; `sequences` are all those that hold blocks. For tests."""
        holders = [0] * self.blocks
        for sequence in sequences:
            assert sequence.settled <= len(sequence.tokens), "a completed step computed a token that is not known"
            assert sequence.settled <= sequence.computed <= sequence.size
            assert sequence.published == sequence.settled // self.block_size
            passed = sequence.blocks[: self._passed(sequence.published * self.block_size)]
            assert all(block < 0 for block in passed), "a block that the window has passed is still held"
            for index, block in enumerate(sequence.blocks):
                if block >= 0:
                    holders[block] += 1
                if index >= sequence.published:
                    assert block not in self._key_of_block, "a block that is or will be written is findable"
                    assert self._ref_counts[block] == 1, "a block that is or will be written is shared"
            assert self.tables[sequence.row, : len(sequence.blocks)].tolist() == sequence.blocks
            assert (self.tables[sequence.row, len(sequence.blocks) :] == -1).all()
        assert holders == self._ref_counts
        assert sorted(self._idle) == [block for block, held in enumerate(holders) if held == 0]
        assert {block: key for key, block in self._block_of_key.items()} == self._key_of_block
        assert len(self._free_rows) + len(sequences) == len(self.tables)

    # -- inside --------------------------------------------------------------------------------------------------

    def _passed(self, computed: int) -> int:
        """Leading blocks that no token at position `computed` or later can see."""
        return 0 if self.window is None else max(0, computed - self.window + 1) // self.block_size

    def _release_passed(self, sequence: Sequence) -> None:
        """Release the blocks that the window has passed."""
        for index in range(self._passed(sequence.settled) - 1, -1, -1):
            if sequence.blocks[index] < 0:
                break
            self._release(sequence.blocks[index])
            sequence.blocks[index] = -1
            self.tables[sequence.row, index] = -1

    def _longest_cached(self, sequence: Sequence) -> int:
        # At least one token must be computed: its logits are wanted.
        full = (len(sequence.tokens) - 1) // self.block_size
        self._extend_keys(sequence, full)
        best = run = 0
        for count, key in enumerate(sequence.keys[:full], start=1):
            if key in self._block_of_key:
                run += 1
                if run >= count - self._passed(count * self.block_size):
                    best = count
            elif self.window is None:
                break
            else:
                run = 0
        return best * self.block_size

    def _extend_keys(self, sequence: Sequence, count: int) -> None:
        """Content keys chain: equal keys mean equal tokens from the very start."""
        assert count * self.block_size <= len(sequence.tokens)
        for index in range(len(sequence.keys), count):
            start = index * self.block_size
            content = array("i", sequence.tokens[start : start + self.block_size]).tobytes()
            parent = sequence.keys[index - 1] if index else b""
            sequence.keys.append(hashlib.blake2b(parent + content, digest_size=16).digest())

    def _hold(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._idle[block]
        self._ref_counts[block] += 1

    def _release(self, block: int) -> None:
        assert self._ref_counts[block] > 0, f"block {block} is freed twice"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._idle[block] = None
            if block not in self._key_of_block:
                self._idle.move_to_end(block, last=False)
