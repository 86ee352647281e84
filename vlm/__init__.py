"""Vision-language models: not built yet; nothing is registered here."""

ENTRIES: dict[str, dict[str, str]] = {}
