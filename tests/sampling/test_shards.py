"""Sets as parquet shards: the same images as single files, whole shards, and readable."""

import json

import pytest
from accelerate import PartialState

from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import ModelArguments
from utils.data.rows import load_split
from utils.sampling import shards
from utils.sampling.generation import generate_folder, prepare_generation
from utils.sampling.shards import Piece, plan_image_files, plan_shards, read_pieces
from utils.sampling.sources import ImageSource
from utils.sampling.synthetic_sets import collect_shards


def test_shards_hold_every_image_once_and_stay_small():
    assert plan_shards(5, 32) == [Piece("data/train-00000-of-00001.parquet", range(5))]
    pieces = plan_shards(2_501, 32)
    assert [len(piece.images) for piece in pieces] == [1_000, 1_000, 501]
    assert [i for piece in pieces for i in piece.images] == list(range(2_501))
    assert len(plan_shards(1000, 512)[0].images) * 3 * 512**2 <= 2**28
    assert len(plan_shards(3, 50_000)) == 3  # never less than one


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "IMAGES_PER_SHARD", 4)


def draw(base, folder, **changes):
    sampling = SamplingArguments(
        class_names=["0", "1", "2"], num_images=10, num_inference_steps=2, **changes
    )
    state = PartialState()
    model = ModelArguments(pretrained_model_name_or_path=str(base))
    prepared = prepare_generation(model, sampling, ImageSource(), folder, state)
    generate_folder(prepared, sampling, folder, state)


def test_shards_hold_the_images_of_single_files_and_are_made_again_if_lost(
    tiny_base, tmp_path, small_shards
):
    one_by_one, in_shards = tmp_path / "files", tmp_path / "shards"
    draw(tiny_base, one_by_one, batch_size=5)
    draw(tiny_base, in_shards, batch_size=5, output_format="parquet")
    names = [f"train-{i:05}-of-00003.parquet" for i in range(3)]
    assert sorted(path.name for path in (in_shards / "data").iterdir()) == names
    assert (in_shards / "grid.png").read_bytes() == (one_by_one / "grid.png").read_bytes()
    pieces = plan_shards(10, 16)
    expected = list(read_pieces(one_by_one, plan_image_files(10)))
    assert list(read_pieces(in_shards, pieces)) == expected

    before = {piece.name: (in_shards / piece.name).stat().st_mtime_ns for piece in pieces}
    (in_shards / pieces[1].name).unlink()
    (in_shards / "data" / "train-00001-of-00003.parquet.tmp").write_bytes(b"half of a shard")
    draw(tiny_base, in_shards, batch_size=5, output_format="parquet")
    after = {piece.name: (in_shards / piece.name).stat().st_mtime_ns for piece in pieces}
    assert [after[piece.name] == before[piece.name] for piece in pieces] == [True, False, True]
    assert list(read_pieces(in_shards, pieces))[:4] == expected[:4]

    # What lies beside the shards is not taken for images, and `datasets` reads the rows.
    (in_shards / "metrics.json").write_text(json.dumps({"accuracy": 1}))
    (in_shards / "report.html").write_text("<p>")
    rows = load_split(str(in_shards), None, None, "train", tmp_path / "cache")
    assert rows["label"] == list("0120120120") and rows[4]["text"] == "a photo of a 1"
    assert rows[9]["image"].size == (16, 16)


def test_both_forms_are_published_as_the_same_shards(tiny_base, tmp_path, small_shards):
    found = []
    for form in ("png", "parquet"):
        folder, aside = tmp_path / form, tmp_path / f"{form}_aside"
        draw(tiny_base, folder, output_format=form)
        files, count = collect_shards(folder, aside if form == "png" else None)
        assert count == 10
        found.append({name: path.read_bytes() for name, path in files.items()})
    assert found[0] == found[1] and len(found[0]) == 3
