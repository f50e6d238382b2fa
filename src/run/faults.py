"""What can be wrong with a run: one function a fault, which returns the evidence, or nothing.

They stand in the order of causes, so that of several faults the first is what to correct first. A threshold says beside
it why it is that number; "ours" are runs of configs/configs_tiny, and benchmarks/doctor.py takes runs on both sides.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from src.run.reading import Run, series
from src.run.trends import MIN_STEPS, START, accuracy_told, end_of, first, gains_accuracy, has, rises, start_of


@dataclass(frozen=True)
class Detector:
    """A fault, how it is found, and what helps against it."""

    fault: str
    needs: tuple[str, ...]  # metrics without which nothing can be said
    advice: str
    least: int  # steps
    find: Callable[[Run], str | None]


DETECTORS: list[Detector] = []


def detector(fault: str, *needs: str, advice: str, least: int = MIN_STEPS):
    """Register fn(run) -> the evidence, or nothing, below those that are registered: causes come before effects."""

    def register(find: Callable[[Run], str | None]) -> Callable[[Run], str | None]:
        DETECTORS.append(Detector(fault, needs, advice, least, find))
        return find

    return register


SKIPPED = 0.05  # of the steps: one now and then is what skipping is for; no healthy run of ours had any


@detector(
    "updates skipped", "train/skipped_updates", least=1,
    advice="the completions in bad_steps/ and data.reward_functions, for huge values; then a lower "
    "training.learning_rate, or model.dtype: float32",
)  # fmt: skip
def updates_skipped(run: Run) -> str | None:
    steps, skipped = series(run, "train/skipped_updates")
    bad = skipped > 0
    if bad.sum() < max(2, SKIPPED * len(steps)):
        return None
    return f"{bad.sum()} of {len(steps)} steps had a gradient that is not finite, the first is step {first(steps, bad)}"


CUT_OFF = 0.5  # finished: below it most completions are graded and learnt without their end


@detector(
    "completions cut off", "rollout/finished",
    advice="a higher training.max_gen_len, training.stop_strings that end an answer, or "
    "training.skip_unfinished_episodes: true, which leaves them out of the loss",
)  # fmt: skip
def cut_off(run: Run) -> str | None:
    """From the start; where a policy unlearns to end, that is an effect: see `endings_lost`."""
    _, finished = series(run, "rollout/finished")
    if start_of(finished) >= CUT_OFF or end_of(finished) >= CUT_OFF:
        return None
    return (
        f"{1 - start_of(finished):.0%} of the completions of the first steps and {1 - end_of(finished):.0%} of the "
        f"last did not end within training.max_gen_len ({run.options.get('training.max_gen_len')} tokens)"
    )


MISMATCH = 0.05  # nats: ratios are 5% off before any update, a quarter of the default clip range; bf16 has 0.004


@detector(
    "sampler mismatch", "rollout/mismatch",
    advice="model.dtype: float32, to see whether it is precision; training.importance_cap: 2 with "
    "training.old_logprobs: trainer corrects for it; else something differs between sampling and scoring",
)  # fmt: skip
def sampler_mismatch(run: Run) -> str | None:
    steps, mismatch = series(run, "rollout/mismatch")
    if mismatch.mean() <= MISMATCH:
        return None
    return (
        f"log-probs of sampler and trainer differ by {mismatch.mean():.3f} nats a token on average, by "
        f"{mismatch[0]:.3f} at step {steps[0]} and {mismatch[-1]:.3f} at step {steps[-1]}"
    )


CERTAIN = 4.0  # standard errors: of 30,000 runs without a trend one seems to have it


@detector(
    "no reward", "train/reward", "reward/answer",
    advice="the first completions in training.log: does the reward look for what the prompt asks for? Then "
    "data.prompt_format, data.response_prefix, easier problems or a better model.pretrained_model_path",
)  # fmt: skip
def no_reward(run: Run) -> str | None:
    """Not one right answer. A reward that is a plain number below 1 counts as none, so there it may not rise either."""
    _, rewards = series(run, "train/reward")
    _, answers = series(run, "reward/answer")
    parts = {tag for row in run.rows for tag in row if tag.startswith("reward/")}
    if answers.max() > 0 or (len(parts) == 1 and rises(rewards, CERTAIN)):
        return None
    return (
        f"not one right answer in {len(answers)} steps; reward {start_of(rewards):.3g} at first, {end_of(rewards):.3g} "
        f"at last"
    )


FLAT = 0.8  # of the groups: at most a fifth of what is sampled teaches. Ours end at 0.6, with 78% right


def flat_groups(run: Run, right: bool | None) -> str | None:
    """Evidence that rewards within groups are equal, and mostly of right answers, of wrong ones, or nobody knows.

    Over the whole run, and at its start too: where a policy has lost what it could, the cause is another.
    """
    _, flat = series(run, "train/groups_without_variance")
    _, answers = series(run, "reward/answer")
    found = bool(answers.mean() >= 0.5) if len(answers) else None
    if min(flat.mean(), start_of(flat)) < FLAT or found is not right:
        return None
    told = f", and {answers.mean():.0%} of the answers are right" if len(answers) else ""
    return f"in {flat.mean():.0%} of the groups all rewards are equal, {end_of(flat):.0%} in the last steps{told}"


@detector(
    "all answers right", "train/groups_without_variance", "reward/answer",
    advice="harder problems (countdown: data.num_numbers, data.number_max), a stricter reward, or an earlier end "
    "(training.max_steps)",
)  # fmt: skip
def all_right(run: Run) -> str | None:
    return flat_groups(run, right=True)


@detector(
    "all answers wrong", "train/groups_without_variance", "reward/answer",
    advice="easier problems, larger groups (training.batch_size / training.num_questions_per_batch), a higher "
    "training.temperature, or a reward with steps in between (data.reward_functions)",
)  # fmt: skip
def all_wrong(run: Run) -> str | None:
    return flat_groups(run, right=False)


@detector(
    "all rewards equal", "train/groups_without_variance",
    advice="harder or easier problems, a reward that tells completions apart, or a higher training.temperature",
)  # fmt: skip
def all_equal(run: Run) -> str | None:
    """Where nothing is known of answers."""
    return flat_groups(run, right=None)


NO_GRADIENT = 1e-8  # ours are 0.1 to 2; Adam's own epsilon, below which it takes no full step either


@detector(
    "no gradient", "train/grad_norm", "train/groups_without_variance",
    advice="a loss that is not zero: training.loss_type with a training.beta above 0, training.epsilon above 0, "
    "training.skip_unfinished_episodes: false, training.kl_target lower",
)  # fmt: skip
def no_gradient(run: Run) -> str | None:
    """In most steps that had something to learn from; where no group had, `flat_groups` is the cause."""
    tags = ("train/grad_norm", "train/groups_without_variance")
    norms = [row[tags[0]] for row in run.rows if has(row, *tags) and row[tags[1]] < 1]
    dead = sum(norm < NO_GRADIENT for norm in norms)
    if len(norms) < START or dead <= len(norms) / 2:
        return None
    return f"the gradient is zero in {dead} of {len(norms)} steps whose groups have different rewards"


MOVED = 1e-4  # of the weights a step: bf16 at 1e-6 shows 1e-6 / 1e-4 (a weight's last bit) = 1e-2, and 1e-8 nothing


@detector(
    "weights do not move", "train/weights_moved", "train/grad_norm",
    advice="a higher training.learning_rate (bf16 weights hide what is below a 256th of them, for a while); "
    "training.warmup_steps fewer than the run has",
)  # fmt: skip
def weights_do_not_move(run: Run) -> str | None:
    """In steps with a gradient; without one other lines say why."""
    tags = ("train/weights_moved", "train/grad_norm")
    found = [row[tags[0]] for row in run.rows if has(row, *tags) and row[tags[1]] > 0]
    if len(found) < START or np.mean(found) >= MOVED:
        return None
    rate = run.options.get("training.learning_rate")
    return f"a step changes {np.mean(found):.1e} of the weights, over {len(found)} steps, at a learning rate of {rate}"


DRIFT = 1.5  # times as long, or as short: lengths of ours stay within 3%


@detector(
    "length drifting", "rollout/length", "reward/answer", "train/reward",
    advice="other data.reward_functions or lower data.reward_weights, if one pays for length; training.loss_agg: "
    "token, as sequence favours short right answers; a higher training.max_gen_len, if completions reach it",
)  # fmt: skip
def length_drifting(run: Run) -> str | None:
    """Without a gain in accuracy; with one it may be what it takes.

    Nor where the reward falls: there a policy breaks, and other lines say so.
    """
    _, length = series(run, "rollout/length")
    _, rewards = series(run, "train/reward")
    factor = end_of(length) / max(start_of(length), 1e-9)
    if 1 / DRIFT < factor < DRIFT or gains_accuracy(run) or rises(-rewards, CERTAIN):
        return None
    limit = run.options.get("training.max_gen_len")
    return (
        f"completions were {start_of(length):.1f} tokens long at first and are {end_of(length):.1f} at last (limit "
        f"{limit}), and accuracy has not risen: {accuracy_told(run)}"
    )


@detector(
    "reward hacking", "train/reward", "reward/answer",
    advice="reading completions of the last step, in TensorBoard; lower data.reward_weights of the part that rises, or "
    "paying it for right answers only",
)  # fmt: skip
def reward_hacking(run: Run) -> str | None:
    """The reward rises, and neither held-out accuracy nor that of training does."""
    _, rewards = series(run, "train/reward")
    if not rises(rewards, CERTAIN) or gains_accuracy(run):
        return None
    parts = {tag: series(run, tag)[1] for row in run.rows[-1:] for tag in row if tag.startswith("reward/")}
    rising = [tag for tag, values in parts.items() if tag != "reward/answer" and len(values) and rises(values, CERTAIN)]
    told = f" ({', '.join(rising)} too)" if rising else ""
    return f"the reward rises from {start_of(rewards):.3g} to {end_of(rewards):.3g}{told}, while {accuracy_told(run)}"


CLIPPED = 0.1  # of the tokens: ours have 0.001, and 0.02 with 4 epochs at 5e-4; clipped ones have no gradient


@detector(
    "clip fraction high", "train/clip_fraction",
    advice="a lower training.learning_rate, fewer training.inner_epochs or training.minibatches, or a wider "
    "training.epsilon_high",
)  # fmt: skip
def clip_fraction_high(run: Run) -> str | None:
    """Of single tokens: GSPO clips whole sequences at a thousandth of the range, and many of them by design."""
    steps, clipped = series(run, "train/clip_fraction")
    if clipped.mean() <= CLIPPED or run.options.get("training.importance_sampling_level") == "sequence":
        return None
    return (
        f"the clip binds for {clipped.mean():.0%} of the tokens on average, {clipped.max():.0%} at step "
        f"{steps[int(clipped.argmax())]}"
    )


COLLAPSED = 0.2  # of the entropy at the start: ours fall to 0.6 of it in 100 steps, while accuracy triples


@detector(
    "entropy collapsed", "train/entropy",
    advice="training.entropy_coef above 0, training.epsilon_high: 0.28, a lower training.learning_rate, or "
    "training.loss_type: kl with a higher training.beta",
)  # fmt: skip
def entropy_collapsed(run: Run) -> str | None:
    _, entropy = series(run, "train/entropy")
    if end_of(entropy) >= COLLAPSED * start_of(entropy):
        return None
    return f"it was {start_of(entropy):.3f} nats a token in the first steps and is {end_of(entropy):.4f} in the last"


EXPLODED = 3.0  # times the entropy at the start, with at least RISE nats more: ours stay below 1.2 times
RISE = 0.2  # nats: of a policy that is nearly sure at the start three times little is still little


@detector(
    "entropy exploded", "train/entropy",
    advice="a lower training.learning_rate or training.entropy_coef, more training.warmup_steps, or "
    "training.loss_type: kl with a higher training.beta",
)  # fmt: skip
def entropy_exploded(run: Run) -> str | None:
    steps, entropy = series(run, "train/entropy")
    limit = max(EXPLODED * start_of(entropy), start_of(entropy) + RISE)
    if end_of(entropy) <= limit:
        return None
    return (
        f"it was {start_of(entropy):.3f} nats a token in the first steps and is {end_of(entropy):.3f} in the last, "
        f"above {limit:.2f} since step {first(steps, entropy > limit)}"
    )


FAR = 1.0  # nats a token: e times as likely as to the reference, token by token; ours end at 0.1 to 0.25, with accuracy


@detector(
    "KL running away", "train/kl_k3",
    advice="a lower training.learning_rate, training.loss_type: kl with a higher training.beta, or "
    "training.beta_kl_target",
)  # fmt: skip
def kl_running_away(run: Run) -> str | None:
    """By k1, whose mean is the KL: k3 has an exponential, and one token can make it jump, so of it the median.

    Where no penalty needs the anchor only some steps have them.
    """
    tag = "train/kl_k1" if len(series(run, "train/kl_k1")[0]) else "train/kl_k3"
    steps, distance = series(run, tag)
    last = float(np.median(distance[-START:]))
    if last <= FAR:
        return None
    beyond = first(steps, distance > FAR)
    return f"the policy is {last:.2f} nats a token from its anchor ({tag}), and was beyond {FAR:g} by step {beyond}"


@detector(
    "endings lost", "rollout/finished",
    advice="what helps against the faults above; else training.zero_truncated_rewards: true, so that ending pays",
)  # fmt: skip
def endings_lost(run: Run) -> str | None:
    """Most completions ended at first and most do not at last."""
    _, finished = series(run, "rollout/finished")
    if start_of(finished) < CUT_OFF or end_of(finished) >= CUT_OFF:
        return None
    return (
        f"{start_of(finished):.0%} of the completions ended by themselves at first and {end_of(finished):.0%} at last"
    )


EVALUATING = 0.5  # of the time of a run: more than training itself takes


@detector(
    "evaluation takes the time", "time/evaluate", "time/update",
    advice="a higher training.eval_interval, fewer data.eval_samples_between or a smaller data.eval_size",
)  # fmt: skip
def evaluation_takes_the_time(run: Run) -> str | None:
    """Those between the first step and the last: both ends are wanted, however short a run is."""
    between = [row for row in run.rows if 0 < row["step"] < run.last_step]
    evaluations = [row["time/evaluate"] for row in between if has(row, "time/evaluate")]
    training = sum(row[tag] for row in run.rows for tag in ("time/rollout", "time/update") if has(row, tag))
    share = sum(evaluations) / max(sum(evaluations) + training, 1e-9)
    if share <= EVALUATING:
        return None
    return (
        f"{len(evaluations)} evaluations between first and last step took {sum(evaluations):.0f} s, {share:.0%} of the "
        f"time; sampling and updates took {training:.0f} s"
    )
