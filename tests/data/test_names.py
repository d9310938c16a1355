import os

from recontrast.data.names import escape_bytes


def test_bytes_that_are_not_utf8_are_escaped():
    assert escape_bytes("plain, grün, 良品") == "plain, grün, 良品"
    assert escape_bytes(os.fsdecode(b"a\xff\xc3\xa4\xe4.png")) == "a\\xffä\\xe4.png"
    assert escape_bytes("\ud800") == "\\ud800"
