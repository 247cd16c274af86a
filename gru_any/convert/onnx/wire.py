"""How much memory a protobuf message takes once it is parsed, found without parsing it.

Two bytes of a file can be an empty message, which takes hundreds in memory. The encoding is a row
of fields: a tag with the number and the kind of the field, and its value, of which messages and
packed numbers have their length in front (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations  # protobuf's classes are known to a type checker alone

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor

# bytes of a parsed message and of any other field, in both parsers together; measured
MESSAGE, FIELD = 300, 40
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


class Span(NamedTuple):
    """A message in the content of a file."""

    start: int
    end: int
    kind: Descriptor


def parsed_size(content: bytes, kind: Descriptor, most: int) -> int:
    """Return how many bytes the message takes beside its texts and numbers, counted up to `most`.

    Raises
    ------
    ValueError
        A field has an unknown kind, or reaches beyond its message.
    """
    total, spans = 0, [Span(0, len(content), kind)]
    while spans:
        at, end, kind = spans.pop()
        while at < end:
            if total > most:
                return total
            tag, at = _varint(content, at, end)
            field: FieldDescriptor | None = kind.fields_by_number.get(tag >> 3)
            total += FIELD
            if tag & 7 == VARINT:
                _, at = _varint(content, at, end)
            elif tag & 7 in (FIXED64, FIXED32):
                at += 8 if tag & 7 == FIXED64 else 4
            elif tag & 7 == LENGTH:
                length, at = _varint(content, at, end)
                if field is not None and field.message_type is not None:
                    total += MESSAGE
                    spans.append(Span(at, min(at + length, end), field.message_type))
                elif field is not None and _is_packed_varints(field):
                    total += 8 * length
                at += length
            else:
                raise ValueError(f"a field of the unknown kind {tag & 7}")
            if at > end:
                raise ValueError("a field reaches beyond its message")
    return total


def _is_packed_varints(field: FieldDescriptor) -> bool:
    """Whether the numbers of a field may be a byte each, and 4 or 8 in memory."""
    texts = (field.TYPE_STRING, field.TYPE_BYTES)
    fixed = (field.TYPE_FLOAT, field.TYPE_DOUBLE, field.TYPE_FIXED32, field.TYPE_FIXED64)
    return field.type not in (*texts, *fixed)


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """Return the integer that begins here, 7 bits a byte, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number does not end")
