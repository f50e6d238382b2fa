"""What a second turn costs: going on from the cache, a second rollout from the whole transcript, and one turn as long.

    uv run python -m benchmarks.turns                          # SmolLM2-135M's shape on a CPU: 3 minutes
    uv run python -m benchmarks.turns --shape tiny --quick     # seconds: only shows that it runs

Every turn has exactly --turn_tokens tokens, every reply --told. `reply` samples both turns with a reply in between;
`again` samples the first, and then the second from prompts that are all that came before, as one would without it;
`one turn` samples as many tokens as both turns and the reply have, in one go: there is nothing to read but the prompt,
so it is the floor. In turn, several times. The last line of stdout is one JSON document.
"""

import argparse
import json
import statistics
import time
from functools import partial

import src  # noqa: F401  before torch: how its threads wait

# isort: split
import torch

from benchmarks.rollout import SHAPES, NoText, load
from src.engine.room import fit_to_memory
from src.engine.sampler import SlotDecoder
from src.engine.token_choice import SamplingSettings
from src.records import Problem, Told

END = 1


class Text(NoText):
    """Turns are decoded one by one."""

    def decode(self, ids, **options):
        return ""


class FixedTurns(SlotDecoder):
    """Each turn ends with its last token, as if the policy had chosen to."""

    ends: tuple[int, ...]  # columns

    def choose(self, hidden, slots) -> None:
        before = self.ended[slots].clone()
        super().choose(hidden, slots)
        columns, episodes = self.lengths[slots].clamp(max=self.settings.width), self.episodes[slots]
        over = (columns[:, None] == torch.tensor(self.ends, device=columns.device)).any(1)
        tokens = self.tokens[episodes, columns]
        tokens = tokens.masked_fill(tokens == END, END + 1).masked_fill(over, END)  # none ends by chance
        self.tokens[episodes, columns] = self.current[slots] = tokens
        self.ended[slots] = before | over


@torch.inference_mode()
def decode(model, problems, samples: int, options, ends: tuple[int, ...], settings: SamplingSettings) -> list:
    """The episodes of one rollout."""
    slots, _ = fit_to_memory(model, problems, samples, settings)
    FixedTurns.ends = ends
    return FixedTurns(model, Text(), problems, samples, slots, settings).run()


def settings_of(options, new: int, **more) -> SamplingSettings:
    return SamplingSettings(new, 1.0, options.prompts * options.samples, (END,), 0, **more)


def run_reply(model, problems, options) -> int:
    """Both turns in one rollout."""
    turn, told = options.turn_tokens, Told((2,) * options.told)
    settings = settings_of(options, 2 * turn, reply=lambda *_: told, max_turns=2, told=options.told)
    ends = (turn - 1, 2 * turn + options.told - 1)
    return sum(len(e.token_ids) for e in decode(model, problems, options.samples, options, ends, settings))


def run_again(model, problems, options) -> int:
    """A rollout a turn; the second reads every transcript from its beginning."""
    turn = options.turn_tokens
    first = decode(model, problems, options.samples, options, (turn - 1,), settings_of(options, turn))
    prompts = [problem.prompt_ids for problem in problems for _ in range(options.samples)]
    whole = [
        Problem(place, prompt + episode.token_ids + (2,) * options.told, "", {})
        for place, (prompt, episode) in enumerate(zip(prompts, first, strict=True))
    ]
    second = decode(model, whole, 1, options, (turn - 1,), settings_of(options, turn))
    return sum(len(a.token_ids) + options.told + len(b.token_ids) for a, b in zip(first, second, strict=True))


def run_one_turn(model, problems, options) -> int:
    """As many tokens, all of them sampled."""
    count = 2 * options.turn_tokens + options.told
    episodes = decode(model, problems, options.samples, options, (count - 1,), settings_of(options, count))
    return sum(len(episode.token_ids) for episode in episodes)


CONTESTANTS = {"reply": run_reply, "again": run_again, "one turn": run_one_turn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", help=f"{', '.join(SHAPES)}, or a folder")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=512)
    parser.add_argument("--turn_tokens", type=int, default=32)
    parser.add_argument("--told", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.prompt_tokens, options.turn_tokens, options.told = 2, 20, 6, 4
        options.repetitions = 1
    model, _ = load(options)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    problems = [
        Problem(
            place, tuple(torch.randint(2, vocabulary, (options.prompt_tokens,), generator=generator).tolist()), "", {}
        )
        for place in range(options.prompts)
    ]
    expected = options.prompts * options.samples * (2 * options.turn_tokens + options.told)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for repetition in range(options.repetitions + 1):  # the first one warms up
        for name, function in CONTESTANTS.items():
            run = partial(function, model, problems, options)
            started = time.perf_counter()
            assert run() == expected, f"{name} made other lengths"
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:9} {medians[name]:7.2f} s (min {min(values):.2f}, max {max(values):.2f})")
    print(f"again / reply {medians['again'] / medians['reply']:.2f}, reply / one turn", end=" ")
    print(f"{medians['reply'] / medians['one turn']:.2f}")
    print(json.dumps({"settings": vars(options), "seconds": seconds, "median": medians}))


if __name__ == "__main__":
    main()
