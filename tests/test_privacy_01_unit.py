"""Clause 1: the unit is one row, or all rows that share a value; epsilon under both relations."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import build_tiny_pipeline, read_json
from tests.worlds import TAIL, build_plan
from utils.arguments.training import DataArguments, PrivacyArguments, TrainingArguments
from utils.data.images import ImageRows, find_readable_rows
from utils.data.latents import (
    EncodedUnits,
    Objective,
    encode_units,
    group_rows_by_unit,
    unit_losses,
)
from utils.data.private_set import PrivateSet, load_private_set
from utils.data.rows import load_rows, load_split
from utils.data.units import number_units, warn_of_similar_units
from utils.errors import UsageError
from utils.ledger.statement import Circumstances, build_statement
from utils.methods.planning import load_private_rows, preview, reserve
from utils.models.families import find_family
from utils.privacy.accounting import REPLACE_ONE, account, pld_epsilon
from utils.privacy.randomness import SecretRandomness


def encoded(sizes: list[int], shuffle_seed: int = 0) -> EncodedUnits:
    """Units of the given sizes, in random order; the latent of a row is the number of its unit."""
    unit_of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    generator = torch.Generator().manual_seed(shuffle_seed)
    unit_of_row = unit_of_row[torch.randperm(len(unit_of_row), generator=generator)]
    latents, captions = unit_of_row.float()[:, None, None, None, None], [""] * len(unit_of_row)
    return EncodedUnits(16, latents, captions, None, None, *group_rows_by_unit(unit_of_row))


def test_rows_are_units_unless_a_column_says_otherwise():
    rows = Dataset.from_dict({"patient": ["b", "a", "b", "c", "a", "b"]})
    assert number_units(rows, None).tolist() == [0, 1, 2, 3, 4, 5]
    assert number_units(rows, "patient").tolist() == [0, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("values", [[7, 3, 7, 7], ["b", "a", "b", "b"]])
def test_the_format_of_a_dataset_makes_no_more_units(tmp_path, kind, values):
    """Tensors are equal to nothing but themselves: each row would be a unit of its own."""
    rows = Dataset.from_dict({"patient": values, "image": [0] * 4}).with_format(kind)
    assert number_units(rows, "patient").tolist() == [0, 1, 0, 0]
    rows.with_format(kind, columns=["image"]).save_to_disk(tmp_path / "saved")
    loaded = load_split(str(tmp_path / "saved"), None, None, "train")
    assert loaded.format["type"] is None and loaded["patient"] == values
    assert number_units(loaded, "patient").tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "hole",
    [None, "", " ", "\u200b", float("nan"), "nan", "NaN", "NA", "N/A", "n.a.", "#N/A", "<NA>"]
    + ["NULL", "None", "NaT", "-", "--", "?", "-1", "-1.0", "Unknown", "(unknown)", "ANONYMOUS"],
)
def test_rows_that_nobody_owns_are_refused(hole):
    values = [1.0, hole, 2.0] if isinstance(hole, float) else ["1", hole, "2"]
    with pytest.raises(UsageError, match="1 row.s. have no value"):
        number_units(Dataset.from_dict({"patient": values}), "patient")
    with pytest.raises(UsageError, match="the columns are patient"):
        number_units(Dataset.from_dict({"patient": values}), "user")


def test_names_that_only_look_like_none_are_names():
    names = ["Nadia", "Nan Goldin", "N. A. Smith", "1", "01", "anonymous 7", "\U0001f600", "0"]
    rows = Dataset.from_dict({"patient": names})
    assert number_units(rows, "patient").tolist() == list(range(len(names)))


@pytest.mark.parametrize(
    "other, said", [("p07", 1), ("P7", 1), ("p7.0", 0), ("p70", 0), ("7.0", 1), ("07", 1), ("8", 0)]
)
def test_units_that_may_be_one_are_spoken_of(capsys, other, said):
    warn_of_similar_units(rows := Dataset.from_dict({"patient": ["p7", "7", other]}), "patient")
    assert capsys.readouterr().err.count("differ from another only by capitals or zeros") == said
    assert number_units(rows, "patient").tolist() == [0, 1, 2]


def test_a_class_that_is_missing_is_nobody():
    """`datasets` keeps a missing class as -1, which would be a unit of many people's rows."""
    names = Features({"patient": ClassLabel(names=["ann", "bob"])})
    for features in (names, None):
        rows = Dataset.from_dict({"patient": [0, -1, 1, -1]}, features=features)
        with pytest.raises(UsageError, match="2 row.s. have no value"):
            number_units(rows, "patient")


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    draws=st.integers(1, 6),
    seed=st.integers(0, 50),
)
def test_a_unit_samples_its_rows_only_and_distinct_if_it_can(sizes, draws, seed):
    units = encoded(sizes, seed)
    wanted = torch.arange(len(sizes))
    rows = units.sample_rows(wanted, draws, SecretRandomness())
    assert rows.shape == (len(sizes), draws)
    assert (units.latents[rows].flatten(1) == wanted[:, None]).all()
    for unit, size in enumerate(sizes):
        assert len(set(rows[unit].tolist())) == min(draws, size)


def test_every_row_of_a_unit_is_equally_likely():
    units, repeats = encoded([1, 7, 50]), 20_000
    rows = units.sample_rows(torch.full((repeats,), 2), 3, SecretRandomness())
    counts = rows.flatten().bincount(minlength=58).double()[units.latents.flatten() == 2]
    share = 3 / 50
    deviation = (repeats * share * (1 - share)) ** 0.5
    assert (counts - repeats * share).abs().max() < TAIL * deviation


def spoilt_units(image_folder, tmp_path, what: str = "images") -> list[int]:
    """The units, of 5 of unlike sizes, whose loss is spoilt when what is unit 2's is spoilt."""
    pipeline = build_tiny_pipeline()
    pipeline.text_encoder.requires_grad_(False)
    rows = load_split(None, None, str(image_folder), "train", tmp_path)
    unit_of_row = torch.tensor([0, 2, 1, 3, 3, 2, 4, 3, 1, 2] * 4)
    captions = ["the digit 8" if unit == 2 else "the digit 1" for unit in unit_of_row]
    if what == "captions of a trained encoder":
        words = pipeline.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    private_set = PrivateSet(
        rows, "image", captions, unit_of_row, {}, find_readable_rows(ImageRows(rows)).digests
    )
    units, _ = encode_units(pipeline, private_set, 16, tmp_path / "latents")
    if what == "images":
        units.latents[unit_of_row == 2] = float("nan")
    elif what == "captions":
        words = units.text["encoder_hidden_states"]
        words[units.caption_rows[unit_of_row == 2].long()] = float("nan")
    else:  # spoil the one word that only unit 2 uses
        own, others = find_family(pipeline).tokenize(["the digit 8", "the digit 1"])[0]
        word = own[own != others]
        assert len(word) == 1
        words.data[word.long()] = float("nan")
    losses = unit_losses(pipeline, units, torch.arange(5), Objective(6), SecretRandomness())
    return (~losses.isfinite()).nonzero().flatten().tolist()


@pytest.mark.parametrize("what", ["images", "captions", "captions of a trained encoder"])
def test_a_units_loss_depends_on_the_rows_of_that_unit_only(image_folder, tmp_path, what):
    """One clip a unit bounds its influence only if its rows reach no other unit's gradient."""
    assert spoilt_units(image_folder, tmp_path, what) == [2]


def test_rows_that_reach_another_unit_are_caught(image_folder, tmp_path, monkeypatch):
    def off_by_one_unit(*arguments):
        order, first, count = group_rows_by_unit(*arguments)
        return order, first.roll(1), count

    monkeypatch.setattr("utils.data.latents.group_rows_by_unit", off_by_one_unit)
    assert spoilt_units(image_folder, tmp_path) != [2]


def test_epsilon_is_for_units_and_says_which():
    plan = build_plan(num_units=500, expected_batch_size=50, steps=10, unit_column="patient_id")
    spent = account([plan.event()], plan.delta)
    statement = build_statement(plan, [plan.event()], spent, Circumstances())
    assert statement["num_units"] == 500
    assert statement["privacy_unit"] == "all images of one patient_id"
    assert statement["max_rows_per_unit"] is None
    epsilon = statement["epsilon"]
    assert epsilon["replace_one"] == pld_epsilon([plan.event()], 1e-4, REPLACE_ONE)
    assert epsilon["replace_one"] > epsilon["add_or_remove_one"] > 0


def test_a_unit_whose_images_cannot_be_read_counts_like_any_other(accelerator, tmp_path):
    """Eleven rows of four patients; the only image of one of them is damaged. Were N of those that
    can be read, what is chosen by the number of those named would depend on an image."""
    folder, lines = tmp_path / "images", []
    folder.mkdir()
    for index, patient in enumerate("aabbbbccccd"):
        name = f"{index}.png"
        Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": "a scan", "patient": patient}))
    (folder / "10.png").write_bytes(b"this is no image")
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = DataArguments(
        train_data_dir=str(folder), caption_column="text", privacy_unit_column="patient"
    )
    training = TrainingArguments(output_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "private").mkdir(parents=True)

    found = load_private_rows(accelerator, data, training)
    plan = build_plan(num_units=4, expected_batch_size=2, unit_column="patient")
    asked = (found, PrivacyArguments(), training)
    private_set, _ = reserve(*asked, 16, {}, Circumstances(), plan)
    assert preview(*asked, 16, Circumstances(), plan) == private_set.left_out
    assert found.num_units == private_set.num_units == 4 and private_set.without_image == 1
    assert read_json(tmp_path / "run" / "private" / "data.json")["units_without_image"] == 1
    assert private_set.left_out == {"unreadable": 1}
    assert len(private_set.captions) == 10


def test_another_image_caption_or_unit_makes_another_set(tmp_path):
    """What a run that is resumed is told by."""

    def digest(colour: int = 0, **changes) -> str:
        rows = [{"file_name": f"{i}.png", "text": f"{i}", "of": f"{i}"} for i in range(3)]
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(tmp_path / "2.png")
        lines = [json.dumps(row) for row in (*rows[:2], rows[2] | changes)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        data = DataArguments(
            train_data_dir=str(tmp_path), caption_column="text", privacy_unit_column="of"
        )
        return load_private_set(load_rows(data), data).digest

    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    found = {digest(), digest(9), digest(text="other"), digest(of="0")}
    assert len(found) == 4 and digest() in found


def test_processes_that_read_different_rows_stop(image_folder, tmp_path, monkeypatch):
    """An index would mean one unit here and another there, so that one unit could count twice."""
    rows = load_split(None, None, str(image_folder), "train", tmp_path / "cache")
    data = DataArguments(label_column="label", caption_template="the digit {label}")
    assert load_private_set(rows, data).num_units == 40
    monkeypatch.setattr(
        "utils.data.private_set.gather_object", lambda mine: [*mine, "something else"]
    )
    with pytest.raises(UsageError, match="different data"):
        load_private_set(rows, data)
