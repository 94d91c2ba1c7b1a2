"""Classifiers that learn from synthetic images, and what is counted of them."""

import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState

from tests.conftest import few_fast
from utils.errors import UsageError
from utils.evaluation import downstream
from utils.evaluation.downstream import (
    Classifiers,
    LabelledImages,
    measure_downstream_accuracy,
    measure_downstream_auroc,
)
from utils.metrics.synthetic_accuracy.classifiers import (
    CLASSIFIERS,
    Recipe,
    predict_classes,
    train_classifier,
)


@pytest.mark.parametrize("network", few_fast(CLASSIFIERS, 2))
def test_classifiers_learn_and_score_what_they_are_given(network):
    """Two classes that differ in brightness; the accuracy is that of the predictions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = torch.randint(0, 90, (40, 3, 16, 16), generator=generator).byte()
    images[labels == 1] += 150
    steps = 40 if network == "cnn" else 12
    model = train_classifier(images, labels, Recipe(network, 2, steps, 0), torch.device("cpu"))
    predicted = predict_classes(model, images, torch.device("cpu"))
    assert (predicted == labels).all() and not model.training


def test_validation_sees_synthetic_images_only(monkeypatch):
    """What picks the weights that are kept is a tenth of the images that were trained on."""
    from utils.metrics.synthetic_accuracy import classifiers

    seen, real = [], classifiers.compute_logits

    def watched(model, images, device):
        seen.append(len(images))
        return real(model, images, device)

    monkeypatch.setattr(classifiers, "compute_logits", watched)
    images = torch.randint(0, 255, (50, 3, 16, 16)).byte()
    train_classifier(images, torch.arange(50) % 2, Recipe("cnn", 2, 20, 0), torch.device("cpu"))
    assert seen == [5] * 10


def test_confusion_and_per_class_accuracy_are_counted_right(capsys):
    images = torch.zeros(9, 3, 16, 16, dtype=torch.uint8)
    synthetic = LabelledImages(images, ["cat"] * 9)
    real = LabelledImages(images, ["cat"] * 4 + ["dog"] * 5)
    found = measure_downstream_accuracy(synthetic, real, Classifiers({"cnn": 2}, 1), PartialState())
    assert found["class_names"] == ["cat", "dog"]
    np.testing.assert_allclose(np.sum(found["confusion"], axis=1), 1)
    assert found["per_class"] == dict(zip(["cat", "dog"], np.diag(found["confusion"]), strict=True))
    right = found["per_class"]["cat"] * 4 + found["per_class"]["dog"] * 5
    assert found["value"] == pytest.approx(right / 9)
    assert "only the real images have the classes dog" in capsys.readouterr().err
    with pytest.raises(UsageError, match="no class in common"):
        other = LabelledImages(images, ["bird"] * 9)
        measure_downstream_accuracy(other, real, Classifiers({"cnn": 2}, 1), PartialState())


@pytest.mark.parametrize("several", [False, True])
def test_what_was_cut_short_goes_on_where_it_was(monkeypatch, tmp_path, several):
    """To the same figures; what is kept counts for the same images, labels and recipe only."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (40, 3, 16, 16), generator=generator).byte()
    names = [{"cat"} if i % 2 else ({"dog", "small"} if i % 3 else {"dog"}) for i in range(40)]
    labels = [frozenset(own) if several else min(own) for own in names]
    images = LabelledImages(pixels, labels)
    measure = measure_downstream_auroc if several else measure_downstream_accuracy
    trained, stop_at = [], 2

    def train(images, labels, recipe, device):
        if len(trained) == stop_at:
            raise KeyboardInterrupt
        trained.append(recipe.seed)
        return train_classifier(images, labels, recipe, device)

    monkeypatch.setattr(downstream, "train_classifier", train)
    classifiers = Classifiers({"cnn": 3}, 3, kept=tmp_path / "private" / "kept")
    with pytest.raises(KeyboardInterrupt):
        measure(images, images, classifiers, PartialState())
    assert trained == [0, 1]
    for folder in (classifiers.kept, classifiers.kept.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    stop_at = None
    found = measure(images, images, classifiers, PartialState())
    assert trained == [0, 1, 2]
    assert found == measure(images, images, Classifiers({"cnn": 3}, 3), PartialState())
    others = [
        (LabelledImages(pixels.flip(0), labels), images, classifiers),
        (LabelledImages(pixels, labels[::-1]), images, classifiers),
        (images, LabelledImages(pixels, labels[::-1]), classifiers),
        (images, images, replace(classifiers, networks={"cnn": 4})),
        (images, images, replace(classifiers, networks={"wide-cnn": 3})),
    ]
    for other in others:
        trained.clear()
        measure(*other, PartialState())
        assert trained == [0, 1, 2]
