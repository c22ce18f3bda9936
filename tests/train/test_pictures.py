"""A folder of pictures with layouts: stages 1 and 2 learn from it, and what is wrong is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from echogen.engine.images.vision import ImageError, encode_image, load_image, to_pixels
from echogen.engine.layout import LayoutError
from echogen.train.config import DJOConfig, LoopConfig, PMTPConfig, VQConfig
from echogen.train.data import samples
from echogen.train.data.pictures import FILE, Pictures, held_back
from echogen.train.run.checkpoint import StateError
from echogen.train.run.loop import run
from echogen.train.stages.djo import DJOStage
from echogen.train.stages.pmtp import PMTPStage
from echogen.train.stages.vq import build_vq
from echogen.train.stages.world import WorldStage
from echogen.train.start import load_start

from .runs import rows, run_in_parts

COUNT = 6
VQ = VQConfig(loop=LoopConfig(steps=1, lr=1e-3), codes=32, latent=32, multipliers=(1, 1, 1, 1))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHOGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def line(i: int, **changes: Any) -> dict[str, Any]:
    """The layout of picture ``i``."""
    box = [0.1, 0.1, 0.4 + 0.05 * i, 0.6]
    objects = [{"expr": "the brown dog", "box": box}, {"expr": "a sofa", "box": [0.2, 0.5, 1, 1]}]
    return {"image": f"pictures/{i}.png", "caption": "at home", "objects": objects} | changes


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of noise, 96 pixels a side."""
    (tmp_path / "mine" / "pictures").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        noise = rng.integers(256, size=(96, 96, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "mine" / "pictures" / f"{i}.png")
    return write(tmp_path / "mine", *map(line, range(COUNT)))


# --- what is read ---------------------------------------------------------------------------------


def test_every_line_is_a_sample_of_its_own_picture(folder: Path) -> None:
    vq = build_vq(VQ, 32).eval()
    source = Pictures(folder)
    validation = source.validation(vq, 256)
    every = [*source.training(vq), *validation.samples]
    assert len(validation.samples) == 1 and len(every) == COUNT and validation.judge is None
    for i in range(COUNT):
        (sample,) = (s for s in every if s.boxes[0] == tuple(line(i)["objects"][0]["box"]))
        picture = load_image(str(folder / "pictures" / f"{i}.png"), 64)
        assert (sample.codes == encode_image(vq, to_pixels([picture]))[0].numpy()).all()
        assert sample.caption == "at home"
        assert sample.expressions == (("the brown dog",), ("a sofa",))
    layout = validation.layouts[0]
    assert tuple(o.box for o in layout.objects) == validation.samples[0].boxes


def test_pictures_are_encoded_once_and_by_what_they_are(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vq = build_vq(VQ, 32).eval()
    before = Pictures(folder).training(vq)
    encode, passes = samples.encode_image, []
    monkeypatch.setattr(samples, "encode_image", lambda *a: passes.append(a) or encode(*a))
    write(folder, *(line(i, caption="changed") for i in reversed(range(COUNT))))
    after = Pictures(folder).training(vq)
    assert not passes and [s.caption for s in after] == ["changed"] * len(before)
    for a, b in zip(before, reversed(after), strict=True):
        assert a.boxes == b.boxes and (a.codes == b.codes).all()
    (folder / "pictures" / "0.png").write_bytes((folder / "pictures" / "1.png").read_bytes())
    Pictures(folder).training(vq)
    assert len(passes) == 1 and len(passes[0][1]) == COUNT - 1
    assert len(list(cache.iterdir())) == 2


def test_the_codes_of_all_pictures_are_not_copied(folder: Path, cache: Path) -> None:
    """They are narrow and lie in the cached file, of which a machine's processes share the pages.
    Held as int64 by each of eight processes they would take 32 times the memory."""
    every = Pictures(folder).training(build_vq(VQ, 32).eval())
    assert len(every) == COUNT - 1
    for sample in every:
        assert sample.codes.dtype == np.uint16 and not sample.codes.flags.owndata
        assert not sample.codes.flags.writeable  # mapped, and to be read only


def test_a_picture_of_many_lines_is_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, *(line(i, image="pictures/0.png") for i in range(5)), line(1))
    read, seen = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: seen.append(path.name) or read(path))
    Pictures(folder)
    assert sorted(seen) == ["0.png", "1.png", FILE]


def test_a_picture_stays_on_its_side_of_the_split(folder: Path) -> None:
    many = {f"{i:032x}" for i in range(100, 300)}
    held = held_back(many)
    assert len(held) == 4 and held_back(many | {f"{1:032x}"}) == held
    assert held_back({"01", "02"}) == {"01"}
    assert held_back({"01", "02", "00"}) == {"00"}  # which the rule finds
    assert held_back({"00", "32"}) == {"00"}  # each by itself would be held back
    vq = build_vq(VQ, 32).eval()
    again = [line(i, caption="once more", objects=line(i)["objects"][:1]) for i in range(COUNT)]
    source = Pictures(write(folder, *map(line, range(COUNT)), *again))  # two layouts a picture
    kept, seen = ({s.codes.tobytes() for s in x} for x in (
        source.validation(vq, 256).samples, source.training(vq)))  # fmt: skip
    assert len(kept) == 1 and len(seen) == COUNT - 1 and not kept & seen
    assert len(source.validation(vq, 1).samples) == 1


def test_what_is_read_is_what_a_run_is(folder: Path) -> None:
    found = [Pictures(folder).fingerprint]
    found.append(Pictures(folder).fingerprint)
    assert found[0] == found[1]
    write(folder, *(line(i, caption="changed") for i in range(COUNT)))
    found.append(Pictures(folder).fingerprint)
    Image.new("RGB", (96, 96)).save(folder / "pictures" / "0.png")
    found.append(Pictures(folder).fingerprint)
    assert len(set(found[1:])) == 3


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"image": None}, 'layout has no "image"; add the path'),
        ({"image": 3}, "image is 3; it must be a string"),
        ({"image": "pictures/none.png"}, "none.png: cannot be opened .No such file"),
        ({"image": "layouts.jsonl"}, "cannot be opened .no picture that Pillow reads"),
        ({"image": "pictures"}, "cannot be opened .Is a directory"),
        ({"image": "float.tiff"}, "float.tiff has pixels of mode F, .* convert it to mode L"),
        ({"image": "wide.png"}, "wide.png is 96x48; .* make it square first"),
        ({"image": "pictures/0.png", "objects": line(0)["objects"]}, "there before with the same"),
        ({"size": [640, 480]}, "size is 640x480; pictures are square"),
        ({"objects": []}, "objects is empty"),
        ({"colour": "red"}, 'unknown key "colour"'),
        ({"objects": [{"expr": "a dog", "box": [0.1, 0.1, 0.11, 0.5]}]}, "make it at least 0.03"),
        ({"objects": [line(0)["objects"][0]] * 2}, "are both 'the brown dog'; tell them apart"),
        ({"caption": "a <ref> of"}, "reserved token <ref>"),
    ],
)
def test_a_bad_line_is_named(folder: Path, changes: dict[str, Any], why: str) -> None:
    Image.new("RGB", (96, 48)).save(folder / "wide.png")
    Image.new("F", (96, 96)).save(folder / "float.tiff")
    write(folder, *map(line, range(3)), line(3, **changes), line(4))
    with pytest.raises(LayoutError, match=rf"mine/layouts\.jsonl: line 4: .*({why})"):
        Pictures(folder)


def test_a_file_that_is_none_is_refused(folder: Path) -> None:
    with pytest.raises(LayoutError, match=r"holds one picture; .* so add more"):
        Pictures(write(folder, line(0), line(0, caption="more", objects=line(1)["objects"])))
    with pytest.raises(LayoutError, match="holds no layout; write one JSON object a line"):
        Pictures(write(folder))
    (folder / FILE).write_text(json.dumps(line(0)) + "\n\n[3]\n")
    with pytest.raises(LayoutError, match=r"line 3: layout is .3.; write an object"):
        Pictures(folder)
    (folder / FILE).write_text("{")
    with pytest.raises(LayoutError, match=r"line 1: not valid JSON"):
        Pictures(folder)
    (folder / FILE).unlink()
    with pytest.raises(LayoutError, match=r"layouts\.jsonl: cannot be read .No such file"):
        Pictures(folder)


def test_a_torn_picture_is_named_when_it_is_encoded(folder: Path) -> None:
    torn = folder / "pictures" / "2.png"
    torn.write_bytes(torn.read_bytes()[:3000])
    source = Pictures(folder)
    with pytest.raises(ImageError, match=r"layouts\.jsonl: line 3: .*2\.png: cannot be opened"):
        source.training(build_vq(VQ, 32).eval())


def test_a_picture_that_changes_meanwhile_is_named(folder: Path, cache: Path) -> None:
    """Else the codes of the new one would be kept as those of the old one."""
    source = Pictures(folder)
    Image.new("RGB", (96, 96)).save(folder / "pictures" / "2.png")
    with pytest.raises(ImageError, match=r"layouts\.jsonl: line 3: .*2\.png has changed since"):
        source.training(build_vq(VQ, 32).eval())
    assert not list(cache.glob("codes-*"))


def test_a_layout_that_the_model_has_no_room_for_is_named(
    folder: Path, pmtp_run: Path, loop: LoopConfig
) -> None:
    write(folder, line(0), line(1), line(2, caption="far " * 1000))
    start = load_start(pmtp_run, "pmtp")
    for begun in (
        lambda: PMTPStage(PMTPConfig(loop=loop, data=str(folder)), start),
        lambda: DJOStage(DJOConfig(loop=loop, data=str(folder)), start),
    ):
        with pytest.raises(LayoutError, match=r"line 3 takes .* tokens with its image; .* shorten"):
            begun()


# --- the stages -----------------------------------------------------------------------------------


def fresh(folder: Path, loop: LoopConfig, start: Path) -> PMTPStage:
    torch.manual_seed(0)
    small = {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "bins": 17, "batch": 3}
    return PMTPStage(PMTPConfig(loop=loop, data=str(folder), **small), build_vq(VQ, 32))


def further(folder: Path, loop: LoopConfig, start: Path) -> PMTPStage:
    return PMTPStage(PMTPConfig(loop=loop, data=str(folder), batch=3), load_start(start, "pmtp"))


def second(folder: Path, loop: LoopConfig, start: Path) -> DJOStage:
    return DJOStage(DJOConfig(loop=loop, data=str(folder), batch=4), load_start(start, "pmtp"))


@pytest.mark.parametrize("build", [fresh, further, second])
def test_a_stage_learns_from_pictures_and_resumes_exactly(
    tmp_path: Path,
    folder: Path,
    pmtp_run: Path,
    loop: LoopConfig,
    build: Callable[[Path, LoopConfig, Path], WorldStage],
) -> None:
    loop = dataclasses.replace(loop, bf16=False, steps=4, eval_every=2)
    stage = build(folder, loop, pmtp_run)
    run(stage, loop, tmp_path / "whole")
    run_in_parts(lambda: build(folder, loop, pmtp_run), loop, tmp_path / "parts", 3)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    seen = [row for row in rows(tmp_path / "whole") if "val_loss" in row]
    assert [row["step"] for row in seen] == [0] * (build is not fresh) + [2, 4]
    assert not any("judge" in name or "gap" in name for row in seen for name in row)
    assert rows(tmp_path / "whole")[-1]["chosen_loss"] == min(row["val_loss"] for row in seen)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["data"] == str(folder) and config["data_hash"] == Pictures(folder).fingerprint
    assert load_start(tmp_path / "whole", stage.name).stages[-1] == stage.name

    write(folder, *(line(i, caption="changed") for i in range(COUNT)))
    with pytest.raises(StateError, match=r"another run .data_hash .* the same .* data, or"):
        run(build(folder, loop, pmtp_run), loop, tmp_path / "whole", resume=True)
