"""Rehearsals on public images: as noisy as the private run, and read nothing private."""

import math
import runpy
from dataclasses import replace

import pytest
import yaml

from tests.conftest import BUDGET, CAPTION, ROOT, read_json, train_here
from tests.worlds import build_plan
from utils.arguments.methods import BothStagesArguments, LdmArguments, LoraArguments
from utils.arguments.publishing import PublishArguments
from utils.arguments.rehearsal import RehearsalArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.errors import UsageError
from utils.methods import rehearsal, stand_in
from utils.methods.rehearsal import Tried, list_trials
from utils.methods.trial import Outcome, scale_down
from utils.privacy.defaults import ADAPTER_RATE, PublicFacts


@pytest.mark.parametrize("noise", [0.5, 1.3, 20.0])
@pytest.mark.parametrize("batch, units", [(1400, 1437), (3000, 60_000), (64, 10**6)])
def test_fewer_public_units_are_as_noisy(noise, batch, units):
    plan = build_plan(num_units=units, expected_batch_size=batch, noise_multiplier=noise)
    weights = 60_000

    def off(plan) -> float:
        each = plan.noise_multiplier / plan.expected_batch_size
        return 1 / plan.expected_batch_size + weights * each**2

    fewer = scale_down(plan, weights, available=5000)
    assert fewer.expected_batch_size <= min(batch, 5000) and fewer.num_units == 5000
    assert math.isclose(off(fewer), off(plan), rel_tol=1e-9)
    assert fewer.sampling_rate <= 1
    # With too few public units the mean is noisier than it will be, never less so.
    scarce = scale_down(plan, weights, available=20)
    assert scarce.expected_batch_size <= 20 and off(scarce) >= off(plan) * (1 - 1e-9)


def build_trials(settings=None, tmp_path="x", **asked):
    privacy = PrivacyArguments(target_epsilon=10.0, target_delta=1e-4)
    training = TrainingArguments(output_dir=str(tmp_path))
    facts = PublicFacts(1437, 60_000, 64, ADAPTER_RATE)
    args = RehearsalArguments(**asked)
    return list_trials(facts, privacy, training, settings or LoraArguments(), args)


def test_what_is_tried(tmp_path):
    trials = build_trials(tmp_path=tmp_path)
    tried = {(t.plan.steps, t.training.learning_rate, t.settings.freeze_lora_a) for t in trials}
    assert len(tried) == len(trials) == 3 * 3 * 2
    passes = {t.plan.steps * t.plan.noise_multiplicity * t.plan.expected_batch_size for t in trials}
    assert len(passes) == 1  # steps against draws
    assert len({t.plan.noise_multiplier for t in trials}) == 3
    assert len({t.folder for t in trials}) == len(trials)
    asked = build_trials(LdmArguments(), tmp_path, tried_rates=[0.1, 0.2], tried_steps=[4])
    assert [t.training.learning_rate for t in asked] == [0.1, 0.2]


@pytest.mark.parametrize("classes, clear", [([""], False), (["a", "b"], True), (["a", "b"], False)])
def test_the_better_half_goes_on_and_the_best_comes_first(tmp_path, monkeypatch, classes, clear):
    """Losses that only the rate decides, so that the ranking is known; where there are classes,
    images that the highest rate draws best, of classes that can be told apart or not."""
    trials, seen = build_trials(tmp_path=tmp_path, tried_steps=[8]), []

    class Now:
        def submit(self, work, *args):
            seen.append((work.__name__, args))
            return self.__class__.Done(work(*args))

        class Done:
            def __init__(self, value):
                self.value = value

            def result(self):
                return self.value

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def advance(_, trial, until, seed):
        return Outcome(until, abs(math.log(trial.training.learning_rate / 0.01)), 0.0)

    monkeypatch.setattr(rehearsal, "open_pool", lambda _: Now())
    monkeypatch.setattr(rehearsal, "advance", advance)
    monkeypatch.setattr(rehearsal, "list_prompts", lambda _: classes)
    each = [0.7, 0.8, 0.9] if clear else [0.5, 0.51, 0.52]  # by pace
    monkeypatch.setattr(
        rehearsal, "measure_accuracy", lambda _, t, seed: 0.5 if t is None else each[t.pace]
    )
    tried, accuracy = rehearsal.halve(None, trials, None, 0)
    assert len(tried) == len(trials) == 6
    # The better half of six are three, and of four two: the highest rate is not among them.
    assert [t.outcomes[-1].step for t in tried] == [8, 8, 8, 8, 2, 2]
    assert len(seen) == 6 + 4 + 4 + (0 if classes == [""] else 4)
    if classes == [""]:
        assert accuracy is None and all(t.accuracy is None for t in tried)
        assert [t.loss for t in tried[:4]] == sorted(t.loss for t in tried[:4])
    else:
        assert accuracy == 0.5 and [t.accuracy is None for t in tried] == [False] * 3 + [True] * 3
    if clear:
        assert [t.accuracy for t in tried[:3]] == [0.9, 0.8, 0.7]
        assert tried[0].loss > tried[1].loss
    else:
        assert tried[0].loss == min(t.loss for t in tried)


@pytest.mark.parametrize(
    "loss, accuracy, warns",
    [(0.5, None, False), (1.5, None, True), (1.5, 0.9, False), (1.5, 0.7, True), (0.5, 0.7, False)],
)
def test_a_stand_in_that_teaches_nothing_is_called_that(tmp_path, capsys, loss, accuracy, warns):
    tried = Tried(build_trials(tmp_path=tmp_path)[0], (Outcome(8, loss, 0.0),), accuracy)
    base = {"loss": 1.0, "accuracy": None if accuracy is None else 0.8}
    rehearsal.print_table([tried], base | {"norms": [1.0, 1.0, 1.0], "aligned": 0.2})
    assert ("knows such images already" in capsys.readouterr().out) == warns


def test_a_token_is_not_written_down(tmp_path):
    write_config = runpy.run_path(str(ROOT / "rehearse.py"))["write_config"]
    given = PublishArguments(hub_token="hf_secret", hub_model_id="user/name")
    write_config(tmp_path / "best.yaml", [given], {"max_train_steps": 4})
    written = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert written == {"hub_model_id": "user/name", "max_train_steps": 4}


@pytest.mark.parametrize(
    "given, leaves_rate", [({"select_saliency": True}, False), ({"release_means": True}, True)]
)
def test_a_rate_without_a_warm_start_is_none_for_one(given, leaves_rate, tmp_path, capsys):
    """The script's own rate is a fifth after one: private steps at that of the trials would fail,
    and cannot be repeated."""
    script = runpy.run_path(str(ROOT / "rehearse.py"))
    leave, stages, winner = script["leave_stages"], BothStagesArguments(), {"learning_rate": 0.01}
    winner["max_train_steps"] = 8
    assert leave(stages, winner, "train.py") == winner and capsys.readouterr().err == ""
    stages, training = BothStagesArguments(**given), TrainingArguments(output_dir="-")
    left = leave(stages, winner, "train.py")
    (name,) = given
    assert f"not rehearsed: --{name}" in capsys.readouterr().err
    script["write_config"](tmp_path / "best.yaml", [training, stages], left)
    rate = {} if leaves_rate else {"learning_rate": 0.01}
    written = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert written == {**given, "max_train_steps": 8} | rate


REHEARSAL = ["--tried_rates", 0.003, 0.02, "--tried_steps", 4, "--num_held_out", 16]


@pytest.mark.slow
def test_a_rehearsal_leaves_a_plan_that_trains(
    run_script, tiny_base, image_folder, tmp_path, capsys
):
    """The private folder does not exist: nothing of it is read."""
    output, private = tmp_path / "rehearsal", ["--train_data_dir", tmp_path / "nowhere"]
    about = ["--pretrained_model_name_or_path", tiny_base, *CAPTION, *BUDGET, "--rank", 2]
    more = ["--num_units", 40, "--stand_in", image_folder, "--workers", 1, *REHEARSAL]
    run = run_script("rehearse.py", *about, *private, *more, "--output_dir", output)
    assert run.returncode == 0, run.stderr
    assert "40 private units, rehearsed on 24 public images; 16 more judge" in run.stdout
    assert "gradients of public units" in run.stdout and "accuracy" in run.stdout
    found = read_json(output / "rehearsal.json")
    assert len(found["tried"]) == 4 and found["accuracy"][0] is not None
    assert (output / "rehearsal.png").stat().st_size > 10_000
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert best["learning_rate"] in (0.003, 0.02) and best["max_train_steps"] == 4
    assert best["rank"] == 2 and best["target_epsilon"] == 8
    said = train_here(
        ["--config", output / "best.yaml", "--train_data_dir", image_folder]
        + ["--output_dir", tmp_path / "run", "--dry_run"]
    )
    assert '"steps": 4' in said, said


def load(base, folder, tmp_path, prompts=None, image_column="image", **asked):
    model = ModelArguments(pretrained_model_name_or_path=str(base))
    data = DataArguments(label_column="label", caption_template="the digit {label}")
    data = replace(data, image_column=image_column)
    args = RehearsalArguments(**({"num_held_out": 16} | asked))
    args = replace(args, stand_in=None if folder is None else str(folder))
    return stand_in.load_stand_in(model, data, args, tmp_path, prompts, 40)


@pytest.mark.parametrize("column", ["image", "img"])  # of the private images
def test_a_stand_in_is_split_and_its_captions_found(tiny_base, image_folder, tmp_path, column):
    found = load(tiny_base, image_folder, tmp_path, image_column=column)
    assert (found.trained_on.num_units, found.judged_on.num_units) == (24, 16)
    assert set(found.judged_on.captions) <= {f"the digit {i}" for i in range(4)}
    both = [tuple(row) for part in (found.trained_on, found.judged_on) for row in part.digests]
    assert len(set(both)) == 40  # no image is on both sides


def test_the_base_draws_a_stand_in_from_public_prompts(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(stand_in, "DRAWN", 36)
    found = load(tiny_base, None, tmp_path, ["the digit 1", "the digit 2"])
    assert set(found.judged_on.captions) == {"the digit 1", "the digit 2"}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "privacy.json").write_text("{}")
    with pytest.raises(UsageError, match="already holds other files"):
        rehearsal.claim_folder(tmp_path)
    again = rehearsal.claim_folder(rehearsal.claim_folder(tmp_path / "new"))
    assert (again / "private").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "folder, asked, sentence",
    [
        (None, {}, "give --stand_in"),
        ("images", {"num_held_out": 21}, "has 40 images, of which"),
        ("images", {"stand_in_caption_column": "words"}, "words"),
    ],
)
def test_mistakes_get_a_sentence(tiny_base, image_folder, tmp_path, folder, asked, sentence):
    with pytest.raises(UsageError, match=sentence):
        load(tiny_base, folder and image_folder, tmp_path, **asked)
    for wrong in ({"tried_rates": [0.0]}, {"tried_steps": [0]}, {"num_held_out": 2}):
        with pytest.raises(UsageError):
            RehearsalArguments(**wrong)
