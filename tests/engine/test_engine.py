"""The facade refuses wrong arguments and says why, and reads pictures as they look."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from echogen.engine import engine as facade
from echogen.engine import ground as grounding
from echogen.engine.cache import Prefix, PrefixCache
from echogen.engine.checkpoints import pretrained
from echogen.engine.checkpoints.weights import CheckpointError
from echogen.engine.decoding.rollout import draw, ground
from echogen.engine.decoding.sampler import Sampling
from echogen.engine.engine import Engine
from echogen.engine.images.vision import ImageError, load_image
from echogen.engine.layout import Layout, LayoutError, LayoutObject
from echogen.engine.prompt import PromptError, Prompts, TextualCodec

LAYOUT = Layout("a red circle", (LayoutObject("a red circle", (0.1, 0.2, 0.5, 0.6)),))
LONG = Layout("a red circle " * 60, LAYOUT.objects)


@pytest.fixture
def saved(engine, tmp_path) -> Path:
    """A folder that the engine has written."""
    engine.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- drawing and finding --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draws", "told"),
    [
        ([5], "1 draws for 2 images"),
        ([1, 2, 3], "3 draws for 2 images"),
        ([0, -1], "draw -1; it must be in"),
        ([0, 1 << 32], "draw 4294967296"),
        ([0, 0.5], r"draw = 0\.5; it must be a whole number"),
    ],
)
def test_draws_are_one_word_for_each_image(engine, draws, told):
    with pytest.raises(ValueError, match=told):
        engine.generate_codes([LAYOUT] * 2, draws=draws)


def test_numbers_that_are_not_whole_are_named(engine):
    with pytest.raises(ValueError, match=r"seed = 1\.5; it must be a whole number"):
        engine.generate(LAYOUT, seed=1.5)
    with pytest.raises(ValueError, match="seed = None; it must be a whole number"):
        engine.generate(LAYOUT, seed=None, sampling=Sampling(temperature=0))
    for seed in (-1, 2**63):  # even where no noise is drawn
        with pytest.raises(ValueError, match=rf"seed = {seed}; it must be in 0"):
            engine.generate(LAYOUT, seed=seed, sampling=Sampling(temperature=0))
    with pytest.raises(ValueError, match=r"samples = 2\.0; it must be a whole number"):
        engine.cycle(LAYOUT, samples=2.0)


def test_nothing_asked_for_is_nothing_done(engine):
    assert engine.generate_codes([]).shape == (0, 16)
    assert engine.decode(torch.empty(0, 16, dtype=torch.int64)) == []
    assert engine.ground_codes(torch.empty(0, 16, dtype=torch.int64), []) == []
    assert engine.ground(Image.new("RGB", (8, 8)), []) == []


def test_expressions_are_lists_of_texts(engine):
    picture, codes = Image.new("RGB", (8, 8)), torch.zeros(2, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="expressions = 'a star'; write a list"):
        engine.ground(picture, "a star")
    with pytest.raises(ValueError, match="features = 'pixle'; choose 'tokens' or 'pixels'"):
        engine.ground(picture, ["a star"], features="pixle")
    for asked in ([["a star"]], [["a star"], []]):
        with pytest.raises(ValueError, match="2 images and expressions of"):
            engine.ground_codes(codes, asked)
    with pytest.raises(ValueError, match=r"top_k = 2\.5; it must be a whole number"):
        Sampling(top_k=2.5)


def test_nothing_is_found_in_a_part_of_an_image(engine):
    """With the codes of a partial picture, for example, what follows would take the places of the
    missing codes."""
    codes = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shape \[1, 12\]; whole images of this model have 16"):
        engine.ground_codes(codes, [["a star"]])


def test_no_way_in_draws_or_finds_behind_the_last_position(engine):
    """Positions beyond the last have no rotation of their own."""
    draws = torch.arange(1)
    with pytest.raises(LayoutError, match="this model has room for 144"):
        engine.generate_codes([LONG])
    with pytest.raises(LayoutError, match="this model has room for 144"):
        engine.generate_codes([LONG], decoding="jacobi")
    with pytest.raises(LayoutError, match="this model has room for 144"):
        draw(engine, [LONG], Sampling(), 0, draws)
    codes, expr = torch.zeros(1, 16, dtype=torch.int64), "a star " * 100
    for find in (engine.ground_codes, lambda *asked: ground(engine, *asked)):
        with pytest.raises(LayoutError, match=r"an expression takes .* room for"):
            find(codes, [[expr]])
    with pytest.raises(ValueError, match="1 prompts for 2 draws"):
        draw(engine, [LAYOUT], Sampling(), 0, torch.arange(2))


@pytest.mark.parametrize("kind", ["location", "textual"])
def test_many_images_are_found_in_parts(engine, monkeypatch, kind):
    if kind == "textual":
        tokenizer = engine.prompts.tokenizer
        monkeypatch.setattr(engine, "prompts", Prompts(tokenizer, TextualCodec(tokenizer)))
    codes = torch.randint(24, (5, 16), generator=torch.Generator().manual_seed(2))
    asked = [["a star"], ["a circle", "a star"], ["two green stars"], ["a star"] * 3, ["x"]]
    wanted, made = engine.ground_codes(codes, asked), list[int]()

    def counted(model, prompts, image, *rest, right=grounding.Branches):
        made.append(len(image))
        return right(model, prompts, image, *rest)

    monkeypatch.setattr(grounding, "Branches", counted)
    monkeypatch.setattr(grounding, "MOST_HELD", 1)
    assert engine.ground_codes(codes, asked) == wanted and made == [1] * 5
    if kind == "location":
        monkeypatch.setattr(grounding, "MOST_HELD", 1 << 32)
        noise = 7, torch.arange(5)
        whole = ground(engine, codes, asked, noise)
        monkeypatch.setattr(grounding, "MOST_HELD", 1)
        parts = ground(engine, codes, asked, noise)
        for tokens, others, row in zip(whole.tokens, parts.tokens, asked, strict=True):
            assert torch.equal(tokens[: len(row)], others[: len(row)])


def test_many_pictures_are_decoded_in_parts(engine, monkeypatch):
    codes = torch.randint(24, (5, 16), generator=torch.Generator().manual_seed(2))
    wanted = [np.asarray(image).astype(int) for image in engine.decode(codes)]
    batches = list[int]()

    def counted(vq, some, right=facade.decode_codes):
        batches.append(len(some))
        return right(vq, some)

    monkeypatch.setattr(facade, "decode_codes", counted)
    monkeypatch.setattr(facade, "MOST_DECODED", 2 * facade.decoding_bytes(engine.vq, 8))
    found = [np.asarray(image).astype(int) for image in engine.decode(codes)]
    assert batches == [2, 2, 1] and np.abs(np.array(found) - wanted).max() <= 1


def test_prefixes_are_any_threads(engine):
    held, errors = PrefixCache(1 << 10), list[Exception]()
    prefix = Prefix(torch.zeros(16), torch.zeros(2))

    def many(thread: int) -> None:
        try:
            for i in range(2000):
                held.put((thread, i % 50), prefix)
                held.get((thread, i % 7))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=many, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and sum(p.nbytes for p in held._held.values()) <= 1 << 10


# --- pictures -------------------------------------------------------------------------------------


def test_greys_of_16_bits_keep_their_shades(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    path = tmp_path / "ramp.png"
    Image.fromarray(np.tile(ramp, (64, 1))).save(path)
    found = np.asarray(load_image(str(path), 64))
    assert np.array_equal(found, np.repeat((ramp >> 8)[None, :, None], 3, 2).repeat(64, 0))


def test_shades_without_a_scale_are_refused(tmp_path):
    for kind in (np.int32, np.float32):
        image = Image.fromarray(np.zeros((8, 8), kind))
        with pytest.raises(ImageError, match=f"mode {image.mode}, .* mode L or RGB"):
            load_image(image, 8)


def test_a_photo_is_read_as_it_is_shown(tmp_path):
    """Cameras store a photo as the sensor was held, and note how to rotate it."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4, 0] = 255  # its left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated clockwise when shown: its left is at the top
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path, exif=exif)
    found = np.asarray(load_image(str(path), 8))
    assert (found[:4, :, 0] == 255).all() and not found[4:].any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_is_read_on_white(tmp_path, mode):
    """Whatever colour the file has under it: black from most programs, or what was erased."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[2:6, 2:6] = (0, 0, 0, 255) if mode in ("LA", "L") else (255, 0, 0, 255)
    pixels[0, 0] = (90, 90, 90, 0)
    image, path = Image.fromarray(pixels), tmp_path / "drawing.png"
    if mode == "L":  # one shade that counts as transparent
        grey = Image.fromarray(np.where(pixels[..., 3] == 0, 7, 0).astype(np.uint8))
        grey.save(path, transparency=7)
    elif mode == "P":
        colours = Image.fromarray(np.where(pixels[..., 3] == 0, 0, 1).astype(np.uint8), "P")
        colours.putpalette([0, 0, 0, 255, 0, 0])
        colours.save(path, transparency=bytes([0, 255]))
    else:
        image.convert(mode).save(path)
    shown = np.full((8, 8, 3), 255, np.uint8)
    shown[2:6, 2:6] = pixels[2, 2, :3]
    assert np.array_equal(np.asarray(load_image(str(path), 8)), shown)


def test_a_photo_that_is_said_to_be_turned_somehow_is_refused(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(path, exif=b"Exif\0\0garbage")
    with pytest.raises(ImageError, match=r"photo\..*EXIF data.*save it without them"):
        load_image(str(path), 8)


def test_a_picture_that_is_cut_off_is_told_to_be(tmp_path):
    """Whether the engine or the caller opens it."""
    path = tmp_path / "photo.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    for source in (str(path), Image.open(path)):
        with pytest.raises(ImageError, match=r"cannot be opened .*truncated"):
            load_image(source, 8)


def test_a_picture_without_pixels_is_refused():
    with pytest.raises(ImageError, match="is 0x0, without pixels"):
        load_image(Image.new("RGB", (8, 8)).crop((4, 4, 4, 4)), 8)


# --- what a checkpoint says of itself -------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(engine, saved):
    again = Engine.from_pretrained(saved)
    assert again.prompts.codec.name == "location" and again.prompts.codec.scale == 32
    assert (again.sampling, again.pixels_trained) == (engine.sampling, engine.pixels_trained)
    codes = engine.generate_codes([LAYOUT], seed=3)
    assert torch.equal(again.generate_codes([LAYOUT], seed=3), codes)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float8_e4m3fn, torch.int8], ids=str)
def test_types_that_the_modules_do_not_run_in_are_refused(saved, dtype):
    with pytest.raises(ValueError, match=r"^dtype = .*; choose one of torch\.float32, .*fp8=True"):
        Engine.from_pretrained(saved, dtype=dtype)


def test_what_is_saved_can_be_read_by_whom_the_umask_allows(engine, tmp_path):
    before = os.umask(0o022)
    try:
        engine.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "model").iterdir()} == {0o644}


def test_a_save_that_breaks_off_leaves_what_there_was(engine, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def torn(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained, "write_json", torn)
    with pytest.raises(OSError, match="No space left"):
        engine.save_pretrained(saved, dtype=torch.bfloat16)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def edited(folder: Path, change: Callable[[dict], object], name: str = pretrained.META) -> Path:
    path = folder / name
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))
    return folder


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m["codec"].update(name="locations"), "codec.name is 'locations'; choose one of"),
        (lambda m: m.update(codec="location"), "codec is 'location'; it must be of type dict"),
        (lambda m: m["codec"].update(bins="33"), "codec.bins is '33'; it must be of type int"),
        (lambda m: m["sampling"].update(heat=1), "sampling.heat is unknown; there are"),
        (lambda m: m["sampling"].update(cfg=-1), "sampling: cfg = -1; it must be 0 or more"),
        (lambda m: m["sampling"].update(temperature="hot"), "sampling: must be real number"),
        (lambda m: m.update(question=3), "question is 3; it must be of type str"),
        (lambda m: m.update(pixels_trained="no"), "pixels_trained is 'no'"),
    ],
)
def test_what_it_says_wrongly_is_named(saved, change, told):
    with pytest.raises(CheckpointError, match=rf"echogen\.json: {told}"):
        Engine.from_pretrained(edited(saved, change))


def test_a_checkpoint_of_transformers_draws_as_its_generation_config_says(saved):
    def drawn_with(**stated) -> Sampling:
        edited(saved, lambda g: g.update(stated), pretrained.GENERATION)
        return Engine.from_pretrained(saved).sampling

    ours = drawn_with(guidance_scale=5, temperature=0.9)
    assert ours == Sampling()  # from echogen.json
    (saved / pretrained.META).unlink()
    assert drawn_with() == Sampling(cfg=5.0, temperature=0.9)
    assert drawn_with(guidance_scale=0, temperature=None) == Sampling()
    with pytest.raises(CheckpointError, match=r"generation_config\.json: guidance_scale .* = -1;"):
        drawn_with(guidance_scale=-1)


def test_padding_without_the_mark_of_janus_is_that_of_transformers(saved, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (saved / name).read_text()
        (saved / name).write_text(text.replace("<｜▁pad▁｜>", "<another>"))
    edited(saved, lambda g: g.update(pad_token_id=7), pretrained.GENERATION)
    engine = Engine.from_pretrained(saved)
    assert engine.prompts.pad == 7
    engine.save_pretrained(tmp_path / "again")
    assert Engine.from_pretrained(tmp_path / "again").prompts.pad == 7
    edited(saved, lambda g: g.update(pad_token_id=-1), pretrained.GENERATION)
    with pytest.raises(CheckpointError, match=r"pad_token_id is -1; it must be in 0 … "):
        Engine.from_pretrained(saved)


def test_a_codec_is_what_is_asked_for_or_refused(saved):
    with pytest.raises(ValueError, match=r"codec = 'loc'; choose one of \('location', 'textual'\)"):
        Engine.from_pretrained(saved, codec="loc")
    with pytest.raises(ValueError, match=r"bins = 1000; .* was trained with 33"):
        Engine.from_pretrained(saved, bins=1000)
    with pytest.raises(ValueError, match="bins = 33 with the textual codec"):
        Engine.from_pretrained(saved, codec="textual", bins=33)
    plain = edited(saved, lambda meta: meta.pop("codec"))
    assert Engine.from_pretrained(plain).prompts.codec.name == "textual"
    assert Engine.from_pretrained(plain, codec="location", bins=20).prompts.codec.scale == 19
    for bins in (0, 1):
        with pytest.raises(PromptError, match=f"location codec with {bins} bins"):
            Engine.from_pretrained(plain, codec="location", bins=bins)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda text: text[:1000]),
        ("tokenizer.json", lambda _: "version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.json", lambda text: text.replace('"type": "BPE"', '"type": "another"')),
        ("tokenizer.json", lambda _: "[]"),
        ("tokenizer_config.json", lambda _: "[]"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(saved, name, change):
    (saved / name).write_text(change((saved / name).read_text()))
    with pytest.raises(CheckpointError, match="its tokenizer does not load") as caught:
        Engine.from_pretrained(saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_read_as_it_is_stored_is_refused(saved, monkeypatch):
    spaceless = AutoTokenizer.from_pretrained(saved)  # as transformers < 5.22 reads DeepSeek's
    spaceless.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: spaceless)
    for version, fix in (("5.17.0", "upgrade transformers"), ("5.22.1", "see which kind")):
        monkeypatch.setattr("transformers.__version__", version)
        with pytest.raises(CheckpointError, match=rf"'3größereÄpfel,12km'\); {fix}"):
            Engine.from_pretrained(saved)


def test_a_tokenizer_of_another_model_is_refused(saved):
    tokenizer = json.loads((saved / "tokenizer.json").read_text())
    last = max(token["id"] for token in tokenizer["added_tokens"])
    tokenizer["added_tokens"].append(
        tokenizer["added_tokens"][-1] | {"id": last + 1, "content": "<new>"}
    )
    (saved / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"token '<new>' with id .* do not belong together"):
        Engine.from_pretrained(saved)
