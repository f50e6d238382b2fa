"""Is a run really on TensorBoard's page? Two short runs, TensorBoard, a browser, and one picture.

    uv run python -m benchmarks.tensorboard_page --output page.png

The last line of stdout is one JSON document: what was found on which tab; the exit code is 1 if something is missing.
"""

import argparse
import base64
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SECONDS_A_PAGE = 60.0
RUNS = ("config_kl_beta0.04_tiny", "config_none_tiny")
# what has to be on a tab; the picture is of the last one
TABS = {
    "timeseries": ["eval/greedy", *(f"{name}_countdown/tb" for name in RUNS)],
    "text": ["completions/text_summary", "prompt", "completion", "reward", "<answer>"],
    "hparams": ["loss_type", "beta", "eval/pass@1", "train/reward", *(f"{name}_countdown" for name in RUNS)],
    "custom_scalars": ["Does it learn?", "held-out accuracy", "Is it healthy?", "Is it fast?"],
}
CURVES = {"timeseries": 5, "custom_scalars": 12}  # the latter: two runs with 3 tags each in the first two charts
PAGE = """(() => {
  const found = {text: [], curves: 0};
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) return found.text.push(node.data);
    if (["SCRIPT", "STYLE"].includes(node.tagName) || (node.checkVisibility && !node.checkVisibility())) return;
    if (node.tagName === "path" && (node.getAttribute("d") || "").split("L").length > 4) found.curves++;
    [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes].forEach(walk);
  };
  walk(document.body);
  return {text: found.text.join("").replace(/\\s/g, ""), curves: found.curves};
})()"""


class Browser:
    """Headless chromium and its DevTools protocol: JSON messages that end with a NUL, on its descriptors 3 and 4."""

    def __init__(self, program: str, profile: str):
        ends = (*os.pipe(), *os.pipe())
        to_read, self.writer, self.reader, to_write = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends]  # above 4
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        command = [program, *options, f"--user-data-dir={profile}", "about:blank"]

        def as_3_and_4() -> None:
            os.dup2(to_read, 3)
            os.dup2(to_write, 4)

        self.process = subprocess.Popen(command, preexec_fn=as_3_and_4, pass_fds=(3, 4), stderr=subprocess.DEVNULL)
        for end in (*ends, to_read, to_write):
            os.close(end)
        self.number, self.buffer, self.session, self.target = 0, b"", {}, None
        self.watchdog = threading.Timer(10 * SECONDS_A_PAGE, self.process.kill)
        self.watchdog.start()  # reading ends with the process

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        answer = {}
        while answer.get("id") != self.number:  # the rest are events
            while b"\0" not in self.buffer:
                self.buffer += os.read(self.reader, 1 << 16) or sys.exit("chromium ended before the pages were seen")
            line, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(line)
        return answer.get("result", {})  # none where the page is just being replaced

    def open(self, url: str) -> None:
        """A page of its own in place of the one before."""
        self.session, before = {}, self.target
        self.target = self.call("Target.createTarget", url=url)["targetId"]
        if before:
            self.call("Target.closeTarget", targetId=before)
        self.session = self.call("Target.attachToTarget", targetId=self.target, flatten=True)
        self.call("Emulation.setDeviceMetricsOverride", width=1500, height=1140, deviceScaleFactor=1, mobile=False)


def see(browser: Browser, url: str, wanted: list[str], curves: int) -> dict:
    """What of the wanted is on the page, once it is all there or the time is over."""
    browser.open(url)
    end = time.monotonic() + SECONDS_A_PAGE
    while True:
        answer = browser.call("Runtime.evaluate", expression=PAGE, returnByValue=True)
        page = answer.get("result", {}).get("value", {"text": "", "curves": 0})
        missing = [text for text in wanted if "".join(text.split()) not in page["text"]]
        ok = not missing and page["curves"] >= curves
        if ok or time.monotonic() > end:
            return {"ok": ok, "missing": missing, "curves": page["curves"], "wanted": wanted}
        time.sleep(0.5)


def train(work: Path, steps: int) -> None:
    """The runs to look at."""
    from src.config import load_config
    from src.run.console import configure_console
    from src.train_grpo import run_training

    configure_console(quiet=True)
    overrides = [f"training.max_steps={steps}", f"training.eval_interval={max(3, steps // 10)}"]
    overrides += ["training.batch_size=128", "training.num_questions_per_batch=16", "data.eval_size=128"]
    for name in RUNS:
        config = load_config(PROJECT / "configs" / "configs_tiny" / f"{name}.yaml", overrides)
        run_training(config, "countdown", work)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE.png")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        print("there is no chromium here; install it, on Debian with `apt-get install chromium`", file=sys.stderr)
        return 2
    tabs: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        train(Path(scratch), arguments.steps)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = ["-m", "tensorboard.main", "--logdir", "runs", "--port", str(port), "--host", "127.0.0.1"]
        server = subprocess.Popen([sys.executable, *command], cwd=scratch, stderr=subprocess.DEVNULL)
        browser = Browser(program, f"{scratch}/profile")
        try:
            for tab, wanted in TABS.items():
                tabs[tab] = see(browser, f"http://127.0.0.1:{port}/#{tab}", wanted, CURVES.get(tab, 0))
            time.sleep(3)  # until the last animation is over
            picture = browser.call("Page.captureScreenshot", format="png")["data"]
            Path(arguments.output).write_bytes(base64.b64decode(picture))
        finally:
            browser.watchdog.cancel()
            for process in (browser.process, server):
                process.kill()
                process.wait()
    print(json.dumps({"benchmark": "tensorboard_page", "steps": arguments.steps, "tabs": tabs}))
    return 0 if all(tab["ok"] for tab in tabs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
