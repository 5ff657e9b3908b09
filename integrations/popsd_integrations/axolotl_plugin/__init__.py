"""``PurifiedOPSDTrainer`` in Axolotl, by its plugins: docs/unsloth_axolotl.md. ``plugin`` imports Axolotl, ``options`` does not."""
