import json

import pytest

from loki.errors import InputError
from loki.log import schema
from loki.log.schema import differences, parse_shard
from loki.log.writer import Batch


@pytest.mark.parametrize(("text", "expected"), [("1/1", (1, 1)), ("2/4", (2, 4)), ("12/12", (12, 12))])
def test_a_shard_is_two_numbers(text, expected, make_header):
    assert parse_shard(text) == expected
    assert make_header(shard=text).shard == text


@pytest.mark.parametrize(
    "text", ["", "2", "0/4", "5/4", "-1/4", "1/0", "01/4", "1/4 ", "1/4\n", "a/b", "1/2/3", "1.0/2", "²/4"]
)
def test_an_impossible_shard_is_refused(text, make_header):
    for call in (parse_shard, lambda shard: make_header(shard=shard)):
        with pytest.raises(InputError) as caught:
            call(text)
        assert str(caught.value) == f"shard {text!r} is not possible: give i/n with i from 1 to n, such as 2/4"


def test_versions_and_shard_do_not_decide_what_belongs_together(make_header):
    """Everything else does: each field of the header, changed alone, changes the identity."""
    header = make_header(num_prompts=5)
    identity = header.identity()
    assert make_header(num_prompts=5, versions={"torch": "0"}, shard="1/2").identity() == identity
    fields = set(header.as_dict()) - {"versions", "shard"}
    assert set(identity) == fields
    for field in fields:
        other = make_header(**({"num_prompts": 5} | {field: "another"}))
        assert other.identity() != identity


def test_an_identity_is_as_json_gives_it_back(make_header):
    """A tuple in the settings is a list in the file: the same settings must be found equal again."""
    identity = make_header(settings={"layers": (1, 2)}).identity()
    assert identity == json.loads(json.dumps(identity))
    assert identity["settings"] == {"layers": [1, 2]}


def test_columns_name_what_a_batch_has(make_header):
    assert [column.attribute for column in schema.COLUMNS] == list(Batch.__dataclass_fields__)
    shapes = {column.name: column.shape_in(make_header(), 7) for column in schema.COLUMNS}
    assert shapes == {"dataset": (7, 3, 5), "target_ids": (7,), "num_tokens": (7,), "completeness_gaps": (7, 3)}
    assert [column.name for column in schema.COLUMNS if column.is_large] == ["dataset"]
    assert schema.COLUMNS[0].dtype_in(make_header(dtype="float16")) == "float16"


def test_differences_are_named_with_both_values():
    found = {"a": 1, "b": {"x": 1, "y": 2, "z": 0}, "c": 3, "d": {"x": 1}}
    expected = {"a": 1, "b": {"x": 1, "y": 5, "w": 7}, "c": 4, "e": None}
    assert differences(found, expected) == (
        "b (w: None, here 7; y: 2, here 5; z: 0, here None), c (3, here 4), d ({'x': 1}, here None)"
    )
    assert differences(found, found) == ""
