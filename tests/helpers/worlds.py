"""Small controlled worlds."""

from __future__ import annotations

from knowledge_compression.world.generator import WorldSettings

SMALL = WorldSettings(people=24, works=12, firms=8, towns=8, countries=4, professions=6, languages=5, instruments=5,
                      genres=4, years=8)  # fmt: skip
