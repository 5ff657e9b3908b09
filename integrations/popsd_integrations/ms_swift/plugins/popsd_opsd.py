"""For ``swift rlhf --external_plugins``: standard OPSD, whose target is the teacher itself. A copy may choose otherwise."""

from popsd_integrations.ms_swift import use

use(loss_target="opsd")
