"""JSON in pieces is the JSON of a whole."""

import json

import pytest

from jdkd.data import stream
from jdkd.data.stream import Unusual, read_object

LISTS = ("images", "annotations")
TEXTS = (
    "{}",
    " { } \n",
    '{"images": [], "info": {"a": [1, {"b": null}]}}',
    '{"images":[{"id":1,"name":"a]},{\\"b"},{"id":2}],"annotations":[{"box":[1.5,-2e3,3,4]}]}',
    '{"images": {"id": 1}, "annotations": "none", "x": -12.5e-3, "y": true, "z": "é\\u00e9 \\ud83d\\ude00"}',
    '{"annotations": [1, -20.25, 3e5, true, null, "x", [], [[2]], {"a": {"b": [{}]}}], "n": 12}',
    '\ufeff{"images": [\n  {"id": 1} ,\n\t{"id": 22}\r\n ] }',
)


def whole(text):
    return json.loads(text.removeprefix("\ufeff"))


def streamed(file):
    found = {}
    for name, value in read_object(file, LISTS):
        if name in found:
            found[name].append(value)
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_any_size_give_what_json_gives(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    found = streamed(tmp_path / "a.json")
    assert found == whole(text) and list(found) == list(whole(text))


@pytest.mark.parametrize("chunk", [1, 5, 2**20])
@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", '{"images": [1 2]}', '{"images": [1,]}', '{"images": [', '{"a": 1} 2', '{"a" 1}', '{"a": 1,}'),
        *('{"a": 1, "a": 2}', '{"a": 01}', "{3: 4}", '{"images": [{"id": 1}}', "{'a': 1}", '{"a": tru}'),
    ],
)
def test_anything_else_is_left_to_json(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(stream, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Unusual):
        list(read_object(tmp_path / "a.json", LISTS))
