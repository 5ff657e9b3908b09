from popsd.testing import *  # noqa: F403
