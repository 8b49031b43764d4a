"""Long-context attention mechanisms behind one contract.

The rooms, from the ground up: `lcattn.ops` (pure functions on arrays), `lcattn.nn` (token mixers
with a streaming state), `lcattn.models` (a decoder language model), `lcattn.tasks` (data) and
`lcattn.training` (the loop). Importing `lcattn` alone imports none of them.
"""

__version__ = "0.1.0"
