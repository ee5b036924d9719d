"""The scheduler without a model: random lives of many requests, every invariant checked after every step."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from starling.engine.cache import BlockCache
from starling.engine.scheduler import Limits, Scheduler, Work
from starling.engine.sequence import SamplingParams, Sequence
from starling.engine.speculation import PromptLookup
from tests.engine.fake_model import FakeRunner, expected_answer

MAX_POSITIONS = 64


def make(
    arrival: int, prompt: list[int], max_tokens: int, stop_ids: frozenset[int] = frozenset(), lookup: bool = False
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, stop_ids=stop_ids, seed=0)
    return Sequence(arrival, prompt, params, lookup=PromptLookup() if lookup else None)


def scheduler(blocks: int = 64, block_size: int = 4, window: int | None = None, **limits: int) -> Scheduler:
    chosen = Limits(**{"max_running": 4, "prefill_tokens": 16, "speculative_rows": 8, **limits})
    return Scheduler(BlockCache(blocks, block_size, chosen.max_running, MAX_POSITIONS, window), chosen)


def step(target: Scheduler) -> tuple[list[Work], dict[int, list[int]], list[Sequence]]:
    """One step with the fake model: the plan, tokens by arrival, and who finished."""
    plan = target.plan()
    outcomes = target.complete(plan, FakeRunner().run(plan))
    return plan, {o.sequence.arrival: o.tokens for o in outcomes}, [o.sequence for o in outcomes if o.finish]


class Lives(RuleBasedStateMachine):
    """Requests come, are computed, are cancelled, finish; sometimes a step fails."""

    @initialize(
        blocks=st.integers(8, 40),
        block_size=st.sampled_from([1, 3, 4, 16]),
        window=st.sampled_from([None, 5, 16]),
        max_running=st.integers(1, 5),
        prefill_tokens=st.integers(1, 24),
        speculative_rows=st.sampled_from([0, 4, 16]),
    )
    def begin(self, **shape: int) -> None:
        self.target = scheduler(**shape)
        self.live: dict[int, Sequence] = {}
        self.answers: dict[int, list[int]] = {}
        self.prompts: list[list[int]] = []
        self.arrivals = 0

    @rule(
        fresh=st.lists(st.integers(0, 6), min_size=1, max_size=30),
        shared=st.integers(0, 30),
        max_tokens=st.integers(1, 20),
        stops=st.booleans(),
    )
    def submit(self, fresh: list[int], shared: int, max_tokens: int, stops: bool) -> None:
        # Half of the prompts begin like an earlier one, answer included: the next turn of a conversation.
        earlier = self.prompts[shared % len(self.prompts)] if self.prompts and shared % 2 else []
        prompt = (earlier[:shared] + fresh)[: MAX_POSITIONS - max_tokens]
        if not self.target.fits(len(prompt), max_tokens):
            return
        stop_ids = frozenset({0}) if stops else frozenset()
        sequence = make(self.arrivals, prompt, max_tokens, stop_ids, lookup=True)
        self.arrivals += 1
        self.target.add(sequence)
        self.live[sequence.arrival] = sequence
        self.answers[sequence.arrival] = []

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 1000))
    def cancel(self, which: int) -> None:
        arrival = sorted(self.live)[which % len(self.live)]
        sequence = self.live.pop(arrival)
        assert self.target.remove(sequence)
        assert not self.target.remove(sequence)
        assert sequence.blocks == []

    @rule()
    def fail(self) -> None:
        plan = self.target.plan()
        for work in plan:
            self.target.remove(work.sequence)
            del self.live[work.sequence.arrival]
        self.target.cache.forget()

    @rule()
    def step(self) -> None:
        before = [s.arrival for s in self.target.running]
        plan, tokens, finished = step(self.target)
        assert bool(plan) == bool(self.live), "with work to do, a step does some"
        if self.live:
            oldest = min(self.live)
            assert any(w.sequence.arrival == oldest for w in plan), "the oldest always moves"
        assert sum(w.count for w in plan if w.count > 1 or not w.samples) <= self.target.limits.prefill_tokens
        planned = {w.sequence.arrival for w in plan}
        paused = {s.arrival for s in self.target.waiting}
        assert all(a in planned or a in paused for a in before if self.live[a].pending == 1)
        for arrival, new in tokens.items():
            self.answers[arrival] += new
        for sequence in finished:
            self._judge(self.live.pop(sequence.arrival))

    def _judge(self, sequence: Sequence) -> None:
        prompt = sequence.tokens[: sequence.prompt_length]
        expected = expected_answer(prompt, sequence.params.max_tokens, sequence.params.stop_ids)
        assert self.answers[sequence.arrival] == expected
        self.prompts.append(sequence.tokens)

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "target"):
            self.target.cache.check(self.target.running)
            arrivals = [s.arrival for s in [*self.target.running, *self.target.waiting]]
            assert arrivals == sorted(self.live), "in order of arrival, none lost, none twice"

    def teardown(self) -> None:
        if not hasattr(self, "target"):
            return
        for _ in range(5000):
            if not self.live:
                break
            self.step()
            self.books_balance()
        assert not self.live
        assert self.target.cache.available == self.target.cache.blocks


Lives.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase


def test_a_plan_follows_from_the_state_alone() -> None:
    def history() -> list[list[tuple[int, int, int, int]]]:
        target = scheduler(blocks=20)
        for arrival in range(6):
            target.add(make(arrival, [arrival % 3] * (5 + 3 * arrival), 8, lookup=True))
        shapes = []
        while target.running or target.waiting:
            plan, _, _ = step(target)
            shapes.append([(w.sequence.arrival, w.start, w.count, len(w.drafts)) for w in plan])
        return shapes

    assert history() == history()


def test_a_long_prompt_delays_a_running_stream_by_no_more_than_its_chunk() -> None:
    target = scheduler(prefill_tokens=8, speculative_rows=0)
    target.add(make(0, [1, 2], 20))
    step(target)
    target.add(make(1, list(range(40)), 4))
    for _ in range(5):
        plan, tokens, _ = step(target)
        assert [len(tokens[0])] == [1]
        assert sum(w.count for w in plan if w.sequence.arrival == 1) == 8


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    target = scheduler(prefill_tokens=8, speculative_rows=0)
    target.add(make(0, list(range(60)), 2))
    target.add(make(1, [1, 2, 3, 4], 2))
    _, tokens, _ = step(target)
    assert 1 in tokens, "equal shares: the short one is answered in the first step"


def test_the_next_turn_computes_only_what_is_new() -> None:
    target = scheduler(speculative_rows=0)
    first = make(0, list(range(10)), 7)
    target.add(first)
    while target.running or target.waiting:
        step(target)
    second = make(1, [*first.tokens, 5, 5, 5], 2)
    target.add(second)
    plan, _, _ = step(target)
    # 16 of the first turn's 17 tokens were computed, in 4 blocks of 4.
    assert second.cached == 16
    assert [(w.start, w.count) for w in plan] == [(16, 4)]


def test_an_equal_prompt_still_computes_its_last_token() -> None:
    target = scheduler(speculative_rows=0)
    for arrival in (0, 1):
        target.add(make(arrival, [3] * 8, 1))
        plan, tokens, _ = step(target)
        assert len(tokens[arrival]) == 1
    assert plan[0].start == 4


def test_the_least_recently_used_prefix_goes_first() -> None:
    target = scheduler(blocks=8, speculative_rows=0)

    def serve(arrival: int, token: int) -> int:
        sequence = make(arrival, [token] * 9, 1)
        target.add(sequence)
        while target.running or target.waiting:
            step(target)
        assert sequence.cached is not None
        return sequence.cached

    assert [serve(0, 1), serve(1, 2), serve(2, 1)] == [0, 0, 8]
    assert serve(3, 3) == 0  # takes free blocks
    serve(4, 4)  # needs blocks: 2's prefix is the oldest
    assert serve(5, 1) == 8
    assert serve(6, 2) < 8


def test_what_can_never_fit_is_known_at_once() -> None:
    target = scheduler(blocks=4, block_size=4)
    assert target.fits(10, 6)
    assert not target.fits(10, 7)
    windowed = scheduler(blocks=8, block_size=4, window=8, prefill_tokens=8)
    assert windowed.fits(40, 20), "blocks passed by the window are given back"


def test_drafts_are_taken_when_text_repeats_and_stop_when_they_fail() -> None:
    lookup = PromptLookup()
    assert lookup.draft([1, 2, 3, 4, 1, 2, 3], limit=8) == [4, 1]
    lookup.judge(2, 2, 10)
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], limit=8) == [4, 5, 6, 7]
    lookup.judge(4, 0, 11)
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 2, 3], limit=8) == []
    assert (lookup.proposed, lookup.accepted) == (6, 2)
