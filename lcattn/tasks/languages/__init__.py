"""In-context language learning: strings of a random automaton that no other row shares."""

from lcattn.tasks.languages.automata import AutomataConfig, minimal, random_automata
from lcattn.tasks.languages.backoff import backoff_laws
from lcattn.tasks.languages.instances import Languages, LanguagesConfig

__all__ = [
    "AutomataConfig",
    "Languages",
    "LanguagesConfig",
    "backoff_laws",
    "minimal",
    "random_automata",
]
