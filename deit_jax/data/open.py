"""Opens the split of a data set that a config describes."""

from ml_collections import ConfigDict

from deit_jax.data.digits import open_digits
from deit_jax.data.source import Source
from deit_jax.errors import InputError

SPLITS = ("train", "eval")


def open_source(dataset: ConfigDict, split: str) -> Source:
    """Opens a split of the data set that the `dataset` group of a config describes.

    Args:
      dataset: the group.
      split: "train" or "eval"; `train_split` and `eval_split` say what they are called.

    Raises:
      InputError: the data are not where the config says, or are not what it says.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    fraction = dataset.train_fraction
    if not 0 < fraction <= 1:
        raise InputError(
            f"config.dataset.train_fraction is {fraction}, expected a number in (0, 1]"
        )
    # Imported by need: the other sources should not wait for tensorflow_datasets.
    if dataset.source == "folder":
        from deit_jax.data.folder import open_folder

        return open_folder(dataset, split)
    if dataset.source == "tfds":
        from deit_jax.data.tfds import open_tfds

        return open_tfds(dataset, split)
    if dataset.source == "digits":
        return open_digits(dataset, split)
    raise InputError(
        f"config.dataset.source is {dataset.source!r}, expected one of folder, tfds, digits"
    )
