"""Photographs that a search is shown at half their size."""

import json

import pytest
from PIL import Image
from pycocotools import mask

from benchmarks.proof import halved
from jdkd.data import CocoDetectionDataset, resolve_split

WHOLE = [2, 4, 4, 3]  # x, y, width, height
POLYGON = [2, 4, 6, 4, 6, 7, 2, 7]  # its corners


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # by pycocotools
def test_boxes_and_masks_of_every_form_are_halved_with_their_photographs(tmp_path):
    lengths = mask.frPyObjects([POLYGON], 9, 11)[0]
    runs = [2 * 9 + 4, 3, 6, 3, 6, 3, 6, 3, 4 * 9 + 9 + 2]  # down the columns
    forms = [[POLYGON], lengths | {"counts": lengths["counts"].decode()}, {"size": [9, 11], "counts": runs}, []]
    content = {"images": [{"id": 1, "file_name": "a.png", "width": 11, "height": 9}]}
    content["categories"] = [{"id": 1, "name": "cell"}]
    made = {"image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": WHOLE, "area": 12}
    content["annotations"] = [made | {"id": place, "segmentation": form} for place, form in enumerate(forms)]
    content["annotations"].append(made | {"id": 9})
    (tmp_path / "given" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "given" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        (tmp_path / "given" / f"{split}2017").mkdir()
        Image.new("RGB", (11, 9)).save(tmp_path / "given" / f"{split}2017" / "a.png")
    split = resolve_split("val", halved(tmp_path / "given", tmp_path / "data"))
    found = json.loads(split.annotations.read_text())
    assert found["images"][0] == content["images"][0] | {"width": 6, "height": 5}
    polygon, compressed, plain, empty, none = found["annotations"]
    assert all((one["bbox"], one["area"]) == ([1, 2, 2, 1.5], 3) for one in found["annotations"])
    assert polygon["segmentation"] == [[side / 2 for side in POLYGON]]
    for one in (compressed, plain):
        assert one["segmentation"]["size"] == [5, 6]
        (rows, columns) = mask.decode(one["segmentation"]).nonzero()
        assert (sorted({*rows.tolist()}), sorted({*columns.tolist()})) == ([2, 3], [1, 2])
    assert empty["segmentation"] == [] and "segmentation" not in none
    image, target = CocoDetectionDataset(split)[0]
    assert image.shape == (3, 5, 6) and target["boxes"][0].tolist() == pytest.approx([1, 2, 3, 3.5])
