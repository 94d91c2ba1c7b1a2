"""Clause 9: a base model that is a private result itself brings its epsilon along."""

import json
import re

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from tests.conftest import read_json, train_arguments, train_here
from tests.sampling.conftest import find, state
from utils.errors import UsageError
from utils.files import STATEMENT, hash_file
from utils.ledger.checks import check_statement
from utils.ledger.ledger import Ledger
from utils.ledger.statement import STOPPED, UNKNOWN_BASE, add_base, quote_total
from utils.methods import private_run
from utils.methods.election import Election
from utils.models.own_weights import save_denoiser
from utils.models.pipelines import load_pipeline
from utils.privacy.accounting import pld_both_relations, pld_epsilon, quote
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import _Progress
from utils.sampling import paid_sets
from utils.sampling.generation import claim_folder
from utils.sampling.paid_sets import PaidSet, find_covered_set
from utils.sampling.sources import ImageSource, cover_both


def test_no_adapter_is_public_only_if_the_base_is(tiny_base, private_base):
    assert find(tiny_base).is_public and find(tiny_base).statement is None
    source = find(private_base)
    assert not source.is_public and source.statement == read_json(private_base / STATEMENT)
    assert not find("user/out_of_reach").is_public  # nobody knows: there is no network here


SELECT = ["--select_saliency", "--dry_run"]


def test_a_dry_run_counts_the_base_towards_the_cap(private_base, image_folder, tmp_path):
    """It tells what the run would be told: epsilon 8 fits, 8 and what the base cost do not."""
    words = train_arguments(private_base, image_folder, tmp_path / "run", "--total_epsilon", 8.01)
    for more in (["--dry_run"], []):
        assert "above --total_epsilon 8.01" in train_here([*words, *more])
    for first in (SELECT, ["--release_means"]):
        assert "all stages would bring" in train_here([*words, *first])
    assert not Ledger(tmp_path / "run" / "private" / "ledger.jsonl").path.exists()
    (private_base / STATEMENT).unlink()
    assert '"purpose": "selection"' in train_here([*words, *SELECT])
    assert '"noise_multiplier"' in train_here([*words, "--dry_run"])


def test_what_a_run_shows_counts_its_base(private_base, image_folder, tmp_path, monkeypatch):
    told, shown = [], []
    describe, close = private_run.describe_for_trackers, _Progress.close
    monkeypatch.setattr(
        private_run, "describe_for_trackers", lambda *a: told.append(describe(*a)) or told[-1]
    )
    monkeypatch.setattr(_Progress, "close", lambda bar: shown.append(bar.epsilon) or close(bar))
    words = train_arguments(private_base, image_folder, tmp_path / "run")
    assert "saved the weights" in train_here([*words, "--report_to", "tensorboard"])
    epsilon, delta = quote_total(read_json(tmp_path / "run" / STATEMENT))
    assert epsilon > 8.05  # at most 8 are its own
    assert (told[0]["epsilon"], told[0]["delta"]) == (pytest.approx(epsilon), delta)
    assert shown == [pytest.approx(epsilon)] and f"{quote(epsilon)} at" in told[0]["cost"]


def test_a_base_and_an_adapter_add_up(private_base, adapter):
    source = find(private_base, adapter)
    base, own = read_json(private_base / STATEMENT), read_json(adapter / STATEMENT)
    epsilon, delta = quote_total(source.statement)
    assert delta == 1e-3 == min(base["delta"], own["delta"])
    assert epsilon == pld_epsilon([*base["events"], *own["events"]], 1e-3)
    assert epsilon > max(base["epsilon"]["add_or_remove_one"], own["epsilon"]["add_or_remove_one"])
    assert check_statement(source.statement) == []
    source.statement["base"]["epsilon"]["add_or_remove_one"] /= 2
    assert "it and its base" in check_statement(source.statement)[0]


@pytest.mark.parametrize("first, second", [(1e-3, 1e-4), (1e-4, 1e-3)])
def test_a_base_and_an_adapter_are_quoted_at_the_smaller_delta(first, second):
    base, own = state(delta=first), state(delta=second)
    statement = add_base(own, base)
    assert quote_total(statement)[1] == 1e-4 and check_statement(statement) == []
    epsilon = pld_epsilon([*base["events"], *own["events"]], 1e-4)
    assert quote_total(statement)[0] == epsilon
    third = add_base(state(delta=1e-3), statement)  # a base that has one itself
    assert quote_total(third)[1] == 1e-4 and len(third["base"]["events"]) == 2
    larger = pld_both_relations([*base["events"], *own["events"]], 5e-3)
    statement["base"] |= {"delta": 5e-3, "epsilon": larger}
    assert "at a larger delta" in check_statement(statement)[0]


def test_an_adapter_is_drawn_over_the_private_base_that_it_was_trained_on():
    """Else the cost of the other base would be missing; and NOT PRIVATE stays so."""
    base, other = state(), state(steps=4)
    statement = add_base(state(steps=2), base)
    assert cover_both(statement, base) == statement == cover_both(statement, None)
    with pytest.raises(UsageError, match="trained on another private base model than this one"):
        cover_both(statement, other)
    with pytest.raises(UsageError, match="or on an earlier state of it"):
        cover_both(statement, add_base(base, other))
    debug = state() | {"private": False}
    assert cover_both(statement, debug) == debug


def test_two_private_bases_of_one_recipe_are_told_apart():
    """Their events are equal, so it is the ledger's entry that says which of them was paid for."""
    one, two = (state() | {"ledger": {"run": name, "entry": name * 64}} for name in "ab")
    adapter = add_base(state(steps=2) | {"ledger": {"run": "c", "entry": "c" * 64}}, one)
    assert cover_both(adapter, one) == adapter
    with pytest.raises(UsageError, match="another private base model"):
        cover_both(adapter, two)
    deeper, other = (add_base(state(steps=5), base) for base in (one, two))  # of a base's base
    assert cover_both(add_base(state(steps=2), deeper), deeper)
    with pytest.raises(UsageError, match="another private base model"):
        cover_both(add_base(state(steps=2), deeper), other)
    drawn = PaidSet((), adapter, {}, "digest")
    drawn.check_base("--warm_start set", one)
    drawn.check_base("--reject_by set", add_base(state(), adapter))
    with pytest.raises(UsageError, match="use the same base model"):
        drawn.check_base("--warm_start set", two)


def test_a_set_is_not_finished_from_a_base_of_another_cost(private_base, tmp_path):
    """Else its first images would get the epsilon of the last."""
    settings = {"seed": 0}
    claim_folder(tmp_path / "set", settings, find(private_base))
    claim_folder(tmp_path / "set", settings, find(private_base))
    (private_base / STATEMENT).write_text(json.dumps(state(steps=1)))
    with pytest.raises(UsageError, match="had another privacy.json"):
        claim_folder(tmp_path / "set", settings, find(private_base))
    (private_base / STATEMENT).unlink()
    with pytest.raises(UsageError, match="had another privacy.json"):
        claim_folder(tmp_path / "set", settings, find(private_base))
    assert read_json(tmp_path / "set" / "sampling.json")["is_public"] is False


def test_a_set_that_was_begun_in_doubt_stays_in_doubt(tiny_base, tmp_path):
    claim_folder(tmp_path / "set", {}, ImageSource(is_public=False))
    claim_folder(tmp_path / "set", {}, ImageSource())
    assert read_json(tmp_path / "set" / "sampling.json")["is_public"] is False


@pytest.mark.parametrize(
    "base, of_statement, later, covered",
    [(3, 2, 3, False), (3, None, 5, False), (2, 2, 3, True)],
    ids=["another base", "a statement without one", "its base"],
)
def test_an_equal_event_does_not_cover_the_cost_of_a_base(
    tmp_path, monkeypatch, base, of_statement, later, covered
):
    """A set that was drawn with an adapter of 3 steps over a private base of so many, and a
    statement of that adapter and a stage after it: numbers of steps, all else being equal."""
    covers = state() | {"events": [*state()["events"], *state(steps=later)["events"]]}
    if of_statement is not None:
        covers = add_base(covers, state(steps=of_statement))
    paid = PaidSet((), add_base(state(), state(steps=base)), {}, "digest")
    monkeypatch.setattr(paid_sets, "find_paid_set", lambda *_: paid)
    about = ("set", Ledger(tmp_path / "ledger.jsonl"), covers, "--synthetic", "", "")
    if covered:
        assert find_covered_set(*about) == paid
    else:
        with pytest.raises(UsageError, match="base model|cost privacy"):
            find_covered_set(*about)


def test_what_is_trained_on_a_base_that_nobody_knows_says_so(tiny_base, image_folder, tmp_path):
    """As on a node without the Hub, where the base lies in the cache."""
    patched = "utils.ledger.bases.fetch_statement"
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patched, lambda *_: (None, False))
        assert "saved" in train_here([*arguments, "--num_validation_images", 0])
    statement = read_json(tmp_path / "run" / STATEMENT)
    assert UNKNOWN_BASE in statement["not_covered"]
    assert UNKNOWN_BASE in (tmp_path / "run" / "README.md").read_text()


def test_a_doubt_about_the_base_is_in_the_statement_of_what_is_drawn(adapter):
    """Offline, over a base of the Hub that may be another than the adapter was trained on."""
    covered, own = find("user/out_of_reach", adapter).statement, read_json(adapter / STATEMENT)
    assert UNKNOWN_BASE not in own["not_covered"]
    assert covered == own | {"not_covered": [*own["not_covered"], UNKNOWN_BASE]}


def test_weights_that_were_trained_are_no_public_base_wherever_they_are_saved(tiny_base, tmp_path):
    """As one does with a DP-LDM adapter: load its denoiser, save the pipeline; the privacy.json
    stays behind, and diffusers keeps what the configuration says."""
    save_denoiser(load_pipeline(str(tiny_base)), tmp_path / "adapter")
    denoiser = UNet2DConditionModel.from_pretrained(tmp_path / "adapter", subfolder="unet")
    pipeline = DiffusionPipeline.from_pretrained(tiny_base, unet=denoiser)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "merged")
    with pytest.raises(UsageError, match="put it beside model_index.json"):
        find(tmp_path / "merged")
    files = {f"unet/{path.name}": hash_file(path) for path in (tmp_path / "merged/unet").iterdir()}
    (tmp_path / "merged" / STATEMENT).write_text(json.dumps(told := state() | {"files": files}))
    assert find(tmp_path / "merged").statement == told


def test_a_base_that_protects_another_unit_is_refused(private_base, adapter):
    statement = state(unit_column="patient")
    (private_base / STATEMENT).write_text(json.dumps(statement))
    with pytest.raises(UsageError, match="one epsilon cannot cover"):
        find(private_base, adapter)


def test_training_on_a_private_base_adds_what_was_spent_on_it(
    private_base, image_folder, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "run"
    arguments = train_arguments(private_base, image_folder, output, "--num_validation_images", 0)
    shown = train_here(arguments)
    statement, base = read_json(output / STATEMENT), read_json(private_base / STATEMENT)
    total, delta = quote_total(statement)
    said = f"{quote(total)} at delta {delta:g} with what its private base model cost"
    assert "saved" in shown and said in shown
    assert statement["base"]["events"] == base["events"]
    together = [*base["events"], *statement["events"]]
    assert quote_total(statement)[0] == pld_epsilon(together, 1e-3)
    card = (output / "README.md").read_text()
    assert f"epsilon = {quote(total)} at delta" in card
    (code,) = [part for part in re.findall("```python\n(.*?)```", card, re.S) if "PLD" in part]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: output / STATEMENT)
    exec(code, {})
    found, _, _, at = capsys.readouterr().out.split()
    assert abs(float(found) - total) < 1e-3 and float(at) == delta
    # Another copy of the base, without its statement, changes nothing: the adapter remembers.
    (private_base / STATEMENT).unlink()
    assert find(private_base, output).statement == statement

    (private_base / STATEMENT).write_text(json.dumps(state() | {"private": False}))
    again = train_arguments(private_base, image_folder, tmp_path / "again")
    assert "stamped NOT PRIVATE" in train_here(again)
    (private_base / STATEMENT).write_text(json.dumps(state(unit_column="patient")))
    assert "cannot be added up" in train_here(again)


@pytest.mark.parametrize("doubt", [UNKNOWN_BASE, STOPPED])
def test_what_is_doubted_about_a_base_is_doubted_about_what_is_made_on_it(doubt):
    base, own = state(), state(steps=2)
    doubtful = base | {"not_covered": [*base["not_covered"], doubt]}
    assert doubt not in add_base(own, base)["not_covered"]
    for statement in (
        add_base(own, doubtful),
        cover_both(own, doubtful),
        cover_both(add_base(own, base), doubtful),  # by a statement from before that was told
    ):
        assert statement["not_covered"].count(doubt) == 1 and check_statement(statement) == []


def test_a_doubt_is_passed_on_to_what_is_made_of_the_images():
    for doubts in ([UNKNOWN_BASE], [STOPPED], []):
        paid = PaidSet((), state() | {"not_covered": doubts}, {}, "digest")
        about = Election(paid, (), (), None, None, None, None)
        about = about.describe_circumstances(SecretRandomness(), "fp32")
        assert about.is_base_known == (UNKNOWN_BASE not in doubts)
        assert about.is_stopped == (STOPPED in doubts)
