"""popsd's TRL trainer in Axolotl: docs/unsloth_axolotl.md. ``plugin`` imports Axolotl, ``options`` does not."""
