"""Which sequences run in the next step. No clock, no randomness, no model: the plan follows from the state alone.

One step may be in flight while the next is planned. A sequence whose newest token is still being sampled goes on
decoding: its work names the row that the token will come from instead of the token itself.

Every running sequence decodes in every step. Half of a step's prefill budget goes to the oldest prompt, the rest to
those with the fewest tokens left: long prompts do not hold up short ones, prompts finish one after another rather than
all at the end, and a long one gets its turn when it becomes the oldest. Requests are admitted in order of arrival. When
blocks run short, the newest sequence is preempted and recomputed later, so the oldest always advances and all finish.
"""

from collections import deque
from dataclasses import dataclass, field

from starling.engine.cache import BlockCache
from starling.engine.sequence import FinishReason, Sequence

NO_TOKEN = -1  # instead of a token id, where a row of logits held no finite number


@dataclass(frozen=True)
class Limits:
    """Sizes of a step."""

    max_running: int  # sequences that run at once
    prefill_tokens: int  # prompt tokens per step, over all sequences
    speculative_rows: int  # drafts may bring a step to at most this many decoded tokens; 0: no drafts


@dataclass(slots=True, eq=False)
class Work:
    """Compute `count` tokens of one sequence from position `start`, then `drafts` after them."""

    sequence: Sequence
    start: int
    count: int
    drafts: list[int]
    samples: bool  # the sequence's last token is among them, so a new one is sampled
    source: int = -1  # the token is this one of the ids that the previous step samples; -1: it is known


@dataclass(slots=True, eq=False)
class Outcome:
    """What a step produced for one sequence."""

    sequence: Sequence
    tokens: list[int]
    finish: FinishReason | None


@dataclass
class Counters:
    """Totals since start."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    proposed: int = 0
    accepted: int = 0


@dataclass
class Scheduler:
    cache: BlockCache
    limits: Limits
    device_counts: bool = False  # penalties need not wait for tokens in flight (StepRunner.device_counts)
    waiting: deque[Sequence] = field(default_factory=deque)  # by arrival; the preempted come first
    running: list[Sequence] = field(default_factory=list)  # by arrival
    counters: Counters = field(default_factory=Counters)
    _in_flight: deque[list[Work]] = field(default_factory=deque)  # planned, but not yet completed or failed

    def fits(self, prompt_length: int, max_tokens: int) -> bool:
        """Whether a request could ever finish, alone on the device."""
        return self._need(prompt_length + max_tokens) <= self.cache.blocks

    def add(self, sequence: Sequence) -> None:
        assert self.fits(sequence.prompt_length, sequence.params.max_tokens)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Remove a sequence at any stage and release its blocks. False when it is not here (any more)."""
        if sequence.row >= 0:
            self.running.remove(sequence)
            self.cache.release(sequence)
            return True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return True
        return False

    def plan(self) -> list[Work] | None:
        """The next step: decodes first, then chunks of prompts. Empty when there is nothing to do.

        None when the step in flight must complete first. Every plan that holds work must be started, and then
        completed or failed, in order; at most one may be in flight when the next is asked for.
        """
        assert len(self._in_flight) <= 1
        if self._in_flight and self._must_wait_for(self._in_flight[0]):
            return None
        decodes = self._plan_decodes()
        if decodes is None:
            return None
        self._admit()
        prefills = self._plan_prefills({work.sequence.arrival for work in decodes})
        if prefills is None:
            return None
        # Making room for an older prompt may have preempted a sequence that was to decode.
        decodes = [work for work in decodes if work.sequence.row >= 0]
        self._add_drafts(decodes)
        plan = decodes + prefills
        sampled_row = 0
        for work in plan:
            sequence = work.sequence
            sequence.computed = work.start + work.count
            if sequence.cached is None:
                sequence.cached = work.start
                self.counters.cached_tokens += work.start
            if work.samples:
                sequence.unknown += 1
                sequence.sampled_row = sampled_row
                sampled_row += 1 + len(work.drafts)
        if plan:
            self._in_flight.append(plan)
        return plan

    def complete(self, plan: list[Work], sampled: list[list[int]]) -> list[Outcome]:
        """Apply a step's results. `sampled` holds, per work, one token for its last row and one after each draft.

        NO_TOKEN where nothing could be drawn: that sequence alone ends with "error".
        """
        outcomes = []
        prefilled = decoded = 0
        for work, candidates in zip(plan, sampled, strict=True):
            sequence = work.sequence
            if sequence.row < 0:  # removed since; not preempted, which waits until nothing is in flight
                continue
            settled = work.start + work.count
            prefilled += work.count
            if work.samples:
                accepted = self._verify(work, candidates) if work.drafts else 0
                tokens, finish = self._cut(sequence, candidates[: accepted + 1] if work.drafts else candidates)
                sequence.tokens += tokens
                sequence.unknown -= 1
                if work.drafts:
                    settled += min(accepted, len(tokens))
                    sequence.computed = settled
                prefilled -= 1
                decoded += len(tokens)
                outcomes.append(Outcome(sequence, tokens, finish))
            sequence.settled = settled
            if settled // self.cache.block_size != sequence.published:
                self.cache.advance(sequence)
        for outcome in outcomes:
            if outcome.finish is not None:
                self.remove(outcome.sequence)
            if outcome.finish == "error":
                self.cache.forget()
        self.counters.steps += 1
        self.counters.prefill_tokens += prefilled
        self.counters.decode_tokens += decoded
        self._retire(plan)
        return outcomes

    def fail(self, plan: list[Work]) -> list[Sequence]:
        """Remove the sequences of a step that failed, and return those that were still here.

        A step in flight that builds on this one continues for the other sequences: they use no block that the failed
        step wrote, and what it samples for the removed ones is dropped.
        """
        self._retire(plan)
        ended = [work.sequence for work in plan if self.remove(work.sequence)]
        self.cache.forget()
        return ended

    # -- inside --------------------------------------------------------------------------------------------------

    def _retire(self, plan: list[Work]) -> None:
        assert self._in_flight[0] is plan, "steps must complete in the order in which they were planned"
        self._in_flight.popleft()

    def _must_wait_for(self, plan: list[Work]) -> bool:
        """Whether some sequence cannot continue before `plan`, which is in flight, has sampled its token."""
        may_draft = len(plan) <= self.limits.speculative_rows
        for work in plan:
            sequence = work.sequence
            if not work.samples or sequence.row < 0 or sequence.pending == 0:
                continue
            if work.drafts or sequence.constraint is not None:
                return True
            if sequence.params.penalized and not self.device_counts:
                return True
            # A draft that continues the known tokens will often still match after one more, and is worth the wait.
            if may_draft and self._drafts(sequence, len(plan)):
                return True
        return False

    def _plan_decodes(self) -> list[Work] | None:
        plan: list[Work] = []
        for sequence in [sequence for sequence in self.running if sequence.pending == 1]:
            size = sequence.size
            while sequence.row >= 0 and not self.cache.grow(sequence, size):
                if self._in_flight:
                    return None  # it may free blocks, and what is preempted must have nothing in flight
                self._preempt(self.running[-1])
            if sequence.row >= 0:
                source = sequence.sampled_row if sequence.unknown else -1
                plan.append(Work(sequence, size - 1, 1, [], True, source))
        return plan

    def _add_drafts(self, decodes: list[Work]) -> None:
        """Add drafts where there is room. Required work has its blocks already, so no draft causes a preemption."""
        rows = len(decodes)
        for work in decodes:
            sequence = work.sequence
            if rows <= self.limits.speculative_rows and not sequence.unknown:
                drafts = self._drafts(sequence, rows)
                if drafts and self.cache.grow(sequence, sequence.size + len(drafts)):
                    work.drafts = drafts
                    rows += len(drafts)

    def _drafts(self, sequence: Sequence, rows: int) -> list[int]:
        if sequence.lookup is None or sequence.constraint is not None:
            return []
        # The last token of an answer is not worth drafting: the step that verifies the draft samples it anyway.
        room = sequence.max_size - sequence.size - 1
        return sequence.lookup.draft(sequence.tokens, min(room, self.limits.speculative_rows - rows))

    def _plan_prefills(self, decoding: set[int]) -> list[Work] | None:
        prompts = [s for s in self.running if s.arrival not in decoding and s.pending > 0]
        if not prompts:
            return []
        chunks = self._chunks(prompts)
        plan = []
        for sequence, count in zip(prompts, chunks, strict=True):
            if count == 0 or sequence.row < 0:
                continue  # it waits, or was preempted for an older one
            end = sequence.computed + count
            while not (room := self.cache.grow(sequence, end)) and (newest := self.running[-1]) is not sequence:
                if self._in_flight:
                    return None
                self._preempt(newest)
            if room:
                plan.append(Work(sequence, sequence.computed, count, [], samples=count == sequence.pending))
            elif len(self.running) == 1:
                assert self._in_flight, "a sequence that fits alone found no room alone"
                return None
            # Otherwise it waits for older ones to finish: only later arrivals are preempted.
        return plan

    def _chunks(self, prompts: list[Sequence]) -> list[int]:
        """How many tokens of each of `prompts`, by arrival, the step computes; 0 for those that wait.

        A sequence waits for a block that is being computed for another, and then shares it.
        """
        for sequence in prompts:
            if sequence.settled == sequence.computed:
                self.cache.catch_up(sequence)
        coming = {key for s in self.running for key in self.cache.keys_between(s, s.settled, s.computed)}
        counts = [0] * len(prompts)
        budget = self.limits.prefill_tokens

        def give(index: int, most: int) -> int:
            sequence = prompts[index]
            begin = sequence.computed + counts[index]
            if self.cache.next_key(sequence, begin) in coming:
                return 0
            count = min(sequence.pending - counts[index], most)
            coming.update(self.cache.keys_between(sequence, begin, begin + count))
            counts[index] += count
            return count

        budget -= give(0, -(-budget // 2))
        for index in sorted(range(len(prompts)), key=lambda index: prompts[index].pending - counts[index]):
            budget -= give(index, budget)
        return counts

    def _admit(self) -> None:
        if not self.waiting:
            return
        promised = sum(
            max(0, self._need(len(s.tokens) + 1) - self.cache.held(s)) for s in self.running if s.pending > 1
        )
        while self.waiting and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            need = self._need(len(sequence.tokens) + 1)
            missing = need + promised - self.cache.available
            if self.running and missing > 0 and missing > self.cache.shared(sequence):
                return
            self.waiting.popleft()
            self.cache.admit(sequence)
            promised += max(0, need - self.cache.held(sequence))
            self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        assert self.running[-1] is sequence
        self.running.pop()
        self.cache.release(sequence)
        self.waiting.appendleft(sequence)
        self.counters.preemptions += 1

    def _need(self, tokens: int) -> int:
        return self.cache.blocks_needed(tokens, self.limits.prefill_tokens)

    def _verify(self, work: Work, candidates: list[int]) -> int:
        """How many drafts are accepted: the leading ones that equal what the model chose in their place."""
        accepted = 0
        while accepted < len(work.drafts) and work.drafts[accepted] == candidates[accepted]:
            accepted += 1
        self.counters.proposed += len(work.drafts)
        self.counters.accepted += accepted
        if work.sequence.lookup is not None:
            work.sequence.lookup.learn(len(work.drafts), accepted, len(work.sequence.tokens) + accepted + 1)
        return accepted

    @staticmethod
    def _cut(sequence: Sequence, tokens: list[int]) -> tuple[list[int], FinishReason | None]:
        """The leading `tokens` that belong to the answer, and why it ends there, if it does."""
        params = sequence.params
        generated = len(sequence.tokens) - sequence.prompt_length
        for token in tokens:
            generated += 1
            if token == NO_TOKEN:
                return [], "error"
            if token in params.stop_ids:  # drawn before min_tokens only where a grammar leaves nothing else
                return tokens[: generated - sequence.generated], "stop"
            if generated >= params.max_tokens:
                return tokens[: generated - sequence.generated], "length"
        return tokens, None
