"""Run this before building a stock ``trl.DistillationTrainer``: its two-distribution loss becomes ``popsd.linear_jsd``.

Same arguments, same loss and gradients, no other change; importing this file is the whole patch.
"""

import trl.trainer.distillation_trainer as distillation_trainer

from popsd_integrations.trl_trainer.fast_jsd import chunked_divergence_loss

distillation_trainer._chunked_divergence_loss = chunked_divergence_loss
