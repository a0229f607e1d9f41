"""Detection data: COCO-format folders in, seeded batches out, and the embedded digit scenes."""

from jdkd.data.coco import CocoDetectionDataset
from jdkd.data.digits import write_digit_scenes
from jdkd.data.images import read_image
from jdkd.data.loading import batches, in_order
from jdkd.data.splits import Split, resolve_split, resolve_splits

__all__ = [
    "CocoDetectionDataset",
    "Split",
    "batches",
    "in_order",
    "read_image",
    "resolve_split",
    "resolve_splits",
    "write_digit_scenes",
]
