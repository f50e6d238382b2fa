"""benchmarks/frontier.py: what it compares, by hand; a sweep that is stopped; and that a run of it runs."""

import json
import sys

import pytest

from benchmarks import frontier


def line_of(*points: tuple[float, float], seed: int = 0, axis: str = "coverage") -> dict:
    """Points of a line, (accuracy, value) each."""
    return {f"beta {index}": [{"seed": seed, "metrics": {"pass@1": x, axis: y}}] for index, (x, y) in enumerate(points)}


def test_the_gap_is_the_mean_distance_of_a_lines_points_at_equal_accuracy():
    other = line_of((0.8, 1.0), (0.4, 3.0))  # 3 at 0.4 to 1 at 0.8
    assert frontier.gap(line_of((0.5, 3.5), (0.7, 2.5)), other, "coverage") == pytest.approx([1.0])
    assert frontier.gap(line_of((0.6, 1.5)), other, "coverage") == pytest.approx([-0.5])  # one point is a line too
    assert frontier.gap(line_of((0.2, 4.0), (0.6, 2.0)), other, "coverage") == pytest.approx([0.0])  # from 0.4 on
    assert frontier.gap(line_of((0.9, 4.0)), other, "coverage") == pytest.approx([3.0])  # level beyond the last point
    assert frontier.gap(line_of((0.3, 4.0)), other, "coverage") == []  # nothing to compare
    both = {"a": line_of((0.6, 2.5))["beta 0"] + line_of((0.6, 3.0), seed=1)["beta 0"]}
    others = {"a": other["beta 0"], "b": other["beta 1"]}
    assert frontier.gap(both, others, "coverage") == pytest.approx([0.5])  # a seed is compared with itself alone


def test_intervals_are_students():
    value, half = frontier.interval([1.0, 2.0, 3.0])
    assert value == 2.0 and half == pytest.approx(4.302653 / 3**0.5)


def test_a_dagger_is_for_what_is_sure_among_all_figures():
    """t = 3.464 of two degrees of freedom has p = 0.0742, 12.7 of one 0.05."""
    value, half = frontier.interval([1.0, 2.0, 3.0])
    row = {"line": "a", "against": "b", "axis": "kl", "difference": value, "half": half, "seeds": 3}
    assert frontier.chance(row) == pytest.approx(0.0742, abs=1e-4)
    assert frontier.chance(row | {"difference": 1.0, "half": 1.0, "seeds": 2}) == pytest.approx(0.05)
    for seeds, marked in ((3, "**+1.000 ± 0.300** "), (9, "**+1.000 ± 0.300**† ")):
        sure = row | {"difference": 1.0, "half": 0.3, "seeds": seeds}
        text = frontier.differences([sure, *[row | {"axis": str(k)} for k in range(40)]])
        assert marked in text and "**+2" not in text


def test_statements_pair_seeds_and_mark_only_what_is_sure():
    lines = {name: {} for name in ("none", "kl", "maxent")}
    base = dict.fromkeys(frontier.AXES, 0.0)
    for seed, shift in enumerate((0.0, 0.1, 0.2)):
        for name, above in (("none", 0.0), ("kl", 0.5 + 0.01 * shift)):
            for label, runs in line_of((0.4, 3 + shift + above), (0.8, 1 + shift + above), seed=seed).items():
                runs[0]["metrics"] |= dict.fromkeys(("pass@64", "pass@8", "kl", "kl_forward", "forgetting"), shift)
                lines[name].setdefault(label, []).extend(runs)
        for tau in (0.0, 0.1):
            metrics = {
                "pass@1": 0.5,
                "pass@8": 0.7 + tau * (1 + shift),
                "pass@64": shift,
                "coverage": tau * (shift - 0.1),
            }
            lines["maxent"].setdefault(f"tau {tau}", []).append({"seed": seed, "metrics": metrics})
    found = {
        (row["line"], row["axis"]): row for row in frontier.statements({k: lines[k] for k in ("none", "kl")}, base)
    }
    assert found["kl", "coverage"]["difference"] == pytest.approx(0.501) and found["kl", "coverage"]["half"] < 0.01
    assert found["kl", "pass@64"]["difference"] == 0
    taus = {row["axis"]: row for row in frontier.statements({"maxent": lines["maxent"]}, base)}
    assert taus["pass@8"]["difference"] == pytest.approx(0.11) and taus["pass@8"]["seeds"] == 3
    text = frontier.differences(list(taus.values()))
    assert "**+0.110" in text and "**+0.000" not in text and "| maxent tau 0.1 | tau 0.0 |" in text


def test_a_run_is_known_by_everything_that_is_given(tmp_path, monkeypatch):
    point = frontier.LINES["kl"]["beta 0.1"]
    settings = frontier.settings_of(point, 0, 4)
    name = frontier.fingerprint(settings)
    assert name == frontier.fingerprint(json.loads(json.dumps(settings)))
    others = [frontier.settings_of(point, 1, 4), frontier.settings_of(point | {"beta": 0.2}, 0, 4),
              settings | {"problems": 8}]  # fmt: skip
    assert len({name, *map(frontier.fingerprint, others)}) == 4
    other = tmp_path / "other.yaml"
    other.write_text(frontier.CONFIG.read_text().replace("../configs", str(frontier.PROJECT / "configs")))
    monkeypatch.setattr(frontier, "CONFIG", other)
    assert frontier.fingerprint(settings) == name, "the file may lie elsewhere"
    other.write_text(other.read_text().replace("3e-4", "2e-4"))
    assert frontier.fingerprint(settings) != name


def test_all_points_are_configs_and_no_two_are_the_same_run():
    settings = [frontier.settings_of(p, 0, 4) for points in frontier.LINES.values() for p in points.values()]
    assert len({frontier.fingerprint(each) for each in settings}) == len(settings) == 34


@pytest.fixture
def sweep(monkeypatch, capsys, tmp_path):
    """Runs the sweep with runs that take no time, of which the n-th fails; gives its document, and what was run."""

    def go(*words: str, fails: int | None = None) -> tuple[dict | None, list[str]]:
        taken = []

        def take(line, label, settings, results):
            if len(taken) == fails:
                raise SystemExit("stopped")
            taken.append(f"{line} {label} {settings['training']['random_seed']}")
            metrics = dict.fromkeys(frontier.AXES, 0.5 + 0.01 * len(taken))
            row = {"run": frontier.fingerprint(settings), "line": line, "point": label, "metrics": metrics,
                   "seed": settings["training"]["random_seed"], "settings": settings}  # fmt: skip
            frontier.append(row, results)
            return row

        monkeypatch.setattr(frontier, "take", take)
        options = ["--results", str(tmp_path / "r.jsonl"), "--processes", "1", *words]
        monkeypatch.setattr(sys, "argv", ["frontier", *options])
        try:
            frontier.main()
        except SystemExit:
            return None, taken
        return json.loads(capsys.readouterr().out.splitlines()[-1]), taken

    return go


def test_a_sweep_that_is_stopped_goes_on_and_a_changed_setting_is_another_point(sweep, tmp_path):
    words = ("--lines", "none", "kl", "--seeds", "2")
    document, taken = sweep(*words, fails=3)
    assert document is None and len(taken) == 3
    with (tmp_path / "r.jsonl").open("a") as file:
        file.write('{"run": "cut o')  # killed while it wrote
    document, later = sweep(*words)
    assert document["runs"] == 17 and document["new"] == 14 and not set(taken) & set(later)
    assert sweep(*words)[0]["new"] == 0
    assert sweep(*words, "--problems", "8")[0]["new"] == 17
    base, lines = frontier.read_lines(tmp_path / "r.jsonl")
    assert base["pass@1"] == 0.51 and set(lines) == {"none", "kl"}
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert frontier.read_lines(tmp_path / "none.jsonl") == ({}, {})
    assert len(lines["kl"]["beta 0.1"]) == 2, "those of 8 problems are not mixed with those of 256"
    shown = sweep("--show", str(tmp_path / "r.jsonl"))[0]
    assert shown["new"] == 0 and shown["runs"] == 17
    assert sweep("--show", str(tmp_path / "none.jsonl")) == (None, [])


def test_what_is_committed_is_of_todays_points():
    base, lines = frontier.read_lines(frontier.PROJECT / "benchmarks" / "frontier.jsonl")
    assert 0.2 < base["pass@1"] < 0.3
    assert {line: list(points) for line, points in lines.items()} == {k: list(v) for k, v in frontier.LINES.items()}
    for line, points in lines.items():
        for label, rows in points.items():
            assert [row["seed"] for row in rows] == list(range(len(rows))) and len(rows) >= 2, f"{line} {label}"
            assert rows[0]["run"] == frontier.fingerprint(rows[0]["settings"]), "settings have changed: sweep again"


def test_stopped_before_its_first_step_none_is_the_base():
    base = dict.fromkeys(("pass@64", "pass@8", "kl", "kl_forward", "forgetting"), 0.0) | {
        "pass@1": 0.2,
        "coverage": 1.0,
    }
    lines = {"none": {}, "kl": {}}
    for name, points in (("none", [(0.6, 3.0)]), ("kl", [(0.4, 2.5)])):
        for seed in (0, 1):
            for label, runs in line_of(*points, seed=seed).items():
                runs[0]["metrics"] = base | runs[0]["metrics"]
                lines[name].setdefault(label, []).extend(runs)
    (row,) = [row for row in frontier.statements(lines, base) if row["axis"] == "coverage"]
    assert row["difference"] == pytest.approx(0.5) and row["half"] == 0 and row["seeds"] == 2


@pytest.mark.slow  # two processes that import everything
def test_a_run_of_it_trains_and_measures_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["frontier", "--quick", "--lines", "none", "--results", str(tmp_path / "r.jsonl")])
    frontier.main()
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    [metrics] = document["points"]["none max_steps 15"]
    assert document["new"] == 2 and set(frontier.AXES) <= set(metrics)
    for name in ("kl", "kl_forward", "forgetting"):
        assert abs(document["base"][name]) < 1e-5 < abs(metrics[name])
    assert 0 < document["base"]["coverage"] <= 64 * document["base"]["pass@1"]
