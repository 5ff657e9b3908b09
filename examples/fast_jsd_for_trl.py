"""Import this before building TRL's DistillationTrainer or GKDTrainer: their loss becomes popsd's ``linear_jsd``.

Same arguments, same loss and gradients, no other change. See docs/from_gkd.md.
"""

import popsd_integrations

popsd_integrations.patch_trl()
