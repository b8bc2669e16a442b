"""Several processes that train one model together, each computing a share of every step's pairs.

`group` says who this process is among them, and is the only place where they meet.
"""

from rmipo_lite.parallel import group

__all__ = ["group"]
