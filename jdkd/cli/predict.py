"""`jdkd predict`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jdkd.cli.flags import resolve_device
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.files import claim_folder, starts_with, write_json, write_whole
from jdkd.notices import say_once

if TYPE_CHECKING:
    import numpy as np

    from jdkd.export.preparing import Found

EXPORTED = (".onnx", ".pt2")
PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
LISTED = "detections.json"
BEGINS = '{\n  "model"'  # as `LISTED` does


@dataclass(frozen=True)
class Predict:
    """Draw what a detector finds on images, and list it.

    An .onnx file runs in onnxruntime, without torch.

    Example: jdkd predict student.onnx photographs --out seen
    """

    model: Path
    """Folder of a detector, or a file that `jdkd export` wrote (.onnx, .pt2)."""
    images: tuple[Path, ...]
    """Image files, and folders of them."""
    out: Path | None = None
    """Folder for a JPEG of each image and detections.json; must be given."""
    threshold: float = 0.5
    """Score from which a detection is drawn; the list has all."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is the CPU for an .onnx file."""

    def __call__(self) -> None:
        from jdkd.export.drawing import drawn, name_of, read_picture

        if self.out is None:
            raise InputError("--out is missing; give a folder for the pictures.")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"--threshold is {self.threshold:g}; give a score, from 0 to 1.")
        _require_detector(self.model)
        targets = self._targets()
        find, classes = finder(self.model, self.device)
        listed, count, highest = [], 0, 0.0
        with Progress() as progress:
            for file, target in targets.items():
                image = read_picture(file)
                found = find(image, str(file))
                if not listed:
                    claim_folder(self.out, "--out")
                claim_folder(target.parent, "--out")
                shown = found["scores"] >= self.threshold
                count += int(shown.sum())
                highest = max(highest, float(found["scores"].max(initial=0.0)))
                write_whole(target, drawn(image, {name: values[shown] for name, values in found.items()}, classes))
                rows = [
                    {"box": box, "label": label, "class": name_of(label, classes), "score": score}
                    for box, label, score in zip(
                        *(found[key].tolist() for key in ("boxes", "labels", "scores")), strict=True
                    )
                ]
                listed.append({"file": str(file), "picture": str(target.relative_to(self.out)), "detections": rows})
                progress("images", len(listed), len(targets))
        write_json(self.out / LISTED, {"model": str(self.model), "images": listed})
        said = f"{count:,} detections with a score of at least {self.threshold:g} on {len(listed):,} image(s)"
        if not count and highest > 0:
            said += f"; the highest is {highest:.3f}: give a lower --threshold to have some drawn"
        print(said)
        print(self.out)

    def _targets(self) -> dict[Path, Path]:
        """Every image, and the picture that is made of it.

        Pictures of an earlier run in a folder are no images, which is said.

        Raises:
            InputError: there is none, or two pictures would be one, or a file would be written over that is an image
                or that no `jdkd predict` wrote.
        """
        from jdkd.export.drawing import is_drawn

        targets: dict[Path, Path] = {}
        for given in self.images:
            if given.is_dir():
                there = sorted(file for file in given.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
                inside = [file for file in there if not is_drawn(file)]
                if count := len(there) - len(inside):
                    say_once(f"{count:,} picture(s) in {given} that `jdkd predict` drew are left out")
                if not inside:
                    raise InputError(f"{given} holds no image ({', '.join(sorted(PICTURES))}); give another folder.")
                targets |= {file: self.out / file.relative_to(given).with_suffix(".jpg") for file in inside}
            elif given.is_file():
                targets[given] = self.out / f"{given.stem}.jpg"
            else:
                raise InputError(f"image {given} does not exist; give image files or folders of them.")
        if not targets:
            raise InputError("no image is given; give image files or folders of them.")
        whose: dict[Path, Path] = {}
        for file, target in targets.items():
            if target in whose:
                raise InputError(f"{whose[target]} and {file} would both be drawn as {target}; draw them one by one.")
            whose[target] = file
        images, listed = {file.resolve() for file in targets}, self.out / LISTED
        for target in (*whose, listed):
            ours = is_drawn(target) if target != listed else target.is_file() and starts_with(target, BEGINS)
            is_image = target.resolve() in images
            if is_image or (target.exists() and not ours):
                why = "is one of the images" if is_image else "no `jdkd predict` wrote"
                raise InputError(f"--out {self.out} would write over {target}, which {why}; give another folder.")
        return targets


def _require_detector(model: Path) -> None:
    """Refuses what can be no detector by its name, before images are looked for.

    Raises:
        InputError: it is no folder, and does not end as exported files do.
    """
    if not model.is_dir() and model.suffix not in EXPORTED:
        what = "is neither a folder of a detector nor" if model.exists() else "does not exist: it must be a folder or"
        raise InputError(
            f"{model} {what} a file of `jdkd export` ({', '.join(EXPORTED)}); give the detector first, then images."
        )


def finder(model: Path, device: str) -> tuple[Callable[[np.ndarray, str], Found], Sequence[str]]:
    """What finds objects on an image ``[H, W, 3]`` uint8 of a name, and the names of its classes.

    Raises:
        InputError: it cannot be opened; and, when it is called, the image is too elongated for it.
    """
    if model.suffix in EXPORTED and not model.is_dir():
        from jdkd.export.opening import open_exported

        if model.suffix == ".onnx":
            on = "cpu" if device == "auto" else device
            if on.partition(":")[0] not in ("cpu", "cuda"):
                raise InputError(f"--device is {device!r}; give auto, cpu, cuda or cuda:N.")
        else:
            on = resolve_device(device)
        file = open_exported(model, on)
        return lambda image, name: file([image])[0], file.facts["classes"]
    return _of_folder(model, resolve_device(device))


def _of_folder(folder: Path, device: str) -> tuple[Callable[[np.ndarray, str], Found], Sequence[str]]:
    import torch

    from jdkd.detect import load
    from jdkd.detect.architecture import known_architecture
    from jdkd.detect.contract import detections
    from jdkd.detect.input_size import require_visible
    from jdkd.export.parity import numbers
    from jdkd.latency import fuse_for_inference

    model = load(folder)
    known = known_architecture(model)
    model = fuse_for_inference(model).to(device)

    def find(image: np.ndarray, name: str) -> Found:
        require_visible(model, [(name, *image.shape[:2])])
        with torch.inference_mode():
            return numbers(detections(model, [torch.from_numpy(image).permute(2, 0, 1).to(device).float() / 255])[0])

    return find, known.classes if known else ()
