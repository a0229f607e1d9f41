"""Detection data: COCO-format folders in, seeded batches out, and the embedded digit scenes."""

from jdkd.data.coco import CocoDetectionDataset, Split, resolve_split, resolve_splits
from jdkd.data.digits import write_digit_scenes
from jdkd.data.loading import batches

__all__ = [
    "CocoDetectionDataset",
    "Split",
    "batches",
    "resolve_split",
    "resolve_splits",
    "write_digit_scenes",
]
