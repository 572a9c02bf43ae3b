"""Filling `{placeholder}` templates of a checkpoint without `str.format`, which would follow attributes."""

import string
from collections.abc import Mapping

from dsv4.errors import CheckpointError
from dsv4.text.segments import SegmentList


def fill(template: str, name: str, trusted: Mapping[str, str], untrusted: Mapping[str, str]) -> SegmentList:
    """Replace `{field}` by its value; `{{` and `}}` are braces, as in str.format.

    template   text of a module constant of encoding_dsv4.py; its own words are trusted
    name       the constant's name, for messages
    trusted    values written by us (token texts); any of them may be absent from the template
    untrusted  values written by a client; every one of them must occur, or the request would be lost silently
    Raises CheckpointError for broken braces, an unknown field, a field with an attribute, index, conversion or format
    spec, and a missing field.
    """
    out = SegmentList()
    missing = set(untrusted)
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise CheckpointError(f"{name}: not a template ({error}); literal braces are written twice") from error
    for text, field, spec, conversion in pieces:
        out.trusted(text)
        if field is None:
            continue
        if spec or conversion or (field not in trusted and field not in untrusted):
            allowed = ", ".join(f"{{{key}}}" for key in (*trusted, *untrusted))
            raise CheckpointError(f"{name}: placeholder {{{field}}} found, only {allowed} can be filled")
        if field in untrusted:
            out.untrusted(untrusted[field])
            missing.discard(field)
        else:
            out.trusted(trusted[field])
    if missing:
        raise CheckpointError(f"{name}: no placeholder {{{sorted(missing)[0]}}} in the template of this checkpoint")
    return out
