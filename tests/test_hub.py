"""The push to the hub against a stand-in for its HTTP API: what arrives is a model that loads; what fails is told."""

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, _http, validate_repo_id
from huggingface_hub.utils._runtime import is_xet_available
from hypothesis import example, given, settings
from hypothesis import strategies as st

from src.config import Config, ConfigError, HubConfig, dump_config
from src.run import hub as hub_module
from src.run.console import configure_logging
from src.run.hub import check_hub, check_hub_keys, draw_curves, push_final

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own affair
TOKEN = "hf_standin"


class StandIn(ThreadingHTTPServer):
    """Repositories in memory, behind the part of the hub's API that a push uses."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        token = {"type": "access_token", "accessToken": {"role": "write"}}
        self.account = {"name": "anna", "orgs": [{"name": "lab"}], "auth": token}
        self.visibility: dict[str, str] = {}  # repository -> "private" or "public"
        self.files: dict[str, dict[str, bytes]] = {}  # repository -> path -> content
        self.objects: dict[str, bytes] = {}  # sha256 -> what was uploaded as a large file
        self.large = (".safetensors",)
        self.failures: dict[str, list[int]] = {}  # part of a path -> statuses of the next answers to it
        self.requests: list[str] = []

    def create(self, repository: str, **files: bytes) -> None:
        self.visibility[repository] = "public"
        self.files[repository] = {name.replace("__", "."): text for name, text in files.items()}

    def asked(self, part: str) -> int:
        return sum(part in request for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet; in two, the second waits for the client's acknowledgement
    server: StandIn

    def log_message(self, *_):
        pass

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = self.read_body()
        self.server.requests.append(f"{self.command} {path}")
        for part, statuses in self.server.failures.items():
            if part in path and statuses:
                return self.answer(statuses.pop(0), {"errors": [{"message": f"the stand-in refuses {part}"}]})
        if path.startswith("/object/"):  # pre-signed, as the hub's are: without the token
            self.server.objects[path.rpartition("/")[2]] = body
            return self.answer(200, {})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        for pattern, method in (
            (r"/api/whoami-v2", self.whoami),
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/(\w+/[^/]+)/revision/main", self.revision),
            (r"/api/models/(\w+/[^/]+)/tree/main", self.tree),
            (r"/api/models/(\w+/[^/]+)/preupload/main", self.preupload),
            (r"/(\w+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/verify", self.verify),
            (r"/api/models/(\w+/[^/]+)/commit/main", self.commit),
        ):
            match = re.fullmatch(pattern, path)
            if match and (not match.groups() or match[1] in self.server.files):
                return self.answer(*method(body, *match.groups()))
        return self.answer(404, {"error": f"no {path}"})

    do_GET = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, status: int, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def whoami(self, _):
        return 200, self.server.account

    def create(self, body):
        asked = json.loads(body)
        repository = f"{asked['organization'] or self.server.account['name']}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{repository}"}
        if repository in self.server.files:
            return 409, answer | {"error": "You already created this model repo"}
        self.server.create(repository, __gitattributes=b"*.safetensors filter=lfs")
        self.server.visibility[repository] = asked["visibility"]
        return 200, answer

    def validate(self, body):
        facts = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        wrong = [name for name in facts.get("base_model", []) if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)]
        return 400 if wrong else 200, {"errors": [{"message": f"base_model {name}"} for name in wrong], "warnings": []}

    def revision(self, _, repository):
        return 200, {"id": repository, "sha": "0" * 40}

    def tree(self, _, repository):
        files = self.server.files[repository]
        return 200, [{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files]

    def preupload(self, body, repository):
        files = self.server.files[repository]
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(self.server.large)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in files:  # as git names a blob, and as the hub names a large file
                content = files[file["path"]]
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else blob
            answers.append(answer)
        return 200, {"files": answers}

    def batch(self, body, repository):
        def place(one):
            put, verify = f"{self.server.url}/object/{one['oid']}", f"{self.server.url}/verify"
            return one | {"actions": {"upload": {"href": put}, "verify": {"href": verify}}}

        return 200, {"transfer": "basic", "objects": [place(one) for one in json.loads(body)["objects"]]}

    def verify(self, body):
        asked = json.loads(body)
        content = self.server.objects[asked["oid"]]
        return (200 if hashlib.sha256(content).hexdigest() == asked["oid"] else 422), {}

    def commit(self, body, repository):
        files = self.server.files[repository]
        for line in body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        return 200, {"commitUrl": f"{self.server.url}/{repository}/commit/1", "commitOid": "1" * 40}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, in the hub's place for this process: with a token, without xet and without waiting."""
    server = StandIn()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub_module, "RETRY_WAITS", (0, 0))
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def final(tmp_path) -> Path:
    """A finished run's final/, with files that are no model."""
    folder = tmp_path / "runs" / "config kl--beta0.04_countdown" / "final"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    rows = [{"step": 0, "eval/greedy": 0.25}, {"step": 1, "train/reward": 0.5}]
    (folder.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ABOUT = {"model": "lab/base", "dataset": "gsm8k", "datasets": ["openai/gsm8k"], "config": "training:\n  beta: 0.04\n"}
EVALUATION = {
    "before": {"eval/greedy": 0.25, "eval/greedy_ci95": 0.0625, "eval/length": 12.5},
    "after": {"eval/greedy": 0.75, "eval/greedy_ci95": 0.125, "eval/format": 1.0},
}


def push(folder: Path, about=ABOUT, **keys) -> str:
    hub = HubConfig(push_to_hub=True, **{"hub_model_id": "anna/tiny", **keys})
    return push_final(folder, hub, about, EVALUATION, folder / ".." / "metrics.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# What arrives
# ---------------------------------------------------------------------------------------------------------------------


def test_the_pushed_files_load_as_the_same_model(hub, tiny_model_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = shutil.copytree(tiny_model_folder, tmp_path / "run_countdown" / "final")
    (final.parent / "metrics.jsonl").write_text('{"step": 0, "eval/greedy": 0.5}\n')
    assert push(final) == f"{hub.url}/anna/tiny" and hub.visibility["anna/tiny"] == "private"
    rebuilt = tmp_path / "rebuilt"
    rebuilt.mkdir()
    for name, content in hub.files["anna/tiny"].items():
        (rebuilt / name).write_bytes(content)
    assert {"README.md", "curves.svg", "tokenizer.json"} <= {file.name for file in rebuilt.iterdir()}
    assert list(hub.objects.values()) == [(final / "model.safetensors").read_bytes()]  # and only that one as large file
    sent, got = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny_model_folder, rebuilt))
    assert sent.keys() == got.keys() and len(sent) > 10
    assert all(torch.equal(sent[name], got[name]) for name in sent)
    text = "Using the numbers [3, 4], create 12."
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tiny_model_folder, rebuilt)]
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids


def test_the_client_with_xet_commits_the_same_files(hub, final, monkeypatch):
    """xet's own storage protocol has no stand-in here: every file is small enough for the commit itself."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert is_xet_available()
    hub.large = ()
    push(final)
    pushed = hub.files["anna/tiny"]
    pushed.pop(".gitattributes")
    assert pushed == contents(final)


def test_weights_of_another_layout_go_and_foreign_files_stay(hub, final):
    """A stale adapter_config.json or single-file model would be loaded in place of the new shards."""
    (final / "model.safetensors").rename(final / "model-00001-of-00001.safetensors")
    (final / "model.safetensors.index.json").write_text("{}")
    stale = {"model__safetensors": b"old", "adapter_config__json": b"{}", "adapter_model__safetensors": b"old"}
    hub.create("anna/tiny", **stale, notes__txt=b"mine", vae__safetensors=b"mine")
    push(final)
    foreign = {"notes.txt": b"mine", "vae.safetensors": b"mine"}
    assert hub.files["anna/tiny"] == contents(final) | foreign
    (final / "model-00001-of-00001.safetensors").rename(final / "model.safetensors")
    (final / "model.safetensors.index.json").unlink()
    push(final)
    assert hub.files["anna/tiny"] == contents(final) | foreign


def test_without_an_id_the_repository_is_the_runs_name_as_the_hub_allows_it(hub, final, monkeypatch):
    monkeypatch.chdir(final)
    assert push(Path("."), hub_model_id=None) == f"{hub.url}/anna/config-kl-beta0.04_countdown"
    assert hub.files["anna/config-kl-beta0.04_countdown"]["config.json"] == b"{}"
    folder = final.parent.rename(final.parent.with_name("." + "x" * 95 + "-y_countdown")) / "final"
    assert push(folder, hub_model_id=None) == f"{hub.url}/anna/{'x' * 95}"


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


def card_of(hub) -> tuple[dict, str]:
    _, facts, text = hub.files["anna/tiny"]["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(facts), text


def test_the_card_says_what_it_was_made_from_and_shows_the_evaluation(hub, final):
    push(final)
    facts, text = card_of(hub)
    assert facts == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["grpo", "reinforcement-learning"],
        "base_model": ["lab/base"], "datasets": ["openai/gsm8k"],
    }  # fmt: skip
    lines = text.splitlines()
    start = lines.index("| | before | after |")
    assert lines[start + 1 : start + 6] == [
        "|---|---|---|",
        "| eval/greedy | 0.250 ± 0.062 | 0.750 ± 0.125 |",
        "| eval/length | 12.500 | - |",
        "| eval/format | - | 1.000 |",
        "",
    ]
    assert lines[0] == "# tiny" and "![accuracy and reward over the steps](curves.svg)" in lines
    assert "`lab/base` trained with GRPO on `gsm8k`. ± is half of a 95% interval over the problems." in lines


@pytest.mark.parametrize(("config", "fence"), [("a: 1", "```"), ("a: `x`", "```"), ("a: |\n  ````\n", "`````")])
def test_the_config_in_the_card_is_whole_and_its_fence_longer_than_any_in_it(hub, final, config, fence):
    """Markdown closes a block at the first fence of at least its length, indented by up to three spaces."""
    push(final, ABOUT | {"config": config})
    assert card_of(hub)[1].endswith(f"\n\n{fence}yaml\n{config.rstrip()}\n{fence}\n")
    whole = Config()
    whole.data.system_prompt = "Answer like this:\n```\n12\n```\nand nothing else"
    push(final, ABOUT | {"config": dump_config(whole)})
    inside = re.search(r"^(`+)yaml\n(.*?)^\1$", card_of(hub)[1], re.MULTILINE | re.DOTALL)[2]
    assert yaml.safe_load(inside) == yaml.safe_load(dump_config(whole))


def test_an_adapter_is_labelled_as_one(hub, final):
    (final / "adapter_config.json").write_text("{}")
    (final / "README.md").write_text("the card peft writes by itself")
    push(final)
    facts, text = card_of(hub)
    assert facts["library_name"] == "peft" and "by itself" not in text


def test_local_models_and_data_are_named_in_the_text_but_not_to_the_hub(hub, final, tmp_path, monkeypatch):
    (tmp_path / "my" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for model in ("models/countdown-tiny", "my/model", str(tmp_path / "my" / "model"), "~/model", "a/b/c"):
        push(final, ABOUT | {"model": model, "datasets": ["../rows.jsonl", "openai/gsm8k"]})
        facts, text = card_of(hub)
        assert "base_model" not in facts and f"`{model}` trained" in text
        assert facts["datasets"] == ["openai/gsm8k"]


def test_the_curves_are_drawn_to_scale():
    """Panel of 260 x 140 from (60, 180) upwards: step 5 of 0..10 is half way, 0.5 of 0.25..0.75 too."""
    rows = [{"step": 0, "eval/greedy": 0.25}, {"step": 3, "eval/greedy": None}, {"step": 5, "eval/greedy": 0.5}]
    rows += [{"step": 10, "eval/greedy": 0.75, "train/reward": -1.5}]
    drawing = ElementTree.fromstring(draw_curves(rows))
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points") for line in drawing.iter(f"{space}polyline")]
    assert lines == ["60.0,180.0 190.0,110.0 320.0,40.0", "420.0,180.0"]
    labels = [text.text for text in drawing.iter(f"{space}text")]
    assert labels == ["eval/greedy", "0.75", "0.25", "step 0", "10", "train/reward", "-1.5", "-1.5", "step 10", "10"]
    assert "eval/greedy: no values" in draw_curves([]) and "train/reward: no values" in draw_curves([])


# ---------------------------------------------------------------------------------------------------------------------
# What fails after training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "status", "attempts"),
    [
        ("/repos/create", 401, 1),
        ("/repos/create", 403, 1),
        ("/validate-yaml", 400, 1),
        ("/preupload/", 403, 1),
        ("/object/", 403, 1),
        ("/commit/", 403, 1),
        ("/commit/", 500, 3),
        ("/commit/", 429, 3),
    ],
)
def test_a_failed_push_keeps_final_and_says_how_to_push_it(hub, final, part, status, attempts):
    before = contents(final)
    hub.failures[part] = [status] * 100
    with pytest.raises(ConfigError) as caught:
        push(final)
    assert str(caught.value).startswith(f"the model is safe in {final}, but was not pushed to the hub (")
    assert f"the stand-in refuses {part}" in str(caught.value)
    assert shlex.split(str(caught.value).partition("to push it: ")[2])[:4] == ["hf", "upload", "anna/tiny", str(final)]
    assert contents(final).items() >= before.items()
    assert "README.md" in contents(final), "the card travels with a push by hand"
    assert hub.asked(part) == attempts
    assert hub.files.get("anna/tiny", {}).keys() <= {".gitattributes"}


def test_without_a_token_final_stays_and_it_is_told_before_training(hub, final, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match=r"^hub\.push_to_hub: log in with `hf auth login` or set HF_TOKEN.*no token"):
        check_hub(HubConfig(push_to_hub=True))
    assert hub.requests == []
    with pytest.raises(ConfigError, match=r"safe in .*401.*hf upload anna/tiny"):
        push(final)


@pytest.mark.parametrize("reason", ["Connection refused", "offline mode"])
def test_out_of_reach_final_stays_and_it_is_told_before_training(hub, final, monkeypatch, reason):
    if reason == "offline mode":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.shutdown()
        hub.server_close()
    with pytest.raises(ConfigError, match=rf"check the network.*{reason}"):
        check_hub(HubConfig(push_to_hub=True))
    with pytest.raises(ConfigError, match=rf"safe in .*{reason}.*hf upload anna/tiny"):
        push(final)
    assert {"config.json", "model.safetensors", "README.md"} <= contents(final).keys()


@pytest.mark.parametrize("part", ["/repos/create", "/tree/", "/object/", "/commit/"])
def test_a_passing_failure_is_tried_again(hub, final, part, capsys):
    configure_logging()
    hub.failures[part] = [503]
    push(final)
    assert hub.files["anna/tiny"].items() >= contents(final).items()
    by_the_client_itself = part in ("/object/", "/tree/")
    assert ("next attempt in 0 s" in capsys.readouterr().out) != by_the_client_itself


def test_the_command_in_the_message_pushes_the_same_files_and_removes_stale_weights(hub, final):
    for part, earlier in (("/repos/create", {}), ("/commit/", {"adapter_config__json": b"{}"})):
        if earlier:
            hub.create("anna/tiny", **earlier)
        hub.failures[part] = [403]
        with pytest.raises(ConfigError) as caught:
            push(final)
        program, *arguments = shlex.split(str(caught.value).partition("to push it: ")[2])
        assert program == "hf"
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        pushed = hub.files["anna/tiny"]
        assert {name: pushed[name] for name in pushed.keys() - {".gitattributes"}} == contents(final)
        assert hub.visibility["anna/tiny"] == ("public" if earlier else "private"), "a new one is private"


# ---------------------------------------------------------------------------------------------------------------------
# What is found before training
# ---------------------------------------------------------------------------------------------------------------------


def test_without_push_nobody_is_asked(hub):
    check_hub(HubConfig())
    assert hub.requests == []


@pytest.mark.parametrize("name", [None, "anna/tiny", "lab/tiny"])
def test_a_token_that_can_write_passes(hub, name):
    check_hub(HubConfig(push_to_hub=True, hub_model_id=name))
    assert hub.asked("/api/whoami-v2") == 1 and hub.files == {}


@pytest.mark.parametrize(
    ("status", "advice", "reason"),
    [
        (401, "log in with", "HF_TOKEN environment variable is invalid"),
        (403, "log in with", "403"),
        (500, "check the network", "500"),
        (404, "check the network", "404"),
    ],
)
def test_a_hub_that_refuses_is_told_before_training(hub, status, advice, reason):
    hub.failures["/api/whoami-v2"] = [status]
    with pytest.raises(ConfigError, match=rf"^hub\.push_to_hub: {advice}.*{reason}"):
        check_hub(HubConfig(push_to_hub=True))


def test_a_token_that_can_only_read_and_a_foreign_owner_are_told_before_training(hub):
    foreign, token = HubConfig(push_to_hub=True, hub_model_id="bob/tiny"), hub.account["auth"]["accessToken"]
    with pytest.raises(
        ConfigError, match=r"^hub\.hub_model_id: the token can not write for bob; it can for anna, lab$"
    ):
        check_hub(foreign)
    token["role"] = "read"
    with pytest.raises(ConfigError, match="the token can only read"):
        check_hub(HubConfig(push_to_hub=True))
    token["role"] = "fineGrained"  # whose groups the hub need not list
    check_hub(foreign)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hub_model_id": "anna/tiny"}, "c.yaml: hub.hub_model_id needs hub.push_to_hub: true"),
        ({"push_to_hub": True, "hub_model_id": "tiny"}, "c.yaml: hub.hub_model_id must be owner/name"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "must be owner/name"),
        ({"push_to_hub": True, "hub_model_id": "anna/"}, "must be owner/name"),
        ({"push_to_hub": True, "hub_model_id": "anna/a--b"}, "must be owner/name"),
        ({"push_to_hub": True, "hub_model_id": "anna/t\nx"}, "must be owner/name"),
    ],
)
def test_wrong_keys_are_told_when_the_config_is_read(keys, message):
    with pytest.raises(ConfigError) as caught:
        check_hub_keys(HubConfig(**keys), "c.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("keys", [{}, {"push_to_hub": True}, {"push_to_hub": True, "hub_model_id": "anna/T_0.5b-k"}])
def test_right_keys_pass(keys):
    check_hub_keys(HubConfig(**keys), "c.yaml")


@settings(max_examples=300, deadline=None)
@given(st.text("aZ0._-/é\n", max_size=12))
@example("a/b.git")
@example("a" * 96 + "/" + "b" * 96)
@example("a" * 97 + "/b")
@example("a/" + "b" * 97)
@example("b" * 97)
def test_names_are_judged_as_the_hubs_client_judges_them(name):
    try:
        validate_repo_id(name)
        allowed = True
    except HFValidationError:
        allowed = False
    assert bool(hub_module.HUB_ID.fullmatch(name)) == allowed
