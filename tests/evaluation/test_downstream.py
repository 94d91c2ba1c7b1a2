"""Classifiers that learn from synthetic images, and what is counted of them."""

import numpy as np
import pytest
import torch
from accelerate import PartialState

from tests.conftest import few_fast
from utils.errors import UsageError
from utils.evaluation.downstream import (
    Classifiers,
    LabelledImages,
    measure_downstream_accuracy,
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


def test_confusion_and_per_class_accuracy_are_counted_right():
    images = torch.zeros(9, 3, 16, 16, dtype=torch.uint8)
    synthetic = LabelledImages(images, ["cat"] * 9)
    real = LabelledImages(images, ["cat"] * 4 + ["dog"] * 5)
    found = measure_downstream_accuracy(synthetic, real, Classifiers({"cnn": 2}, 1), PartialState())
    assert found["class_names"] == ["cat", "dog"]
    np.testing.assert_allclose(np.sum(found["confusion"], axis=1), 1)
    assert found["per_class"] == dict(zip(["cat", "dog"], np.diag(found["confusion"]), strict=True))
    right = found["per_class"]["cat"] * 4 + found["per_class"]["dog"] * 5
    assert found["value"] == pytest.approx(right / 9)
    with pytest.raises(UsageError, match="no class in common"):
        other = LabelledImages(images, ["bird"] * 9)
        measure_downstream_accuracy(other, real, Classifiers({"cnn": 2}, 1), PartialState())
