"""Random JSON schemas, in the keywords that requests use."""

from random import Random

_WORDS = ("name", "age", "city", "tags", "price", "unit", "done", "color", "size", "note")


def random_schema(random: Random, depth: int = 2) -> dict:
    """The schema of an object; everything in it has an end, so that a bad model comes to one."""
    made = _object(random, depth)
    if random.random() < 0.3:
        inner = made["properties"]
        made["$defs"] = {"other": _object(random, 0)}
        inner[f"more_{len(inner)}"] = {"$ref": "#/$defs/other"}
        made["required"] = list(inner)
    return made


def _object(random: Random, depth: int) -> dict:
    names = random.sample(_WORDS, random.randint(1, 3))
    properties = {name: _value(random, depth) for name in names}
    required = names if random.random() < 0.7 else names[:1]
    closed = {"type": "object", "properties": properties, "required": required}
    return {**closed, "additionalProperties": False}


def _value(random: Random, depth: int) -> dict:
    low = random.randint(-50, 50)
    leaves = [
        {"enum": ["red", "green", "dark blue", 4, None][: random.randint(1, 5)]},
        {"const": random.choice(["yes", 7, True, [1, 2]])},
        {"type": "boolean"},
        {"type": ["null", "boolean"]},
        {"type": "integer", "minimum": low, "maximum": low + random.randint(0, 2000)},
        {"type": "string", "maxLength": random.randint(1, 12)},
        {"type": "string", "minLength": 2, "maxLength": 4},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
        {"type": "string", "format": "date"},
    ]
    if depth == 0 or random.random() < 0.5:
        return random.choice(leaves)
    shapes = [
        lambda: _object(random, depth - 1),
        lambda: {"anyOf": [_value(random, depth - 1), {"type": "null"}]},
        lambda: {
            "type": "array",
            "items": _value(random, depth - 1),
            "minItems": random.randint(0, 2),
            "maxItems": random.randint(2, 4),
        },
    ]
    return random.choice(shapes)()
