"""The command that makes layouts for Cycle RL, by language model or at random, and checks them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from echogen.commands.options import Json, check_range, check_seed
from echogen.commands.output import (
    Failure,
    InputError,
    check_file,
    print_json,
    progress,
    show,
    warn,
    write,
)

if TYPE_CHECKING:
    from echogen.engine.layout import Layout
    from echogen.train.data.endpoint import Endpoint
    from echogen.train.data.llm import Rules

COUNT_MAX, BATCH_MAX, AT_ONCE_MAX = 1_000_000, 100, 256
SHOWN = 10  # rejected lines of a checked file that are printed


@dataclass(frozen=True)
class Layouts:
    """Make a file of layouts for `train cycle-rl --layouts`, one per line: from a language model
    behind an OpenAI-compatible API, at random, or from ShapesWorld. Or check a file."""

    from_llm: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Base URL of the API (http://localhost:8000/v1). An existing --out file is continued."""
    random: int | None = None
    """Make this many layouts uniformly at random."""
    world: int | None = None
    """Take this many of ShapesWorld's training layouts."""
    check: Path | None = None
    """Only check a file (one layout, or one per line) by the rules; exit code 1 if any fails."""
    out: Path | None = None
    """File to write; --from-llm puts rejected layouts beside it, in *.rejects.jsonl."""
    count: int = 1000
    """Layouts the file should hold in the end (--from-llm)."""
    model: str | None = None
    """The model's name at the endpoint; needed with --from-llm."""
    api_key_env: str | None = None
    """Environment variable that holds the API key."""
    batch: int = 10
    """Layouts per request."""
    at_once: int = 1
    """Requests in flight at the same time; see also --per-minute."""
    temperature: float | None = None
    """Temperature of the language model (left out: the server's own)."""
    timeout: float = 120.0
    """Seconds without an answer before a request is retried."""
    per_minute: float = 60.0
    """Most requests per minute."""
    open: bool = False
    """Ask for free layouts of everyday scenes, instead of ones in ShapesWorld's language."""
    room_of: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """A model (bundled name, folder, hub id) that must have room for every layout's prompt."""
    seed: int = 0
    """Seed of the requests, or of the random layouts."""
    json: Json = False
    """End with one JSON object on stdout."""

    def run(self) -> None:
        check_seed(self.seed)
        asked = {
            "--from-llm": self.from_llm, "--random": self.random, "--world": self.world,
            "--check": self.check,
        }  # fmt: skip
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise InputError(f"choose one of {', '.join(asked)} (got {found})")
        if self.check is not None:
            self._check(self.check)
            return
        if self.out is None:
            raise InputError(f"{given[0]}: name the file to write with --out")
        check_file(self.out, (".jsonl",))
        if self.from_llm is not None:
            self._ask(self.out, self.from_llm)
        else:
            self._draw(self.out)

    # --- by a language model --------------------------------------------------------------------

    def _ask(self, out: Path, url: str) -> None:
        check_range("count", self.count, 1, COUNT_MAX)
        check_range("batch", self.batch, 1, BATCH_MAX)
        check_range("at-once", self.at_once, 1, AT_ONCE_MAX)
        endpoint = self._endpoint(url)
        rules = self._rules()
        from echogen.train.data.harvest import Harvest, collect

        harvest = Harvest(out, rules)
        had = harvest.tally.held
        try:
            with progress("layouts") as update:
                collect(
                    endpoint.ask, harvest, self.count, self.batch, self.seed, update, self.at_once
                )
        finally:  # print the count after an interruption too
            tally = harvest.tally
            rows: list[tuple[str, object]] = [
                ("layouts held", tally.held), ("there before", had), ("requests", tally.requests),
                ("taken", tally.taken),
                *((f"rejected: {k}", n) for k, n in tally.rejected.most_common()),
            ]  # fmt: skip
            show(f"{out}", ("", "number"), rows)
        if tally.rejected:
            print(f"why each was rejected: {harvest.rejects}")
        if not endpoint.seeded:
            warn("the server takes no seed; the same command may bring other layouts")
        if self.json:
            print_json(
                {"out": str(out), "held": tally.held, "before": had, "requests": tally.requests,
                 "taken": tally.taken, "rejected": dict(tally.rejected),
                 "rejects": str(harvest.rejects), "seeded": endpoint.seeded}
            )  # fmt: skip

    def _endpoint(self, url: str) -> Endpoint:
        if self.model is None:
            raise InputError("--from-llm: name the model at the endpoint with --model")
        for name, value in (("timeout", self.timeout), ("per-minute", self.per_minute)):
            if not 0 < value < float("inf"):
                raise InputError(f"--{name} {value}: it must be finite and above 0")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise InputError(f"--temperature {self.temperature}: it must be in 0 … 2")
        key = None
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise InputError(f"--api-key-env {self.api_key_env}: this variable is not set")
            if not (key.isascii() and key.isprintable()):
                raise InputError(f"--api-key-env {self.api_key_env}: holds no key (odd characters)")
        from echogen.train.data.endpoint import Endpoint

        return Endpoint(
            url, self.model, key, self.temperature, self.timeout, per_minute=self.per_minute
        )

    def _rules(self) -> Rules:
        from echogen.train.data.llm import Rules

        return Rules(self.open, None if self.room_of is None else _room(self.room_of))

    # --- by a sampler ---------------------------------------------------------------------------

    def _draw(self, out: Path) -> None:
        name, count = ("world", self.world) if self.random is None else ("random", self.random)
        assert count is not None, "one of the two is given"
        check_range(name, count, 1, COUNT_MAX)
        if out.exists():
            raise InputError(f"--out {out}: is there already; name another file or remove it")
        from echogen.train.data.layouts import random_layout
        from echogen.train.data.scenes import load_scenes
        from echogen.train.stages import keys

        rng = keys.generator(self.seed, keys.LAYOUTS)
        if name == "random":
            layouts = [random_layout(rng) for _ in range(count)]
        else:
            layouts = [scene.layout(rng) for scene in load_scenes("train", count)]
        if self.room_of is not None:
            _all_fit(layouts, _room(self.room_of))
        write(out, "".join(layout.dumps() + "\n" for layout in layouts).encode())
        objects = sum(len(layout.objects) for layout in layouts)
        show(f"{out}", ("", "number"), [("layouts", count), ("objects", objects)])
        if self.json:
            print_json({"out": str(out), "held": count, "objects": objects, "kind": name})

    # --- a file that is there -------------------------------------------------------------------

    def _check(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"--check {path}: no such file")
        rules = self._rules()
        from echogen.train.data.harvest import examine_file

        good, bad = examine_file(path, rules)
        kinds = Counter(error.kind for _, error in bad)
        rows: list[tuple[str, object]] = [("good", good), *kinds.most_common()]
        show(f"{path}", ("", "layouts"), rows)
        for number, error in bad[:SHOWN]:
            print(f"line {number}: {error}")
        if len(bad) > SHOWN:
            print(f"… and {len(bad) - SHOWN} more")
        if self.json:
            lines = [{"line": n, "kind": e.kind, "reason": str(e)} for n, e in bad]
            data: dict[str, Any] = {"file": str(path), "good": good, "rejected": dict(kinds)}
            print_json({**data, "lines": lines})
        if bad:
            raise Failure(f"{path}: {len(bad)} of {good + len(bad)} layouts break the rules")
        if not good:
            raise InputError(f"--check {path}: holds no layout; write one JSON object a line")


def _room(model: str) -> Callable[[Layout], None]:
    """Return a check that raises LayoutError for a layout that a model has no room for."""
    from functools import partial

    from echogen.commands.options import ModelOptions
    from echogen.train.data.layouts import check_room

    engine = ModelOptions(model).load()
    return partial(check_room, prompts=engine.prompts, config=engine.transformer.config)


def _all_fit(layouts: list[Layout], fits: Callable[[Layout], None]) -> None:
    from echogen.engine.layout import LayoutError

    for number, layout in enumerate(layouts, 1):
        try:
            fits(layout)
        except LayoutError as error:
            raise InputError(f"--room-of: layout {number}: {error}") from None
