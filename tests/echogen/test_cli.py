"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import echogen
from echogen import __version__
from echogen.cli import main
from echogen.commands.options import ModelOptions
from echogen.commands.output import InputError, folder_for
from echogen.doctor import LIBRARIES
from echogen.engine.engine import Engine
from echogen.engine.layout import Layout, LayoutError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.json"))


# A child finds the package where this process found it, installed or not.
CHILD = os.environ | {"PYTHONPATH": str(Path(echogen.__file__).parents[1])}


def shell(*argv: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=CHILD, capture_output=True, text=True, timeout=60)


# --- usage ------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy(tmp_path):
    probe = (
        "import sys\nfrom echogen.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        # CPU time: a busy machine stretches the wall clock, not the work.
        "import time\nassert time.process_time() < 1, time.process_time()"
    )
    done = shell("-c", probe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in ("doctor", "generate", "ground", "cycle", "eval", "train", "bench"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "argv",
    [["generate"], ["cycle", "--help"], ["train", "pmtp", "--help"], ["bench", "engine", "-h"]],
)
def test_help_of_commands(run, argv):
    shown = run(*argv[:-1], "--help")
    assert shown.code == 0 and "{None}" not in shown.out


def test_texts_of_options_run_on_and_name_no_default_where_there_is_none(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    told = run("bench", "quality", "--help").out
    assert "(default: None)" not in told and "(default: tiny)" in told
    (line,) = (line for line in told.splitlines() if "next to it" in line)
    assert "quality-RECIPE" in line  # which begins a line of the source


def test_titles_of_narrow_tables_are_whole(run, layout):
    assert f"{layout}\n" in run("layouts", "--check", layout).out


def test_quality_names_no_folder_of_an_installed_package(run, monkeypatch, tmp_path):
    monkeypatch.setattr("echogen.bench.quality.__file__", str(tmp_path / "quality" / "x.py"))
    assert run("bench", "quality", "--list").refused("--out")
    assert run("bench", "quality", "--list", "--out", tmp_path).code == 0


def test_version(run):
    assert run("--version").out == f"echogen {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["doctor, generate"]),
        (["paint"], ["Unrecognized options: paint", "doctor, generate"]),
        (["generate"], ["--layout PATH", "see echogen generate --help"]),
        (["generate", "--steps", "4"], ["--layout PATH", "Unrecognized options: --steps 4"]),
        (["generate", "--layout", "a.json", "--sed", "4"], ["--sed, 4", "you meant --seed"]),
        (["train"], ["vq, pmtp"]),
        (["train", "djo"], [": echogen train djo needs --out PATH, --from MODEL-OR-RUN; see "]),
        (["generate", "--layout", "a.json", "--cfg-span", "3"], ["--cfg-span: '3' is not INT INT"]),
        (["generate", "--layout", "a.json", "--seed", "x"], ["--seed: 'x' is no whole number;"]),
        (["generate", "--layout", "a.json", "--top-k", "x"], ["--top-k: 'x' is no whole number;"]),
        (["eval", "--cfg", "x"], ["--cfg: 'x' is no number;"]),
        (["serve", "--timeout", "soon"], ["--timeout: 'soon' is no number;"]),
        (["ground", "--image", "a.png", "--expr", "e", "--features", "words"],
         ["invalid choice 'words' for argument '--features'", "'tokens', 'pixels'"]),
        (["bench", "engine", "--peer", "vllm"], ["'vllm'", "'transformers'"]),
    ],
)  # fmt: skip
def test_usage_errors_leave_with_2_and_one_line(run, argv, words):
    assert run(*argv).refused(*words)


def test_a_box_of_an_unknown_form_is_still_one_line(capsys):
    from echogen.commands.usage import told_in_one_line

    with pytest.raises(SystemExit), told_in_one_line():
        print("== Bad ==\n| the value\n| 'x' | is bad |\n", file=sys.stderr)
        sys.exit(2)
    assert capsys.readouterr().err == "echogen: == Bad == the value 'x' | is bad\n"
    with told_in_one_line():
        print("a warning\nof two lines", file=sys.stderr)
    assert capsys.readouterr().err == "a warning\nof two lines\n"


def test_hints_name_extras_that_the_checkout_has():
    """The package is on no index, so what is missing is installed from the checkout."""
    root = Path(echogen.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    hint = re.compile(r"pip install [^\n]*?([\w.]*)\[(\w+)\]")
    for folder in ("echogen", "engine", "kernels", "train", "bench"):
        for file in (root / folder).rglob("*.py"):
            for place, extra in hint.findall(file.read_text()):
                assert place == "." and extra in project["optional-dependencies"], file


def test_exit_codes_reach_the_shell(model, layout, tmp_path):
    bad = shell("-m", "echogen", "generate", "--layout", "absent.json", cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr == "echogen: absent.json: cannot be read (No such file or directory)\n"
    good = shell(
        "-m", "echogen", "generate", "--layout", layout, "--model", model, "--json", cwd=tmp_path
    )
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout.splitlines()[-1])["files"] == {"image": "image.png"}
    assert good.stderr == ""
    assert Image.open(tmp_path / "image.png").size == (64, 64)


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(Layout, "load", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the interpreter prints it and leaves with 1
        main(["generate", "--layout", "a.json"])


@pytest.mark.parametrize("argv", [("generate", "--help"), ("--version",)])
def test_a_reader_that_leaves_gets_no_traceback(argv, tmp_path):
    """As `echogen generate --help | head -3` is one."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "echogen", *argv]
    done = subprocess.run(
        command, cwd=tmp_path, env=CHILD, stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_process_without_stdout_does_its_work(tmp_path, monkeypatch):
    """As of `echogen … >&-`: Python has None there."""
    monkeypatch.setattr(sys, "stdout", None)
    out = tmp_path / "layouts.jsonl"
    assert main(["layouts", "--random", "2", "--out", str(out)]) == 0 and out.is_file()


def test_interruption(run, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Layout, "load", interrupted)
    done = run("generate", "--layout", "a.json")
    assert (done.code, done.err) == (130, "echogen: interrupted\n")


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", "-1"], ["--seed -1"]),
        (["--seed", 2**63], ["--seed"]),
        (["--temperature", "-0.5"], ["temperature", "-0.5"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--cfg", "inf"], ["cfg", "inf"]),
        (["--top-k", "-1"], ["--top-k", "-1"]),
        (["--top-p", "0"], ["--top-p", "0.0"]),
        (["--cfg-start", "2"], ["--cfg-start = 2.0", "linear"]),
        (["--cfg-span", "9", "9"], ["--cfg-span = (9, 9)"]),
        (["--cfg-span", "9", "20", "--cfg", "1"], ["--cfg-span = (9, 20)", "guides nothing"]),
        (["--cfg-span", "9", "65"], ["--cfg-span = (9, 65)", "64 positions"]),
        (["--negative", "absent.json"], ["absent.json"]),
        (["--negative", "{layout}", "--cfg", "1"], ["--negative", "give --cfg above 1"]),
        (["--out", "image.gif.txt"], ["--out", ".txt"]),
        (["--out", "absent/image.png"], ["--out", "absent"]),
        (["--model", "enormous"], ["enormous", "no such folder"]),
        (["--model", "."], ["config.json is missing"]),
        (["--device", "toaster"], ["toaster"]),
        (["--device", "cuda:999"], ["cuda:999"]),
    ],
)
def test_generate_refuses(run, layout, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    given = [str(option).format(layout=layout) for option in options]
    assert run("generate", "--layout", layout, *given).refused(*words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "argv", "line"),
    [
        ("ECHOGEN_NATIVE", ["generate", "--layout", "{layout}"], "ECHOGEN_NATIVE=2: write 0"),
        ("ECHOGEN_NATIVE", ["serve", "--port", "0"], "ECHOGEN_NATIVE=2: write 0"),
        (
            "WORLD_SIZE",
            ["train", "djo", "--any-stage", "--any-shape", "--out", "x"],
            "WORLD_SIZE = 2, but",
        ),
    ],
)
def test_an_environment_that_cannot_be_is_refused(
    run, model, layout, tmp_path, monkeypatch, name, argv, line
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "2")
    which = "--from" if argv[0] == "train" else "--model"
    done = run(*(word.format(layout=layout) for word in argv), which, model)
    assert done.refused() and done.err.startswith(f"echogen: {line}"), done


@pytest.mark.parametrize(
    ("expr", "word"), [("a </box> circle", "</box>"), ("word " * 2000, "tokens")]
)
def test_layouts_that_no_prompt_can_hold(run, model, tmp_path, expr, word):
    """They are refused when drawing begins; a folder made for the pictures goes again."""
    path = tmp_path / "layout.json"
    objects = [{"expr": expr, "box": [0.1, 0.1, 0.5, 0.5]}]
    path.write_text(json.dumps({"caption": "a circle", "objects": objects}))
    for command, out in (("generate", "image.png"), ("cycle", "new/folder")):
        done = run(command, "--layout", path, "--model", model, "--out", tmp_path / out)
        assert done.refused(word), done
        assert sorted(tmp_path.iterdir()) == [path]


def test_folders_stay_with_what_they_hold(tmp_path):
    """Those that were there before, and those that something was written to."""
    there, file = tmp_path / "there", tmp_path / "there" / "new" / "written"
    there.mkdir()
    for held in ([], [file.parent, file]):
        with pytest.raises(KeyboardInterrupt), folder_for(file.parent / "deep"):
            if held:
                file.touch()
            raise KeyboardInterrupt
        assert sorted(there.rglob("*")) == held
    nameless = there / "other" / ("x" * 300)
    with pytest.raises(InputError, match="cannot be made"), folder_for(nameless):
        pytest.fail("worked first")
    assert sorted(there.iterdir()) == [file.parent]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cycle", "--layout", "{layout}", "--out", "{file}"], ["--out"]),
        (["cycle", "--layout", "{layout}", "--out", "x", "--samples", "0"], ["--samples 0"]),
        (["cycle", "--layout", "{layout}", "--out", "x", "--samples", "-3"], ["--samples -3"]),
        (["cycle", "--layout", "{layout}", "--out", "x", "--samples", "9999"], ["--samples"]),
        (["ground", "--image", "absent.png", "--expr", "a star"], ["absent.png"]),
        (["ground", "--image", "{layout}", "--expr", "a star"], ["no picture"]),
        (["ground", "--image", "{wide}", "--expr", "a star"], ["20x10", "square"]),
        (["ground", "--image", "{square}"], ["--expr"]),
        (["ground", "--image", "{square}", "--expr", " "], ["--expr"]),
        (["ground", "--image", "{square}", "--expr", "a\nstar"], ["--expr", "U+000A"]),
        (["ground", "--image", "{square}", "--expr", "赤い\u3000<ref>"], ["<ref>"]),
        (["ground", "--image", "{square}", "--expr", "<ref>"], ["<ref>"]),
        (["ground", "--image", "{square}", "--expr", "word " * 2000], ["tokens"]),
        (
            ["ground", "--image", "{square}", "--expr", "a star", "--features", "pixels"],
            ["pixels", "not trained"],
        ),
        (["eval", "--split", "exam"], ["--split exam", "train, val, test"]),
        (["eval", "--count", "0"], ["--count 0"]),
        (["eval", "--seed", "-1"], ["--seed -1"]),
        (["eval", "--cfg", "-2"], ["cfg", "-2"]),
        (["eval", "--out", "table.txt"], ["--out", ".json"]),
        (["train", "vq", "--out", "x", "--recipe", "huge"], ["--recipe huge", "tiny"]),
        (["train", "vq", "--out", "x", "--steps", "0"], ["--steps 0"]),
        (["train", "vq", "--out", "x", "--resume"], ["no run"]),
        (["train", "vq", "--out", "{run}"], ["--resume"]),
        (["train", "pmtp", "--out", "x", "--vq", "absent"], ["--vq absent"]),
        (["train", "pmtp", "--out", "x", "--vq", "{broken}"], ["--vq"]),
        (["bench", "engine", "--repeats", "0"], ["--repeats 0"]),
        (["bench", "engine", "--cfg", "nan"], ["--cfg nan"]),
        (["bench", "engine", "--cfg", "1e39"], ["--cfg 1e+39", "at most 10000"]),
        (["bench", "train", "--stage", "djo", "--recipe", "huge"], ["--recipe huge", "tiny"]),
        (
            ["bench", "train", "--stage", "djo", "--recipe", "janus_pro_1b", "--batch", "3"],
            ["--batch 3", "multiple of 2"],
        ),
        (["doctor", "--model", "enormous"], ["enormous"]),
        (["eval", "--fp8"], ["--fp8 with --device cpu", "leave it out"]),
        (["eval", "--fp8-cache"], ["--fp8-cache with --device cpu"]),
    ],
)
def test_commands_refuse(run, model, layout, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 10)).save("wide.png")
    Image.new("RGB", (64, 64)).save("square.png")
    for name, file in (("run", "state.pt"), ("broken", "config.json")):
        Path(name).mkdir()
        Path(name, file).write_text("{}")
    names = {"layout": layout, "file": layout, "wide": "wide.png", "square": "square.png"}
    filled = [a.format(**names, run="run", broken="broken") for a in argv]
    if argv[0] in ("cycle", "ground", "eval"):
        filled += ["--model", str(model)]
    before = sorted(tmp_path.rglob("*"))
    done = run(*filled)
    assert done.refused(*words), done
    assert sorted(tmp_path.rglob("*")) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
NUMBER = st.floats() | st.integers(-3, 3) | st.sampled_from([0.2, 0.8]) | JSON
NEARLY = st.fixed_dictionaries(
    {
        "caption": st.just("a red circle") | st.text(max_size=5),
        "objects": st.lists(
            st.fixed_dictionaries(
                {
                    "expr": st.just("a star") | st.text(max_size=5) | JSON,
                    "box": st.lists(NUMBER, min_size=3, max_size=5) | JSON,
                }
            ),
            max_size=3,
        ),
    },
    optional={"size": st.lists(NUMBER, max_size=3) | JSON, "extra": JSON},
)
TEXTS = st.text(max_size=30).map(str.encode) | st.binary(max_size=30)
FILES = (NEARLY | JSON).map(lambda data: json.dumps(data).encode()) | TEXTS


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=FILES)
def test_broken_layout_files(run, tmp_path, content):
    path, out = tmp_path / "layout.json", tmp_path / "image.png"
    path.write_bytes(content)
    try:
        Layout.load(path)
        return
    except LayoutError:
        pass
    done = run("generate", "--layout", path, "--out", out)
    assert done.refused(path.name), done
    assert sorted(tmp_path.iterdir()) == [path]


# --- what is printed and written --------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_layouts_of_the_world(path):
    from echogen.train.data.grammar import parse_expression

    for obj in Layout.load(path).objects:
        parse_expression(obj.expr)


def test_generate(run, model, layout, tmp_path):
    out = tmp_path / "picture.png"
    options = ["--layout", layout, "--model", model, "--out", out, "--json"]
    done = run("generate", *options, "--top-k", "5", "--seed", "7")
    assert (done.code, done.err) == (0, "")
    first = out.read_bytes()
    assert Image.open(out).size == (64, 64)
    # What is not asked for is the checkpoint's own.
    sampling = {"temperature": 0.8, "cfg": 1.5, "top_k": 5, "top_p": 1.0, "unconditional": "pad"}
    assert done.data["sampling"].items() >= sampling.items()
    assert (done.data["seed"], done.data["model"]) == (7, str(model))
    run("generate", *options, "--top-k", "5", "--seed", "7")
    assert out.read_bytes() == first
    run("generate", *options, "--top-k", "5", "--seed", "8")
    assert out.read_bytes() != first


def test_a_table_keeps_its_columns_in_a_narrow_terminal(run, model, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    seed = 2**63 - 1
    done = run("generate", "--layout", layout, "--model", model, "--out", tmp_path / "picture.png",
               "--seed", seed, "--json")  # fmt: skip
    for whole in ("pixels", "seconds", "64×64", str(seed), f"{done.data['seconds']:.3f}"):
        assert whole in done.out.rpartition("{")[0]


def test_generate_along_a_schedule_and_away_from_a_layout(run, model, layout, tmp_path):
    out, away = tmp_path / "picture.png", tmp_path / "away.json"
    options = ["generate", "--layout", layout, "--model", model, "--out", out, "--json"]
    away.write_text(json.dumps({"caption": "a star", "objects": [
        {"expr": "a star", "box": [0.5, 0.5, 0.9, 0.9]}
    ]}))  # fmt: skip
    pictures = []
    for asked in (
        [],
        ["--negative", away],
        ["--cfg-schedule", "linear", "--cfg-start", "3"],
        ["--cfg-span", "8", "64"],
    ):
        # Random weights hardly tell prompts apart: guided this far they do.
        done = run(*options, "--cfg", "3000", *asked)
        assert (done.code, done.err) == (0, "")
        pictures.append(out.read_bytes())
        wanted = json.loads(away.read_text()) if "--negative" in asked else None
        assert done.data["negative"] == wanted
    assert len(set(pictures)) == 4
    assert done.data["sampling"]["cfg_span"] == [8, 64]


@pytest.mark.parametrize("asked", [[], ["--cfg", "1"]])
def test_a_schedule_may_be_the_models_own(run, model, layout, tmp_path, asked):
    own = shutil.copytree(model, tmp_path / "own")
    about = json.loads((own / "echogen.json").read_text())
    about["sampling"] |= {"cfg": 5.0, "cfg_schedule": "linear"}
    (own / "echogen.json").write_text(json.dumps(about))
    options = ["--layout", layout, "--model", own, "--out", tmp_path / "picture.png", "--json"]
    done = run("generate", *options, "--cfg-start", "2", "--cfg-span", "0", "10", *asked)
    assert done.code == 0, done.err
    assert done.data["sampling"]["cfg_start"] == 2 and done.data["sampling"]["cfg_span"] == [0, 10]


def test_ground(run, model, tmp_path):
    picture, out = tmp_path / "picture.png", tmp_path / "overlay.png"
    Image.new("RGB", (100, 100), "white").save(picture)
    asked = ["--expr", "a red circle", "--expr", "a [blue] square"]
    done = run("ground", "--image", picture, *asked, "--model", model, "--out", out, "--json")
    assert (done.code, done.err) == (0, "")
    assert [o["expr"] for o in done.data["objects"]] == ["a red circle", "a [blue] square"]
    assert "a [blue] square" in done.out.splitlines()[-3]  # the table takes no markup
    for obj in done.data["objects"]:
        x1, y1, x2, y2 = obj["box"]
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
    assert Image.open(out).width >= 512


def test_cycle(run, model, layout, tmp_path):
    options = ["--layout", layout, "--model", model, "--seed", "3", "--json"]
    done = run("cycle", *options, "--out", tmp_path / "a", "--samples", "3")
    assert (done.code, done.err) == (0, "")
    data = done.data
    assert {"objects", "reward", "seconds", "seed", "model", "sampling", "files"} <= set(data)
    assert set(data["files"]) == {"image", "overlay", "sheet", "report"}
    assert json.loads(Path(data["files"]["report"]).read_text()) == data
    rewards = [s["reward"] for s in data["samples"]]
    assert data["reward"] == max(rewards) == rewards[data["best"]]
    assert abs(sum(s["advantage"] for s in data["samples"])) < 1e-4
    for obj in data["objects"]:
        assert set(obj) == {"expr", "box", "recovered", "iou", "l1"}
    reward = 1 - sum(0.5 * (1 - o["iou"]) + 0.5 * o["l1"] for o in data["objects"]) / 2
    assert abs(reward - data["reward"]) < 1e-5

    run("cycle", *options, "--out", tmp_path / "b", "--samples", "3")
    for name in ("image.png", "overlay.png", "sheet.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    alone = run("cycle", *options, "--out", tmp_path / "c")
    assert "samples" not in alone.data
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "cycle.json",
        "image.png",
        "overlay.png",
    ]


@pytest.mark.parametrize(
    ("argv", "work"),
    [
        (["cycle", "--layout", "{layout}"], "echogen.engine.engine.Engine.cycle"),
        (["profile", "cycle"], "echogen.bench.profile.subjects.warmed"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_before_the_work(
    run, model, layout, monkeypatch, argv, work
):
    monkeypatch.setattr(work, lambda *_: pytest.fail("worked first"))
    asked = [word.format(layout=layout) for word in argv]
    assert run(*asked, "--model", model, "--out", layout).refused(f"--out {layout}")


def test_eval(run, model, tmp_path, monkeypatch):
    monkeypatch.setenv("ECHOGEN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "tables.json"
    done = run("eval", "--model", model, "--count", "3", "--cfg", "3", "--json", "--out", out)
    assert done.code == 0, done.err
    assert {"ap", "ap50", "ap75", "acc50", "spatial", "color", "texture", "shape"} <= set(
        done.data["l2i"]
    )
    assert {"i2l", "cycle", "judge_ceiling", "sampling", "model"} <= set(done.data)
    assert done.data["count"] == 3 and done.data["sampling"]["cfg"] == 3
    assert 0 <= done.data["misread"] < 1 and "drawn again: " in done.out
    assert json.loads(out.read_text()) == done.data


def test_options_of_the_weights_reach_the_engine(monkeypatch):
    told = []
    monkeypatch.setattr(Engine, "from_pretrained", lambda *where, **how: told.append((where, how)))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    ModelOptions("tiny", "cuda", "bfloat16", fp8=True, fp8_cache=True).load()
    assert told == [(("tiny", "cuda", torch.bfloat16), {"fp8": True, "fp8_cache": True})]


def test_doctor(run, model):
    done = run("doctor", "--model", model, "--json")
    assert (done.code, done.err) == (0, "")
    assert set(done.data["operators"]) >= {"box_reward", "grpo_loss", "skinny_linear"}
    assert done.data["model"]["image_size"] == 64
    assert done.data["libraries"]["torch"] and done.data["bf16_slowdown"] > 0


def test_doctor_looks_for_every_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    known = {name for names, _ in LIBRARIES.values() for name in names}
    for extra, needs in project["optional-dependencies"].items():
        assert extra == "dev" or known & {re.split("[>=]", need)[0] for need in needs}, extra


def test_profile(run, model, tmp_path):
    out = tmp_path / "profile"
    done = run("profile", "cycle", "--model", model, "--batch", 2, "--out", out, "--json")
    assert done.code == 0
    shares = [r["share"] for r in done.data["ranges"]]
    assert sum(shares) == pytest.approx(1, abs=0.05)
    found = {r["category"] for r in done.data["ranges"]}
    assert {"engine/vq/decode", "engine/ground/step"} <= found
    # One code a step in C++, several by PyTorch's operations.
    assert found & {"engine/decode/step", "engine/decode/window"}
    trace = json.loads((out / "cycle.trace.json").read_text())
    names = {e.get("name") for e in trace["traceEvents"]}
    assert {f"echogen:{c}" for c in found if c.startswith("engine/")} <= names
    assert json.loads((out / "cycle.json").read_text())["wall_ms"] > 0
    asked = {"model": str(model), "recipe": "tiny", "batch": 2, "dtype": "float32"}
    assert asked.items() <= done.data.items()


def test_profile_for_other_profilers(run, model, tmp_path):
    done = run("profile", "generate", "--model", model, "--batch", 1, "--tool", "none")
    assert (done.code, done.out, done.err) == (0, "", "")
    done = run("profile", "generate", "--tool", "nsys", "--out", tmp_path, "--dry-run")
    assert done.code == 0 and done.out.startswith("ECHOGEN_NVTX=1 nsys profile ")
    assert "--tool none" in done.out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tool", "torch"], ["--out is missing"]),
        (["--out", "x", "--within", "step"], ["--within step", "ncu"]),
        (["--out", "x", "--dry-run"], ["--dry-run", "--tool torch"]),
        (["--out", "x", "--batch", "0"], ["--batch 0"]),
        (["--out", "x", "--tool", "ncu"], ["--tool ncu", "--device cuda"]),
        (["--out", "x", "--device", "tpu"], ["--device tpu"]),
    ],
)
def test_profile_refuses(run, words, said):
    assert run("profile", "cycle", *words).refused(*said)


def test_bench_compare(run, tmp_path):
    def row(provider, ms):
        return {"operator": "swiglu", "provider": provider, "ms": ms, "ms_q20": ms, "ms_q80": ms}

    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ours in zip(files, (1.0, 2.0), strict=True):
        path.write_text(json.dumps({"kernels": [row("echogen", ours), row("eager", 1.0)]}))
    done = run("bench", "compare", *files, "--json")
    assert done.code == 1 and "1 of 1 slower than 1.15 times before" in done.err
    assert done.data["changes"][0]["ratio"] == 2
    assert run("bench", "compare", *reversed(files)).code == 0
    assert run("bench", "compare", files[0], tmp_path / "c.json").refused("c.json: cannot be read")
    assert run("bench", "compare", *files, "--to", "liger").refused("echogen and liger")
    assert run("bench", "compare", *files, "--threshold", "0.5").refused("--threshold 0.5")


def test_bench_kernels_memory_and_report(run, tmp_path):
    done = run("bench", "kernels", "--operator", "swiglu", "--operator", "rope", "--repeats", 1,
               "--device", "cpu", "--out", tmp_path, "--json")  # fmt: skip
    assert done.code == 0
    assert {r["operator"] for r in done.data["kernels"]} == {"swiglu", "rope"}
    assert (tmp_path / "kernels.csv").read_text().startswith("operator,provider,")
    assert run("bench", "kernels", "--operator", "softmax").refused("operator softmax")
    assert run("bench", "kernels", "--provider", "vllm").refused("provider vllm")
    done = run("bench", "memory", "--operator", "gumbel_st_embed", "--json")
    assert done.code == 0 and all(r["ratio"] <= 0.25 for r in done.data["memory"])
    assert run("bench", "memory", "--operator", "cfg_sample").refused("cfg_sample")
    assert "Peak memory" in run("bench", "report").out


def test_numbers_that_json_lacks_become_null():
    from echogen.commands.output import finite

    assert finite({"a": [float("nan"), 1.0], "b": (float("inf"), 2)}) == {
        "a": [None, 1.0],
        "b": [None, 2],
    }
