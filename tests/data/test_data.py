"""Rows to images and captions."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List
from PIL import Image as PILImage

from tests.conftest import build_tiny_pipeline
from utils.arguments.training import DataArguments
from utils.data.images import ImageRows, crop_to_pixels, find_readable_rows
from utils.data.latents import Objective, encode_units, unit_losses
from utils.data.private_set import PrivateSet
from utils.data.rows import load_split, read_captions
from utils.errors import UsageError
from utils.models.processes import read_process
from utils.privacy.randomness import SecretRandomness


def test_images_are_resized_and_cropped_to_rgb():
    pixels = crop_to_pixels(PILImage.new("L", (40, 20), 7), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8 and (pixels == 7).all()


def encoded(image_folder, tmp_path, flip: bool):
    pipeline = build_tiny_pipeline()
    pipeline.text_encoder.requires_grad_(False)
    rows = load_split(None, None, str(image_folder), "train", tmp_path)
    captions = read_captions(
        rows, DataArguments(label_column="label", caption_template="the digit {label}")
    )
    private_set = PrivateSet(
        rows, "image", captions, torch.arange(40), {}, find_readable_rows(ImageRows(rows)).digests
    )
    return pipeline, encode_units(pipeline, private_set, 16, tmp_path / "latents", flip)[0]


def test_units_are_encoded_once_with_each_caption_once(image_folder, tmp_path):
    pipeline, units = encoded(image_folder, tmp_path, flip=True)
    assert units.latents.shape == (40, 2, 4, 8, 8)
    assert units.text["encoder_hidden_states"].shape == (4, 8, 16)
    assert units.caption_rows.tolist() == [i // 10 for i in range(40)]
    assert not torch.allclose(units.latents[:, 0], units.latents[:, 1])


def test_a_units_loss_depends_on_its_own_image_only(image_folder, tmp_path):
    """Clause 3 rests on this: draws laid out otherwise would spread one image over several rows."""
    pipeline, units = encoded(image_folder, tmp_path, flip=False)
    units.latents[4] = float("nan")
    randomness = SecretRandomness(debug_seed=1)
    losses = unit_losses(pipeline, units, torch.tensor([7, 4, 30]), Objective(3), randomness)
    assert losses.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "high_noise"])
def test_timesteps_follow_their_distribution(sampling):
    """Ten equal cells, each within 6.5 standard deviations: false alarms below 1e-8."""
    quantiles = Objective(3, sampling).quantiles(20_000, SecretRandomness()).flatten()
    assert 0 <= quantiles.min() and quantiles.max() <= 1
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    cumulative = {
        "uniform": edges,
        "logit_normal": torch.special.ndtr(edges.logit()),
        "high_noise": edges.square(),
    }[sampling]
    share = cumulative.diff()
    counts = (quantiles * 10).long().clamp_max(9).bincount(minlength=10).double()
    deviation = (60_000 * share * (1 - share)).sqrt()
    assert ((counts - 60_000 * share).abs() < 6.5 * deviation + 1).all()


def test_min_snr_weights_of_both_predictions():
    for prediction, divisor in (("epsilon", 0.0), ("v_prediction", 1.0)):
        scheduler = build_tiny_pipeline(prediction).scheduler
        steps = torch.tensor([1, 500, 998])
        alphas = scheduler.alphas_cumprod[steps]
        snr = alphas / (1 - alphas)
        expected = snr.clamp(max=5) / (snr + divisor)
        process, blank = read_process(scheduler, 5.0), torch.zeros(3, 4, 8, 8)
        weights = process.corrupt(blank, blank, (steps + 0.5) / 1000).weight
        torch.testing.assert_close(weights, expected)


def test_timesteps_are_stratified_within_a_unit_and_uniform_over_units(
    image_folder, tmp_path, monkeypatch
):
    pipeline, units = encoded(image_folder, tmp_path, flip=False)
    seen = []

    def keep(predict, process, latents, text, noise, quantiles):
        seen.append((quantiles * 1000).long().view(-1, 4))
        return torch.zeros(len(quantiles))

    monkeypatch.setattr("utils.data.latents.denoising_loss", keep)
    for _ in range(100):
        unit_losses(pipeline, units, torch.arange(40), Objective(4), SecretRandomness())
    timesteps = torch.cat(seen)
    assert (timesteps.sort(1).values // 250 == torch.arange(4)).all()
    # Each draw sees each part equally often: 6.5 standard deviations, false alarms below 1e-8.
    for draw in range(4):
        counts = (timesteps[:, draw] // 250).bincount(minlength=4).double()
        assert (counts - 1000).abs().max() < 6.5 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(
    "value, kind", [({"raw": "a cat", "tokens": [1]}, "dict"), ([{"raw": "a cat"}], "dict")]
)
def test_what_is_no_text_is_no_caption(value, kind):
    rows = Dataset.from_dict({"text": [value], "label": [value]})
    with pytest.raises(UsageError, match=f"--caption_column text: a row holds a {kind}, not a te"):
        read_captions(rows, DataArguments(caption_column="text"))[0]
    with pytest.raises(UsageError, match=f"--label_column label: a row holds a {kind}, not a la"):
        read_captions(rows, DataArguments(label_column="label", caption_template="a {label}"))[0]


def test_several_labels_are_joined_by_name():
    features = Features({"label": List(ClassLabel(names=["effusion", "no_finding", "mass"]))})
    rows = Dataset.from_dict({"label": [[0, 2], [1], []]}, features=features)
    captions = read_captions(
        rows, DataArguments(label_column="label", caption_template="an x-ray: {label}")
    )
    assert captions[0] == "an x-ray: effusion, mass" and captions[1] == "an x-ray: no finding"
    with pytest.raises(UsageError, match="a row has no label"):
        captions[2]
    plain = Dataset.from_dict({"label": [[1, 2], [3]]})
    assert list(
        read_captions(plain, DataArguments(label_column="label", caption_template="{label}"))
    ) == ["1, 2", "3"]
