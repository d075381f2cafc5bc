"""reports/prose.py: long lines of a page's prose are wrapped, and nothing else of it changes."""

from reports.prose import wrap_markdown

WORDS = "word " * 30
KEPT = [f"# {WORDS}", f"| {WORDS} | {WORDS} |", f"    code {WORDS}", f"```text\n{WORDS}\n```", "- short"]
PROSE = f"{WORDS}97.0 ± 0.2 % and 1. and - and {WORDS}"


def test_long_prose_is_wrapped_and_stays_the_same_text():
    page = "\n\n".join([PROSE, f"- {WORDS}\n  goes on", *KEPT]) + "\n"
    wrapped = wrap_markdown(page)
    assert wrapped.split() == page.split() and wrap_markdown(wrapped) == wrapped
    paragraphs = wrapped.removesuffix("\n").split("\n\n")
    assert paragraphs[2:] == KEPT
    lines = [line for paragraph in paragraphs[:2] for line in paragraph.split("\n")]
    assert max(map(len, lines)) <= 120 and len(lines) > 4
    assert not [line for line in lines[1:] if line.startswith(("±", "%", "1.", "- and"))]
    assert paragraphs[1].startswith("- word") and paragraphs[1].splitlines()[1].startswith("  word")
