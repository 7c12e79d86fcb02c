"""A workdir that was moved while its run was saving."""

from deit_jax import storage
from deit_jax.checkpoints import training


def test_what_a_save_makes_anew_of_a_moved_workdir_is_removed(tmp_path, monkeypatch):
    """Also what its writers make between the removal of the checkpoints and that of the workdir."""
    folder = tmp_path / "run" / "checkpoints"
    checkpoints = object.__new__(training.TrainCheckpoints)
    checkpoints._directory, checkpoints._saved = folder, 7
    remove, removed = storage.remove_folder, []

    def removing(path):
        remove(path)
        if not removed:
            (folder / "7.tmp").mkdir(parents=True)
        removed.append(path)

    monkeypatch.setattr(storage, "remove_folder", removing)
    (folder / "7").mkdir(parents=True)
    checkpoints._remove_remnant()
    assert not folder.parent.exists()
    assert len(removed) == 2
    for other in ("checkpoints/6", "model"):  # it is no remnant
        (folder / "7").mkdir(parents=True)
        (folder.parent / other).mkdir()
        checkpoints._remove_remnant()
        assert (folder / "7").exists()
        remove(folder.parent)
