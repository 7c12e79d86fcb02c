"""The input plan of a run: the numbers that decide its batches, in one object."""

import dataclasses

from ml_collections import ConfigDict, FrozenConfigDict

from deit_jax.config.plan import RunPlan
from deit_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputPlan:
    """Decides, together with a source, every batch of a run.

    All processes of a run have the same plan, but for `process_index`.

    Raises:
      InputError: a batch that its groups or its processes do not divide.
    """

    input: ConfigDict  # the `input` group of the config
    image_size: int  # side S of the images, in pixels
    batch_size: int  # rows of the global batch
    steps_per_epoch: int  # training batches after which a new permutation begins
    seed: int  # of the order and the augmentation
    group_size: int  # consecutive rows that stand for one GPU of the reference (`order.Order.row`)
    process_index: int = 0
    process_count: int = 1  # each process has batch_size / process_count rows

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise InputError(
                f"batch_size is {self.batch_size}, expected a positive multiple of the "
                f"{self.process_count} processes that share it"
            )
        if self.batch_size % self.group_size:
            raise InputError(
                f"group_size is {self.group_size}, which does not divide the batch of "
                f"{self.batch_size}; choose a divisor"
            )

    @classmethod
    def of(
        cls, config: ConfigDict, plan: RunPlan, *, process_index: int = 0, process_count: int = 1
    ) -> "InputPlan":
        """Builds the input plan of the run that a config and its derived numbers describe."""
        return cls(
            input=FrozenConfigDict(config.input),  # what is traced later must not see changes
            image_size=config.input.image_size,
            batch_size=config.train.batch_size,
            steps_per_epoch=plan.steps_per_epoch,
            seed=config.train.seed,
            group_size=plan.order_group_size,
            process_index=process_index,
            process_count=process_count,
        )

    @property
    def local_rows(self) -> int:
        """How many rows of a global batch this process has."""
        return self.batch_size // self.process_count

    @property
    def first_row(self) -> int:
        """The first of them in the global batch."""
        return self.process_index * self.local_rows
