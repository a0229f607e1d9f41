"""See :func:`with_variance`."""

from collections.abc import Iterator
from contextlib import contextmanager

from jdkd.errors import ModelError
from jdkd.train.config import TrainConfig


@contextmanager
def with_variance(config: TrainConfig) -> Iterator[None]:
    """Says what to do where a batch leaves a batch norm a single value a channel, or one is synchronised on a CPU."""
    try:
        yield
    except ValueError as error:
        if "SyncBatchNorm expected" in str(error):
            raise ModelError(
                'norm "sync" takes its statistics over the processes of a group, which torch does on GPUs alone: train '
                'there, or with norm "batch".'
            ) from error
        if "more than 1 value per channel" not in str(error):
            raise
        raise ModelError(
            f"batch_size {config.batch_size} leaves a batch norm 1 value a channel, which has no variance ({error}): "
            'train on more or larger images (batch_size, min_size), or with norm "frozen".'
        ) from error
