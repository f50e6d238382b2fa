"""Push final/ to the Hugging Face hub, with a model card: `check_hub_keys` when the config is read, `check_hub` before
training, `push_final` after it. A push that fails loses nothing: final/ stays, and the message says how to push it.
"""

import logging
import re
import shlex
import time
from pathlib import Path

import yaml

from src.config import ConfigError, HubConfig

logger = logging.getLogger("grpo")
RETRY_WAITS = (5, 20)  # seconds; the hub's own client tries again only in some of its calls
# Weights of an earlier push in another layout: transformers would load them in place of the new ones
STALE_FILES = ["model*.safetensors*", "adapter_*"]
HUB_ID = re.compile(r"(?!.*(--|\.\.|\.git$))(\w([\w.-]{0,94}\w)?/)?\w([\w.-]{0,94}\w)?", re.ASCII)


def check_hub_keys(hub: HubConfig, source: str) -> None:
    """What can be wrong with the hub section without asking the hub."""
    given = [name for name, value in vars(hub).items() if value != getattr(HubConfig(), name)]
    if given and not hub.push_to_hub:
        raise ConfigError(f"{source}: hub.{given[0]} needs hub.push_to_hub: true; set it, or remove the key")
    name = hub.hub_model_id
    if name is not None and not ("/" in name and HUB_ID.fullmatch(name)):
        raise ConfigError(f"{source}: hub.hub_model_id must be owner/name as the hub allows them, not {name!r}")


def check_hub(hub: HubConfig) -> None:
    """Before hours of training: is there a token, does the hub take it, and may it write to hub_model_id?"""
    if not hub.push_to_hub:
        return
    from huggingface_hub import HfApi, errors

    try:
        account = HfApi().whoami()
    except Exception as error:
        refused = isinstance(error, errors.LocalTokenNotFoundError) or status_of(error) in (401, 403)
        advice = "log in with `hf auth login` or set HF_TOKEN" if refused else "check the network, or try again later"
        raise ConfigError(f"hub.push_to_hub: {advice}, or set it to false ({reason_of(error)})") from error
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigError("hub.push_to_hub: the token can only read; log in with one that can write")
    owners = [account["name"], *(group["name"] for group in account.get("orgs", []))]
    owner = (hub.hub_model_id or account["name"]).partition("/")[0]
    if owner not in owners and role != "fineGrained":  # such a token need not see the groups it may write for
        raise ConfigError(f"hub.hub_model_id: the token can not write for {owner}; it can for {', '.join(owners)}")


def push_final(folder: Path, hub: HubConfig, about: dict, evaluation: dict, metrics_file: Path) -> str:
    """Write the card into final/ and push it; returns the URL. A failure is a ConfigError with the command to do it.

    about: {"model", "dataset", "datasets": [hub ids], "config": YAML text}; evaluation: {"before", "after": metrics}.
    """
    folder = folder.resolve()
    name = hub.hub_model_id or re.sub(r"\W{2,}|[^\w.]", "-", folder.parent.name, flags=re.ASCII)[:96].strip("-.")
    try:
        write_card(folder, name, about, evaluation, metrics_file)
        for wait in RETRY_WAITS:
            try:
                return upload(folder, name)
            except Exception as error:
                if 400 <= status_of(error) < 500 and status_of(error) not in (408, 429):  # refused for good
                    raise
                logger.warning(f"pushing to {name} failed, next attempt in {wait} s ({reason_of(error)})")
            time.sleep(wait)
        return upload(folder, name)
    except Exception as error:
        options = ["--private", *(f"--delete={file}" for file in STALE_FILES)]
        raise ConfigError(
            f"the model is safe in {folder}, but was not pushed to the hub ({reason_of(error)}); to push it: "
            + shlex.join(["hf", "upload", name, str(folder), ".", *options])
        ) from error


def upload(folder: Path, name: str) -> str:
    """Create the repository, private, where it is missing, and commit the folder; to do it again changes nothing."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(name, private=True, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, folder_path=folder, delete_patterns=STALE_FILES)
    return str(url)


def status_of(error: BaseException) -> int:
    """The HTTP status behind an error (the client wraps some in others); 0 if there was no answer."""
    if (response := getattr(error, "response", None)) is not None:
        return response.status_code
    return status_of(error.__cause__) if error.__cause__ else 0


def reason_of(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, RuntimeError) else None  # of these the client's text is only the file
    return (" ".join(f"{error} {cause or ''}".split()) or type(error).__name__)[:400]


def write_card(folder: Path, name: str, about: dict, evaluation: dict, metrics_file: Path) -> None:
    """README.md and curves.svg of final/."""
    from src.run.reading import read_rows  # here: it imports numpy

    facts: dict = {"library_name": "peft" if (folder / "adapter_config.json").is_file() else "transformers"}
    places = (Path(), Path(__file__).parents[2])  # a local model may be called owner/name, too
    facts |= {"pipeline_tag": "text-generation", "tags": ["grpo", "reinforcement-learning"]}
    for fact, ids in (("base_model", [about["model"]]), ("datasets", about["datasets"])):
        known = [one for one in ids if HUB_ID.fullmatch(one)]  # the hub refuses a card that names anything else
        known = [one for one in known if not any((place / one).exists() for place in places)]
        facts |= {fact: known} if known else {}
    before, after = evaluation["before"], evaluation["after"]
    tags = [tag for tag in before | after if not tag.endswith("_ci95")]
    table = "".join(f"| {tag} | {cell(before, tag)} | {cell(after, tag)} |\n" for tag in tags)
    config = about["config"].rstrip()
    fence = "`" * max(3, *(1 + len(run) for run in re.findall("`+", config)), 0)  # a prompt may hold a fence
    (folder / "curves.svg").write_text(draw_curves(read_rows(metrics_file)), encoding="utf-8")
    card = f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n# {name.rpartition('/')[2]}\n\n`{about['model']}` "
    card += f"trained with GRPO on `{about['dataset']}`. ± is half of a 95% interval over the problems.\n\n"
    card += f"| | before | after |\n|---|---|---|\n{table}\n![accuracy and reward over the steps](curves.svg)\n\n"
    card += f"The resolved config:\n\n{fence}yaml\n{config}\n{fence}\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


def cell(metrics: dict, tag: str) -> str:
    """A metric with its interval, if it has one; a dash where it was not measured."""
    interval = f" ± {metrics[tag + '_ci95']:.3f}" if tag + "_ci95" in metrics else ""
    return f"{metrics[tag]:.3f}{interval}" if tag in metrics else "-"


def draw_curves(rows: list[dict]) -> str:
    """Greedy accuracy and training reward over the steps: an SVG of two panels, ranges beside them."""
    drawn = '<rect width="720" height="220" fill="white"/>'
    for left, tag in ((60, "eval/greedy"), (420, "train/reward")):
        points = [(row["step"], row[tag]) for row in rows if row.get(tag) is not None]  # null: it was not finite
        steps, values = [step for step, _ in points] or [0], [value for _, value in points] or [0.0]
        width, low, height = (steps[-1] - steps[0]) or 1, min(values), (max(values) - min(values)) or 1
        places = [f"{left + 260 * (s - steps[0]) / width:.1f},{180 - 140 * (v - low) / height:.1f}" for s, v in points]
        drawn += f'<polyline points="{" ".join(places)}" fill="none" stroke="steelblue" stroke-width="2"/>'
        labels = [(left, 20, tag if points else f"{tag}: no values"), (left - 50, 44, f"{max(values):.3g}")]
        labels += [(left - 50, 184, f"{low:.3g}"), (left, 205, f"step {steps[0]}"), (left + 240, 205, steps[-1])]
        drawn += "".join(f'<text x="{x}" y="{y}">{text}</text>' for x, y, text in labels)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 220" font-size="12">{drawn}</svg>\n'
