"""Opens the data set that a config describes."""

from ml_collections import ConfigDict

from deit_jax.data.digits import open_digits
from deit_jax.data.source import Source
from deit_jax.errors import InputError


def open_source(dataset: ConfigDict, split: str) -> Source:
    """Opens a split of a data set.

    Args:
      dataset: the `dataset` group of a validated config.
      split: "train" or "eval"; `train_split` and `eval_split` say what they are called.

    Raises:
      InputError: the data are not where the config says, or are not what it says.
    """
    # Imported by need: the other sources should not wait for tensorflow_datasets.
    if dataset.source == "folder":
        from deit_jax.data.folder import open_folder

        return open_folder(dataset, split)
    if dataset.source == "tfds":
        from deit_jax.data.tfds import open_tfds

        return open_tfds(dataset, split)
    if dataset.source == "hf":
        from deit_jax.data.hf import open_hf

        return open_hf(dataset, split)
    if dataset.source == "digits":
        return open_digits(dataset, split)
    raise InputError(
        f"config.dataset.source is {dataset.source!r}, expected one of folder, tfds, digits, hf"
    )
