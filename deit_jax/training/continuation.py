"""What a step number means: kept in every checkpoint, and compared where a run goes on."""

from deit_jax.errors import InputError
from deit_jax.training.run import Run

EPOCHS = "schedule.epochs"
_CONSEQUENCES = {  # of another value than that of the checkpoint
    "train.batch_size": "its steps stand for other numbers of images",
    "train.seed": "order and augmentation start anew in the middle",
    "input.repeats": "an epoch has other images",
    "mixing.group_size": "the order of the images is another one",
    "steps_per_epoch": "an epoch ends at another step, and with it the rate and the end move",
    "data": "the training images, their order or their labels are others",
    EPOCHS: "the schedule ends sooner, perhaps before this step",
}


def facts(run: Run) -> dict[str, object]:
    """Returns by name what decides which images a step sees, and where the run ends."""
    config = run.config
    return {
        "train.batch_size": config.train.batch_size,
        "train.seed": config.train.seed,
        "input.repeats": config.input.repeats,
        "mixing.group_size": config.mixing.group_size,
        "steps_per_epoch": run.plan.steps_per_epoch,
        "data": run.train_source.fingerprint(),
        EPOCHS: config.schedule.epochs,
    }


def check(step: int, saved: dict[str, object], run: Run) -> list[str]:
    """Compares the facts of a checkpoint with those of the run that goes on from it.

    More epochs are accepted, others only by name in `checkpoint.accept_changes`.

    Args:
      step: of the checkpoint.
      saved: its facts; {} in one of an earlier version.
      run: the checked run.

    Returns:
      A line for each change that is accepted.

    Raises:
      InputError: a change is not accepted.
    """
    accepted = run.config.checkpoint.accept_changes.split()
    if not saved:
        return ["the checkpoint does not say of which data and batches; nothing was compared"]
    notes, refused = [], {}
    for name, new in facts(run).items():
        if (old := saved.get(name)) == new:
            continue
        change = f"{name} was {old} and is {new}"
        if name == EPOCHS and new > old:
            notes.append(f"{change}: from here the rate follows the longer schedule")
        elif name in accepted:
            notes.append(f"{change}, as accepted: {_CONSEQUENCES[name]}")
        else:
            refused[name] = f"{change} ({_CONSEQUENCES[name]})"
    if refused:
        raise InputError(
            f"--workdir={run.workdir} holds step {step} of another run: "
            f"{'; '.join(refused.values())}; undo that, choose a new --workdir, or accept it with "
            f"--config.checkpoint.accept_changes='{' '.join([*accepted, *refused])}'"
        )
    return notes
