"""The commands that make and read pictures: generate, ground, cycle."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from echogen.commands.options import (
    Json,
    ModelOptions,
    SamplingOptions,
    check_range,
    check_seed,
)
from echogen.commands.output import (
    PICTURES,
    InputError,
    check_file,
    finite,
    folder_for,
    print_json,
    progress,
    show,
    write,
    write_picture,
)

if TYPE_CHECKING:
    from echogen.engine.cycle import CycleResult
    from echogen.engine.layout import Box

SAMPLES_MAX = 256  # they are drawn as one batch


@dataclass(frozen=True)
class Generate:
    """Draw a picture of a layout."""

    layout: Path
    """Layout file (JSON)."""
    out: Path = Path("image.png")
    """Picture to write."""
    seed: int = 0
    """The same seed draws the same picture."""
    negative: Path | None = None
    """Layout file of what the picture should not show; it needs --cfg above 1."""
    json: Json = False
    """End with one JSON object on stdout."""
    engine: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def run(self) -> None:
        from echogen.engine.layout import Layout

        layout = Layout.load(self.layout)
        negative = None if self.negative is None else Layout.load(self.negative)
        check_seed(self.seed)
        check_file(self.out, PICTURES)
        self.sampling.check()
        engine = self.engine.load()
        sampling = self.sampling.over(engine)
        if negative is not None and not sampling.guided:
            raise InputError(
                f"--negative {self.negative}: it acts through guidance, and cfg = {sampling.cfg:g} "
                f"is off; give --cfg above 1"
            )
        began = time.perf_counter()
        with progress("drawing") as update:
            image = engine.generate(
                layout, self.seed, sampling=sampling, progress=update, negative=negative
            )
        seconds = round(time.perf_counter() - began, 3)
        write_picture(self.out, image)
        show(
            layout.caption,
            ("picture", "pixels", "objects", "seed", "temperature", "cfg", "seconds"),
            [(self.out, "×".join(map(str, image.size)), len(layout.objects), self.seed,
              sampling.temperature, sampling.cfg, seconds)],
        )  # fmt: skip
        if self.json:
            print_json(
                {
                    "caption": layout.caption,
                    "size": list(image.size),
                    "seconds": seconds,
                    "seed": self.seed,
                    "model": self.engine.model,
                    "sampling": asdict(sampling),
                    "negative": None if negative is None else negative.to_dict(),
                    "files": {"image": str(self.out)},
                }
            )


@dataclass(frozen=True)
class Ground:
    """Find objects in a picture, one box for each expression."""

    image: Path
    """A square picture."""
    expr: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What to find; give it once for each object."""
    features: Literal["tokens", "pixels"] = "tokens"
    """Read the picture as image tokens, or as pixels through SigLIP."""
    out: Path | None = None
    """Overlay to write: the picture with the boxes found."""
    json: Json = False
    """End with one JSON object on stdout."""
    engine: ModelOptions = field(default_factory=ModelOptions)

    def run(self) -> None:
        if not self.expr:
            raise InputError('--expr is missing; name what to find, as in --expr "a red circle"')
        from echogen.engine.layout import check_text

        for expr in self.expr:
            check_text(expr, "--expr")
        if self.out is not None:
            check_file(self.out, PICTURES)
        from echogen.engine.images.vision import load_image

        load_image(str(self.image), 1)  # refused before the model is loaded
        engine = self.engine.load()
        if self.features == "pixels" and not engine.pixels_trained:
            raise InputError(
                f"--features pixels: the SigLIP path of {self.engine.model} was not trained; "
                "use --features tokens"
            )
        began = time.perf_counter()
        boxes = engine.ground(str(self.image), list(self.expr), self.features)
        seconds = round(time.perf_counter() - began, 3)
        files = {}
        if self.out is not None:
            from echogen.engine.images.picture import overlay

            picture = load_image(str(self.image), engine.image_size)
            write_picture(self.out, overlay(picture, list(self.expr), recovered=boxes))
            files["overlay"] = str(self.out)
        show(
            f"{self.image}",
            ("expression", "x1", "y1", "x2", "y2"),
            [(e, *map(float, box)) for e, box in zip(self.expr, boxes, strict=True)],
        )
        if self.json:
            print_json(
                {
                    "objects": [
                        {"expr": e, "box": list(b)} for e, b in zip(self.expr, boxes, strict=True)
                    ],
                    "image": str(self.image),
                    "features": self.features,
                    "seconds": seconds,
                    "model": self.engine.model,
                    "files": files,
                }
            )


@dataclass(frozen=True)
class Cycle:
    """Draw a layout, find its objects in the picture, and score how well they match."""

    layout: Path
    """Layout file (JSON)."""
    out: Path
    """Folder for image.png, overlay.png, cycle.json and, with several samples, sheet.png."""
    samples: int = 1
    """Pictures to draw; the one with the highest reward is kept."""
    seed: int = 0
    """The same seed draws the same pictures."""
    json: Json = False
    """End with one JSON object on stdout."""
    engine: ModelOptions = field(default_factory=ModelOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def run(self) -> None:
        from echogen.engine.layout import Layout

        layout = Layout.load(self.layout)
        check_range("samples", self.samples, 1, SAMPLES_MAX)
        check_seed(self.seed)
        self.sampling.check()
        engine = self.engine.load()
        sampling = self.sampling.over(engine)
        with folder_for(self.out):
            with progress("drawing") as update:
                result = engine.cycle(
                    layout, self.samples, self.seed, sampling=sampling, progress=update
                )
            data = result.to_dict(result.best)
            data |= {"seed": self.seed, "model": self.engine.model, "sampling": asdict(sampling)}
            data["files"] = self._write_pictures(result)
            if self.samples > 1:
                data["best"] = result.best
                data["samples"] = [_sample(result, i) for i in range(self.samples)]
            report = Path(data["files"]["report"])
            write(report, (json.dumps(finite(data), indent=2) + "\n").encode())
        self._show(data)
        if self.json:
            print_json(data)

    def _write_pictures(self, result: CycleResult) -> dict[str, str]:
        from echogen.engine.images.picture import contact_sheet, overlay

        expressions = [o.expr for o in result.layout.objects]
        asked: list[Box] = [o.box for o in result.layout.objects]
        best = result.best
        pictures = {
            "image": result.images[best],
            "overlay": overlay(
                result.images[best],
                expressions,
                asked,
                result.boxes[best],
                result.iou[best].tolist(),
            ),
        }
        if len(result.images) > 1:
            pictures["sheet"] = contact_sheet(
                result.images, expressions, asked, result.boxes, result.reward.tolist(), best
            )
        files = {name: self.out / f"{name}.png" for name in pictures}
        for name, picture in pictures.items():
            write_picture(files[name], picture)
        files["report"] = self.out / "cycle.json"
        return {name: str(path) for name, path in files.items()}

    def _show(self, data: dict[str, Any]) -> None:
        def corners(box: list[float]) -> str:
            return " ".join(f"{v:.2f}" for v in box)

        which = f", best of {self.samples} samples" if self.samples > 1 else ""
        show(
            f"{data['caption']}: reward {data['reward']:.3f}{which} ({data['seconds']:.2f} s)",
            ("expression", "asked for", "found again", "IoU", "L1"),
            [
                (o["expr"], corners(o["box"]), corners(o["recovered"]), o["iou"], o["l1"])
                for o in data["objects"]
            ],
        )


def _sample(result: CycleResult, index: int) -> dict[str, Any]:
    row = result.to_dict(index)
    return {
        "reward": row["reward"],
        "advantage": row["advantage"],
        "iou": [o["iou"] for o in row["objects"]],
        "recovered": [o["recovered"] for o in row["objects"]],
    }
