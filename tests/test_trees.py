import copy

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


def broken(kind):
    tree = copy.deepcopy(make_tree())
    if kind == "renamed":
        tree["head"]["kern"] = tree["head"].pop("kernel")
    elif kind == "missing":
        del tree["blocks"][11]["bias"]
    elif kind == "unexpected":
        tree["head"]["extra"] = np.zeros(1)
    elif kind == "misshaped":
        tree["head"]["kernel"] = np.zeros((5, 3))
    elif kind == "string keys":
        tree["blocks"] = {str(i): block for i, block in tree["blocks"].items()}
    return tree


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("renamed", "missing head/kernel; unexpected head/kern."),
        ("missing", "missing blocks/11/bias"),
        ("unexpected", "unexpected head/extra"),
        ("misshaped", "head/kernel has shape (5, 3), expected (3, 5)"),
        ("string keys", "restore_int_paths"),
    ],
)
def test_check_like_names_the_difference(kind, message):
    with pytest.raises(InputError) as error:
        trees.check_like(broken(kind), make_tree(), "weights in x.pth")
    assert message in str(error.value)
    assert str(error.value).startswith("weights in x.pth")


def test_check_like_message_is_one_bounded_line():
    with pytest.raises(InputError) as error:
        trees.check_like({}, make_tree())
    message = str(error.value)
    assert "\n" not in message
    assert message.count("missing") == 10
    assert "and 16 more" in message
