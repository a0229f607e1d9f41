"""`jdkd export`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jdkd.cli.flags import DataFlags, recorded_split
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.files import require_file, sha256_of, write_whole

if TYPE_CHECKING:
    from torch import Tensor, nn

    from jdkd.export import Exported


@dataclass(frozen=True)
class Export:
    """Write a detector as a file for a runtime, checked against it on real images.

    onnx: ONNX's own operators alone, for onnxruntime, OpenVINO, TensorRT. pt2: torch's exported program. Number and
    size of the images are free, but for a detector that resizes to one size (SSD). Where the file does not find what
    the detector finds, in onnxruntime (or torch) and in OpenVINO where that is installed, it is not written.

    Example: jdkd export runs/student --format onnx --data coco --out student.onnx
    """

    ckpt: Path
    """Folder of the detector, written by train, import or search."""
    source: DataFlags = field(default_factory=DataFlags)
    format: Literal["onnx", "pt2"] = "onnx"
    """What to write."""
    out: Path | None = None
    """File to write [CKPT/model.onnx or CKPT/model.pt2]."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Of weights and features; inputs, boxes and scores are fp32."""
    nms: Literal["inside", "outside"] = "inside"
    """Whether the last non-maximum suppression is in the file; proposals are suppressed in it always."""
    images: int = 50
    """Images that both must agree on, at most, of the validation images [of the data that it was trained on]."""

    def __call__(self) -> None:
        from jdkd.detect import load
        from jdkd.detect.checkpoint import WEIGHTS
        from jdkd.export.opening import checking
        from jdkd.export.parity import parity, require_parity
        from jdkd.export.writing import exported, require_runtime
        from jdkd.latency import fuse_for_inference

        out = self._out()
        require_runtime(self.format)
        model = load(self.ckpt)
        how = {"half": self.dtype == "fp16", "nms": self.nms, "weights": sha256_of(self.ckpt / WEIGHTS)}
        with Progress() as progress:
            images, dataset = self._images(model, progress)
            fused = fuse_for_inference(model)
            told = progress.task(f"make the {self.format} file")
            told(0, 1)
            content = exported(fused, self.format, **how)
            told(1, 1)

            def with_stages(opener: Callable[[bytes, str], Exported]) -> Exported:
                return opener(exported(fused, self.format, **how, stages=True), "cpu")

            sentences = []
            for name, opener in checking(self.format).items():
                file = opener(content, "cpu")
                found = parity(model, file, images, dataset, progress.task(f"compare in {name}"))
                require_parity(model, file, found, partial(with_stages, opener))
                sentences.append(f"{name}: {found.sentence()}")
        write_whole(out, content)
        print("\n".join(sentences))
        print(f"{out}: {self.dtype}, {len(content) / 1e6:.1f} MB, SHA-256 {sha256_of(out)}")

    def _out(self) -> Path:
        """The file to write.

        Raises:
            InputError: it cannot be, or another flag is wrong.
        """
        from jdkd.export.opening import MARK

        if self.images < 1:
            raise InputError(f"--images is {self.images}; compare on at least 1 image.")
        out = self.ckpt / f"model.{self.format}" if self.out is None else self.out
        if out.suffix != f".{self.format}":
            raise InputError(f"--out is {out}, and --format {self.format}; give a file that ends with .{self.format}.")
        if not self.ckpt.is_dir():
            raise InputError(
                f"{self.ckpt} is no folder of a detector; give one that `jdkd train` or `jdkd import` wrote."
            )
        require_file(out, "--out", holds=MARK)
        return out

    def _images(self, model: nn.Module, progress: Progress) -> tuple[list[tuple[Tensor, dict[str, Any]]] | Any, Any]:
        """Images to compare on, and the data set of just these, where there is one."""
        from jdkd.data import CocoDetectionDataset
        from jdkd.data.photographs import photographs
        from jdkd.detect.input_size import require_visible
        from jdkd.train.evaluate import require_same_classes

        split = self.source.split("val") if self.source.given else recorded_split(self.ckpt, "val", self.source.strict)
        if split is None:
            return [(image, {}) for image in photographs()[: self.images]], None
        dataset = CocoDetectionDataset(split, progress.task("check images"))
        require_same_classes(model, dataset.classes, dataset.label_to_category)
        dataset = dataset.subset(range(min(self.images, len(dataset))))
        require_visible(model, dataset.sizes)
        return dataset, dataset
