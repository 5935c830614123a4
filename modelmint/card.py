"""Reads a model card's front matter and recognizes the licence of a checkpoint."""

import re
from pathlib import Path
from typing import Any

from modelmint.errors import SourceError

MAX_FRONT_MATTER_BYTES = 1 << 18
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
# The first that is found in the text decides; how each licence names itself.
_TEXTS = (
    ("apache-2.0", r"apache license\s+version 2\.0"),
    ("agpl-3.0", r"gnu affero general public license\s+version 3"),
    ("lgpl-3.0", r"gnu lesser general public license\s+version 3"),
    ("gpl-3.0", r"gnu general public license\s+version 3"),
    ("gemma", r"gemma (terms|is provided under)"),
    ("llama3.3", r"llama 3\.3 community license"),
    ("llama3.2", r"llama 3\.2 community license"),
    ("llama3.1", r"llama 3\.1 community license"),
    ("llama3", r"(meta )?llama 3 community license"),
    ("llama2", r"llama 2 community license"),
    ("cc-by-nc-4.0", r"attribution-noncommercial 4\.0"),
    ("cc-by-sa-4.0", r"attribution-sharealike 4\.0"),
    ("cc-by-4.0", r"attribution 4\.0 international"),
    ("mit", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("bsd-3-clause", r"redistribution and use in source and binary forms.*neither the name"),
    ("bsd-2-clause", r"redistribution and use in source and binary forms"),
)


def front_matter(folder: Path) -> dict[str, Any]:
    """The mapping at the beginning of a checkpoint's card; empty if there is none.

    Raises:
        SourceError: if it is there and cannot be read.
    """
    # Late: what a child process imports counts.
    import yaml

    card = folder / "README.md"
    if not card.is_file():
        return {}
    text = card.read_bytes()[:MAX_FRONT_MATTER_BYTES].decode(errors="replace")
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}
    try:
        fields = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SourceError(f"README.md has front matter that is no YAML ({error}); correct it in the source") from error
    return fields if isinstance(fields, dict) else {}


def license_of(folder: Path, card: dict[str, Any]) -> str:
    """The licence as the card names it, else as a licence file shows, in lower case; empty if neither says."""
    named = card.get("license")
    names = [str(name).strip().lower() for name in (named if isinstance(named, list) else [named]) if name]
    if names == ["other"] and card.get("license_name"):
        names = [str(card["license_name"]).strip().lower()]
    if names and names != ["other"]:
        return " and ".join(names)
    for file in sorted(folder.iterdir()):
        if re.match(r"(licen[sc]e|copying)\b", file.name, re.IGNORECASE) and file.is_file():
            text = " ".join(file.read_text(errors="replace").lower().split())
            for name, pattern in _TEXTS:
                if re.search(pattern, text):
                    return name
    return names[0] if names else ""
