"""The scheduler without a model: random lives of many requests, every invariant checked after every step."""

import random
from collections import Counter
from dataclasses import asdict

import pytest

from starling.engine.cache import BlockCache
from starling.engine.scheduler import Counters, Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.engine.speculation import PromptLookup
from tests.engine.fake_model import SEEN, VOCABULARY, FakeRunner, Loop, Rhythm, Turn, expected_answer

MAX_POSITIONS = 65  # a multiple of no block size but 1
LIVES = 300


def make(
    arrival: int,
    prompt: list[int],
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    lookup: bool = False,
    constraint: Rhythm | None = None,
    **settings: float,
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_ids=stop_ids, seed=0, **settings)  # type: ignore[arg-type]
    return Sequence(arrival, prompt, params, constraint, PromptLookup() if lookup else None)


def scheduler(blocks: int = 64, block_size: int = 4, window: int | None = None, **limits: int) -> Scheduler:
    chosen = Limits(**{"max_running": 4, "prefill_tokens": 16, "speculative_rows": 8, **limits})
    return Scheduler(BlockCache(blocks, block_size, chosen.max_running, MAX_POSITIONS, window), chosen)


def loop(overlaps: bool = False, device_counts: bool = False, **shape: int) -> Loop:
    target = scheduler(**shape)
    target.device_counts = device_counts
    return Loop(target, FakeRunner(target.cache, overlaps, device_counts))


def step(target: Loop) -> tuple[list[Work], dict[int, list[int]]]:
    """One step, not overlapped: the plan, and tokens by arrival."""
    turn = target.step()
    assert turn.plan is not None
    return turn.plan, {o.sequence.arrival: o.tokens for o in turn.outcomes}


class Foresight(PromptLookup):
    """Drafts what will come, in varying lengths, and now and then with a wrong last token."""

    def __init__(self, whole: list[int]) -> None:
        super().__init__()
        self._whole = whole  # prompt and answer
        self.learned: list[tuple[int, int, int]] = []

    def draft(self, tokens: list[int], limit: int) -> list[int]:
        size = len(tokens)
        draft = self._whole[size : size + max(0, min(limit, size % 5))]
        return [*draft[:-1], (draft[-1] + 1) % VOCABULARY] if draft and size % 3 == 0 else draft

    def learn(self, proposed: int, accepted: int, size: int) -> None:
        self.learned.append((proposed, accepted, size))


class Life:
    """Requests arrive, run, are cancelled, finish; sometimes a step fails. A step may be in flight throughout."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.plain = dice.random() < 0.5  # no request has to wait for its token, so that steps overlap for long
        block_size = dice.choice([1, 3, 4, 16])
        self.loop = loop(
            overlaps=dice.random() < 0.7,
            device_counts=dice.random() < 0.5,
            blocks=dice.randint(40, 160) // block_size,  # enough for a request or a few
            block_size=block_size,
            window=dice.choice([None, None, 5, 16]),
            max_running=dice.randint(1, 5),
            prefill_tokens=dice.randint(1, 24),
            speculative_rows=dice.choice([0, 2, 4, 16]),
        )
        self.target = self.loop.scheduler
        chance = dice.choice([0, 0, 0.01, 0.05])
        assert isinstance(self.loop.runner, FakeRunner)
        self.loop.runner.draws_nothing = lambda: dice.random() < chance
        self.live: dict[int, Sequence] = {}
        self.answers: dict[int, list[int]] = {}
        self.prompts: list[list[int]] = []
        self.waited: Sequence | None = None
        self.finished = 0

    def run(self, events: int) -> None:
        kinds = {self.submit: 4, self.cancel: 1, self.fail: self.dice.choice([0, 0, 1]), self.step: 12}
        for event in self.dice.choices(list(kinds), list(kinds.values()), k=events):
            event()
            self.check_invariants()
        for _ in range(5000):
            if self.loop.idle:
                break
            self.step()
            self.check_invariants()
        assert not self.live
        assert self.target.cache.available == self.target.cache.blocks

    def submit(self) -> None:
        dice = self.dice
        max_tokens = dice.randint(1, 20)
        prompt = [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 30))]
        if dice.random() < 0.3:  # a text that repeats, so that drafts are right
            prompt += expected_answer(prompt, 20, frozenset()) + prompt[-SEEN:]
        if self.prompts and dice.random() < 0.5:  # begins like an earlier one, answer included: the next turn
            prompt = dice.choice(self.prompts)[: dice.randint(1, 40)] + prompt
        elif self.live and dice.random() < 0.5:  # or like one that is being computed
            prompt = dice.choice(list(self.live.values())).tokens[: dice.randint(1, 40)] + prompt
        prompt = prompt[: MAX_POSITIONS - max_tokens]
        if dice.random() < 0.1:
            max_tokens = MAX_POSITIONS - len(prompt)
        if not self.target.fits(len(prompt), max_tokens):
            return
        penalized = dice.random() < 0.3 and (self.target.device_counts or not self.plain)
        sequence = make(
            len(self.answers),
            prompt,
            max_tokens,
            frozenset({0}) if dice.random() < 0.5 else frozenset(),
            lookup=True,
            constraint=Rhythm() if dice.random() < 0.3 and not self.plain else None,
            repetition_penalty=1.5 if penalized else 1.0,
            min_tokens=min(max_tokens, dice.choice([0, 0, 3, 20])),
        )
        if dice.random() < 0.3:
            sequence.lookup = Foresight(prompt + self._expected(sequence))
        self.target.add(sequence)
        self.live[sequence.arrival] = sequence
        self.answers[sequence.arrival] = []

    def cancel(self) -> None:
        if not self.live:
            return
        sequence = self.live.pop(self.dice.choice(sorted(self.live)))
        assert self.target.remove(sequence)
        assert not self.target.remove(sequence)
        assert sequence.blocks == []

    def fail(self) -> None:
        self._record(self.loop.step(breaks=self.dice.choice(["start", "result"])))

    def step(self) -> None:
        running = list(self.target.running)
        in_flight = self.loop.in_flight is not None
        decoding = {s.arrival for s in running if s.pending == 1}
        ending = {s.arrival for s in running if s.pending == 0}
        oldest = self.live[min(self.live)] if self.live else None
        computed = oldest.computed if oldest is not None else 0
        preemptions = self.target.counters.preemptions
        turn = self.loop.step()
        assert turn.plan or in_flight or not self.live, "with work to do, a step does some"
        assert turn.plan is not None or in_flight
        assert in_flight or not ending
        if turn.plan is not None:
            planned = {w.sequence.arrival for w in turn.plan}
            preempted = {s.arrival for s in self.target.waiting}
            if oldest is not None:
                moved = oldest.arrival in planned | ending or oldest.computed > computed
                # Or it waits for blocks that a step in flight computes for another, and gets them after that step.
                assert moved or (in_flight and self.waited is not oldest), "the oldest always advances"
                self.waited = None if moved else oldest
            chunks = sum(w.count for w in turn.plan if w.count > 1 or not w.samples)
            assert chunks <= self.target.limits.prefill_tokens
            assert decoding <= planned | preempted
            assert not planned & ending, "nothing is computed for a token that max_tokens rules out"
            for work in turn.plan:
                assert work.start + work.count + len(work.drafts) < work.sequence.max_size, "nor drafted"
                assert work.source < 0 or not work.drafts, "a draft continues tokens that are known"
            drafts = sum(len(work.drafts) for work in turn.plan)
            rows = sum(work.samples and work.sequence.arrival in decoding for work in turn.plan) + drafts
            # A sequence that is preempted for an older one, and admitted again in the same step, does not decode in it.
            admitted_again = self.target.counters.preemptions - preemptions
            assert not drafts or rows - admitted_again <= self.target.limits.speculative_rows
        self._record(turn)

    def _record(self, turn: Turn) -> None:
        for sequence in turn.failed:
            del self.live[sequence.arrival]
        for outcome in turn.outcomes:
            self.answers[outcome.sequence.arrival] += outcome.tokens
            if outcome.finish == "error":
                assert not self.live.pop(outcome.sequence.arrival).blocks
            elif outcome.finish is not None:
                self._check_answer(self.live.pop(outcome.sequence.arrival))

    def _check_answer(self, sequence: Sequence) -> None:
        assert self.answers[sequence.arrival] == self._expected(sequence)
        self.prompts.append(sequence.tokens)
        self.finished += 1

    @staticmethod
    def _expected(sequence: Sequence) -> list[int]:
        prompt, params = sequence.tokens[: sequence.prompt_length], sequence.params
        grammar = Rhythm() if sequence.constraint is not None else None
        return expected_answer(prompt, params.max_tokens, params.stop_ids, grammar, params.min_tokens, params.penalized)

    def check_invariants(self) -> None:
        self.target.cache.check(self.target.running)
        arrivals = [s.arrival for s in [*self.target.running, *self.target.waiting]]
        assert arrivals == sorted(self.live), "in order of arrival, none lost, none twice"
        assert all(s.unknown == 0 for s in self.target.waiting)
        assert all(s.unknown == 0 or self.loop.in_flight for s in self.target.running)


def test_random_lives() -> None:
    counters: dict[str, int] = Counter()
    for _ in range(LIVES):
        seed = random.SystemRandom().randrange(2**32)
        life = Life(random.Random(seed))
        try:
            life.run(events=60)
        except BaseException:
            print(f"seed {seed}")
            raise
        counters.update(asdict(life.target.counters), finished=life.finished)
    # A life in which nothing much happens finds nothing.
    for name, each in {"finished": 4, "cached_tokens": 8, "preemptions": 0.1, "accepted": 3}.items():
        assert counters[name] > each * LIVES, counters


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_plan_follows_from_the_state_alone(overlaps: bool) -> None:
    def history() -> list[list[tuple[int, ...]]]:
        target = loop(overlaps, blocks=20)
        for arrival in range(6):
            target.scheduler.add(make(arrival, [arrival % 3] * (5 + 3 * arrival), 8, lookup=True))
        shapes = []
        while not target.idle:
            plan = target.step().plan or []
            shapes.append([(w.sequence.arrival, w.start, w.count, len(w.drafts), w.source) for w in plan])
        return shapes

    assert history() == history()


def gaps(target: Loop) -> list[bool]:
    """Per step until all is done: was it planned only after the previous step was complete?"""
    found = []
    while not target.idle:
        waited = target.in_flight is None
        if target.step().plan:
            found.append(waited)
    return found


def test_the_device_never_waits_for_plain_streams() -> None:
    target = loop(overlaps=True, speculative_rows=0)
    for arrival in range(4):
        target.scheduler.add(
            make(arrival, [arrival + 1] * (1 + 9 * arrival), 10 + arrival, frozenset({0}), min_tokens=5)
        )
    waited = gaps(target)
    assert len(waited) > 12
    assert waited == [True] + [False] * (len(waited) - 1)


def test_a_grammar_waits_for_every_token_of_its_own() -> None:
    target = loop(overlaps=True)
    target.scheduler.add(make(0, [1] * 40, 6, constraint=Rhythm()))
    assert gaps(target) == [True, False, False] + [True] * 5, "three chunks of the prompt, then five tokens"


@pytest.mark.parametrize("cancelled", [False, True])
def test_no_step_waits_for_a_token_that_nothing_follows(cancelled: bool) -> None:
    target = loop(overlaps=True, speculative_rows=0)
    ruled = make(0, [1, 2], 2, constraint=Rhythm())
    target.scheduler.add(ruled)
    target.scheduler.add(make(1, [3, 4], 8))
    target.step()
    if cancelled:
        assert target.scheduler.remove(ruled)
    assert gaps(target) == [not cancelled] + [False] * 6


@pytest.mark.parametrize("device_counts", [False, True])
def test_penalties_wait_unless_the_device_counts(device_counts: bool) -> None:
    target = loop(overlaps=True, device_counts=device_counts)
    target.scheduler.add(make(0, [1, 2], 6, frequency_penalty=0.5))
    sources = []
    while not target.idle:
        sources += [work.source for work in target.step().plan or []]
    assert sources == ([-1] + [0] * 5 if device_counts else [-1] * 6)


def test_a_step_is_waited_for_when_a_draft_is_ready() -> None:
    start = [1, 2, 3, 4, 5]  # as many as the next token depends on, so the answer repeats
    prompt = [*start, *expected_answer(start, 12, frozenset()), *start]
    counters = []
    for overlaps in (False, True):
        target = loop(overlaps)
        target.scheduler.add(make(0, prompt, 16, lookup=True))
        while not target.idle:
            target.step()
        counters.append(target.scheduler.counters)
    assert counters[0].accepted == counters[1].accepted > 6


def test_no_step_is_waited_for_when_a_draft_has_no_room() -> None:
    target = loop(overlaps=True, speculative_rows=2, prefill_tokens=64)
    for arrival, start in enumerate(([1, 2, 3, 4, 5], [5, 4, 3, 2, 1])):
        prompt = [*start, *expected_answer(start, 12, frozenset()), *start]
        target.scheduler.add(make(arrival, prompt, 16, lookup=True))
    waited = gaps(target)
    assert waited == [True] + [False] * (len(waited) - 1)
    assert target.scheduler.counters.proposed == 0


def test_a_draft_leaves_out_no_more_than_the_last_token() -> None:
    class Eager(PromptLookup):
        def draft(self, tokens: list[int], limit: int) -> list[int]:
            return [1] * limit

    target = loop()
    sequence = make(0, [1, 2], 6)
    sequence.lookup = Eager()
    target.scheduler.add(sequence)
    step(target)
    assert [len(work.drafts) for work in step(target)[0]] == [4], "the first token is there, the last is sampled anyway"


def test_every_draft_is_verified_and_every_token_counted() -> None:
    target = loop(speculative_rows=16)
    expected: dict[int, list[tuple[int, int, int]]] = {0: [], 1: [], 2: []}
    lookups = []
    for arrival in expected:
        prompt = [arrival + 1] * 30
        sequence = make(arrival, prompt, 12)
        sequence.lookup = Foresight(prompt + expected_answer(prompt, 12, frozenset()))
        lookups.append(sequence.lookup)
        target.scheduler.add(sequence)
    steps = 0
    while not target.idle:
        turn = target.step()
        steps += 1
        drafts = {work.sequence.arrival: len(work.drafts) for work in turn.plan or []}
        for outcome in turn.outcomes:
            arrival, right = outcome.sequence.arrival, len(outcome.tokens) - 1
            if drafts[arrival]:
                expected[arrival].append((drafts[arrival], right, len(outcome.sequence.tokens)))
    assert [lookup.learned for lookup in lookups] == list(expected.values())
    drafts_seen = [each for learned in expected.values() for each in learned]
    proposed, accepted = (sum(each[i] for each in drafts_seen) for i in range(2))
    assert proposed > accepted > 0
    assert target.scheduler.counters == Counters(
        steps=steps, prefill_tokens=3 * 29, decode_tokens=3 * 12, proposed=proposed, accepted=accepted
    )


def test_a_stop_id_as_the_last_allowed_token_is_a_stop() -> None:
    prompt = next(p for p in ([a, b] for a in range(7) for b in range(7)) if len(stopped(p)) == 3)
    for max_tokens, finish in ((2, "length"), (3, "stop")):
        target = loop()
        target.scheduler.add(make(0, prompt, max_tokens, frozenset({0})))
        while not target.idle:
            turn = target.step()
        assert [outcome.finish for outcome in turn.outcomes] == [finish]


def test_a_preemption_waits_for_the_step_in_flight() -> None:
    target = loop(overlaps=True, blocks=12, block_size=4, speculative_rows=0)
    sequences = [make(arrival, [arrival + 1] * 6, 24) for arrival in range(4)]
    for sequence in sequences:
        target.scheduler.add(sequence)
    while not target.idle:
        in_flight, preemptions = target.in_flight, target.scheduler.counters.preemptions
        target.step()
        target.scheduler.cache.check(target.scheduler.running)
        assert in_flight is None or target.scheduler.counters.preemptions == preemptions
        assert all(sequence.unknown == 0 for sequence in target.scheduler.waiting)
    assert target.scheduler.counters.preemptions > 0
    assert target.scheduler.counters.cached_tokens == 0, "what a preempted one finds again does not count"
    for arrival, sequence in enumerate(sequences):
        assert sequence.cached == 0
        assert sequence.tokens[6:] == expected_answer([arrival + 1] * 6, 24, frozenset())


def test_a_draft_in_flight_is_waited_for_when_there_is_no_room_for_another() -> None:
    """One sequence and its draft fill two rows; with a prompt's chunk in the step, another draft has no row left."""
    start = [1, 2, 3, 4, 5]
    prompt = [*start, *expected_answer(start, 12, frozenset()), *start]
    target = loop(overlaps=True, speculative_rows=2, prefill_tokens=40)
    drafting = make(0, prompt, 16, lookup=True)
    target.scheduler.add(drafting)
    others = 0
    while not target.idle:
        if len(target.scheduler.running) == 1 and drafting.generated and others < 4:
            others += 1
            target.scheduler.add(make(others, [6] * 60, 1))  # two chunks
        target.step()
        target.scheduler.cache.check(target.scheduler.running)
    assert others and target.scheduler.counters.accepted > 0
    assert drafting.tokens == prompt + expected_answer(prompt, 16, frozenset())


def test_cancelling_a_draft_in_flight_leaves_the_others_their_own_tokens() -> None:
    start = [1, 2, 3, 4, 5]
    prompt = [*start, *expected_answer(start, 12, frozenset()), *start]
    target = loop(overlaps=True)
    drafting, plain = make(0, prompt, 16, lookup=True), make(1, [6, 2], 16)
    for sequence in (drafting, plain):
        target.scheduler.add(sequence)
    while not any(work.drafts for work in target.step().plan or []):
        pass
    assert target.scheduler.remove(drafting)
    while not target.idle:
        target.step()
    assert plain.tokens[2:] == expected_answer([6, 2], 16, frozenset())


def test_a_preemption_for_a_prompt_waits_too() -> None:
    """The older one's chunks outgrow what is free while the newer one's token is in flight."""
    target = loop(overlaps=True, blocks=16, block_size=4, speculative_rows=0, prefill_tokens=4)
    older, newer = make(0, [1] * 50, 4), make(1, [2] * 3, 40)
    target.scheduler.add(older)
    target.step()
    target.scheduler.running.append(newer)  # admitted before its turn, as when an older one has grown since
    target.scheduler.cache.admit(newer)
    while not target.idle:
        target.step()
        target.scheduler.cache.check(target.scheduler.running)
        assert all(sequence.unknown == 0 for sequence in target.scheduler.waiting)
    assert target.scheduler.counters.preemptions > 0
    assert older.tokens[50:] == expected_answer([1] * 50, 4, frozenset())
    assert newer.tokens[3:] == expected_answer([2] * 3, 40, frozenset())


def test_no_sequence_is_preempted_for_a_draft() -> None:
    """The last free block goes to the newer sequence, for its next token, and not to the older one's drafts."""

    def preemptions(speculative_rows: int) -> list[int]:
        target = loop(blocks=5, block_size=16, prefill_tokens=256, speculative_rows=speculative_rows)
        prompt = [1, 2, 3] * 9
        older, newer = make(0, prompt, 20), make(1, [4] * 31, 20)
        older.lookup = Foresight(prompt + expected_answer(prompt, 20, frozenset()))
        target.scheduler.add(older)
        target.scheduler.add(newer)
        found, drafts = [], 0
        while newer.size < 34:
            plan, _ = step(target)
            drafts += sum(len(work.drafts) for work in plan)
            found.append(target.scheduler.counters.preemptions)
        assert bool(drafts) == bool(speculative_rows)
        return found

    assert preemptions(8) == preemptions(0) == [0, 0, 0]


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_sequence_that_nothing_can_be_drawn_for_ends_alone_and_its_blocks_are_not_reused(overlaps: bool) -> None:
    target = loop(overlaps, prefill_tokens=64)
    assert isinstance(target.runner, FakeRunner)
    broken, other = make(0, [3] * 30, 8), make(1, [4] * 30, 8)
    rows = iter([True])  # the first to be drawn
    target.runner.draws_nothing = lambda: next(rows, False)
    for sequence in (broken, other):
        target.scheduler.add(sequence)
    finished = {}
    while not target.idle:
        finished |= {o.sequence.arrival: o.finish for o in target.step().outcomes if o.finish}
        target.scheduler.cache.check(target.scheduler.running)
    assert finished == {0: "error", 1: "length"}
    assert broken.tokens == [3] * 30
    assert other.tokens == [4] * 30 + expected_answer([4] * 30, 8, frozenset())
    again = make(2, [3] * 30, 4)
    target.scheduler.add(again)
    target.step()
    assert again.cached == 0


def test_no_idle_block_is_reused_once_a_step_has_failed() -> None:
    """What a chunk has written is only checked when a token is drawn at the prompt's end."""
    target = loop(prefill_tokens=8)
    target.scheduler.add(make(0, [3] * 30, 4))
    for _ in range(2):
        target.step()
    assert target.step(breaks="result").failed
    again = make(1, [3] * 30, 4)
    target.scheduler.add(again)
    target.step()
    assert again.cached == 0


def test_what_was_started_beyond_a_stop_id_is_dropped() -> None:
    prompt = next(p for p in ([a, b] for a in range(7) for b in range(7)) if len(stopped(p)) == 3)
    target = loop(overlaps=True)
    sequence = make(0, prompt, 20, frozenset({0}))
    target.scheduler.add(sequence)
    turns = [target.step() for _ in range(4)]
    assert [len(t.plan or []) for t in turns] == [1, 1, 1, 1], "the fourth is started before the third is known"
    assert turns[3].outcomes[0].finish == "stop"
    assert not target.idle
    assert target.scheduler.cache.available == target.scheduler.cache.blocks
    assert target.step().outcomes == []
    assert target.idle and sequence.tokens == prompt + stopped(prompt)


def stopped(prompt: list[int]) -> list[int]:
    return expected_answer(prompt, 20, frozenset({0}))


def test_a_long_prompt_delays_a_running_stream_by_no_more_than_its_chunk() -> None:
    target = loop(prefill_tokens=8, speculative_rows=0)
    target.scheduler.add(make(0, [1, 2], 20))
    step(target)
    target.scheduler.add(make(1, list(range(40)), 4))
    for _ in range(5):
        plan, tokens = step(target)
        assert [len(tokens[0])] == [1]
        assert sum(w.count for w in plan if w.sequence.arrival == 1) == 8


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    target = loop(prefill_tokens=8, speculative_rows=0)
    target.scheduler.add(make(0, list(range(60)), 2))
    target.scheduler.add(make(1, [1, 2, 3, 4], 2))
    _, tokens = step(target)
    assert 1 in tokens, "half of the step is left for it: the short one is answered in the first step"


def first_tokens(target: Loop) -> list[int]:
    """By arrival, the step that gives the first token."""
    found: dict[int, int] = {}
    number = 0
    while not target.idle:
        number += 1
        for outcome in target.step().outcomes:
            found.setdefault(outcome.sequence.arrival, number)
        target.scheduler.cache.check(target.scheduler.running)
    return [found[arrival] for arrival in sorted(found)]


def test_prompts_that_come_together_are_done_one_after_the_other() -> None:
    target = loop(prefill_tokens=8, speculative_rows=0)
    for arrival in range(4):
        target.scheduler.add(make(arrival, [arrival + 1] * 8, 6))
    assert first_tokens(target) == [1, 2, 3, 4], "and not all of them at the end"


def test_a_short_prompt_does_not_wait_for_many_long_ones() -> None:
    target = loop(prefill_tokens=8, speculative_rows=0)
    for arrival in range(3):
        target.scheduler.add(make(arrival, [arrival + 1] * 40, 2))
    target.scheduler.add(make(3, [4] * 8, 2))
    assert first_tokens(target)[3] == 2, "half of each step is the oldest's"


def test_short_prompts_that_keep_coming_leave_a_long_one_half_of_each_step() -> None:
    target = loop(prefill_tokens=8, speculative_rows=0)
    target.scheduler.add(make(0, [6] * 40, 1))
    steps = 0
    while target.scheduler.running or steps == 0:
        steps += 1
        target.scheduler.add(make(steps, [steps % 5, steps // 5] * 4, 1))
        if any(outcome.sequence.arrival == 0 for outcome in target.step().outcomes):
            break
    assert steps <= 10


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("window", [None, 16])
def test_what_is_being_computed_for_one_is_shared_by_all(window: int | None, overlaps: bool) -> None:
    """Prompts that come together and begin alike: the common part is computed once, though none of it was cached."""
    target = loop(overlaps, window=window, prefill_tokens=20, speculative_rows=0)
    sequences = [make(arrival, [1, 2, 3, 4, 5, 6, 0] * 5 + [arrival], 6) for arrival in range(4)]
    for sequence in sequences:
        target.scheduler.add(sequence)
    first_tokens(target)
    for sequence in sequences:
        prompt = sequence.tokens[:36]
        assert sequence.tokens[36:] == expected_answer(prompt, 6, frozenset())
    assert [sequence.cached for sequence in sequences] == [0, 32, 32, 32]
    assert target.scheduler.counters.prefill_tokens + 4 == 36 + 3 * 4  # the last token of each counts as a decode
    assert target.scheduler.counters.cached_tokens == 3 * 32


def test_no_sequence_waits_for_a_block_that_it_has_begun_itself() -> None:
    """Both begin with three tokens of a block of four; the older one completes it in the second step."""
    target = loop(prefill_tokens=6, block_size=4, speculative_rows=0)
    prompt = [1, 2, 3, 4, 5, 6, 0] * 3
    target.scheduler.add(make(0, prompt, 3))
    target.scheduler.add(make(1, prompt[:9], 3))
    assert first_tokens(target)[1] == 3


def test_blocks_of_others_are_shared_only_before_any_of_its_own() -> None:
    cache = BlockCache(8, 4, 2, MAX_POSITIONS)
    older, younger = sequences = [make(arrival, [1] * 12, 1) for arrival in range(2)]
    for sequence in sequences:
        cache.admit(sequence)
    assert cache.grow(older, 12) and cache.grow(younger, 4)
    older.computed = older.settled = 12
    cache.advance(older)
    cache.catch_up(younger)
    cache.check(sequences)
    assert younger.computed == 0, "the room that it has of its own comes first"


def test_room_that_is_shared_is_counted_once() -> None:
    target = loop(blocks=12, block_size=4, prefill_tokens=40, speculative_rows=0)
    target.scheduler.add(make(0, [1] * 33, 3))  # nine blocks, eight of them full
    target.step()
    for arrival in range(1, 4):
        target.scheduler.add(make(arrival, [1] * 33, 3))
    target.step()
    assert len(target.scheduler.running) == 4, "each needs one block more"
    first_tokens(target)
    assert target.scheduler.counters.preemptions == 0


def test_the_oldest_prompt_ends_if_that_takes_less_than_another_needs() -> None:
    target = loop(prefill_tokens=8, speculative_rows=0)
    target.scheduler.add(make(0, [1] * 10, 2))
    target.scheduler.add(make(1, [2] * 8, 2))
    # Its half leaves it 6, fewer than the 8 of the other.
    assert [(work.sequence.arrival, work.count) for work in step(target)[0]] == [(0, 8)]


def test_what_a_short_prompt_leaves_goes_to_the_oldest() -> None:
    target = loop(prefill_tokens=8, speculative_rows=0)
    target.scheduler.add(make(0, list(range(60)), 2))
    target.scheduler.add(make(1, [1], 2))
    assert [work.count for work in step(target)[0]] == [7, 1]


@pytest.mark.parametrize(
    ("length", "blocks", "window"),
    [
        (50, 20, None),  # 14 blocks each in the end
        (52, 27, None),  # 13 for the prompt, and one for what comes after it
        (52, 10, 8),  # 6 at most, however many the window has passed
    ],
)
def test_no_request_is_admitted_that_a_half_read_prompt_would_preempt(
    length: int, blocks: int, window: int | None
) -> None:
    target = loop(blocks=blocks, block_size=4, window=window, prefill_tokens=8, speculative_rows=0)
    first, second = (make(arrival, [arrival] * length, 4) for arrival in range(2))
    target.scheduler.add(first)
    target.scheduler.add(second)
    while first.pending > 1:
        step(target)
        assert target.scheduler.running == [first]
    first_tokens(target)
    assert target.scheduler.counters.preemptions == 0


def test_the_next_turn_computes_only_what_is_new() -> None:
    target = loop(speculative_rows=0)
    first = make(0, list(range(10)), 7)
    target.scheduler.add(first)
    while not target.idle:
        step(target)
    second = make(1, [*first.tokens, 5, 5, 5], 2)
    target.scheduler.add(second)
    plan, _ = step(target)
    # 16 of the first turn's 17 tokens were computed, in 4 blocks of 4.
    assert second.cached == 16
    assert [(w.start, w.count) for w in plan] == [(16, 4)]


def test_an_equal_prompt_still_computes_its_last_token() -> None:
    target = loop(speculative_rows=0)
    for arrival in (0, 1):
        target.scheduler.add(make(arrival, [3] * 8, 1))
        plan, tokens = step(target)
        assert len(tokens[arrival]) == 1
    assert plan[0].start == 4


def test_the_least_recently_used_prefix_goes_first() -> None:
    target = loop(blocks=8, speculative_rows=0)

    def serve(arrival: int, token: int) -> int:
        sequence = make(arrival, [token] * 9, 1)
        target.scheduler.add(sequence)
        while not target.idle:
            step(target)
        assert sequence.cached is not None
        return sequence.cached

    assert [serve(0, 1), serve(1, 2), serve(2, 1)] == [0, 0, 8]
    assert serve(3, 3) == 0  # takes free blocks
    serve(4, 4)  # needs blocks: 2's prefix is the oldest
    assert serve(5, 1) == 8
    assert serve(6, 2) < 8


def test_blocks_that_hold_nothing_to_share_go_first() -> None:
    target = loop(blocks=8, speculative_rows=0)
    found = []
    for arrival, (token, length) in enumerate([(1, 13), (2, 13), (3, 8), (1, 13)]):  # 4, 4, 2 and 4 blocks
        sequence = make(arrival, [token] * length, 1)
        target.scheduler.add(sequence)
        while not target.idle:
            step(target)
        found.append(sequence.cached)
    assert found == [0, 0, 0, 12], "the third took the two blocks that were only partly filled"


def test_the_end_of_a_prefix_goes_first() -> None:
    target = loop(blocks=8, speculative_rows=0)
    for arrival, prompt in enumerate(([1] * 25, [2] * 17)):  # 6 full blocks and one begun; then 5 in all
        target.scheduler.add(make(arrival, prompt, 1))
        while not target.idle:
            step(target)
    again = make(2, [1] * 25, 1)
    target.scheduler.add(again)
    step(target)
    assert again.cached == 12, "three of the six are left, and they are the first three"


@pytest.mark.parametrize("evicted", range(13))
def test_with_a_window_a_prefix_counts_if_all_that_can_be_seen_is_left(evicted: int) -> None:
    target = loop(blocks=12, block_size=4, window=8, speculative_rows=0)
    prompt = [i % 7 for i in range(41)]

    def serve(arrival: int, prompt: list[int]) -> Sequence:
        sequence = make(arrival, prompt, 1)
        target.scheduler.add(sequence)
        while not target.idle:
            step(target)
            target.scheduler.cache.check(target.scheduler.running)
        return sequence

    serve(0, prompt)
    if evicted:
        serve(1, [5] * (4 * evicted))
    again = serve(2, prompt)
    assert again.tokens[41:] == expected_answer(prompt, 1, frozenset())
    # The token at 40 sees 33 to 40: of the ten full blocks, the ninth and the tenth. Two of the twelve held nothing.
    assert again.cached == (40 if evicted <= 2 + 8 else 0)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_window_passes_blocks_no_sooner_and_no_later_than_it_may(overlaps: bool, block_size: int) -> None:
    target = loop(overlaps, blocks=64, block_size=block_size, window=5, prefill_tokens=20, speculative_rows=0)
    sequence = make(0, [i % 7 for i in range(50)], 10)
    target.scheduler.add(sequence)
    while not target.idle:
        target.step()
        target.scheduler.cache.check(target.scheduler.running)
        if sequence.blocks and sequence.settled % block_size == 0:
            passed = max(0, sequence.settled - 4) // block_size  # the next token sees itself and four before it
            assert [block < 0 for block in sequence.blocks] == [i < passed for i in range(len(sequence.blocks))]


def test_what_can_never_fit_is_known_at_once() -> None:
    target = scheduler(blocks=4, block_size=4)
    assert target.fits(10, 6)
    assert not target.fits(10, 7)
    windowed = scheduler(blocks=6, block_size=4, window=8, prefill_tokens=8)
    assert windowed.fits(40, 20), "blocks passed by the window are released"
    assert scheduler(blocks=4, block_size=4, window=8, prefill_tokens=8).fits(10, 6), "it never fills its window"


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("window", [5, 6, 7, 8, 11])
def test_what_fits_in_a_window_finishes_alone(window: int, overlaps: bool) -> None:
    """In exactly as many blocks as `blocks_needed` says, however its chunks are cut."""
    prompt = [1, 2, 3, 4, 5, 6, 0] * 7
    for block_size in (1, 2, 3, 4, 5):
        for chunk in (1, 2, 3, 4, 7, 8):
            blocks = scheduler(block_size=block_size, window=window, prefill_tokens=chunk).cache.blocks_needed(
                61, chunk
            )
            target = loop(overlaps, blocks=blocks, block_size=block_size, window=window, prefill_tokens=chunk)
            sequence = make(0, prompt, 12, lookup=True)
            target.scheduler.add(sequence)
            while not target.idle:
                target.step()
            assert sequence.tokens[49:] == expected_answer(prompt, 12, frozenset())
