"""For ``swift rlhf --external_plugins``: the purified target with the paper's numbers. A copy may choose others."""

from popsd_integrations.ms_swift import use

use(loss_target="purified", pmi_beta=1.0, pmi_clip=10.0)
