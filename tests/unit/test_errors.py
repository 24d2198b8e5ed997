import pytest

from ssd_jax.errors import MAX_MESSAGE, CheckpointError, shortened, shown
from ssd_jax.json_files import read_json_object


def test_a_message_shows_what_a_terminal_would_obey():
    message = str(CheckpointError("got \x1b[2J\r\x9b and \udc80, \u202e but é and 猫"))
    assert message == r"got \x1b[2J\r\x9b and \udc80, \u202e but é and 猫"


@pytest.mark.parametrize("text", ["\x1b" * 10**6, "a" * 10**7])
def test_nothing_makes_a_message_long(text):
    assert len(str(CheckpointError(text))) <= MAX_MESSAGE
    assert len(shortened(text, 80)) <= 80
    assert len(shown(text)) <= 80


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"b": {"a": 1, "c": 0, "a": true, "a": 2}}'])
def test_a_field_with_two_values_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match="the field 'a' stands there twice"):
        read_json_object(tmp_path / "x.json")


def test_a_field_may_stand_twice_with_one_value(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1], "b": 2, "a": [1]}')
    assert read_json_object(tmp_path / "x.json") == {"a": [1], "b": 2}
