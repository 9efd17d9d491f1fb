"""What one thread must do at a time, so that any number of threads can ask one model.

GPyTorch's settings and torch's backends are switches of the whole process; hooks and swapped weights belong to a
network that threads share; and what a model makes when it is first asked is made once.
"""

from __future__ import annotations

import os
import threading

ONE_AT_A_TIME = threading.RLock()

if hasattr(os, "register_at_fork"):  # a child forked while another thread holds it would wait for ever
    os.register_at_fork(
        before=ONE_AT_A_TIME.acquire, after_in_parent=ONE_AT_A_TIME.release, after_in_child=ONE_AT_A_TIME.release
    )
