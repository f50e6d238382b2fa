"""What a step's graded groups say, whatever the method did with them."""

from collections.abc import Mapping

from src.records import Group, Transcript


def step_metrics(groups: list[Group], seconds: Mapping[str, float], sampled: float | None = None) -> dict[str, float]:
    """Rewards part by part, lengths, and the time that the engine took; every number is over the whole step.

    `sampled`: tokens of the rollout, where not all of its groups were trained on.
    """
    episodes = [episode for group in groups for episode in group.episodes]
    tokens = sum(episode.length for episode in episodes)
    metrics = {"train/reward": sum(e.reward for e in episodes) / len(episodes)}  # what was trained on
    for part in {part: None for e in episodes for part in e.reward_parts if part != "reward"}:  # which is the sum
        metrics[f"reward/{part}"] = sum(e.reward_parts.get(part, 0.0) for e in episodes) / len(episodes)
    metrics |= {
        "rewards/errors": float(sum(episode.reward_errors for episode in episodes)),
        "train/groups_without_variance": sum(not group.varies() for group in groups) / len(groups),
        "rollout/length": tokens / len(episodes),
        "rollout/finished": sum(e.finished for e in episodes) / len(episodes),
    }
    turns = [len(episode.text.turns) for episode in episodes if isinstance(episode.text, Transcript)]
    if turns:
        metrics["rollout/turns"] = sum(turns) / len(turns)
    for purpose in ("rollout", "update"):
        metrics[f"time/{purpose}"] = seconds.get(purpose, 0.0)
        handled = sampled if purpose == "rollout" and sampled is not None else tokens
        metrics[f"{purpose}/tokens_per_second"] = handled / max(seconds.get(purpose, 0.0), 1e-9)
    return metrics
