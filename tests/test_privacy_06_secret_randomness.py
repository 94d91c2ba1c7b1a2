"""Clause 6: noise and sampling are secret, apart from --seed, never saved, never the same twice."""

import pickle

import pytest
import torch

from tests.conftest import ROOT
from tests.worlds import TAIL, assert_normal, build_plan, measure_update
from utils.errors import UsageError
from utils.privacy import randomness
from utils.privacy.randomness import SecretRandomness, SecureRandomness, make_randomness

SOURCES = [SecretRandomness, SecureRandomness]


def draws_after_seeding(source) -> list[torch.Tensor]:
    torch.manual_seed(0)
    randomness = source()
    noise = randomness.noise((50,)), randomness.normal((50,)).double()
    return [*noise, randomness.bernoulli(0.5, 200).double(), randomness.uniform((50,))]


def assert_unlike(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_the_seed_reaches_neither_noise_nor_sampling(source):
    assert_unlike(draws_after_seeding(source), draws_after_seeding(source))


def test_a_published_seed_is_caught():
    with pytest.raises(AssertionError):
        published = lambda: SecretRandomness(debug_seed=0)  # noqa: E731
        assert_unlike(draws_after_seeding(published), draws_after_seeding(published))


def test_two_runs_that_differ_in_nothing_get_different_noise(accelerator):
    torch.manual_seed(0)
    first = measure_update(accelerator, build_plan())
    torch.manual_seed(0)
    assert not torch.equal(first, measure_update(accelerator, build_plan()))


def test_keys_have_more_than_64_bits():
    """PyTorch's CPU generator would keep 32 bits of its seed."""
    keys = [SecretRandomness()._generator.bit_generator.state["state"]["key"] for _ in range(64)]
    for word in range(2):
        assert len({int(key[word]) for key in keys}) == 64
        assert max(int(key[word]) for key in keys) > 2**57


@pytest.mark.parametrize("source", SOURCES)
def test_secret_randomness_cannot_be_saved(tmp_path, source):
    with pytest.raises(TypeError, match="never saved"):
        pickle.dumps(source())
    with pytest.raises(TypeError, match="never saved"):
        torch.save({"randomness": source()}, tmp_path / "state.pt")


@pytest.mark.parametrize("source", SOURCES)
def test_the_draws_have_the_distributions_they_claim(source):
    randomness = source()
    assert_normal(randomness.noise((300, 1000)), 1.0)
    assert_normal(randomness.normal((300, 1000)), 1.0)
    uniform = randomness.uniform((300_000,))
    assert 0 <= uniform.min() and uniform.max() < 1 and uniform.dtype == torch.float64
    cells = (uniform * 16).long().bincount(minlength=16).double()
    deviation = (300_000 / 16 * (15 / 16)) ** 0.5
    assert (cells - 300_000 / 16).abs().max() < TAIL * deviation


def test_secure_noise_is_a_sum_of_four_draws_of_the_operating_system(monkeypatch):
    """All of its bits come from os.urandom; four Gaussians (two pairs) make one value."""
    asked = []
    monkeypatch.setattr(
        randomness.os, "urandom", lambda n: asked.append(n) or bytes(range(256)) * n
    )
    with pytest.raises(ValueError, match="reshape"):  # the fake gives too many bytes to be used
        SecureRandomness().noise((10,))
    monkeypatch.setattr(randomness.os, "urandom", lambda n: asked.append(n) or b"\x80" * n)
    asked.clear()
    noise = SecureRandomness().noise((10,))
    assert asked == [80, 80, 80, 80]
    assert (noise == noise[0]).all()
    half = torch.tensor(float(0x8080808080808080 >> 11) * 2.0**-53, dtype=torch.float64)
    radius, angle = (-2 * torch.log1p(-half)).sqrt(), 2 * torch.pi * half
    torch.testing.assert_close(noise[0], radius * (angle.cos() + angle.sin()))


def test_secure_noise_takes_far_more_values_than_one_float():
    """A single fp32 Gaussian repeats itself; of sums of four fp64 ones, two in 100,000 are the
    same with probability 1.5e-7."""
    randomness = SecureRandomness()
    assert randomness.noise((1,)).dtype == torch.float64
    assert len(randomness.noise((100_000,)).unique()) == 100_000
    assert len(randomness.normal((100_000,)).unique()) < 100_000


def test_the_arguments_choose_the_source():
    kinds = {secure: type(make_randomness(secure)) for secure in (False, True)}
    assert kinds == {False: SecretRandomness, True: SecureRandomness}
    assert make_randomness(debug_seed=1).is_private is False
    with pytest.raises(UsageError, match="exclude each other"):
        make_randomness(secure=True, debug_seed=1)


def test_no_global_generator_is_used_by_the_private_step():
    """Draws of the engine go through SecretRandomness: its files name no other source."""
    sources = ["torch.rand", "randn_like", "randint", "randperm", "np.random", "manual_seed"]
    private = [
        *(ROOT / "utils" / "gradients").glob("*.py"),
        *(ROOT / "utils" / "data").glob("*.py"),
    ]
    private += [ROOT / "utils" / "privacy" / f"{name}.py" for name in ("dp_sgd", "training")]
    assert len(private) > 10
    for path in private:
        text = path.read_text()
        for source in sources:
            assert source not in text, f"{path} samples from {source}"
