from fastweights.generation.text import TextStream


class Bytes:
    """Every byte is a token, so that characters come in parts."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def stream(text: str, *stop: str) -> tuple[TextStream, list[str]]:
    out = TextStream(Bytes(), stop)
    pieces = []
    for byte in text.encode():
        if not out.stopped:
            pieces.append(out.push(byte))
    return out, pieces


def test_a_character_appears_when_it_is_complete() -> None:
    out, pieces = stream("aé€")
    assert pieces == ["a", "", "é", "", "", "€"]
    assert out.text == "aé€"


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    out, pieces = stream("a<b<e", "<end>")
    assert pieces == ["a", "", "<b", "", ""]
    assert out.finish() == "<e"
    assert out.text == "a<b<e"


def test_a_stop_string_ends_the_text_before_it() -> None:
    out, _ = stream("one<end>two", "<end>", "never")
    assert out.stopped
    assert out.text == "one"
    assert out.finish() == ""


def test_a_broken_character_comes_out_at_the_end() -> None:
    out = TextStream(Bytes())
    assert out.push("é".encode()[0]) == ""
    assert out.finish() == "�"
