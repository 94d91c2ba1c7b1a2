"""Clause 9: an epsilon is credited to images only after its statement was verified."""

import json
import shutil

import pytest
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from tests.conftest import read_json, train_arguments, train_here
from tests.worlds import build_plan
from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import ModelArguments
from utils.errors import UsageError
from utils.files import STATEMENT
from utils.ledger.checks import check_statement
from utils.ledger.ledger import Ledger
from utils.ledger.statement import Circumstances, add_base, build_statement, quote_total
from utils.privacy.accounting import account, pld_both_relations, pld_epsilon
from utils.sampling import paid_sets
from utils.sampling.generation import claim_folder, prepare_generation
from utils.sampling.paid_sets import PaidSet, find_covered_set
from utils.sampling.sources import ImageSource, cover_both, find_source, require_statement
from utils.sampling.synthetic_sets import read_privacy


@pytest.fixture(scope="module")
def adapter(tiny_base, image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapter") / "run"
    assert "saved" in train_here(train_arguments(tiny_base, image_folder, output))
    return output


@pytest.fixture
def copied(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "adapter")


def state(**changes) -> dict:
    """A statement that holds by itself."""
    plan = build_plan(**{"num_units": 500, "steps": 3, "delta": 1e-3} | changes)
    about = Circumstances(randomness="a test")
    made = build_statement(plan, plan.events(), account(plan.events(), plan.delta), about)
    return json.loads(json.dumps(made | {"files": {}}))


@pytest.fixture
def private_base(tiny_base, tmp_path):
    """A base model that is a private result itself."""
    base = shutil.copytree(tiny_base, tmp_path / "private_base")
    (base / STATEMENT).write_text(json.dumps(state()))
    return base


def find(base, adapter=None):
    model = ModelArguments(pretrained_model_name_or_path=str(base))
    return find_source(model, SamplingArguments(adapter=adapter and str(adapter)))


def change_statement(folder, change) -> None:
    statement = read_json(folder / STATEMENT)
    change(statement)
    (folder / STATEMENT).write_text(json.dumps(statement))


def test_an_adapter_brings_its_verified_statement(tiny_base, adapter):
    source = find(tiny_base, adapter)
    assert source.statement == read_json(adapter / STATEMENT) and not source.is_public
    require_statement(source)


TAMPERED = {
    "epsilon": lambda s: s["epsilon"].update(add_or_remove_one=0.1),
    "weights": lambda s: s["files"].update({"pytorch_lora_weights.safetensors": "0" * 64}),
    "power": lambda s: s["membership_inference"].update({"0.01": 0.011}),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_statement_that_does_not_hold_is_refused(tiny_base, copied, what, tmp_path, run_script):
    change_statement(copied, TAMPERED[what])
    with pytest.raises(UsageError, match="--adapter"):
        find(tiny_base, copied)
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--adapter", copied]
    arguments += ["--prompts", "a", "--output_dir", tmp_path / "images"]
    if what == "epsilon":
        run = run_script("sample.py", *arguments)
        assert run.returncode == 2 and "come to" in run.stderr
        assert not (tmp_path / "images").exists()


def test_an_adapter_without_a_statement_is_of_unknown_privacy(tiny_base, copied, capsys):
    (copied / STATEMENT).unlink()
    source = find(tiny_base, copied)
    assert source.statement is None and not source.is_public
    assert "nobody can tell" in capsys.readouterr().err
    with pytest.raises(UsageError, match="has no privacy.json"):
        require_statement(source)


def test_no_adapter_is_public_only_if_the_base_is(tiny_base, private_base):
    assert find(tiny_base).is_public and find(tiny_base).statement is None
    source = find(private_base)
    assert not source.is_public and source.statement == read_json(private_base / STATEMENT)
    assert not find("user/out_of_reach").is_public  # nobody knows: there is no network here


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


def test_an_adapter_that_is_replaced_while_it_is_loaded_is_refused(
    tiny_base, copied, tmp_path, accelerator
):
    """What was verified is what generates."""
    source, folder = find(tiny_base, copied), tmp_path / "images"
    weights = copied / "pytorch_lora_weights.safetensors"
    save_file({k: 2 * v for k, v in load_file(weights).items()}, weights)
    model = ModelArguments(pretrained_model_name_or_path=str(tiny_base))
    sampling = SamplingArguments(adapter=str(copied), prompts=["a"])
    with pytest.raises(UsageError, match="changed while it was loaded"):
        prepare_generation(model, sampling, source, folder, PartialState())
    assert not folder.exists()


@pytest.mark.parametrize("text", ["[]", '{"private": true}', '{"schema_version": 2, "private": 1}'])
def test_a_malformed_statement_gets_a_sentence(tiny_base, copied, tmp_path, text):
    for folder in (copied, tmp_path):
        (folder / STATEMENT).write_text(text)
    with pytest.raises(UsageError):
        find(tiny_base, copied)
    with pytest.raises(UsageError):
        find(tmp_path)
    with pytest.raises(UsageError):
        read_privacy(str(tmp_path), None)


def test_a_base_that_protects_another_unit_is_refused(private_base, adapter):
    statement = state(unit_column="patient")
    (private_base / STATEMENT).write_text(json.dumps(statement))
    with pytest.raises(UsageError, match="one epsilon cannot cover"):
        find(private_base, adapter)


def test_training_on_a_private_base_adds_what_was_spent_on_it(private_base, image_folder, tmp_path):
    output = tmp_path / "run"
    arguments = train_arguments(private_base, image_folder, output, "--num_validation_images", 0)
    shown = train_here(arguments)
    statement, base = read_json(output / STATEMENT), read_json(private_base / STATEMENT)
    total, delta = quote_total(statement)
    said = f"{total:.3f} at delta {delta:g} with what its private base model cost"
    assert "saved" in shown and said in shown
    assert statement["base"]["events"] == base["events"]
    together = [*base["events"], *statement["events"]]
    assert quote_total(statement)[0] == pld_epsilon(together, 1e-3)
    card = (output / "README.md").read_text()
    assert f"epsilon = {quote_total(statement)[0]:.3f} at delta" in card
    # Another copy of the base, without its statement, changes nothing: the adapter remembers.
    (private_base / STATEMENT).unlink()
    assert find(private_base, output).statement == statement

    (private_base / STATEMENT).write_text(json.dumps(state() | {"private": False}))
    again = train_arguments(private_base, image_folder, tmp_path / "again")
    assert "stamped NOT PRIVATE" in train_here(again)
    (private_base / STATEMENT).write_text(json.dumps(state(unit_column="patient")))
    assert "cannot be added up" in train_here(again)


@pytest.mark.slow
def test_a_set_brings_the_epsilon_that_was_verified(
    private_base, adapter, tmp_path, run_script, tiny_base
):
    arguments = ["--prompts", "a", "--num_images", 2, "--num_inference_steps", 1]
    for name, base, more in (
        ("both", private_base, ["--adapter", adapter]),
        ("base", private_base, []),
        ("public", tiny_base, []),
    ):
        images = ["--output_dir", tmp_path / name, "--pretrained_model_name_or_path", base]
        run = run_script("sample.py", *arguments, *images, *more)
        assert run.returncode == 0, run.stderr
    expected = {"both": find(private_base, adapter), "base": find(private_base)}
    for name, source in expected.items():
        statement, entry = read_privacy(str(tmp_path / name), None)
        assert statement == source.statement
        assert entry["epsilon"]["value"] == quote_total(statement)[0] > 0
    assert read_privacy(str(tmp_path / "public"), None)[1]["epsilon"]["value"] == 0
    # A record that does not say so, and a statement about other weights, prove nothing.
    settings = read_json(tmp_path / "public" / "sampling.json")
    del settings["is_public"]
    (tmp_path / "public" / "sampling.json").write_text(json.dumps(settings))
    assert read_privacy(str(tmp_path / "public"), None) == (None, {})
    change_statement(tmp_path / "both", TAMPERED["weights"])
    with pytest.raises(UsageError, match="about other weights"):
        read_privacy(str(tmp_path / "both"), None)


def test_what_is_stamped_not_private_brings_no_epsilon(tiny_base, copied, tmp_path):
    """Also if someone wrote a number beside the stamp, or broke the stamp off."""
    change_statement(copied, lambda s: s.update(private=False, warning="NOT PRIVATE"))
    source = find(tiny_base, copied)
    assert source.statement["private"] is False
    with pytest.raises(UsageError, match="stamped NOT PRIVATE"):
        require_statement(source)
    shutil.copy(copied / STATEMENT, tmp_path / STATEMENT)
    assert read_privacy(str(tmp_path), None)[1]["epsilon"]["value"] is None
    for change in (lambda s: s.pop("private"), lambda s: s.update(private="yes")):
        change_statement(copied, change)
        with pytest.raises(UsageError, match="--adapter"):
            find(tiny_base, copied)


def test_a_statement_names_its_circumstances(adapter):
    statement = read_json(adapter / STATEMENT)
    assert statement["schema_version"] == 2 and statement["made_by"]["version"]
    assert "operating system" in statement["randomness"] and statement["precision"] == "fp32"
    assert len(statement["date"]) == 10 and statement["audit"] is None
