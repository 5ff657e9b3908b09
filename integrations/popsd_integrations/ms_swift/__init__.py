"""OPSD and purified OPSD in ms-swift's ``swift rlhf --rlhf_type gkd``, with the loss from hidden states: docs/ms_swift.md.

``use`` is what a plugin file calls. The trainer itself imports ms-swift, and is imported by ms-swift alone.
"""

from popsd_integrations.ms_swift.options import Options, use

__all__ = ["Options", "use"]
