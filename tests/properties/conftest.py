"""How many examples: `HYPOTHESIS_PROFILE=nightly` draws 10,000 new ones in all, `test` the same 300 in each run."""

import os

from hypothesis import HealthCheck, Phase, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("nightly", max_examples=10_000, derandomize=False, print_blob=True, **COMMON)
settings.register_profile("test", max_examples=300, derandomize=True, phases=[Phase.explicit, Phase.generate], **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "test"))
