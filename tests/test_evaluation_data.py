"""Test sets of examples/evaluate.py: what is read, what each row has to make, and what there is to judge."""

import json
from pathlib import Path

import pytest
from muse_examples.evaluation.data import (
    Content,
    plan,
    read_contents,
    read_pairs,
    shown_elsewhere,
    shown_of,
)
from muse_examples.runs import save_picture
from PIL import Image


IMAGES = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(20)]
COCO = {
    "info": {},
    "images": IMAGES,
    "annotations": [
        {"id": 2 * image["id"] + k, "image_id": image["id"], "caption": f" caption {k}\nof {image['id']}. "}
        for image in IMAGES
        for k in range(2)
    ],
}
EMOTIONS = ["awe", "fear"]


def write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "teal").save(path)
    return path


def test_coco_gives_one_caption_of_each_image_in_an_order_of_the_seed(tmp_path):
    path = write(tmp_path / "captions.json", COCO)
    prompts = [content.prompt for content in read_contents(path)]
    assert sorted(int(prompt.split()[-1][:-1]) for prompt in prompts) == list(range(20))
    assert {prompt.split()[1] for prompt in prompts} == {"0", "1"}  # not the first caption of each
    assert all("\n" not in prompt and prompt.strip() == prompt for prompt in prompts)
    assert prompts == [content.prompt for content in read_contents(path)]
    assert prompts != [content.prompt for content in read_contents(path, seed=1)]


def test_the_elements_of_emoctrl_are_named_as_its_authors_do(tmp_path):
    data = {"element": ["beach", "cake", "cake"], "caption": ["A cat on the floor."]}
    contents = read_contents(write(tmp_path / "test_data.json", data))
    assert contents == [
        Content("a photo of a beach", element=True),
        Content("a photo of a cake", element=True),
        Content("A cat on the floor."),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "# what\na boat\n\na house\n"),
        ("a.jsonl", '{"prompt": "a boat"}\n{"text": "a house"}\n'),
        ("a.json", '["a boat", {"captions": ["a house"]}]'),
    ],
)
def test_captions_are_read_from_every_usual_kind_of_file(tmp_path, name, text):
    assert read_contents(write(tmp_path / name, text)) == [Content("a boat"), Content("a house")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"captions": 1}', "neither COCO's nor EmoCtrl's"),
        ("a.txt", "# nothing\n", "holds no captions"),
        ("a.jsonl", '{"file_name": "a.png"}', "without a caption"),
    ],
)
def test_files_without_captions_are_refused_by_name(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_contents(write(tmp_path / name, text))
    assert name in str(error.value)


@pytest.mark.parametrize("kind", ["coco", "list", "metadata", "texts"])
def test_pictures_find_their_captions(tmp_path, kind):
    folder = tmp_path / "pictures"
    paths = [picture(folder / image["file_name"]) for image in IMAGES[:3]]
    captions = None
    if kind == "coco":
        captions = write(tmp_path / "coco.json", COCO)
    elif kind == "list":
        write(
            folder / "captions.json",
            [{"file": path.name, "captions": [f"caption 0 of {path.name}"]} for path in paths],
        )
    elif kind == "metadata":
        lines = [json.dumps({"file_name": path.name, "text": "caption 1"}) for path in paths]
        write(folder / "metadata.jsonl", "\n".join(lines))
    else:
        for path in paths[1:]:
            write(path.with_suffix(".txt"), "caption\nof it\n")
    pairs = read_pairs(folder, captions)
    assert {pair.source for pair in pairs} == set(paths[1:] if kind == "texts" else paths)
    assert all(pair.prompt.startswith("caption") and "\n" not in pair.prompt for pair in pairs)
    assert pairs == read_pairs(folder, captions)


def test_pictures_without_captions_are_refused(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no picture with a caption"):
        read_pairs(tmp_path)


def test_each_content_is_made_with_every_emotion_from_one_seed():
    cases = plan([Content("a boat"), Content("a house")], EMOTIONS, per_emotion=3, seed=7)
    assert [(case.prompt, case.emotion, case.seed) for case in cases] == [
        ("a boat", "awe", 7),
        ("a boat", "fear", 7),
        ("a house", "awe", 8),
        ("a house", "fear", 8),
        ("a boat", "awe", 9),
        ("a boat", "fear", 9),
    ]
    assert [case.content for case in cases] == [0, 0, 1, 1, 0, 0]
    assert len({case.file_name for case in cases}) == 6
    assert len(plan([Content("a boat"), Content("a house")], EMOTIONS, None)) == 4
    assert len(plan([Content("a boat"), Content("a house")], EMOTIONS, 1)) == 2


def test_what_a_row_has_made_is_judged_with_what_was_asked(tmp_path):
    cases = plan([Content("a photo of a cake", tmp_path / "source.png", element=True)], EMOTIONS, None)
    save_picture(Image.new("RGB", (8, 8)), {"file": cases[1].file_name, "seconds": 2.0}, tmp_path)
    (shown,) = shown_of(cases, tmp_path)
    assert (shown.path.name, shown.emotion, shown.prompt) == (cases[1].file_name, "fear", "a photo of a cake")
    assert (shown.source, shown.content, shown.element) == (tmp_path / "source.png", 0, True)
    assert shown.record["seconds"] == 2.0


def test_foreign_pictures_are_known_by_record_name_or_folder(tmp_path):
    cases = plan(
        [Content("a boat", tmp_path / "boat.png"), Content("a house", tmp_path / "house.png")], EMOTIONS, None
    )
    folder = tmp_path / "other"
    picture(folder / "fear" / "17.png")
    picture(folder / "00001_awe.jpg")
    picture(folder / "nothing.png")
    picture(folder / "b" / "x.png")
    write(folder / "b" / "metadata.jsonl", json.dumps({"file": "x.png", "emotion": "awe", "prompt": "a boat"}) + "\n")
    found = {shown.path.name: shown for shown in shown_elsewhere(folder, cases, EMOTIONS)}
    assert {name: (shown.emotion, shown.prompt, shown.source) for name, shown in found.items()} == {
        "17.png": ("fear", None, None),
        "00001_awe.jpg": ("awe", "a house", tmp_path / "house.png"),
        "x.png": ("awe", "a boat", tmp_path / "boat.png"),
    }
    assert found["x.png"].content == 0
    twins = plan([Content("a boat", tmp_path / "1.png"), Content("a boat", tmp_path / "2.png")], EMOTIONS, None)
    record = {"file": picture(folder / "z.png").name, "emotion": "awe", "prompt": "a boat", "source": "1.png"}
    write(folder / "metadata.jsonl", json.dumps(record) + "\n")
    (edit,) = (one for one in shown_elsewhere(folder, twins, EMOTIONS) if one.path.name == "z.png")
    assert edit.source == tmp_path / "1.png", "two sources may have one caption"
    with pytest.raises(ValueError, match="Of no picture"):
        shown_elsewhere(folder, cases, ["disgust"])
