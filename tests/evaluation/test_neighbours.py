"""Nearest training images against a plain search, planted copies, and what the picture shows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.data import ImageData
from flashddpm.evaluation import neighbours
from flashddpm.evaluation.features import Features
from flashddpm.evaluation.neighbours import nearest, picture


def images(n: int, seed: int, shape: tuple[int, int, int] = (1, 6, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *shape), generator=generator, dtype=torch.uint8)


def search(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """All distances, [N, M]."""
    difference = a.double().flatten(1)[:, None] - b.double().flatten(1)
    return difference.square().mean(2).sqrt()


class Halves(torch.nn.Module):
    """Two features: the mean brightness of the upper and of the lower half."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().flatten(1).unflatten(1, (2, -1)).mean(2)


@settings(max_examples=25)
@given(
    n=st.integers(1, 9),
    m=st.integers(3, 40),
    k=st.integers(1, 3),
    max_bytes=st.sampled_from([1, 2000, 10_000, 1 << 28]),
    seed=st.integers(0, 99),
)
def test_agrees_with_a_plain_search_whatever_the_chunks(n, m, k, max_bytes, seed):
    samples, training = images(n, seed), images(m, seed + 1)
    found = nearest(samples, training, k, max_bytes=max_bytes)
    expected = search(samples, training)
    torch.testing.assert_close(found.distance, expected.sort(1).values[:, :k], rtol=1e-12, atol=0)
    assert torch.equal(expected.gather(1, found.index), found.distance)
    assert all(len(set(row)) == k for row in found.index.tolist())
    assert found.duplicate.tolist() == [-1] * n


@pytest.mark.parametrize("max_bytes", [1, 1 << 28])
def test_planted_copy_is_found_and_flagged(max_bytes):
    samples, training = images(4, 0), images(50, 1)
    training[37] = samples[2]
    training[41] = samples[2]
    changed = samples[3].clone()
    changed[0, 0, 0] ^= 1
    training[5] = changed
    found = nearest(samples, training, 3, max_bytes=max_bytes)
    assert found.duplicate.tolist() == [-1, -1, 37, -1]
    assert sorted(found.index[2, :2].tolist()) == [37, 41] and found.distance[2, :2].tolist() == [
        0,
        0,
    ]
    assert found.index[3, 0] == 5
    assert float(found.distance[3, 0]) == pytest.approx((1 / 30) ** 0.5, rel=1e-12)


def test_pixel_distances_are_exact_for_large_images():
    """White and nearly white: float32 would lose a difference of one level in 3 x 64 x 64."""
    white = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    nearly = white.clone()
    nearly[0, 1, 5, 7] = 254
    found = nearest(white, torch.cat((nearly, white)), 2)
    assert found.index.tolist() == [[1, 0]]
    assert found.distance.tolist() == [[0.0, (1 / (3 * 64 * 64)) ** 0.5]]


def test_feature_space_has_its_own_neighbours():
    """Noise with the same brightness is far in pixels and near in features."""
    dark, bright = images(20, 1) // 4, images(20, 2) // 4 + 192
    training = torch.cat((dark, bright))
    sample = torch.full((1, 1, 6, 5), 220, dtype=torch.uint8)
    extractor = Features.of_module(Halves(), "halves")
    found = nearest(sample, training, 5, extractor, max_bytes=500)
    expected = search(extractor(sample), extractor(training))
    torch.testing.assert_close(found.distance, expected.sort(1).values[:, :5])
    assert torch.equal(found.index, expected.argsort(1)[:, :5])
    training[3] = sample
    found = nearest(sample, training, 5, extractor)
    assert found.duplicate.tolist() == [3] and found.distance[0, 0] == 0
    # A copy by features alone is none.
    shuffled = training[3:4].clone()
    shuffled[0, 0, 0, 0] += 1
    shuffled[0, 0, 0, 1] -= 1
    found = nearest(shuffled, training, 1, extractor)
    assert found.distance[0, 0] == 0 and found.duplicate.tolist() == [-1]


class Odd(torch.nn.Module):
    """Features that are no integers: their squares are rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float().flatten(1) / 9).exp()


def test_rounding_below_zero_is_no_distance():
    x = images(50, 1)
    found = nearest(x, x, 1, Features.of_module(Odd(), "odd"))
    assert found.index[:, 0].tolist() == list(range(50))
    assert bool((found.distance < 1e-6 * x.float().div(9).exp().max()).all()), "NaN is no distance"


class Counting:
    """A source that tells what was fetched."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.fetched = data, []

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, index):
        self.fetched += index.tolist()
        return self.data[index], None


def test_source_is_read_once_and_in_bounded_parts():
    samples, source = images(9, 0), Counting(images(60, 1))
    limit = 8 * (neighbours.TABLES * 7 * 7 + 2 * 7 * 30)
    found = nearest(samples, source, 2, max_bytes=limit)
    assert source.fetched == [0, *range(60)], "the first one tells the shape"
    whole = nearest(samples, source.data, 2)
    assert torch.equal(found.index, whole.index)
    data = ImageData(source.data, None, None)
    assert torch.equal(nearest(samples, data, 2).index, whole.index)


@pytest.mark.parametrize("width", [1, 30, 784, 196_608])
@pytest.mark.parametrize("max_bytes", [10_000_000, 256 << 20])
def test_tile_is_the_largest_that_fits(width, max_bytes):
    def bytes_of(t):
        return 8 * (neighbours.TABLES * t * t + 2 * t * width)

    tile = neighbours._tile(width, max_bytes)
    assert bytes_of(tile) <= max_bytes
    assert tile == neighbours.MAX_TILE or bytes_of(tile + 1) > max_bytes


def test_picture_has_a_row_a_sample():
    samples, training = images(2, 0, (1, 20, 20)), images(9, 1, (1, 20, 20))
    training[4] = samples[1]
    found = nearest(samples, training, 3)
    shown = picture(samples, training, found, zoom=1)
    cell, text = 22, (shown.height - 2) // 2 - 22
    assert shown.width == 4 * cell + 2

    def pixels(row, column):
        left, top = 2 + column * cell, 2 + row * (cell + text) + text
        return [[shown.getpixel((left + x, top + y))[0] for x in range(20)] for y in range(20)]

    for row in range(2):
        assert pixels(row, 0) == samples[row, 0].tolist()
        for column in range(3):
            assert pixels(row, column + 1) == training[found.index[row, column], 0].tolist()


def test_captions_say_distances_and_copies(monkeypatch):
    samples, training = images(2, 0), images(9, 1)
    training[4] = samples[1]
    found = nearest(samples, training, 2)
    seen = []
    monkeypatch.setattr(
        neighbours, "make_grid", lambda x, columns, captions, zoom: seen.append(captions)
    )
    picture(samples, training, found, ["seed 7", "seed 8"])
    distances = [[f"{d:.3g}" for d in row] for row in found.distance.tolist()]
    assert seen == [["seed 7", *distances[0], "seed 8", "same", distances[1][1]]]


def test_what_cannot_be_compared_is_refused():
    samples, training = images(3, 0), images(5, 1)
    with pytest.raises(ValueError, match="training: holds 5 images; k=6 needs at least 6"):
        nearest(samples, training, 6)
    with pytest.raises(ValueError, match="k=0: must be at least 1"):
        nearest(samples, training, 0)
    with pytest.raises(ValueError, match="samples: holds none"):
        nearest(samples[:0], training)
    with pytest.raises(ValueError, match=r"samples of shape \(1, 5, 6\).*\(1, 6, 5\)"):
        nearest(samples.transpose(2, 3), training)
    with pytest.raises(ValueError, match="torch.float32: must be uint8"):
        nearest(samples.float(), training)
    found = nearest(samples, training, 2)
    with pytest.raises(ValueError, match="samples: 2 for the neighbours of 3"):
        picture(samples[:2], training, found)
    with pytest.raises(ValueError, match="names: 1 for the neighbours of 3"):
        picture(samples, training, found, ["a"])
