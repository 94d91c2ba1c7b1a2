"""evaluate.py on small sets: what it finds, what it marks, what it refuses."""

import json
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import load_dataset
from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import read_json
from tests.ledger.conftest import state
from tests.worlds import build_plan
from utils.arguments.evaluation import ExtractorArguments
from utils.data.images import ImageRows
from utils.errors import UsageError
from utils.evaluation.features import build_extractor, extract
from utils.evaluation.memorisation import compare, summarise_neighbours
from utils.ledger.statement import Circumstances, build_statement
from utils.privacy.accounting import account
from utils.sampling.shards import hash_set
from utils.sampling.synthetic_sets import read_privacy


def as_images(pixels: np.ndarray) -> np.ndarray:
    """Digits of scikit-learn [N, 8, 8] as uint8 [N, 3, 16, 16]."""
    large = (pixels * 15.9).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    return np.stack([large] * 3, 1)


def write_folder(folder, images: np.ndarray, labels: np.ndarray) -> None:
    for label in np.unique(labels):
        (folder / str(label)).mkdir(parents=True)
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / str(label) / f"{index:05}.png")


@pytest.fixture(scope="module")
def digits():
    """Real digits: 1,000 private ones, 597 held out, and 200 that stand for synthetic ones."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    images, labels = as_images(data.images[order]), data.target[order]
    cuts = {"private": slice(0, 1000), "real": slice(1000, 1597), "synthetic": slice(1597, None)}
    return {name: (images[part], labels[part]) for name, part in cuts.items()}


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name, count in (("private", 60), ("real", 40), ("synthetic", 30)):
        write_folder(root / name, digits[name][0][:count], digits[name][1][:count])
    return root


def load_rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / np.float32(255)


def test_a_planted_copy_is_found_and_an_honest_run_has_none(digits):
    """Exact, and after noise, brightness and a save as JPEG would leave it; honest ones: none."""
    private, real, synthetic = (
        load_rows(digits[name][0]) for name in ("private", "real", "synthetic")
    )
    honest = compare("pixels", synthetic, private, real)
    assert len(honest.copies()) == 0 and summarise_neighbours([honest])["copies"]["value"] == 0
    generator = np.random.default_rng(1)
    planted = synthetic.copy()
    planted[17] = private[321]
    planted[99] = private[7] + generator.normal(scale=0.02, size=private[7].shape)
    planted[150] = np.round(private[800] * 0.97 * 16) / 16
    found = compare("pixels", planted, private, real)
    assert found.copies().tolist() == [17, 99, 150]
    assert found.nearest[found.copies()].tolist() == [321, 7, 800]
    entry = summarise_neighbours([found])["copies"]
    assert entry["value"] == 3 and entry["covered_by_epsilon"] is False
    assert entry["by_space"] == {"pixels": 3}

    # An image that is everywhere, such as a blank one, is nobody's copy, and hides none.
    private[5] = real[5] = planted[5] = 0.0
    assert compare("pixels", planted, private, real).copies().tolist() == [17, 99, 150]


@pytest.mark.slow
def test_one_run_answers_everything_and_marks_what_read_private_images(
    run_script, folders, digits, tmp_path
):
    arguments = ["--synthetic", folders / "synthetic", "--test_data_dir", folders / "real"]
    arguments += ["--test_split", "train", "--private_data_dir", folders / "private"]
    arguments += ["--classifiers", "cnn", "resnet9", "--classifier_steps", 4, 3]
    arguments += ["--classifier_seeds", 1, "--evaluation_resolution", 16, "--train_on_real"]
    output = tmp_path / "out" / "metrics.json"
    run = run_script("evaluate.py", *arguments, "--output_file", output)
    assert run.returncode == 0, run.stderr
    metrics = read_json(output)
    assert set(metrics) == {
        *("frechet_distance", "kernel_distance", "inception_score"),
        *("precision", "recall", "density", "coverage", "accuracy", "accuracy_of_real"),
        *("nearest_neighbor_ratio_pixels", "nearest_neighbor_ratio_features", "copies"),
    }
    assert covered(metrics) == set()  # nobody knows where the images come from
    for name in ("frechet_distance", "kernel_distance", "precision", "inception_score"):
        entry = metrics[name]
        assert entry["extractor"] == "efficientnet-lite0" and "224" in entry["resize"]
        assert entry["num_synthetic"] == 30 and "fewer than 10000" in entry["warning"]
        assert len(entry["extractor_weights"]) == 64
    assert set(metrics["accuracy"]["networks"]) == {"cnn", "resnet9"}
    assert metrics["accuracy"]["classifier_steps"] == {"cnn": 4, "resnet9": 3}
    np.testing.assert_allclose(np.sum(metrics["accuracy"]["confusion"], axis=1), 1, rtol=1e-5)
    aside = output.parent / "private"
    assert {path.name for path in output.parent.iterdir()} == {
        *("metrics.json", "report.html", "private")
    }
    assert stat.S_IMODE(aside.stat().st_mode) == 0o700
    assert {path.name for path in aside.iterdir()} == {
        *("closest_pixels.png", "closest_features.png", "copies.json")
    }

    assert "data:image/png" not in output.with_name("report.html").read_text()

    # Of a public model: what looks at the synthetic images alone is covered; and, with public test
    # images, what compares with them; never what reads the private ones.
    images = tmp_path / "images"
    shutil.copytree(folders / "synthetic", images)
    (images / "sampling.json").write_text('{"is_public": true}')
    arguments[1] = images
    for more, expected in (
        ([], {"epsilon", "inception_score"}),
        (["--test_is_public"], set(metrics) - READ_PRIVATE | {"epsilon"}),
    ):
        run = run_script("evaluate.py", *arguments, *more, "--output_file", output)
        assert run.returncode == 0, run.stderr
        assert covered(read_json(output)) == expected
        shown = output.with_name("report.html").read_text().count("data:image/png")
        assert shown == (2 if more else 1)


READ_PRIVATE = {"accuracy_of_real", "copies"}
READ_PRIVATE |= {f"nearest_neighbor_ratio_{space}" for space in ("pixels", "features")}


def covered(metrics: dict) -> set[str]:
    return {name for name, entry in metrics.items() if entry["covered_by_epsilon"]}


MISTAKES = [
    (["--metrics", "beauty"], "beauty: unknown"),
    (["--classifiers", "vgg"], "vgg: unknown"),
    (["--classifier_steps", "9", "9"], "give one for all, or one for each of the 1 --classifiers"),
    (["--classifier_steps", "0"], "must be at least 1"),
    (["--classifiers", "cnn", "cnn"], "none twice"),
    (["--metrics", "memorisation"], "give --private_dataset_name"),
    (["--train_on_real"], "give --private_dataset_name"),
    (["--compare", "nowhere.json"], "cannot be read"),
    (["--extractor", "classifier"], "needs --classifier_weights"),
    (["--extractor", "inception", "--inception_weights", "no.pt"], "no such file"),
    (["--extractor", "inception", "--inception_weights", "README.md"], "TorchScript"),
    (["--extractor", "clip", "--clip_model", "nobody/nothing"], "cannot be loaded"),
    (["--test_dataset_name", "a/b"], "exactly one of --test_dataset_name and --test_data_dir"),
    (["--metrics", "utility", "--test_label_column", "kind"], "--test_label_column kind: there is"),
    (["--output_file", "/proc/here/metrics.json"], "--output_file: the folder /proc/here takes no"),
    (["--output_file", "/tmp"], "/tmp is a folder: name a file in it"),
]


@pytest.mark.parametrize("more, sentence", MISTAKES)
def test_mistakes_get_a_sentence(run_script, folders, tmp_path, more, sentence):
    arguments = ["--synthetic", folders / "synthetic", "--test_data_dir", folders / "real"]
    arguments += ["--test_split", "train", "--output_file", tmp_path / "metrics.json"]
    run = run_script("evaluate.py", *arguments, *more)
    assert run.returncode == 2 and sentence in run.stderr, run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "metrics.json").exists()


def test_a_statement_that_claims_too_little_is_not_believed(folders, tmp_path, capsys):
    """The epsilon of a report is recomputed from the events, not read."""
    plan = build_plan(num_units=1000, expected_batch_size=100, steps=20, delta=1e-5)
    statement = build_statement(plan, plan.events(), account(plan.events(), 1e-5), Circumstances())
    statement["files"] = {}
    images = tmp_path / "images"
    shutil.copytree(folders / "synthetic", images)
    (images / "privacy.json").write_text(json.dumps(statement))
    assert read_privacy(str(images), None) == (None, {})  # it may be about other images
    assert "which images it is about" in capsys.readouterr().err
    (images / "sampling.json").write_text(json.dumps({"set": hash_set(images)}))
    true = read_privacy(str(images), None)[1]["epsilon"]["value"]
    assert true == statement["epsilon"]["add_or_remove_one"]
    for relation in statement["epsilon"]:
        statement["epsilon"][relation] /= 2
    (images / "privacy.json").write_text(json.dumps(statement))
    with pytest.raises(UsageError, match="does not hold"):
        read_privacy(str(images), None)


def test_a_statement_is_credited_to_no_other_images(folders, tmp_path):
    images = shutil.copytree(folders / "synthetic", tmp_path / "images")
    (images / "privacy.json").write_text(json.dumps(told := state()))
    (images / "sampling.json").write_text(json.dumps({"set": hash_set(images)}))
    assert read_privacy(str(images), None)[0] == told
    first, second, *_ = sorted(images.rglob("*.png"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UsageError, match="its images, or files among them, are not"):
        read_privacy(str(images), None)


class InceptionStandIn(torch.nn.Module):
    """The interface of inception-2015-12-05.pt: uint8 in; features, or class probabilities, out."""

    def forward(
        self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        means = images.float().mean([2, 3])
        return means if return_features else means.softmax(1)


@pytest.mark.slow
def test_each_extractor_reads_images_its_own_way(folders, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 8}
    config = CLIPVisionConfig(**size, num_attention_heads=2, image_size=24, projection_dim=12)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "clip")
    torch.jit.script(InceptionStandIn()).save(str(tmp_path / "inception.pt"))
    rows = load_dataset("imagefolder", data_dir=str(folders / "real"), split="train")
    made = ExtractorArguments("classifier", public_data=[str(folders / "private")], public_steps=20)
    made.classifier_weights = str(tmp_path / "cnn.safetensors")
    wide = replace(made, classifier_weights=str(tmp_path / "wide"), public_network="wide-cnn")
    rows.rename_column("image", "img").to_parquet(str(tmp_path / "img" / "train.parquet"))
    wide.public_data = [*made.public_data, str(tmp_path / "img")]  # whose classes are other ones
    cases = [
        (ExtractorArguments(), 224, 1280, 1000),
        (ExtractorArguments("clip", clip_model=str(tmp_path / "clip")), 24, 12, None),
        (ExtractorArguments("inception", str(tmp_path / "inception.pt")), 299, 3, 3),
        (made, 32, 256, 10),
        (made, 32, 256, 10),  # read from its file
        (wide, 32, 1024, 20),
    ]
    state, weights = PartialState(), []
    for arguments, resolution, width, classes in cases:
        extractor = build_extractor(arguments, state.device)
        assert extractor.resolution == resolution
        seen = extract(ImageRows(rows), extractor, state, "test")
        assert seen.features.shape == (40, width) and np.isfinite(seen.features).all()
        if classes is None:
            assert seen.log_probabilities is None
        else:
            np.testing.assert_allclose(np.exp(seen.log_probabilities).sum(1), 1, rtol=1e-4)
        weights.append(seen.about["extractor_weights"])
    assert weights[3] == weights[4] and len(set(weights)) == 5


def test_metrics_are_json_that_the_next_run_compares_with(run_script, folders, tmp_path):
    first = tmp_path / "first" / "metrics.json"
    arguments = ["--synthetic", folders / "synthetic", "--test_data_dir", folders / "real"]
    arguments += ["--test_split", "train", "--classifier_steps", 2, "--classifier_seeds", 1]
    arguments += ["--metrics", "utility", "--evaluation_resolution", 16]
    run = run_script("evaluate.py", *arguments, "--output_file", first)
    assert run.returncode == 0, run.stderr
    assert json.loads(first.read_text())["accuracy"]["covered_by_epsilon"] is False
    second = tmp_path / "second" / "metrics.json"
    run = run_script("evaluate.py", *arguments, "--compare", first, "--output_file", second)
    assert run.returncode == 0, run.stderr
    assert "Against other runs" in second.with_name("report.html").read_text()
