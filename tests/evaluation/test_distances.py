"""Distances with known answers: Gaussians, equal sets, sets apart, and a second way to compute."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashddpm.evaluation import distances
from flashddpm.evaluation.distances import frechet, kernel, precision_recall


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, n: int = 500, seed: int = 0):
    """Samples whose own mean and covariance are exactly these."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.atleast_2d(torch.cov(x.T))), x.T, upper=False
    )
    return (torch.linalg.cholesky(covariance) @ x).T + mean


def random_covariance(d: int, seed: int) -> torch.Tensor:
    root = normal(d, d, seed=seed)
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def shuffled(x: torch.Tensor) -> torch.Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def test_frechet_of_gaussians_with_diagonal_covariance():
    a, b = torch.tensor([[1.0, 4.0, 9.0], [4.0, 0.25, 9.0]]).double()
    mean = torch.tensor([1.0, -2.0, 0.5]).double()
    expected = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    left = gaussian(torch.zeros(3).double(), a.diag(), seed=1)
    right = gaussian(mean, b.diag(), n=300, seed=2)
    assert frechet(left, right) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_one_feature():
    left = gaussian(torch.zeros(1).double(), torch.tensor([[4.0]]).double())
    right = gaussian(torch.ones(1).double(), torch.tensor([[9.0]]).double(), seed=1)
    assert frechet(left, right) == pytest.approx(1 + (2 - 3) ** 2, rel=1e-10)


def test_frechet_of_correlated_gaussians():
    """In two dimensions Tr M^(1/2) = (Tr M + 2 det(M)^(1/2))^(1/2): no eigenvalues needed."""
    a, b = random_covariance(2, 3), random_covariance(2, 4)
    assert not torch.allclose(a @ b, b @ a), "these must not commute"
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = float(a.trace() + b.trace()) - 2 * root
    zero = torch.zeros(2).double()
    left, right = gaussian(zero, a, seed=5), gaussian(zero, b, seed=6)
    assert frechet(left, right) == pytest.approx(expected, rel=1e-10)
    assert frechet(right, left) == pytest.approx(expected, rel=1e-10)


@settings(max_examples=25)
@given(d=st.integers(1, 12), seed=st.integers(0, 1000))
def test_frechet_is_the_symmetric_form(d, seed):
    """(S_a S_b)^(1/2) has the trace of (R S_b R)^(1/2) with R = S_a^(1/2), which is symmetric."""
    a, b = random_covariance(d, seed), random_covariance(d, seed + 1)
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
    mean = normal(d, seed=seed)
    expected = float(mean.square().sum() + a.trace() + b.trace() - 2 * cross)
    left, right = gaussian(mean, a, 40, seed), gaussian(torch.zeros(d).double(), b, 50, seed + 1)
    assert frechet(left, right) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_frechet_of_a_set_to_itself_is_zero_even_with_dead_features():
    x = gaussian(torch.zeros(7).double(), random_covariance(7, 0))
    x[:, 3] = 0
    assert frechet(x, shuffled(x)) == pytest.approx(0, abs=1e-6)
    assert frechet(x, x + 1) == pytest.approx(7, rel=1e-7)


def test_frechet_is_never_rounded_below_zero():
    for seed in range(20):
        x = normal(40, 7, seed=seed)
        assert frechet(x, shuffled(x)) >= 0


def test_float32_is_computed_in_float64():
    x = (normal(200, 4, seed=1) + 1e4).float()
    y = (normal(200, 4, seed=2) + 1e4).float()
    assert frechet(x, y) == frechet(x.double(), y.double())
    assert kernel(x, y, 3, 100) == kernel(x.double(), y.double(), 3, 100)
    assert precision_recall(x, y) == precision_recall(x.double(), y.double())


def cubic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate():
    """A subset as large as the set is the set, whatever was drawn."""
    x, y = normal(30, 5, seed=1), normal(30, 5, seed=2) + 0.5
    off = ~torch.eye(30, dtype=torch.bool)
    expected = cubic(x, x)[off].mean() + cubic(y, y)[off].mean() - 2 * cubic(x, y).mean()
    found = kernel(x, y, subsets=4, subset_size=30)
    assert found.mean == pytest.approx(float(expected), rel=1e-10)
    assert found.deviation == pytest.approx(0, abs=1e-10)


def test_kernel_distance_is_about_zero_for_equal_distributions_only():
    x, y = normal(800, 6, seed=1), normal(800, 6, seed=2)
    near, far = kernel(x, y, 20, 400), kernel(x, y + 1, 20, 400)
    assert abs(near.mean) < 3 * near.deviation and far.mean > 10 * far.deviation
    assert near.deviation > 0


def test_kernel_distance_is_a_function_of_its_seed():
    x, y = normal(100, 6, seed=1), normal(100, 6, seed=2)
    before = torch.random.get_rng_state()
    assert kernel(x, y, 3, 50, seed=1) == kernel(x, y, 3, 50, seed=1)
    assert kernel(x, y, 3, 50, seed=1) != kernel(x, y, 3, 50, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_number_of_subsets_and_their_size_are_those_asked_for():
    x, y = normal(100, 6, seed=1), normal(100, 6, seed=2)
    one = kernel(x, y, subsets=1, subset_size=50)
    assert one.deviation == 0 and kernel(x, y, 2, 50).deviation > 0
    assert kernel(x, y, 1, 10) != one


def test_precision_and_recall_of_equal_sets_and_of_sets_apart():
    x = normal(60, 4, seed=1)
    assert precision_recall(x, shuffled(x)) == distances.PrecisionRecall(1.0, 1.0)
    assert precision_recall(x, x + 1000) == distances.PrecisionRecall(0.0, 0.0)


def test_precision_is_of_the_drawn_images_and_recall_of_the_real_ones():
    """One mode of two is drawn: all drawn look real, half of the real ones are never drawn."""
    left, right = normal(60, 4, seed=1), normal(60, 4, seed=2) + 1000
    found = precision_recall(torch.cat((left, right)), left)
    assert found == distances.PrecisionRecall(precision=1.0, recall=0.5)


def test_reach_is_the_distance_to_the_kth_neighbour_besides_oneself():
    real = torch.tensor([[0.0], [1.0], [3.0], [100.0]])
    drawn = torch.tensor([[4.5], [4.6], [-1.9], [50.0]])
    # k = 1: 0 reaches 1, 3 reaches 2, 100 reaches 97. k = 2 of the first three: 0 reaches 3.
    assert precision_recall(real, drawn, k=1).precision == 0.75
    assert precision_recall(real[:3], drawn[:3], k=1).precision == pytest.approx(2 / 3)
    assert precision_recall(real[:3], drawn[:3], k=2).precision == 1.0


@settings(max_examples=25)
@given(n=st.integers(4, 30), m=st.integers(4, 30), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_precision_and_recall_are_those_of_the_definition(n, m, k, seed):
    real, drawn = normal(n, 3, seed=seed), 1.5 * normal(m, 3, seed=seed + 1)

    def covered(points, balls):
        reach = [sorted(math.dist(b, c) for c in balls)[k] for b in balls]
        hits = [
            any(math.dist(p, b) <= r for b, r in zip(balls, reach, strict=True)) for p in points
        ]
        return sum(hits) / len(hits)

    a, b = real.tolist(), drawn.tolist()
    found = precision_recall(real, drawn, k)
    assert found.precision == pytest.approx(covered(b, a), abs=1e-6)
    assert found.recall == pytest.approx(covered(a, b), abs=1e-6)


def test_chunks_do_not_change_precision_and_recall(monkeypatch):
    real, drawn = normal(50, 3, seed=1), 1.5 * normal(40, 3, seed=2)
    whole = precision_recall(real, drawn)
    monkeypatch.setattr(distances, "MAX_BYTES", 8 * 50 * 7)  # seven rows at a time
    assert precision_recall(real, drawn) == whole


def test_too_few_samples_are_refused_with_the_number_needed():
    x = normal(20, 8, seed=1)
    with pytest.raises(ValueError, match="features_b: 8 samples of 8 features.*at least 9 samples"):
        frechet(x, x[:8])
    assert frechet(x, x[:9]) > 0
    with pytest.raises(ValueError, match="features_a: 9 samples.*subset_size=10.*at least 10"):
        kernel(x[:9], x, 1, 10)
    kernel(x[:10], x, 1, 10)
    with pytest.raises(ValueError, match="drawn: 3 samples.*k=3.*at least 4 samples"):
        precision_recall(x, x[:3])
    precision_recall(x, x[:4])


@pytest.mark.parametrize("distance", [frechet, kernel, precision_recall])
def test_features_that_cannot_be_compared_are_refused(distance):
    x = normal(20, 8, seed=1)
    with pytest.raises(ValueError, match=r"of shape \(20, 7\).*D the same in both"):
        distance(x, x[:, :7])
    with pytest.raises(ValueError, match=r"of shape \(160,\).*must be floating, \[N, D\]"):
        distance(x.flatten(), x)
    with pytest.raises(ValueError, match="torch.int64: must be floating"):
        distance(x, x.long())
    with pytest.raises(ValueError, match="must be finite"):
        distance(x / 0, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": 0}, "subsets=0: must be at least 1"),
        ({"subset_size": 1}, "subset_size=1: must be at least 2"),
        ({"seed": -1}, "seed=-1: must be in"),
        ({"seed": 2**32}, "seed=4294967296: must be in"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    x = normal(20, 8, seed=1)
    with pytest.raises(ValueError, match=message):
        kernel(x, x, **{"subset_size": 10, **options})
    with pytest.raises(ValueError, match="k=0: must be at least 1"):
        precision_recall(x, x, 0)


def test_missing_package_is_named_with_its_extra(monkeypatch):
    distances.require_fidelity()
    x = normal(20, 8, seed=1)
    monkeypatch.setitem(sys.modules, "torch_fidelity.version", None)
    for call in (
        distances.require_fidelity,
        lambda: frechet(x, x),
        lambda: kernel(x, x, 1, 10),
        lambda: precision_recall(x, x),
    ):
        with pytest.raises(ValueError, match=r"torch-fidelity.*pip install flashddpm\[evaluate\]"):
            call()


@pytest.mark.parametrize("version", ["0.3.0", "0.4.0-beta"])
def test_older_package_is_refused(monkeypatch, version):
    import torch_fidelity.version

    monkeypatch.setattr(torch_fidelity.version, "__version__", version)
    with pytest.raises(ValueError, match=f"torch-fidelity 0.4 or newer, not {version}"):
        distances.require_fidelity()
