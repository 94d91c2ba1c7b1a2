"""Released moments: what one image can add, what Gaussians make of them, and what is paid for."""

import json

import pytest
import torch

from tests.conftest import read_json, train_arguments, train_here
from tests.methods.test_means import SMALL, release
from utils.arguments.means import MeansArguments
from utils.ledger.charges import count_charged_steps
from utils.ledger.ledger import Ledger
from utils.ledger.verification import find_problems, read_source
from utils.methods import means as story
from utils.methods import releases
from utils.methods.mean_features import COUNT, SIDE, sum_features
from utils.methods.mixtures import choose_places, fit_mixture
from utils.methods.moments import (
    SECOND,
    Places,
    build_basis,
    count_components,
    pack,
    start_places,
    sum_moments,
    unpack,
)

MOMENTS = ["--release", "moments", "--moment_side", 3, "--moment_components", 2]


def draw_groups(count: int, spread: float = 0.05) -> tuple[torch.Tensor, list]:
    """Grey images of two classes, each of two groups: their cosines [n, 4], and their rows."""
    basis = build_basis(2, grey=True)
    draws = torch.Generator().manual_seed(0)
    middles = torch.tensor([[0.0, 9, 0, 0], [0, -9, 0, 0], [6, 0, 5, 0], [-6, 0, 0, 5]])
    group = torch.arange(count) % 4
    seen = middles[group] + 32 * spread * torch.randn(count, 4, generator=draws)
    images = (seen @ basis).view(-1, 1, SIDE, SIDE).expand(-1, 3, -1, -1)
    return seen, [(i, i % 4 // 2, image) for i, image in enumerate(images)]


@pytest.mark.parametrize("grey", [False, True])
def test_the_basis_is_orthonormal_and_of_low_frequency(grey):
    basis = build_basis(6, grey)
    assert basis.shape == ((36, 1024) if grey else (36 + 9 + 9, 3072))
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
    flat = torch.ones(basis.shape[1])
    torch.testing.assert_close(basis.T @ (basis @ flat), flat, atol=1e-5, rtol=0)


def test_packing_keeps_norms_and_comes_back():
    matrix = torch.randn(5, 5).double()
    matrix = matrix + matrix.T
    assert pack(matrix).norm().item() == pytest.approx(matrix.norm().item())
    torch.testing.assert_close(unpack(pack(matrix), 5), matrix)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_an_image_adds_one_at_most_and_by_itself(grey, size):
    """Whatever is in it, and wherever it is measured from."""
    basis, draws = build_basis(4, grey), torch.Generator().manual_seed(0)
    centres = 9 * torch.randn(3, 5, len(basis), generator=draws)
    for places in (Places(basis, centres, 2.5), start_places(basis, 3, 5)):
        images = size * (2 * torch.rand(12, 3, SIDE, SIDE, generator=draws) - 1)
        images[0], images[1], images[2] = size, -size, 0.0
        own = [places.measure(i % 3, image) for i, image in enumerate(images)]
        norms = torch.stack(own).norm(dim=1)
        assert (norms <= 1 + 1e-5).all() and (norms >= COUNT - 1e-6).all()
        assert torch.equal(own[7], places.measure(1, images[7].clone()))


@pytest.mark.parametrize("value", [3e38, float("nan"), 1.0])
def test_one_unit_moves_the_sum_by_the_bound_at_most(value):
    """Also one of several images and classes, and one that is not finite, which adds nothing."""
    image, (_, rows) = torch.full((3, SIDE, SIDE), value), draw_groups(8)
    places = Places(build_basis(2, True), torch.randn(2, 3, 4), 1.5)
    without = sum_moments(rows, places, 1.0)
    for extra in ([(8, 0, image)], [(8, 0, image), (8, 1, -image), (8, 1, image / 2)]):
        moved = sum_moments([*rows, *extra], places, 1.0) - without
        assert moved.isfinite().all() and moved.norm() <= 1
    first = start_places(build_basis(2, True), 2, 3)
    assert sum_moments([(0, 0, torch.ones(3, SIDE, SIDE))], first, 1.0).norm() > 0.99


def test_more_noise_leaves_fewer_components():
    assert count_components(144, 10, 2.26 / 60_000) == 27
    assert count_components(144, 10, 2.26 / 3_000) == 1
    assert count_components(144, 1, 1e-9) == 64


def test_a_row_of_no_class_is_in_no_class():
    """Not in the last one, where Python finds what is at -1."""
    image, basis = torch.ones(3, SIDE, SIDE), build_basis(2, True)
    places = start_places(basis, 3, 2)
    assert (sum_moments([(0, -1, image)], places, 1.0) == 0).all()
    total = sum_moments([(0, -1, image), (0, 2, image)], places, 1.0)
    whole = sum_moments([(0, 2, image)], places, 2.0)
    torch.testing.assert_close(total, whole / 2, rtol=1e-5, atol=0)
    features = sum_features([(0, -1, image)], lambda images: images.flatten(1)[:, :4] / 2, 3, 1.0)
    assert (features == 0).all()


def test_mixtures_find_the_groups_and_their_spread():
    """400 images a group: the mean of one is known to 1.6 / 20, and none of the four is near that
    of another."""
    seen, rows = draw_groups(1600)
    places = start_places(build_basis(2, True), 2, 2)
    for _ in range(3):
        mixture = fit_mixture((sum_moments(rows, places, 1.0) / 1600).float(), places, 1e-7)
        places = choose_places(mixture, seed=0)
    for number in (0, 1):
        groups = [seen[torch.arange(1600) % 4 == 2 * number + g] for g in (0, 1)]
        order = torch.cdist(torch.stack([g.mean(0) for g in groups]), mixture.means[number])
        nearest = order.argmin(1)
        assert sorted(nearest.tolist()) == [0, 1] and order.min(1).values.max() < 0.6
        torch.testing.assert_close(mixture.shares[number], torch.full((2,), 0.5), atol=0.05, rtol=0)
        root = mixture.roots[number]
        within = sum(torch.cov(g.T) for g in groups) / 2
        torch.testing.assert_close(root @ root.T, within, atol=0.5, rtol=0)
    drawn = mixture.draw_images(torch.arange(400) % 2, seed=3)
    assert drawn.shape == (400, 3, SIDE, SIDE) and drawn.dtype == torch.uint8
    assert torch.equal(drawn[:, 0], drawn[:, 2])
    pixels = (seen @ build_basis(2, True)).clamp(-1, 1).add(1).mul(127.5)
    own = drawn[::2, 0].flatten(1).float().mean(0)
    wanted = pixels[torch.arange(1600) % 4 < 2].mean(0)
    assert (own - wanted).abs().mean() < 8


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0, 1e3])
def test_what_noise_hides_is_left_out(noise):
    """However large it is, and where a class, or a place, has nobody: finite images all the same,
    and no component where there may be nobody."""
    _, rows = draw_groups(40)
    places = start_places(build_basis(2, True), 3, 2)  # of the third class there is no image
    exact = (sum_moments(rows, places, 1.0) / 40).float()
    draws = torch.Generator().manual_seed(1)
    released = exact + noise * torch.randn(exact.shape, generator=draws)
    mixture = fit_mixture(released, places, noise)
    assert all(t.isfinite().all() for t in (mixture.shares, mixture.means, mixture.roots))
    torch.testing.assert_close(mixture.shares.sum(1), torch.ones(3))
    if noise <= 1e-3:
        assert (mixture.shares[:, 1] == 0).all()
    choose_places(mixture, 0)
    assert mixture.draw_images(torch.tensor([0, 1, 2]), 0).shape == (3, 3, SIDE, SIDE)


def test_noise_alone_has_no_directions():
    """Forty releases of noise about no image at all: of 2 x 10 directions, no more than the one
    that is always kept are taken for variance, in nine of ten at least."""
    places = start_places(build_basis(3, True), 2, 1)
    width, kept = 1 + 9 + 45, []
    for seed in range(40):
        released = torch.randn(2, width, generator=torch.Generator().manual_seed(seed)) * 1e-3
        released[:, 0] += COUNT / 2
        kept.append(fit_mixture(released, places, 1e-3).roots.shape[2])
    assert sum(count == 1 for count in kept) >= 36, kept
    strong = 1e-3 * torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    strong[:, 0] += COUNT / 2
    strong[:, 10:] += SECOND / 2 * pack(torch.diag(torch.tensor([0.1] * 4 + [0.0] * 5)))
    assert fit_mixture(strong, places, 1e-3).roots.shape[2] == 4


# The script --------------------------------------------------------------------------------------


def test_a_release_of_moments_states_its_rounds(image_folder, tmp_path):
    assert "40 images, grid.png" in release(image_folder, tmp_path / "run", *MOMENTS)
    statement = read_json(tmp_path / "run" / "privacy.json")
    (event,) = statement["events"]
    assert (event["purpose"], event["steps"], event["sampling_rate"]) == ("means", 2, 1.0)
    assert statement["epsilon"]["add_or_remove_one"] <= 3 and event["sensitivity"] == 1.0
    released, _ = story.read_means(tmp_path / "run" / "means.safetensors")
    size = 9 + 2  # of brightness, and of two colours at half the side
    assert released.shape == (2, 4, 2 + 2 * size + size * (size + 1) // 2)
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []
    lines = (tmp_path / "run" / "set" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines[:5]] == ["0", "1", "2", "3", "0"]


def test_the_second_round_measures_from_what_the_first_released(
    image_folder, tmp_path, monkeypatch
):
    """And an interruption between them costs nothing twice, and changes no place."""
    seen, real = [], releases.sum_moments

    def watch(rows, places, bound):
        if len(seen) == 1 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        seen.append(places)
        return real(rows, places, bound)

    monkeypatch.setattr(releases, "sum_moments", watch)
    with pytest.raises(KeyboardInterrupt):
        release(image_folder, tmp_path / "run", *MOMENTS)
    more = [*MOMENTS, "--resume_from_checkpoint", "latest"]
    assert "40 images" in release(image_folder, tmp_path / "run", *more)
    ledger = Ledger(tmp_path / "run" / "private" / "ledger.jsonl")
    (run,) = {r["run"] for r in ledger.records()}
    assert count_charged_steps(ledger.records(), run) == 2 and len(seen) == 2
    released, told = story.read_means(tmp_path / "run" / "means.safetensors")
    event = read_json(tmp_path / "run" / "privacy.json")["events"][0]
    noise = event["noise_multiplier"] / 40
    first = start_places(seen[0].basis, 4, 2)
    assert torch.equal(first.centres, seen[0].centres)
    wanted = choose_places(fit_mixture(released[0], first, noise), told["seed"])
    torch.testing.assert_close(wanted.centres, seen[1].centres)
    assert wanted.reach == pytest.approx(seen[1].reach)


def test_moments_are_a_warm_start_within_one_budget(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL)
    arguments += ["--release_means", *MOMENTS, "--warm_start_steps", 2]
    assert "saved the weights" in train_here(arguments)
    events = read_json(tmp_path / "run" / "privacy.json")["events"]
    assert [(e["purpose"], e["steps"]) for e in events] == [("means", 2), ("training", 3)]
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []
    assert "moments of all images were released, 2 times" in (
        tmp_path / "run" / "README.md"
    ).read_text().replace("\n", " ")


@pytest.mark.parametrize("more, said", [
    (["--release", "moments", "random_features"], "--release moments is a release of its own"),
    ([*MOMENTS, "--moment_side", "33"], "--moment_side 33 must be"),
    ([*MOMENTS, "--moment_components", "0"], "--moment_components 0 must be"),
    ([*MOMENTS, "--moment_rounds", "0"], "--moment_rounds 0 must be"),
])  # fmt: skip
def test_mistakes_get_a_sentence(image_folder, tmp_path, more, said):
    shown = release(image_folder, tmp_path / "run", *more)
    assert shown.startswith("error: ") and said in shown
    assert not (tmp_path / "run" / "means.safetensors").exists()


def test_the_number_of_components_does_not_change_the_cost():
    plans = [
        story.plan_release(
            1000, privacy, MeansArguments(release=["moments"], moment_components=k), None, False
        )
        for k in (1, 50)
        for privacy in [_privacy()]
    ]
    assert plans[0].noise_multiplier == plans[1].noise_multiplier
    assert plans[0].steps == 2


def _privacy():
    from utils.arguments.training import PrivacyArguments

    return PrivacyArguments(target_epsilon=3.0, target_delta=1e-4)
