"""Files for ``swift rlhf --external_plugins``, in a folder of their own, since ms-swift puts it first on ``sys.path``."""
