"""Episodes of several turns: what the policy is told between them takes the place of sampled tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from src.engine.ending import PLAIN, cut_at_stop
from src.engine.token_choice import SamplingSettings
from src.records import Episode, Problem, Told, Transcript


@dataclass
class Conversing:
    """An episode that may go on: columns of its row, and what was written and told so far."""

    problem: Problem
    room: int  # columns that its row can have at most
    limit: int  # as of now it ends here
    begin: int = 0  # of the turn
    finished: bool = False
    broken: str = ""
    is_open: bool = False
    written: list[tuple[int, int]] = field(default_factory=list)  # first and last + 1 of each turn
    texts: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


class Turns:
    """The conversations of one rollout."""

    def __init__(self, tokenizer, problems: Iterable[Problem], settings: SamplingSettings, positions: int | None):
        """A problem for each episode; `positions`: tokens of the longest text the model can read, None: any."""
        self.tokenizer, self.settings = tokenizer, settings
        self.states: list[Conversing] = []
        for problem in problems:
            room = max(1, min(settings.width, (positions or 2**60) - len(problem.prompt_ids)))
            self.states.append(Conversing(problem, room, min(settings.max_new_tokens, room)))

    def start(self, episodes: Sequence[int]) -> None:
        for episode in episodes:
            self.states[episode].is_open = True

    def end_turn(self, episode: int, row: list[int]) -> tuple[int, Told] | None:
        """A turn is over, by an end token, a stop string or its limit: the column of its last token, and what the
        policy is told then; None if the episode is over. `row`: its tokens, junk after the end.
        """
        state, settings = self.states[episode], self.settings
        ids = row[state.begin : state.limit]
        end = next((place for place, token in enumerate(ids) if token in settings.eos_ids), None)
        ids = ids if end is None else ids[: end + 1]
        ids, text, stopped = cut_at_stop(
            self.tokenizer, ids, self.tokenizer.decode(ids, **PLAIN), settings.stop_strings
        )
        last = state.begin + len(ids) - 1
        state.written.append((state.begin, last + 1))
        state.texts.append(text)
        state.finished = end is not None or stopped
        told = None
        if state.finished and len(state.texts) < settings.max_turns and settings.reply is not None:
            told = settings.reply(state.problem, Transcript(state.texts, state.told), ids[-1])
        count = 0 if told is None else len(told.token_ids)
        begin, limit = last + 1 + count, min(state.limit + count, state.room)
        if told is None or told.broken or begin >= limit:
            state.is_open = False
            state.broken = "" if told is None else told.broken
            state.finished &= told is None  # else it was to go on
            return None
        state.told.append(told.text)
        state.begin, state.limit = begin, limit
        return last, told

    def episodes(self, tokens: Tensor, logprobs: Tensor) -> list[Episode]:
        """Rows of tokens and log-probs [episodes, width] as episodes."""
        found = []
        for state, ids, scores in zip(self.states, tokens.tolist(), logprobs.tolist(), strict=True):
            end = state.written[-1][1]
            written = [False] * end
            for begin, stop in state.written:
                written[begin:stop] = [True] * (stop - begin)
            own = tuple(score for score, is_own in zip(scores, written, strict=False) if is_own)
            text = Transcript(state.texts, state.told)
            found.append(Episode(tuple(ids[:end]), own, state.finished, text, tuple(written), broken=state.broken))
        return found
