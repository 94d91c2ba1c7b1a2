"""The metric modules, against independent computations, and loaded as a stranger loads them."""

import subprocess
import sys

import evaluate
import numpy as np
import pytest
import scipy.linalg
from sklearn.datasets import load_digits

from tests.conftest import ROOT, few_fast, quiet_environment
from utils.evaluation.fidelity import inception_score
from utils.metrics.frechet_distance.frechet_distance import frechet_distance
from utils.metrics.kernel_distance.kernel_distance import kernel_distance
from utils.metrics.nearest_neighbor_ratio.nearest_neighbor_ratio import (
    compute_ratio,
    find_nearest,
    measure_both_distances,
)
from utils.metrics.precision_recall_density_coverage.precision_recall_density_coverage import (
    precision_recall_density_coverage,
)

METRICS = sorted(path.name for path in (ROOT / "utils" / "metrics").iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Real handwritten digits as features: two halves, by different people, in 32 dimensions."""
    pixels = load_digits().data.astype(np.float32)
    projection = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    features = pixels @ projection / 16
    return features[:800], features[800:]


def test_frechet_distance_is_that_of_scipy(digits):
    first, second = (rows.astype(np.float64) for rows in digits)
    difference = first.mean(0) - second.mean(0)
    s1, s2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = difference @ difference + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(*digits) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(*digits, block=7) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(digits[0], digits[0]) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_the_unbiased_estimate(digits):
    """With one subset of everything there is nothing random; with many, their mean is near it."""
    first, second = (rows[:700].astype(np.float64) for rows in digits)
    n, d = first.shape

    def kernel(a, b):
        return (a @ b.T / d + 1) ** 3

    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(first, first),))
    within += sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(second, second),))
    expected = within - 2 * kernel(first, second).mean()
    exact, spread = kernel_distance(first, second, subsets=1, subset_size=n)
    assert exact == pytest.approx(expected, rel=1e-4) and spread is None
    mean, spread = kernel_distance(first, second, subsets=50, subset_size=200)
    assert 0 < abs(mean - expected) < 3 * spread
    assert kernel_distance(first, second, 50, 200) == (mean, spread)  # reproducible


def brute_force(synthetic, real, k):
    """The four definitions, image by image."""

    def radius(rows, i):
        return sorted(np.linalg.norm(rows[i] - row) for j, row in enumerate(rows) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    synthetic_radii = [radius(synthetic, i) for i in range(len(synthetic))]
    distance = [[np.linalg.norm(s - r) for r in real] for s in synthetic]
    held = [[d < own for d, own in zip(row, real_radii, strict=True)] for row in distance]
    return {
        "precision": np.mean([any(row) for row in held]),
        "recall": np.mean(
            [
                any(distance[j][i] < synthetic_radii[j] for j in range(len(synthetic)))
                for i in range(len(real))
            ]
        ),
        "density": np.sum(held) / (k * len(synthetic)),
        "coverage": np.mean([any(row[i] for row in held) for i in range(len(real))]),
    }


@pytest.mark.parametrize("block", [1024, 13])
def test_precision_recall_density_coverage_by_definition(digits, block):
    real, synthetic = digits[0][:60], digits[1][:45] * 1.15
    found = precision_recall_density_coverage(synthetic, real, k=3, block=block)
    assert found == pytest.approx(brute_force(synthetic, real, 3), abs=1e-9)
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1


def test_nearest_neighbours_by_definition(digits):
    queries, points = digits[1][:50], digits[0][:300]
    distances, numbers = find_nearest(queries, points, k=4, block=16)
    every = np.linalg.norm(queries[:, None].astype(np.float64) - points[None], axis=2)
    assert (numbers == np.argsort(every, axis=1)[:, :4]).all()
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :4], rtol=1e-5)


def test_a_copying_generator_is_distinguished_from_an_honest_one(digits):
    generator = np.random.default_rng(1)
    private, held_out = digits[0], digits[1][:500]
    copies = private[:200] + generator.normal(scale=0.01, size=(200, 32)).astype(np.float32)
    summary = compute_ratio(*measure_both_distances(copies, private, held_out))
    assert summary["nearest_neighbor_ratio"] < 0.5 and summary["share_nearer"] > 0.75
    both = np.concatenate([private, held_out])
    order = np.random.default_rng(2).permutation(len(both))  # so that neither half is nearer
    summary = compute_ratio(
        *measure_both_distances(digits[1][500:], both[order[:600]], both[order[600:]])
    )
    assert abs(summary["share_nearer"] - 0.5) < 5 * summary["standard_error"]


def test_inception_score_by_definition():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(400, 7)) * 2
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    marginal = probabilities.mean(0)
    divergence = (probabilities * np.log(probabilities / marginal)).sum(1).mean()
    score, spread = inception_score(np.log(probabilities), splits=1)
    assert score == pytest.approx(np.exp(divergence), rel=1e-6) and spread is None


def test_too_few_images_is_an_error():
    few = np.zeros((1, 4), np.float32)
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(few, few)
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(few, few)
    with pytest.raises(ValueError, match="more than 5"):
        precision_recall_density_coverage(np.zeros((5, 4)), np.zeros((9, 4)))


USE = """
import evaluate, numpy
rows = numpy.random.default_rng(0).normal(size=(40, 6)).astype("float32")
images = numpy.random.default_rng(0).integers(0, 255, (40, 3, 16, 16)).astype("uint8")
labels = numpy.arange(40) % 2
inputs = {"predictions": rows[:25], "references": rows[25:]}
if NAME == "nearest_neighbor_ratio":
    inputs["held_out"] = rows[:7]
if NAME == "clip_score":
    inputs = {"predictions": rows[:20], "references": rows[20:]}
if NAME == "synthetic_accuracy":
    inputs = {"predictions": images[:25], "references": images[25:], "steps": 3, "seeds": 1}
    inputs |= {"prediction_labels": labels[:25], "reference_labels": labels[25:]}
metric = evaluate.load(FOLDER)
metric.add_batch = None  # it would write what it is given to a file
found = metric.compute(**inputs)
print(found)
assert NAME in found or "recall" in found
if NAME == "frechet_distance":
    inputs |= {"prediction_labels": labels[:25], "reference_labels": labels[25:]}
    more = metric.compute(**inputs)
    assert more["frechet_distance"] == found["frechet_distance"]
    assert set(more["per_class"]) == {0, 1}
if NAME == "synthetic_accuracy":
    several = numpy.stack([labels, 1 - labels, labels], 1)
    inputs |= {"prediction_labels": several[:25], "reference_labels": several[25:]}
    more = metric.compute(**inputs)
    assert set(more) == {"synthetic_auroc", "standard_deviation", "per_label"}
    assert abs(more["synthetic_auroc"] - numpy.mean(more["per_label"])) < 1e-9
    assert len(more["per_label"]) == 3
assert all(value is None or numpy.isfinite(value) for value in found.values())
"""


@pytest.mark.parametrize("name", few_fast(METRICS, 2))
def test_each_module_loads_from_another_folder_and_leaves_no_copy_of_what_it_saw(name, tmp_path):
    assert name in METRICS and len(METRICS) == 6
    assert (ROOT / "utils" / "metrics" / name / "README.md").exists()
    code = f"NAME, FOLDER = {name!r}, {str(ROOT / 'utils' / 'metrics' / name)!r}\n{USE}"
    environment = quiet_environment() | {"HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_library_is_found_beside_the_script_of_its_name():
    assert hasattr(evaluate, "load")
    code = "import evaluate; evaluate.load('./utils/metrics/frechet_distance')"
    command = [sys.executable, "-c", code]  # as a reader of the docs types it, in this folder
    run = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
