"""What the classifier of relabel.py sees: images as an autoencoder gives them back."""

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import train_here
from tests.families import SIDE
from tests.methods.test_relabelling import EXTRACTOR, relabel
from utils.arguments.evaluation import ExtractorArguments
from utils.data.images import crop_to_pixels
from utils.evaluation.features import build_extractor
from utils.methods import relabelling as story
from utils.methods.election import extract_pixels
from utils.methods.labeller import fit_whitening, read_images
from utils.methods.rendered import choose_autoencoder, see_rendered
from utils.sampling.shards import hash_set


def test_private_and_synthetic_images_pass_through_the_autoencoder(
    public, image_folder, tiny_base, tmp_path, monkeypatch, capfd
):
    """What made the features white is of the synthetic images as the autoencoder gives them back,
    and private images are read by the same extractor. It is that of the base that drew them."""
    readers = []

    def read(private_set, numbers, extractor, *more):
        readers.append(extractor)
        return read_images(private_set, numbers, extractor, *more)

    monkeypatch.setattr(story, "read_images", read)
    more = ["--target_epsilon", 3, "--relabel_steps", 4]
    assert "24 images" in relabel(public, image_folder, tmp_path / "run", *more, autoencoder=None)
    assert f"as the autoencoder of {tiny_base}, which drew" in capfd.readouterr().err
    file = load_file(tmp_path / "run" / "labeller.safetensors")
    vae, side = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae"), 16
    pixels = [crop_to_pixels(Image.open(p), side) for p in sorted(public.glob("0*.png"))]
    with torch.no_grad():
        latents = vae.encode(torch.stack(pixels).float() / 127.5 - 1).latent_dist.mode()
        seen = torch.nn.functional.interpolate(
            vae.decode(latents).sample, (32, 32), mode="bilinear", antialias=True
        )
    extractor = build_extractor(
        ExtractorArguments("classifier", classifier_weights=str(EXTRACTOR[-1])),
        torch.device("cpu"),
    )
    features = extract_pixels(
        extractor, ((seen.clamp(-1, 1) + 1) * 127.5).round().byte(), Accelerator()
    )
    assert torch.allclose(fit_whitening(features).mean, file["mean"], atol=1e-3)
    rendered = see_rendered(extractor, (str(tiny_base), None, None, side), torch.device("cpu"))
    assert rendered.resolution == side and "rendered_by" in rendered.about()
    assert [reader.about() for reader in readers] == [rendered.about()]
    assert "rendered_by" not in extractor.about()
    assert torch.allclose(
        extract_pixels(rendered, torch.stack(pixels[:1]), Accelerator()), features[:1], atol=1e-3
    )  # each by itself
    more = [
        "--labeller",
        tmp_path / "run",
        "--synthetic",
        public,
        "--output_dir",
        tmp_path / "more",
    ]
    assert "24 images" in train_here(
        [*more, *EXTRACTOR], "relabel"
    )  # as it did, without being told
    assert hash_set(tmp_path / "more" / "set") == hash_set(tmp_path / "run" / "set")


def test_the_autoencoder_of_a_private_result_is_refused(drawn, image_folder, tmp_path):
    more = ["--target_epsilon", 9]
    own = drawn / "adapter"
    shown = relabel(drawn / "set", image_folder, tmp_path / "run", *more, autoencoder=own)
    assert "is a private result itself: name the public model it began as" in shown


def test_it_is_that_of_the_pipeline_that_drew_the_set(capfd):
    base = {"pretrained_model_name_or_path": "user/base", "revision": "v1", "variant": "fp16"}
    base["resolution"] = 256
    chosen = {"curated": {}, "from": {"relabelled": {}, "from": base}}
    for settings in (base, chosen):
        assert choose_autoencoder(None, settings) == ("user/base", "v1", "fp16", 256)
        assert "--autoencoder none: as they are" in capfd.readouterr().err
        assert choose_autoencoder("none", settings) is None
        assert choose_autoencoder("other", settings) == ("other", None, None, 256)
    assert choose_autoencoder(None, {"release": ["moments"]}) is None  # no pipeline drew those
    assert capfd.readouterr().err == ""


def test_every_family_gives_images_back(family_base):
    """In rows that are functions of their own image, and of nothing else."""
    weights = ExtractorArguments("classifier", classifier_weights=str(EXTRACTOR[-1]))
    extractor = build_extractor(weights, torch.device("cpu"))
    source = (str(family_base), None, None, SIDE)
    rendered = see_rendered(extractor, source, torch.device("cpu"))
    assert rendered.resolution == SIDE  # as it is told, not the base's own
    pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE)).byte()
    both, one = (extract_pixels(rendered, p, Accelerator()) for p in (pixels, pixels[1:]))
    assert both.isfinite().all() and torch.allclose(both[1:], one, atol=1e-3)
    assert not torch.allclose(both[0], both[1])
