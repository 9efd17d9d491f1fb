"""KeOps prints to standard output, as soon as GPyTorch imports it, where it is installed: ask it not to."""

import os

os.environ.setdefault("KEOPS_VERBOSE", "0")  # what keopscore says, also when it is imported
os.environ.setdefault("PYKEOPS_VERBOSE", "0")  # what pykeops says of its compiler
