"""What every result carries, and how times are compared."""

from __future__ import annotations

import stat
import subprocess

import pytest

from echogen.bench import harness


def test_a_result_says_where_it_comes_from():
    found = harness.environment()
    assert found["device"] == "cpu" and found["gpu"] is None and found["cpus"] >= 1
    assert {"python", "torch", "transformers", "triton", "cuda", "cupy"} <= found["versions"].keys()
    assert found["commit"] is None or len(found["commit"]) == 40


def test_results_make_no_checkout_dirty(tmp_path, monkeypatch):
    """A run of many benchmarks leaves the first ones' results there before the others begin."""
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "bench" / "harness.py"))
    results = tmp_path / "bench" / "results" / "gpu"
    results.mkdir(parents=True)
    (tmp_path / "code.py").write_text("")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "code")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (results / "doctor.json").write_text("{}")
    found = harness.environment()
    assert len(found["commit"]) == 40 and found["dirty"] is False
    (tmp_path / "new.py").write_text("")
    assert harness.environment()["dirty"] is True


def test_switches_are_told(monkeypatch):
    for name in harness.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    assert harness.environment()["switches"] == {}
    monkeypatch.setenv("ECHOGEN_PDL", "1")
    assert harness.environment()["switches"] == {"ECHOGEN_PDL": "1"}


def test_processors_of_one_name_are_told_apart(tmp_path):
    info = tmp_path / "cpuinfo"
    one = "processor\t: {}\ncpu family\t: 25\nmodel\t\t: {}\nmodel name\t: AMD EPYC\n\n"
    info.write_text(one.format(0, 17) + one.format(1, 17))
    assert harness.cpu_model(info) == "AMD EPYC (family 25, model 17)"
    info.write_text("model name : Some CPU\n")
    assert harness.cpu_model(info) == "Some CPU"
    info.write_text("processor : 0\nBogoMIPS : 50.00\n")  # an ARM says no name
    assert harness.cpu_model(info) == harness.cpu_model(tmp_path / "none")


def test_a_copy_without_git_can_be_told_its_commit(monkeypatch):
    monkeypatch.setattr(harness, "_git", lambda *_: None)
    assert harness.environment()["commit"] is None
    monkeypatch.setenv("ECHOGEN_COMMIT", "0123abc")
    found = harness.environment()
    assert (found["commit"], found["dirty"]) == ("0123abc", False)


@pytest.mark.parametrize(
    ("script", "wanted"),
    [
        ("echo '580.1, 70.1 W, 700.0 W, 1980 MHz, 3201 MHz, 30, 0 %'", "1980 MHz"),
        ("echo no devices were found; exit 6", None),
        ("echo 1, 2", None),
    ],
)
def test_the_state_of_a_gpu(script, wanted, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = harness.gpu_state()
    assert (found is None) if wanted is None else (found["clocks.sm"] == wanted)


def test_contestants_run_in_turn():
    said = []
    calls = {"a": lambda: said.append("a"), "b": lambda: said.append("b")}
    times = harness.alternate(calls, 3, after=lambda: said.append("."))
    assert said == ["a", ".", "b", "."] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def test_quantiles():
    found = harness.quantiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found["median"] == 3
    assert found["q20"] == pytest.approx(1.8) and found["q80"] == pytest.approx(4.2)


def test_a_package_that_is_absent_has_no_version():
    assert harness.version("no-such-package-anywhere") is None
