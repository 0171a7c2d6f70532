"""Text from elsewhere as a terminal may show it: what would move the cursor or forge a line is escaped."""

import unicodedata

ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, invisible marks that reorder text, surrogates, line separators


def visible(text: str, keep: str = "") -> str:
    """The text with control characters written as escapes (\\x1b, \\u2028), but for those to `keep`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in ESCAPED else escape(c) for c in text)


def escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
