import jax
import numpy as np
import pytest

from deit_jax import trees
from deit_jax.errors import InputError


def make_tree():
    return {
        "blocks": {i: {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)} for i in range(12)},
        "head": {"kernel": np.zeros((3, 5)), "bias": np.zeros(5)},
    }


def test_names_follow_jax_flattening():
    tree = {"b": {10: 1, 2: 2}, "a": [3, 4]}
    assert trees.leaf_names(tree) == ["a/0", "a/1", "b/2", "b/10"]
    assert trees.flat(tree) == {"a/0": 3, "a/1": 4, "b/2": 2, "b/10": 1}
    assert list(trees.flat(tree).values()) == jax.tree.leaves(tree)


def test_param_count_of_arrays_and_shapes():
    tree = make_tree()
    assert trees.param_count(tree) == 12 * 9 + 20
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert trees.param_count(shapes) == 12 * 9 + 20


def test_name_mask_matches_whole_names():
    mask = trees.name_mask(make_tree(), [r"blocks/1/.*", r"head/bias"])
    assert jax.tree.structure(mask) == jax.tree.structure(make_tree())
    true = {name for name, value in trees.flat(mask).items() if value}
    assert true == {"blocks/1/kernel", "blocks/1/bias", "head/bias"}
    assert not any(jax.tree.leaves(trees.name_mask(make_tree(), ["kernel", "head"])))


def test_check_like_accepts_equal_trees_of_other_dtype():
    want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float16), make_tree())
    trees.check_like(make_tree(), want)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda tree: tree["head"].update(kern=tree["head"].pop("kernel")),
            "missing head/kernel; unexpected head/kern.",
        ),
        (lambda tree: tree["blocks"][11].pop("bias"), "missing blocks/11/bias"),
        (lambda tree: tree["head"].update(extra=np.zeros(1)), "unexpected head/extra"),
        (
            lambda tree: tree["head"].update(kernel=np.zeros((5, 3))),
            "head/kernel has shape (5, 3), expected (3, 5)",
        ),
        (
            lambda tree: tree.update(blocks={str(i): x for i, x in tree["blocks"].items()}),
            "restore_int_paths",
        ),
        (dict.clear, "and 16 more"),
    ],
)
def test_check_like_names_the_difference_in_a_bounded_line(spoil, message):
    tree = make_tree()
    spoil(tree)
    with pytest.raises(InputError) as error:
        trees.check_like(tree, make_tree(), "weights in x.pth")
    assert message in str(error.value)
    assert str(error.value).startswith("weights in x.pth")
    assert str(error.value).count("missing") <= 10
    assert "\n" not in str(error.value)
