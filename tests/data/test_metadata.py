"""Image folders: rows that name a picture several times, paths, scans, and splits."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features

from tests.data.test_folders import draw, load
from utils.arguments.training import DataArguments
from utils.data.rows import read_captions
from utils.data.units import number_units
from utils.errors import UsageError


def test_an_image_that_is_named_several_times_is_a_row_each_time(tmp_path):
    """Five captions of each picture; `file_name` can be the privacy unit."""
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    lines = [
        {"file_name": name, "text": f"{name} {i}"}
        for i in range(5)
        for name in ("b.png", "./a.png")
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = load(tmp_path)
    assert rows["file_name"] == ["a.png"] * 5 + ["b.png"] * 5
    assert rows["text"][:5] == [f"./a.png {i}" for i in range(5)]
    assert number_units(rows, "file_name").tolist() == [0] * 5 + [1] * 5
    assert number_units(rows, None).tolist() == list(range(10))


def write(folder, name: str, content: str | bytes, images: int = 3) -> None:
    for index in range(images):
        draw(folder / f"{index}.png")
    content = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(content)


ROWS = "0.png,a cat\n1.png,a dog\n2.png,a cow\n"


@pytest.mark.parametrize(
    "content",
    [
        "file_name,text\n" + ROWS,
        "\ufefffile_name,text\n" + ROWS,
        "file_name, text\n" + ROWS,
        ("file_name,text\n" + ROWS).replace("\n", "\r\n"),
        'file_name,text\n0.png,"a cat"\n1.png,"a dog"\n2.png,"a cow"\n\n\n',
    ],
)
def test_csv_files_as_programs_write_them(tmp_path, content):
    write(tmp_path, "metadata.csv", content)
    assert load(tmp_path)["text"] == ["a cat", "a dog", "a cow"]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("csv", ("file_name,text\n" + ROWS).replace(",", ";"), "separated by semicolons or tabs"),
        ("csv", ("file_name,text\n" + ROWS).replace(",", "\t"), "save it with commas"),
        ("csv", "filename,text\n" + ROWS, "it has: filename, text"),
        ("csv", "File_Name,text\n" + ROWS, "it has: File_Name, text"),
        ("csv", "file_name,text,text\n0.png,a,b\n", "two columns have one name"),
        ("csv", "file_name,text, text\n0.png,a,b\n", "two columns have one name"),
        ("csv", "file_name,text\n", "names no image"),
        ("csv", "", "names no image"),
        ("csv", "file_name,text\nRöntgen.png,x\n".encode("cp1252"), "is not UTF-8 text: save it"),
        ("csv", ("file_name,text\n" + ROWS).encode("utf-16"), "is not UTF-8 text: save it"),
        ("csv", "file_name,text\n0.PNG,x\n", "did you mean 0.png"),
        ("csv", "file_name,text\n0,x\n", "did you mean 0.png"),
        ("csv", "file_name,text\n../else/0.png,x\n", "it names ../else/0.png"),
        ("jsonl", '{"file_name": "0.png"},\n', "cannot read"),
        ("jsonl", '{"file_name": "0.png"}\n\n{"file_name":', "cannot read.*: line 3: Expecting"),
        ("jsonl", '[{"file_name": "0.png"}]', "row 1 has no file_name.*it has: list"),
        ("jsonl", "{}", "it has: nothing else"),
    ],
)
def test_tables_that_are_something_else_get_a_sentence(tmp_path, name, content, sentence):
    write(tmp_path, f"metadata.{name}", content)
    with pytest.raises(UsageError, match=sentence):
        load(tmp_path)


def test_a_caption_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path):
    lines = [{"file_name": f"{i}.png", "text": f"a\u2028{i}\x85"} for i in range(3)]
    write(tmp_path, "metadata.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in lines))
    assert load(tmp_path)["text"] == [line["text"] for line in lines]


def test_two_tables_that_name_the_same_images_are_refused(tmp_path):
    """Else every picture would count twice."""
    write(tmp_path, "metadata.csv", "file_name,text\n" + ROWS)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "a cow"}\n')
    with pytest.raises(UsageError, match="name the same image, which would count twice"):
        load(tmp_path)


def test_patients_that_differ_by_spaces_alone_are_refused(tmp_path):
    """They would be two privacy units, each with its own share of one person."""
    lines = [{"file_name": f"{i}.png", "id": v} for i, v in enumerate(("7", "7 ", "8"))]
    write(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.raises(UsageError, match="1 value.s. differ from another only by spaces"):
        number_units(load(tmp_path), "id")
    lines[1]["id"] = "8 "
    lines[2]["id"] = " 8"
    write(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    with pytest.raises(UsageError, match="1 value.s. differ"):
        number_units(load(tmp_path), "id")
    for same in ("Jose\u0301", "Jos\u00e9\u200b"):
        for line, name in zip(lines, ("Jos\u00e9", same, "x\u00b2"), strict=True):
            line["id"] = name
        write(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, lines)))
        with pytest.raises(UsageError, match="how Unicode spells the same letters"):
            number_units(load(tmp_path), "id")


@pytest.mark.parametrize(
    "same",
    ["Anna\u00a0Smith", "Anna  Smith", "Anna\u3000Smith", "Anna Smith\ufe0f", "Anna\tSmith"]
    + ["An\u034fna Smith", "\uff21nna Smith", "Anna\u200b Smith", "Anna Sm\u00adith"]
    + ["Anna Smith\u3164", "Anna Smith\uffa0", "Anna\u2800 Smith"],
)
def test_a_person_is_one_however_the_name_was_typed(same):
    rows = Dataset.from_dict({"id": ["Anna Smith", same, "Anna-Smith", "AnnaSmith"]})
    with pytest.raises(UsageError, match="1 value.s. differ from another only by spaces"):
        number_units(rows, "id")
    with pytest.raises(UsageError, match="1 value"):
        number_units(Dataset.from_dict({"id": ["p-7", "p\u20117"]}), "id")
    others = Dataset.from_dict({"id": ["Anna Smith", "Anna-Smith", "AnnaSmith", "anna smith"]})
    assert number_units(others, "id").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("names", [["Ann", "Ann "], ["Jos\u00e9", "Jose\u0301"]])
def test_a_folder_a_person_is_that_persons_whatever_its_number(names):
    """Names of classes are stored as numbers: those of two spellings would be two people."""
    folders = Features({"label": ClassLabel(names=[*names, "Bob"])})
    rows = Dataset.from_dict({"label": [0, 1, 2, 1]}, folders)
    with pytest.raises(UsageError, match="1 value.s. differ from another only by spaces"):
        number_units(rows, "label")
    assert number_units(rows.select([1, 2, 3]), "label").tolist() == [0, 1, 0]
    nobody = Dataset.from_dict({"label": [0]}, Features({"label": ClassLabel(names=[" "])}))
    with pytest.raises(UsageError, match="have no value"):
        number_units(nobody, "label")


def test_a_caption_that_is_not_a_number_is_none(tmp_path):
    lines = '{"file_name": "0.png", "text": NaN}\n{"file_name": "1.png", "text": null}\n'
    write(tmp_path, "metadata.jsonl", lines, 2)
    assert list(read_captions(load(tmp_path), DataArguments(caption_column="text"))) == ["", ""]


@pytest.mark.parametrize("other", [1.5, 1.0, float("nan"), None, 3, "3", True, [4.5], ["x"]])
@pytest.mark.parametrize("values", [(1, 2), (1.0, 2.0), ([1], [2]), ("1", "2.0"), ([], ["x"])])
def test_what_one_row_says_changes_no_other_caption_or_label(tmp_path, values, other):
    """A column has one type: one person's 1.5 must not make "2.0" of another's 2."""

    def read(values) -> dict[str, list]:
        lines = [{"file_name": f"{i}.png", "about": value} for i, value in enumerate(values)]
        write(tmp_path, "metadata.jsonl", "\n".join(map(json.dumps, lines)), len(values))
        found = {}
        for name in ("caption_column", "label_column"):
            with suppress(UsageError):  # a set that is refused releases nothing
                captions = read_captions(load(tmp_path), DataArguments(**{name: "about"}))
                found[name] = list(captions[:2])
        return found

    before, after = read(values), read((*values, other))
    for name in before.keys() & after.keys():
        assert after[name] == before[name]
    if isinstance(values[0], str):
        assert before["caption_column"] == list(values)


def test_numbers_are_no_captions(tmp_path):
    for value in (7, 7.5, [7]):
        write(tmp_path, "metadata.jsonl", json.dumps({"file_name": "0.png", "text": value}))
        with pytest.raises(UsageError, match="not a text; .* or give --label_column"):
            read_captions(load(tmp_path), DataArguments(caption_column="text"))[0]


def test_a_table_decides_about_the_images_of_its_own_folder_only(tmp_path):
    """One patient's export brings a table, the others' do not: it must not be the whole set."""
    for name in ("ann/0.png", "bob/0.png", "bob/1.png"):
        draw(tmp_path / name)
    assert len(load(tmp_path)) == 3
    (tmp_path / "bob" / "metadata.csv").write_text("file_name,text\n0.png,a scan\n")
    with pytest.raises(UsageError, match="1 images, such as .*ann/0.png, are in no table"):
        load(tmp_path)
    (tmp_path / "ann" / "metadata.csv").write_text("file_name,text\n0.png,a scan\n")
    assert load(tmp_path)["text"] == ["a scan"] * 2  # its own second image is not used


@pytest.mark.parametrize("there, named", [("a.png", "a.PNG"), ("Jos\u00e9.png", "Jose\u0301.png")])
def test_names_that_look_alike_lose_no_image(tmp_path, monkeypatch, there, named):
    for name in (there, "other.png"):
        draw(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{named},a cat\nother.png,a dog\n")
    with pytest.raises(UsageError, match=f"1 images have other .*{named}, which is .*{there}: by"):
        load(tmp_path)
    monkeypatch.setattr(Path, "is_file", lambda path: True)  # as on a disk that minds no capitals
    with pytest.raises(UsageError, match="1 images have other names"):
        load(tmp_path)


def test_paths_as_windows_writes_them(tmp_path):
    (tmp_path / "sub").mkdir()
    draw(tmp_path / "sub" / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub\\a.png,a cat\n")
    assert load(tmp_path)["text"] == ["a cat"]


def test_paths_from_the_root_and_back_up_are_the_same_images(tmp_path, monkeypatch):
    scans = tmp_path / "scans"
    (scans / "sub").mkdir(parents=True)
    draw(scans / "sub" / "a.png")
    monkeypatch.chdir(tmp_path)
    for name in ("sub/a.png", f"{scans}/sub/a.png", f"{scans}/sub/../sub/a.png"):
        (scans / "metadata.csv").write_text(f"file_name,text\n{name},a cat\n")
        for folder in (
            "scans",
            "scans/sub/..",
            scans / ".." / "scans",
            f"../{tmp_path.name}/scans",
        ):
            rows = load(Path(folder))
            assert (rows["text"], rows["file_name"]) == (["a cat"], ["sub/a.png"]), (name, folder)


@pytest.mark.parametrize("names", [["1.dcm", "2.DCM"], ["1", "1.2.840.113"]])
def test_a_folder_of_scans_says_how_to_convert_them(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
    sentence = f"but 2 scans such as {names[0]}: convert .* --intensity_range"
    with pytest.raises(UsageError, match=sentence):
        load(tmp_path)


def test_one_class_alone(tmp_path):
    (tmp_path / "benign").mkdir()
    draw(tmp_path / "benign" / "a.png")
    rows = load(tmp_path)
    assert rows.features["label"].names == ["benign"] and rows["label"] == [0]


@pytest.mark.parametrize(
    "folders, split, found",
    [
        ([""], None, ""),  # flat: the only split there is
        (["test", "train"], None, "test"),
        (["val"], None, "val"),
        (["train", "val"], None, None),
        ([""], "test", None),
        (["cat", "dog"], None, ""),
    ],
)
def test_which_images_are_the_test_images(tmp_path, folders, split, found):
    for name in folders:
        (tmp_path / name).mkdir(exist_ok=True)
        draw(tmp_path / name / "a.png")
    if found is None:
        with pytest.raises(UsageError, match="split"):
            load(tmp_path, split)
    else:
        assert len(load(tmp_path, split)) == sum(1 for n in folders if n.startswith(found))
