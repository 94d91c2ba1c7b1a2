"""Numbers that cannot be are refused with the option's name, before anything is read or spent."""

import math

import pytest

from utils.arguments.audit import AuditArguments
from utils.arguments.evaluation import EvaluateArguments
from utils.arguments.means import MeansArguments
from utils.arguments.methods import LoraArguments
from utils.arguments.reports import PlanArguments
from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.errors import UsageError

NEEDED = {TrainingArguments: {"output_dir": "unused"}, EvaluateArguments: {"synthetic": "S"}}


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (AuditArguments, "max_train_steps"),
        (AuditArguments, "noise_multiplicity"),
        (AuditArguments, "train_batch_size"),
        (AuditArguments, "learning_rate"),
        (AuditArguments, "max_grad_norm"),
        (AuditArguments, "target_epsilon"),
        (AuditArguments, "target_delta"),
        (AuditArguments, "mutant_epsilon"),
        (EvaluateArguments, "evaluation_resolution"),
        (LoraArguments, "rank"),
        (LoraArguments, "lora_alpha"),
        (PlanArguments, "num_units"),
        (PrivacyArguments, "max_grad_norm"),
        (PrivacyArguments, "target_epsilon"),
        (PrivacyArguments, "total_epsilon"),
        (PrivacyArguments, "noise_multiplicity"),
        (TrainingArguments, "max_train_steps"),
        (TrainingArguments, "num_units"),
        (TrainingArguments, "train_batch_size"),
        (TrainingArguments, "validation_steps"),
    ],
)
def test_a_number_that_must_be_positive(kind, name, value):
    with pytest.raises(UsageError, match=f"--{name}"):
        kind(**NEEDED.get(kind, {}) | {name: value})


@pytest.mark.parametrize("kind", [MeansArguments, SamplingArguments])
def test_a_class_is_named_once(kind):
    with pytest.raises(UsageError, match="--class_names names a class twice"):
        kind(class_names=["cat", "dog", "cat"])
    assert kind(class_names=["cat", "dog"]).class_names == ["cat", "dog"]
