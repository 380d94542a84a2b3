"""Dropout: its masks are random enough, and the same wherever and however they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.config import MeshConfig
from gpt_jax.model.layers import dropout, keep_mask
from gpt_jax.parallel.mesh import make_mesh, split_batch

SHAPE = (16, 3, 64, 64)
MOST = 4.5  # standard deviations that a sum of independent masks stays within, tens of them and each time


def deviations(products, variance):
    """How many standard deviations the mean of `products` is from 0, each of this variance."""
    return abs(products.mean()) * (products.size / variance) ** 0.5


def seed(n):
    return jax.random.bits(jax.random.key(n), (2,))


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.9])
def test_masks_have_the_right_mean_and_no_neighbours(rate):
    mask = np.asarray(keep_mask(seed(7), 0, rate, SHAPE)).ravel() - (1 - rate)
    variance = rate * (1 - rate)
    assert deviations(mask, variance) < MOST
    for distance in (1, 2, 3, 4, 8, 63, 64, 65, 64 * 64, 3 * 64 * 64):
        assert deviations(mask[:-distance] * mask[distance:], variance**2) < MOST


def test_masks_of_other_seeds_and_places_have_nothing_in_common():
    seeds_Nx2 = jax.random.bits(jax.random.key(1), (8, 2))
    seeds_Nx2 = jnp.concatenate([seeds_Nx2, seeds_Nx2.at[:, 0].add(1), seeds_Nx2.at[:, 1].add(1)])
    masks = [
        np.asarray(jax.vmap(lambda s, place=place: keep_mask(s, place, 0.5, (2**14,)))(seeds_Nx2)) - 0.5
        for place in range(4)
    ]
    masks = np.concatenate(masks)
    correlations = masks @ masks.T / (0.25 * 2**7)  # in standard deviations
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5.5  # of 4,560 pairs


def test_elements_are_scaled_or_dropped():
    x = jnp.arange(1.0, 1001.0)
    y = dropout(x, 0.25, seed(0))
    np.testing.assert_allclose(np.unique(np.asarray(y / x).round(4)), [0, 4 / 3], atol=1e-4)
    np.testing.assert_array_equal(dropout(x, 0.25, seed(0)), y)
    assert (dropout(x, 0.25, seed(1)) != y).any() and (dropout(x, 0.25, seed(0), 1) != y).any()
    assert dropout(x, 0.0, seed(0)) is x and dropout(x, 0.25, None) is x


def test_a_mask_does_not_depend_on_how_it_is_split():
    def mask(mesh):
        return jax.jit(lambda seed_2: split_batch(keep_mask(seed_2, 0, 0.3, SHAPE), mesh))(seed(3))

    split = mask(make_mesh(MeshConfig(data=8)))
    assert not split.is_fully_replicated
    np.testing.assert_array_equal(split, mask(None))
