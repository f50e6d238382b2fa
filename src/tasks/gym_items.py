"""Items of reasoning-gym and what its own scorers say of an answer: the side that imports the package.

The worker process of gym.py runs this as well, and makes an item again in place of being sent it.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache, lru_cache
from importlib import import_module

BLOCK = 10_000  # items of one of its data sets: always as many, since the items of some families depend on the size


@cache
def dataset_of(family: str, parameters: str, seed: int):
    """A data set of the package; the parameters are JSON, so that they can be a key."""
    return import_module("reasoning_gym").create_dataset(family, **json.loads(parameters), seed=seed, size=BLOCK)


@lru_cache(maxsize=64)  # a group asks for one item many times
def entry_of(family: str, parameters: str, seed: int, item: int) -> dict:
    """Item number `item` of a family, which depends on seed + item alone."""
    block, position = divmod(item, BLOCK)
    return dataset_of(family, parameters, seed + block * BLOCK)[position]


def start() -> str:
    """`ready`, where the package can be imported."""
    import_module("reasoning_gym")
    return "ready"


def grading(family: str, parameters: str, seed: int, item: int, answer: str) -> Callable[[], bool]:
    """A call that says whether the family's scorer gives the answer exactly 1. An error is a wrong answer."""
    entry = deepcopy(entry_of(family, parameters, seed, item))  # some scorers write into it
    dataset = dataset_of(family, parameters, seed)

    def verdict() -> bool:
        try:
            return bool(dataset.score_answer(answer, entry) == 1)
        except Exception:
            return False

    return verdict
