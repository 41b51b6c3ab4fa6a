"""What a made-up sample's row names as its conversion; a test replaces it through CONVERSIONS."""

CONVERSIONS = {}


def convert(source, out):
    """Runs the test's conversion, or puts the text into upper case."""
    return CONVERSIONS.get("tiny", upper)(source, out)


def upper(source, out):
    for path in source.rglob("*.txt"):
        (out / path.name).write_text(path.read_text().upper())
    return {"note": "upper case"}
