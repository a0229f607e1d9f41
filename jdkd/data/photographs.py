"""See :func:`photographs`."""

import torch
from torch import Tensor


def photographs() -> list[Tensor]:
    """The two photographs that scikit-learn carries, uint8 ``[3, 427, 640]``: of use where there are no data."""
    from sklearn.datasets import load_sample_images

    return [torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous() for image in load_sample_images().images]
