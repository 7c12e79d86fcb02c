"""Texts of RandAugment that are none; tests/data compares the others with timm."""

import pytest

from deit_jax.config.randaugment_policy import parse_policy
from deit_jax.errors import InputError


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("augmix-m3", "'augmix'"),
        ("", "''"),
        ("original-mstd0.5", "'original'"),
        ("rand-m9-x3", "'x3'"),
        ("rand-m9-tweights", "'tweights'"),
        ("rand-m9-w0", "'w0'"),
        ("rand-m9-inc", "'inc'"),
        ("rand-m", "'m'"),
        ("rand-m9.5", "'m9.5'"),
        ("rand-m9-", "''"),
        ("rand-m9-mstd", "'mstd'"),
        ("rand-m9-mstd-0.5", "'mstd'"),
        ("rand-mstdnan", "'mstdnan'"),
        ("rand-mstd0.5.5", "'mstd0.5.5'"),
        ("rand-p1.5", "'p1.5'"),
        ("rand-n0", "'n0'"),
        ("rand-mmax0", "'mmax0'"),
        ("rand-m9-m8", "'m' twice"),
        ("rand-m9 -inc1", "'m9 '"),
        ("rand-m²", "'m²'"),
        ("RAND-m9", "'RAND'"),
    ],
)
def test_malformed_policies_are_refused_by_their_part(text, part):
    with pytest.raises(InputError) as caught:
        parse_policy(text)
    message = str(caught.value)
    assert repr(text) in message
    assert part in message
    assert "\n" not in message
